"""The loss around a model's weights W: L(W + d) and its gradient at any d. The model is restored afterwards.

W are the quantized weights as the model holds them, Q(w) and not w, because rounding would undo d. Every evaluation
uses the same buffers and the same random numbers (dropout), so that only d makes a difference.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsam.coverage import coverage_of
from qsam.distributed import is_sharded
from qsam.functional import wide_dtype
from qsam.inputs import frozen
from qsam.latents import Latents, own_parameters
from qsam.layers import unwrap_model
from qsam.optim import QuantizedOptimizer
from qsam.optim.snapshot import RandomState, buffers_kept, same_random_numbers

Subject = QuantizedOptimizer | nn.Module
"""A qsam optimizer, or a model, whose weights are those with a quantizer if it is quantized."""

Closure = Callable[[], Any]
Progress = bool | Callable[[int, int], object] | None
"""None: a bar on a terminal if tqdm is there; True: always; False: never; or a function that gets (done, total)."""


class Probe:
    """L(W + d) for flat vectors d over all entries of W, the Parameters ``weights``; ``tick`` moves a progress bar."""

    def __init__(
        self, root: nn.Module, weights: list[nn.Parameter], closure: Closure, tick: Callable[[], object]
    ) -> None:
        self.root, self.weights, self.closure, self.tick = root, weights, closure, tick
        self.start = [p.detach().clone() for p in weights]
        self.sizes = [p.numel() for p in weights]
        self.random = RandomState.now()

    def zeros(self) -> Tensor:
        """Return d = 0, in fp32 (fp64 if a weight is)."""
        dtype = torch.float32
        for p in self.weights:
            dtype = torch.promote_types(dtype, wide_dtype(p.dtype))
        return torch.zeros(sum(self.sizes), dtype=dtype, device=self.weights[0].device)

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return one tensor per weight as a flat vector; None counts as zeros."""
        like = self.zeros()
        for part, tensor in zip(torch.split(like, self.sizes), tensors, strict=True):
            if tensor is not None:
                part.copy_(tensor.detach().flatten())
        return like

    def gaussian(self, seed: int) -> Tensor:
        """Return N(0, 1) entries, drawn from ``seed`` without a global generator."""
        like = self.zeros()
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).to(like.device)

    def loss(self, d: Tensor | None) -> float:
        """Return L(W + d); None: the loss of the model as it is now."""
        if d is not None:
            self.move_to(d)
        with buffers_kept(self.root), self._pass():
            return _as_float(self.closure())

    def gradient(self, d: Tensor) -> tuple[float, Tensor]:
        """Return L(W + d) and its gradient."""
        loss = self.loss(d)
        if all(p.grad is None for p in self.weights):
            raise RuntimeError("the closure left no gradient in the weights: it must call backward() on the loss.")
        return loss, self.flat([p.grad for p in self.weights])

    def differentiable_gradient(self, *, graph: bool = True) -> tuple[Tensor, ...]:
        """Return the gradient at W, one tensor per weight, with its graph; the closure must not run a backward.

        Attention runs torch's plain kernel, because the fused ones have no second derivative. The buffers that the
        forward wrote stay until the end of :func:`probing`, because the graph needs them. Without ``graph`` it is the
        plain gradient.
        """
        with self._pass(), sdpa_kernel(SDPBackend.MATH):
            loss = self.closure()
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise TypeError(f"`loss_fn` must return the loss, a tensor of one entry, got {loss!r}.")
        if any(p.grad is not None for p in self.weights):
            raise RuntimeError("`loss_fn` called backward(), which frees the graph: it must only return the loss.")
        if not loss.requires_grad:
            raise RuntimeError("the loss that `loss_fn` returned does not depend on the weights, or was detached.")
        return torch.autograd.grad(loss, self.weights, create_graph=graph, materialize_grads=True)

    @contextlib.contextmanager
    def _pass(self) -> Iterator[None]:
        """Run one evaluation without old gradients and with the same random numbers each time."""
        for p in self.root.parameters():
            p.grad = None
        with same_random_numbers(self.random), frozen(), torch.enable_grad():
            yield
        self.tick()

    @torch.no_grad()
    def move_to(self, d: Tensor) -> None:
        """Write W + d into the model."""
        for p, start, part in zip(self.weights, self.start, torch.split(d, self.sizes), strict=True):
            p.copy_(start.to(part.dtype) + part.to(p.device).view_as(start))
        torch.clear_autocast_cache()

    @torch.no_grad()
    def realised(self, d: Tensor) -> float:
        """Return the norm of the part of d that is in the model, because 16-bit weights round some of it away."""
        now = self.flat([p.to(d.dtype) - start.to(d.dtype) for p, start in zip(self.weights, self.start, strict=True)])
        return float(now.norm())

    @torch.no_grad()
    def restore(self) -> None:
        """Write W."""
        for p, start in zip(self.weights, self.start, strict=True):
            p.copy_(start)
        torch.clear_autocast_cache()


@contextlib.contextmanager
def probing(
    subject: Subject,
    closure: Closure,
    caller: str,
    count: int,
    progress: Progress,
    *,
    chosen: list[nn.Parameter] | None = None,
) -> Iterator[Probe]:
    """Within this context evaluate L(W + d); then restore weights, gradients, buffers, modes and generators.

    Args:
        subject: An optimizer or a model. W are its quantized weights, or all Parameters if there are none, as far as
            they require gradients.
        closure: torch's closure.
        caller: Name of the public function, for messages and for the progress bar.
        count: The number of evaluations to come.
        progress: A progress bar: None on a terminal if tqdm is installed; True always; False never; or a function.
        chosen: W, if it is other weights than those.
    """
    root, latents, weights = _weights_of(subject, caller)
    weights = weights if chosen is None else chosen
    if not callable(closure):
        raise TypeError(f"{caller} needs a function that returns the loss, got {closure!r}.")
    if any(is_sharded(p) for p in root.parameters()):
        raise RuntimeError(
            f"{caller} measures a whole model, and this one is sharded: gather its weights, "
            "torch.distributed.checkpoint's get_model_state_dict with full_state_dict=True, and measure in one process."
        )
    if not weights:
        raise RuntimeError(f"{caller} found no trainable weight: the ones to be perturbed must require gradients.")
    grads = [(p, p.grad) for p in root.parameters()]
    modes = [(module, module.training) for module in root.modules()]
    with buffers_kept(root), _ticking(count, caller, progress) as tick:
        probe = Probe(root, weights, closure, tick)
        if latents is not None:
            latents.open_block(caller)
        try:
            yield probe
        finally:
            _restore(probe, latents, grads, modes)


def _restore(
    probe: Probe,
    latents: Latents | None,
    grads: list[tuple[nn.Parameter, Tensor | None]],
    modes: list[tuple[nn.Module, bool]],
) -> None:
    probe.restore()
    if latents is not None:
        latents.write()
    for p, grad in grads:
        p.grad = grad
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def _ticking(count: int, title: str, progress: Progress) -> Iterator[Callable[[], object]]:
    """Yield a function that moves a progress bar of length ``count`` by one."""
    if callable(progress):
        done = itertools.count(1)
        yield lambda: progress(next(done), count)
        return
    if progress is not False:
        try:
            from tqdm import tqdm
        except ImportError:
            if progress:
                raise
        else:
            with tqdm(total=count, desc=title, leave=False, disable=None if progress is None else False) as bar:
                yield bar.update
            return
    yield lambda: None


def _weights_of(subject: Subject, caller: str) -> tuple[nn.Module, Latents | None, list[nn.Parameter]]:
    if isinstance(subject, QuantizedOptimizer):
        subject._refuse_inside_block(caller)
        latents = subject._latents
        latents.check()
        root, quantized = latents.root, [slot.parameter for slot in latents.slots]
    elif isinstance(subject, nn.Module):
        root, latents = unwrap_model(subject), None
        coverage = coverage_of(root)
        quantized = [getattr(row.module, row.attr) for row in coverage.quantized] if coverage is not None else []
    else:
        raise TypeError(f"{caller} needs a qsam optimizer or a torch.nn.Module, got {type(subject).__name__}.")
    return root, latents, [p for p in quantized or [p for _, p in own_parameters(root)] if p.requires_grad]


def _as_float(loss: Any) -> float:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, int | float):
        return float(loss)
    raise TypeError(f"the closure must return the loss, a number or a tensor of one entry, got {loss!r}.")


def checked_number(value: float, name: str) -> float:
    """Return ``value`` as a float; raise if it is not a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number > 0, got {value!r}.")
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be finite and > 0, got {value}.")
    return float(value)


def checked_count(value: int, name: str, least: int) -> int:
    """Return ``value``; raise if it is not an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}, got {value}.")
    return value

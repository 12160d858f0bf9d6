"""Laws of every quantizer, uniform or not."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import torch
from torch import Tensor

from qsam.quantizers import Quantizer
from qsam.testing.battery import SHORT
from qsam.testing.case import Case, claim, same
from qsam.testing.table import law

PLAIN = ("normal", "normal_bfloat16")


@law()
def shape_and_dtype_kept(case: Case) -> None:
    """Q(x) has the shape and the dtype of x."""
    out = case.quantizer(case.x)
    claim(out.shape == case.x.shape, f"the output must have the shape of the input, got {tuple(out.shape)}.")
    claim(out.dtype == case.x.dtype, f"the output must have the dtype of the input, got {out.dtype}: cast it back.")


@law()
def finite(case: Case) -> None:
    """A finite input gives a finite output, on zeros, constants and extremes too."""
    out = case.quantizer(case.x)
    claim(out.isfinite(), "a finite input must give a finite output: guard the division.", x=case.x, got=out)


@law(inputs=(*PLAIN, "zeros", "edges"))
def deterministic(case: Case) -> None:
    """The same input gives the same output, and the global random state is left alone."""
    q, seed = case.build(), torch.get_rng_state()
    first, second = q(case.x), q(case.x)
    sentence = "the same input must give the same output: draw noise from a seed kept in the quantizer."
    claim(same(first, second), sentence, x=case.x, first=first, second=second)
    claim(torch.equal(seed, torch.get_rng_state()), "forward must not draw from the global random state.")


@law(inputs=(*PLAIN, "zeros", "edges"))
def forward_moves_no_state(case: Case) -> None:
    """Forward and backward write neither the input, nor a Parameter, nor a buffer."""
    q, x = case.build(), case.x.clone()
    before = {key: value.clone() for key, value in q.state_dict().items()}
    out = q(x.requires_grad_())
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    claim(same(x, case.x), "forward must not write its input.", before=case.x, after=x)
    claim(before.keys() == q.state_dict().keys(), "forward must not add or remove Parameters or buffers.")
    for key, value in q.state_dict().items():
        claim(same(value, before[key]), f"forward must not move {key!r}: move it in `update`.")


@law(inputs=PLAIN)
def same_in_train_and_eval(case: Case) -> None:
    """``.eval()`` and ``torch.no_grad()`` change nothing: the weights that are trained are those that are deployed."""
    q = case.build()
    train = q.train()(case.x)
    with torch.no_grad():
        claim(same(q(case.x), train), "the output must not depend on whether gradients are recorded.")
    claim(same(q.eval()(case.x), train), "the output must not depend on `training`.")


@law()
def idempotent(case: Case) -> None:
    """At fixed parameters Q(Q(x)) = Q(x); where the scale follows from the input, but for its rounding."""
    q = case.quantizer
    once = q(case.x)
    twice = q(once)
    if q.dynamic:
        slack = 4 * torch.finfo(case.x.dtype).eps * once.abs()
        claim((twice - once).abs() <= slack, "Q(Q(x)) must be Q(x).", x=case.x, once=once, twice=twice)
        return
    claim(same(once, twice), "Q(Q(x)) must be Q(x) at fixed parameters.", x=case.x, once=once, twice=twice)


@law()
def monotone(case: Case) -> None:
    """Where entries share one set of parameters (with a dynamic scale: in a token), x <= y gives Q(x) <= Q(y)."""
    q = case.quantizer
    if q.granularity != "per_tensor":
        return
    if q.dynamic:
        tokens = case.x.sort(-1).values
        rising = q(tokens).diff(dim=-1) >= 0
        claim(rising, "a larger entry must not become a smaller one.", x=tokens[..., 1:])
        return
    x = case.x.flatten().sort().values.reshape(case.x.shape)
    out = q(x).flatten()
    ok = out[1:] >= out[:-1]
    claim(ok, "a larger entry must not become a smaller one.", x=x.flatten()[1:], got=out[1:], before=out[:-1])


@law(inputs=PLAIN)
def layout_does_not_matter(case: Case) -> None:
    """A transposed view gives what its contiguous copy gives."""
    q = case.quantizer
    strided = case.x.transpose(0, -1).contiguous().transpose(0, -1)
    claim(same(q(strided), q(case.x)), "a view and its contiguous copy must give the same output.", x=case.x)


@law(inputs=PLAIN)
def parameters_stay_fp32(case: Case) -> None:
    """``.half()``, ``.bfloat16()`` and ``.double()`` on the model leave fp32 Parameters and buffers as they are."""
    q = case.build()
    before = copy.deepcopy(q.state_dict())
    for cast in (q.half, q.bfloat16, q.double):
        cast()
        for key, value in q.state_dict().items():
            sentence = (
                f"{key!r} must keep its dtype and value through .half(), .bfloat16() and .double(), got {value.dtype}."
            )
            claim(before[key].dtype == value.dtype and torch.equal(before[key], value), sentence)


@law(inputs=PLAIN)
def parameters_have_dimensions(case: Case) -> None:
    """No Parameter is 0-dimensional: FSDP2 refuses those."""
    for name, parameter in case.quantizer.named_parameters():
        claim(parameter.dim() > 0, f"the Parameter {name!r} must have shape (1,), not (): FSDP2 refuses scalars.")


@law(inputs=("normal", "zeros", "zero_channel", "constant", "negative", "subnormal", "huge", "spread"))
def init_sets_finite_parameters(case: Case) -> None:
    """``init_`` sets finite leaves, the same ones each time, by every rule; its data are left alone."""
    x = case.x.clone()
    q, again = case.cls(**case.config), case.cls(**case.config)
    q.observe_(x)
    again.observe_(x)
    claim(same(x, case.x), "`init_` must not write its data.", before=case.x, after=x)
    for (key, value), other in zip(q.state_dict(keep_vars=True).items(), again.state_dict().values(), strict=True):
        claim(value.isfinite(), f"`init_` must leave {key!r} finite on any finite data.", got=value)
        claim(value.is_leaf, f"`init_` must leave {key!r} a leaf: put it under torch.no_grad().")
        claim(same(value, other), f"`init_` on the same data must give the same {key!r}.", first=value, second=other)


@law(inputs=PLAIN)
def state_dict_round_trip(case: Case) -> None:
    """A strict load of the state_dict into a quantizer of other data gives the same output."""
    q, other = case.build(), case.build(x=case.x * 1.7 + 1)
    other.load_state_dict(q.state_dict(), strict=True)
    sentence = "a strict load of the state_dict must restore the output: keep all state in Parameters and buffers."
    claim(same(q(case.x), other(case.x)), sentence, x=case.x, before=q(case.x), after=other(case.x))


@law(inputs=PLAIN)
def survives_deepcopy_and_pickle(case: Case) -> None:
    """``copy.deepcopy`` and ``pickle`` give a quantizer with the same output."""
    q = case.quantizer
    out = q(case.x)
    claim(same(copy.deepcopy(q)(case.x), out), "a deepcopy must give the same output.")
    claim(same(pickle.loads(pickle.dumps(q))(case.x), out), "an unpickled quantizer must give the same output.")


@law()
def gradient_is_finite(case: Case) -> None:
    """Both x and every Parameter receive a finite gradient of their own shape and dtype."""
    q, x = case.quantizer, case.x
    for tensor, grad in zip([x, *q.parameters()], gradients(q, x, torch.ones_like(x)), strict=True):
        sentence = "a gradient must have the shape and dtype of what it belongs to, got"
        claim(
            grad.shape == tensor.shape and grad.dtype == tensor.dtype, f"{sentence} {grad.dtype} {tuple(grad.shape)}."
        )
        claim(grad.isfinite(), "a gradient must be finite on any finite input.", got=grad)


@law(inputs=("normal",))
def gradient_passes_through(case: Case) -> None:
    """On ordinary data, a ramp from 1/n to 1, the straight-through gradient of x is not zero."""
    x = (torch.arange(1, case.x.numel() + 1) / case.x.numel()).reshape(case.x.shape).to(case.x.dtype)
    dx = gradients(dataclasses.replace(case, x=x, scale=None).build(), x, torch.ones_like(x))[0]
    claim(bool(dx.any()), "the gradient of x is zero everywhere: pass it straight through the rounding.")


@law(inputs=SHORT)
def update_keeps_it_finite(case: Case) -> None:
    """``update``, called once an optimizer step, leaves state and output finite."""
    q = case.build()
    q.update(case.x)
    claim(q(case.x).isfinite(), "after `update` a finite input must give a finite output.", x=case.x)


def gradients(q: Quantizer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the Parameters, given that of the output; zeros where one is not used."""
    leaf = x.detach().clone().requires_grad_()
    inputs = [leaf, *(parameter.requires_grad_() for parameter in q.parameters())]
    return torch.autograd.grad(q(leaf), inputs, grad, allow_unused=True, materialize_grads=True)

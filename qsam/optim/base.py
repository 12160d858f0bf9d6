"""The optimizer round an optimizer: its passes, its step, and what a torch Optimizer must be able to do.

The base optimizer steps the latents; the scales have an optimizer of their own; outside the blocks the model holds
Q(w). A method says in its own file how passes and updates follow each other.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qsam.latent import Latents, ScaleSlot, Slot, coverage_for, input_signs, scale_tensors, set_input_signs
from qsam.optim import state as packing
from qsam.optim.diagnostics import noise_figures
from qsam.optim.groups import Base, build_base, pointed_at_latents
from qsam.optim.passes import Passes
from qsam.optim.perturbation import Perturbation, checked_rho
from qsam.optim.scale_rates import ScaleRate, build_scale_optimizer
from qsam.registry import Registry

Closure = Callable[[], Any]


class QuantizedOptimizer(Passes, Optimizer):
    """Base class of the methods: see the classes in ``qsam/optim/``.

    Args:
        model: The model; a plain one is quantized with the defaults of :func:`qsam.quantize_`.
        base: A torch Optimizer class with its ``arguments``, or an instance.
        perturbation: What is added in the second pass; None for a method of one pass.
        rho: Radius, kept in every base group as ``qsam_rho``; a schedule may change it there.
        ste: ``"clipped"``: dw carries the quantizer's mask. ``"identity"``: dw is the gradient of Q(w) itself.
        rng: ``"shared"``: all passes of a step draw the same random numbers; ``"independent"``: each its own.
        max_grad_norm: Clip the pulled-back gradients of everything the base steps to this global norm.
        params: Parameters or groups for the base class; all trainable ones by default.
        scale_lr: The scales' rate; see :mod:`qsam.optim.scale_rates`.
        scale_optimizer: The scales' optimizer class.
        arguments: The base's own keywords.
    """

    quantizes = True
    """Whether the method has quantizers."""

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        perturbation: Perturbation | None,
        rho: float,
        ste: str,
        rng: str,
        max_grad_norm: float | None,
        params: Iterable[Any] | None,
        scale_lr: ScaleRate,
        scale_optimizer: type[Optimizer],
        arguments: dict[str, Any],
        ours: set[str],
    ) -> None:
        _check_options(model, ste, rng, max_grad_norm)
        coverage = coverage_for(model, self.quantizes)
        self.latents_of = Latents(model, self, coverage)
        self.perturbation = perturbation
        try:
            self.base = build_base(
                type(self).__name__, base, self.latents_of, params=params, arguments=arguments, ours=ours
            )
            weights, inputs = scale_tensors(coverage)
            self.scale_slots: list[ScaleSlot] = [*weights, *inputs]
            slots = self.latents_of.slots
            self.scale_base = build_scale_optimizer(
                weights, inputs, scale_lr=scale_lr, scale_optimizer=scale_optimizer, base=self.base, slots=slots
            )
            for group in self.base.param_groups:
                group["qsam_rho"] = self._radius(group, rho)
        except BaseException:
            self.latents_of.release()
            raise
        self.ste, self.rng, self.max_grad_norm = ste, rng, max_grad_norm
        self.__setstate__({"defaults": self.base.defaults, "param_groups": []})
        self.param_groups[:] = self.base.param_groups
        if self.scale_base is not None:
            self.param_groups += [self._public_group(group) for group in self.scale_base.param_groups]
        self.param_groups[0].update(qsam_step=0, qsam_phase=0, qsam_quantizers=self._describe_quantizers())
        self._state_created = False
        self._start_passes()
        self.scales = ScaleFacade(self)

    # --- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: torch's closure: clears gradients, runs forward and backward, returns the loss. It is called as
                often as the method has passes. Without it, the gradients of the passes made by hand are used.

        Returns:
            What the closure returned in the first pass; None without a closure.

        Raises:
            RuntimeError: called inside a block, without new gradients, or after somebody else wrote the weights.
        """
        self._refuse_inside_block("step")
        if closure is not None:
            self._clear_gradients()
            with torch.enable_grad():
                return self._run(closure)
        if (
            not self._passes_made
            and packing.all_lr_zero(self.param_groups)
            and packing.no_gradient_but_zeros(self.param_groups)
        ):
            return self._create_state()
        if not self._has_gradients():
            raise RuntimeError("step() found no gradient: run a new backward before each step.")
        if self.perturbation is not None and not self._perturbed and self.perturbation.passes(self.steps):
            self._say_once(
                f"{type(self).__name__}.step() without first_pass() and perturbed() is a plain QAT step. A "
                "framework that does not hand its closure on (Lightning with 16-mixed, AcceleratedOptimizer) does this."
            )
        self._finish_step()
        return None

    def _run(self, closure: Closure) -> Any:
        """Make the passes of one step by calling ``closure``, and step."""
        raise NotImplementedError

    def _finish_step(self) -> None:
        """Update from the gradients in place: w and s together, in a method that does not alternate."""
        if self.latents_of.noises and not self.latents_of.noisy:
            self._say_once(
                "noise quantizers draw inside first_pass(), perturbed(), scale_phase() and "
                "step(closure) only: this step's "
                "gradients were taken at the rounded weights."
            )
        self._update(weights=True, scales=True)

    @torch.no_grad()
    def _update(self, *, weights: bool, scales: bool) -> None:
        """Pull the gradients back; step the latents, or the scales, or both; write Q(w)."""
        latents = self.latents_of
        latents.check()
        try:
            if weights and self.perturbation is not None:
                self.perturbation.direction.learn(self.perturbation.gather(latents, self.base.state))
            scale_grads = self._pull_back()
            if weights:
                self._step_base()
            if scales:
                self._step_scales(scale_grads)
        finally:
            self._clean_up()
        if weights:
            self._count_step()

    def _clean_up(self) -> None:
        """Let go of all gradients, and leave Q(w) in the model."""
        for slot in self.latents_of.slots:
            slot.latent.grad = slot.shift = None
        self.latents_of.write()
        self._clear_gradients()

    def _count_step(self) -> None:
        """Move what moves once a step: the quantizers' state, and the step's number."""
        for slot in self.latents_of.slots:
            slot.quantizer.requires_grad_(False)  # model.requires_grad_(True) flips it, and DDP would wait for it
            slot.quantizer.update(slot.latent.detach())
        self.latents_of.move_input_noise()
        self.param_groups[0]["qsam_step"] += 1
        self._passes_made = 0

    def _pull_back(self, keep: bool = False) -> dict[int, Tensor]:
        """Put dw on the latents and return the scales' gradients by the id of the scale."""
        grads: dict[int, Tensor] = {}
        owned = {id(p) for p in self._parameters()}
        for slot in self.latents_of.slots:
            p = slot.parameter
            if p.grad is None:
                continue
            if id(p) not in owned:
                raise RuntimeError(
                    f"the quantized weight {slot.path!r} has a gradient, but its Parameter is in no group: it was "
                    "unfrozen "
                    "(call add_param_group), or replaced (build the optimizer afterwards)."
                )
            dw, ds = self.latents_of.pull_back(slot, p.grad)
            slot.latent.grad = dw if self.ste == "clipped" else p.grad.to(dw.dtype)
            for name, gradient in ds.items():
                grads[id(getattr(slot.quantizer, name))] = gradient
            if not keep:
                p.grad = None
        for scale in self.scale_slots:
            if scale.parameter.grad is not None:
                grads[id(scale.parameter)] = scale.parameter.grad
        return grads

    def _step_base(self, closure: Closure | None = None) -> Any:
        """Step the base optimizer on the latents; after an exception they are what they were before."""
        copies = [self._backup(slot, in_place=closure is None) for slot in self.latents_of.slots]
        with pointed_at_latents(self.base, self.latents_of):
            if closure is None:
                self._clip()
            try:
                return self.base.step() if closure is None else self.base.step(closure)
            except BaseException:
                for slot, copy in zip(self.latents_of.slots, copies, strict=True):
                    slot.latent.copy_(copy)
                raise

    def _clip(self) -> None:
        if self.max_grad_norm is not None:
            owned = [p for group in self.base.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(owned, self.max_grad_norm)

    def _backup(self, slot: Slot, in_place: bool) -> Tensor:
        """Return a copy of w. A Parameter of w's dtype serves as its place: it is rewritten after the step anyway."""
        p = slot.parameter
        if in_place and p.dtype == slot.latent.dtype:
            p.copy_(slot.latent)
            return p.detach()
        return slot.latent.detach().clone()

    def _step_scales(self, grads: Mapping[int, Tensor]) -> None:
        """Step the scales' optimizer with these gradients, at the rates of the public groups."""
        if self.scale_base is None:
            return
        self._sync_scale_groups()
        for scale in self.scale_slots:
            scale.parameter.grad = grads.get(id(scale.parameter))
        sign = -1.0 if self._maximizes() else 1.0
        for group in self.scale_base.param_groups:
            for s in group["params"]:
                if s.grad is not None and sign < 0:
                    s.grad = -s.grad
        self.scale_base.step()
        for scale in self.scale_slots:
            scale.parameter.grad = None

    def _create_state(self) -> None:
        """Create the base's state and nothing else: torch.distributed.checkpoint asks for it with every lr at 0."""
        for slot in self.latents_of.slots:
            slot.latent.grad = torch.zeros_like(slot.latent)
        with pointed_at_latents(self.base, self.latents_of):
            self.base.step()
        self._step_scales({id(s.parameter): torch.zeros_like(s.parameter) for s in self.scale_slots})
        for slot in self.latents_of.slots:
            slot.latent.grad = None
        self._state_created = True

    # --- what users read and do ---------------------------------------------------------------------------------

    @property
    def coverage(self) -> Any:
        """What is quantized, what is not and why; None for a method without quantizers."""
        return self.latents_of.coverage

    @contextlib.contextmanager
    def latents(self) -> Iterator[None]:
        """Within this context the model holds the full-precision w: average them (EMA, SWA) or save them here."""
        self._refuse_inside_block("latents")
        self.latents_of.check()
        self._block = "latents"
        self.latents_of.put_latents()
        try:
            yield
        finally:
            self.latents_of.write()
            self._block = None

    def sync_latents(self) -> None:
        """Take the model's present weights as latents, and write Q(w): after a merge, a load, a pruning."""
        self._refuse_inside_block("sync_latents")
        self.latents_of.take_present_weights()

    def diagnostics(self) -> dict[str, float]:
        """Return figures of the last step; those marked * are measured in the next perturbed pass after each call.

        Returns:
            ``loss`` and ``loss_perturbed`` of ``step(closure)`` and their difference ``rise``; ``direction_norm``, the
            norm by which the ascent direction was divided; ``quantization_noise_norm``, ||Q(w) - w||, and
            ``clipped_share``, the share of quantized weights whose gradient the clip mask stops;
            ``perturbation_norm``*, ||e|| as realised in the quantized weights, ``noise_perturbation_cosine``*, the
            cosine of e and Q(w) - w, and ``flipped_share``*, the share of codes that e would flip. What has not been
            measured is left out.
        """
        found = {name: float(value) for name, value in self._losses.items()}
        if len(found) == 2:
            found["rise"] = found["loss_perturbed"] - found["loss"]
        if self.perturbation is not None and self.perturbation.norm is not None:
            found["direction_norm"] = float(self.perturbation.norm)
        self._measure = self.perturbation is not None and bool(self.latents_of.slots)
        return found | self._measured | noise_figures(self.latents_of)

    # --- a torch Optimizer --------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """A merged view by parameter: the base's state with the latents, and the scales'; empty before a step."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        if self.base.state or self._state_created or self.steps:  # plain SGD never has a state of its own
            entries = self._entries()
            for group in self.param_groups:
                merged.update({p: entries[id(p)] for p in group["params"] if entries[id(p)]})
        return merged

    @state.setter
    def state(self, value: Any) -> None:
        """Refuse silently what torch's own ``__setstate__`` assigns: the state lives in the two optimizers."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; see :meth:`torch.optim.Optimizer.add_param_group`."""
        group = dict(param_group)
        group["qsam_rho"] = self._radius(group, self.param_groups[0]["qsam_rho"])
        self.base.add_param_group(group)
        self.param_groups.append(self.base.param_groups[-1])

    def _radius(self, group: dict[str, Any], default: float) -> float:
        """Take a group's radius out of it: its "rho", or "qsam_rho" where the base has a "rho" too (Adadelta)."""
        if self.perturbation is not None and "rho" not in self.base.defaults:
            default = group.pop("rho", default)
        return checked_rho(group.pop("qsam_rho", default))

    def state_dict(self) -> dict[str, Any]:
        """Return latents, scales, counters and both optimizers' state: tensors and plain Python types only.

        Raises:
            RuntimeError: called inside a block.
        """
        self._refuse_inside_block("state_dict")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.param_groups[0]["qsam_input_signs"] = input_signs(self.coverage)
        if self.perturbation is not None and self.perturbation.kept_norm is not None:
            self.param_groups[0]["qsam_kept_norm"] = float(self.perturbation.kept_norm)
        packed = packing.pack(self.param_groups, self._entries())
        with pointed_at_latents(self.base, self.latents_of):
            own = self.base.state_dict()
        if set(own) != {"state", "param_groups"}:
            packed["qsam_base"] = own
        owned = {id(p) for p in self._parameters()}
        frozen = {s.path: s.latent.detach() for s in self.latents_of.slots if id(s.parameter) not in owned}
        if frozen:
            packed["qsam_frozen"] = frozen
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a bare base optimizer's. Load the model first, then this.

        The latents win over the model's weights and are written. A bare checkpoint has none: they start from the
        model's present weights, which is said once.

        Raises:
            ValueError: it does not fit; nothing has been changed then.
            RuntimeError: called inside a block.
        """
        self._refuse_inside_block("load_state_dict")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        if packing.is_plain(state_dict):
            self._load_plain(state_dict)
        else:
            self._load(state_dict)
        self._start_passes()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        packing.check(state_dict, self.param_groups)
        found = packing.entries(state_dict, self.param_groups, "qsam_latent")
        scales = packing.entries(state_dict, self.param_groups, "qsam_scale")
        ours = [i for i, group in enumerate(self.param_groups) if "qsam_scales" not in group]
        theirs = [i for i, group in enumerate(self.param_groups) if "qsam_scales" in group]
        self._load_base(state_dict.get("qsam_base") or packing.part(state_dict, ours), ours)
        if self.scale_base is not None:
            self.scale_base.load_state_dict(self._scale_state(state_dict, theirs))
            for i, group in zip(theirs, self.scale_base.param_groups, strict=True):
                self.param_groups[i].update({k: v for k, v in state_dict["param_groups"][i].items() if k != "params"})
                group["params"] = self.param_groups[i]["params"]
        by_parameter = {id(slot.parameter): slot for slot in self.latents_of.slots}
        for p, value in found:
            by_parameter.pop(id(p)).latent.copy_(value)
        for s, value in scales:
            s.copy_(value)
        for slot in by_parameter.values():
            self.latents_of.take_frozen(slot, state_dict.get("qsam_frozen", {}).get(slot.path))
        set_input_signs(self.coverage, self.param_groups[0].get("qsam_input_signs", {}))
        self._load_memories(state_dict)
        self.latents_of.write()

    def _scale_state(self, state_dict: dict[str, Any], positions: list[int]) -> dict[str, Any]:
        """Return the scale optimizer's state_dict; the state of a weight's scale rides in the entry of the weight."""
        found = packing.part(state_dict, positions)
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=True)
        index = {id(p): i for ours, saved in pairs for p, i in zip(ours["params"], saved["params"], strict=True)}
        for slot in self.latents_of.slots:
            entry = state_dict["state"].get(index.get(id(slot.parameter)), {})
            for name, s in slot.quantizer.named_parameters():
                prefix = f"qsam_{name}_"
                own = {k.removeprefix(prefix): v for k, v in entry.items() if str(k).startswith(prefix)}
                if own:
                    found["state"][index[id(s)]] = own
        return found

    def _load_memories(self, state_dict: dict[str, Any]) -> None:
        paths = {id(p): path for path, p in self.latents_of.root.named_parameters()}
        for name, memory in self._memories().items():
            memory.clear()
            for p, value in packing.entries(state_dict, self.param_groups, name):
                memory[paths[id(p)]] = value.detach().to(p.device, copy=True)
        norm = self.param_groups[0].get("qsam_kept_norm")
        if self.perturbation is not None and norm is not None:
            self.perturbation.kept_norm = torch.tensor(norm)

    def _load_plain(self, state_dict: dict[str, Any]) -> None:
        ours = [i for i, group in enumerate(self.param_groups) if "qsam_scales" not in group]
        first = {k: v for k, v in self.param_groups[0].items() if k.startswith("qsam_")}
        packing.check(state_dict, [self.param_groups[i] for i in ours])
        self._load_base(state_dict, ours)
        for i in ours:
            self.param_groups[i].setdefault("qsam_rho", first["qsam_rho"])
        self.param_groups[0].update(first)
        self.latents_of.take_present_weights()
        warnings.warn(
            "this is a checkpoint of the bare base optimizer: the latents start from the model's present weights.",
            UserWarning,
            stacklevel=3,
        )

    def _load_base(self, state_dict: dict[str, Any], positions: list[int]) -> None:
        with pointed_at_latents(self.base, self.latents_of):
            self.base.load_state_dict(state_dict)
        for i, group in zip(positions, self.base.param_groups, strict=True):
            self.param_groups[i] = group

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything, but for the wrapper that a scheduler put round ``step``."""
        return {k: v for k, v in self.__dict__.items() if k not in {"step", "_opt_called"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and own the latents of the restored model."""
        super().__setstate__(state)
        self.latents_of.claim(self)

    def _release(self) -> None:
        """Put the latents into the model for good."""
        self._refuse_inside_block("dequantize_")
        self.latents_of.release()

    def _entries(self) -> dict[int, dict[str, Any]]:
        """Return every parameter's state by its id: the base's, the scales', and what qsam adds to them."""
        keys = {id(slot.parameter): slot.latent for slot in self.latents_of.slots}
        found: dict[int, dict[str, Any]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                found[id(p)] = dict(self.base.state.get(keys.get(id(p), p), {}))
        states = {} if self.scale_base is None else self.scale_base.state
        for scale in self.scale_slots:
            found[id(scale.parameter)] = {**states.get(scale.parameter, {}), "qsam_scale": scale.parameter.detach()}
        for slot in self.latents_of.slots:
            entry = found.setdefault(id(slot.parameter), {})
            entry["qsam_latent"] = slot.latent.detach()
            # torch.distributed.checkpoint drops the state of what has no gradient: a weight's scale.
            for name, s in slot.quantizer.named_parameters():
                entry |= {f"qsam_{name}_{key}": value for key, value in states.get(s, {}).items()}
                found[id(s)] = {"qsam_scale": s.detach()}
        for entry in found.values():
            # And it wants an entry for all that has one, where a base without state (plain SGD) has none.
            if not entry:
                entry["qsam_stateless"] = torch.zeros(())
        for name, memory in self._memories().items():
            for path, p in self.latents_of.root.named_parameters():
                if path in memory and id(p) in found:
                    found[id(p)][name] = memory[path]
        return found

    def _memories(self) -> dict[str, dict[str, Tensor]]:
        """Return what the perturbation remembers from step to step, by kind and by the parameter's path."""
        if self.perturbation is None:
            return {}
        return {"qsam_direction": self.perturbation.direction.memory, "qsam_kept": self.perturbation.kept}

    def _public_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the group that schedulers see: the scales', with the keys of the base's that they may write."""
        return {**{k: v for k, v in self.base.defaults.items() if k not in group}, **group}

    def _sync_scale_groups(self) -> None:
        """Give the scale optimizer the rates that schedulers wrote into the public groups; nothing else is theirs."""
        assert self.scale_base is not None
        public = [group for group in self.param_groups if "qsam_scales" in group]
        for mine, seen in zip(self.scale_base.param_groups, public, strict=True):
            mine["lr"], mine["params"] = seen["lr"], seen["params"]

    def _maximizes(self) -> bool:
        return bool(self.base.param_groups[0].get("maximize", False))

    def _describe_quantizers(self) -> dict[str, str]:
        found = {
            slot.path: f"{type(slot.quantizer).__name__}({slot.quantizer.extra_repr()})"
            for slot in self.latents_of.slots
        }
        for row in self.coverage.inputs if self.coverage is not None else ():
            if row.quantizer is not None:  # its sign is not part of its identity: the first batch decides it
                found[f"{row.name}.input".lstrip(".")] = f"{type(row.quantizer).__name__}(bits={row.quantizer.bits})"
        return found


class ScaleFacade(Optimizer):
    """``optimizer.scales``: what ``GradScaler`` needs to unscale and step the scales by themselves.

    Its one group holds everything that has a gradient in the scales' pass; its ``step`` is ``step_scales``.
    """

    def __init__(self, owner: QuantizedOptimizer) -> None:
        self.owner = owner
        self.__setstate__({"defaults": {}, "state": defaultdict(dict)})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All tensors that have gradients: where it is fused, e comes from them next, in one unit."""
        return [{"params": [p for p in self.owner._parameters() if p.requires_grad], "lr": 0.0}]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the scales."""
        self.owner.step_scales()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the owner."""
        return {"owner": self.owner, "defaults": {}, "state": self.state}


def _check_options(model: Any, ste: str, rng: str, max_grad_norm: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}: the model comes first, then the optimizer."
        )
    if ste not in ("clipped", "identity"):
        raise ValueError(f"`ste` must be 'clipped' or 'identity', got {ste!r}.")
    if rng not in ("shared", "independent"):
        raise ValueError(f"`rng` must be 'shared' or 'independent', got {rng!r}.")
    if max_grad_norm is not None and (isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, int | float)):
        raise TypeError(f"`max_grad_norm` must be None or a number > 0, got {max_grad_norm!r}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be > 0, got {max_grad_norm}.")


OPTIMIZERS: Registry[QuantizedOptimizer] = Registry("optimizer")
"""All methods by name: "qat", "sam", "joint", "saq", "squat"."""

register_optimizer = OPTIMIZERS.register

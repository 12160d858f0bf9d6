"""An optimizer's state: the merged view that schedulers and checkpoints read, and saving and loading it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qsam.optim import state as packing
from qsam.optim.groups import pointed_at_latents
from qsam.slots import input_signs, set_input_signs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qsam.latent import Latents
    from qsam.optim.perturbation import Perturbation
    from qsam.slots import ScaleSlot


class Checkpoint:
    """The state of base, scales and latents as one optimizer's."""

    base: Optimizer
    _latents: Latents
    param_groups: list[dict[str, Any]]
    perturbation: Perturbation | None
    steps: Any
    _parameters: Callable[[], Iterator[torch.nn.Parameter]]
    _refuse_inside_block: Callable[[str], None]
    _start_passes: Callable[[], None]
    scale_base: Optimizer | None
    scale_slots: list[ScaleSlot]
    _state_created: bool
    _optimizer_state_dict_pre_hooks: Any
    _optimizer_state_dict_post_hooks: Any
    _optimizer_load_state_dict_pre_hooks: Any
    _optimizer_load_state_dict_post_hooks: Any

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """A merged view by parameter: the base's state with the latents, and the scales'; empty before a step."""
        self._latents.settle(self.base)
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        if self.base.state or self._state_created or self.steps:  # plain SGD never has a state of its own
            entries = self._entries()
            for group in self.param_groups:
                merged.update({p: entries[id(p)] for p in group["params"] if entries[id(p)]})
        return merged

    @state.setter
    def state(self, value: Any) -> None:
        """Refuse silently what torch's own ``__setstate__`` assigns: the state lives in the two optimizers."""

    def state_dict(self) -> dict[str, Any]:
        """Return latents, scales, counters and both optimizers' state: tensors and plain Python types only.

        Raises:
            RuntimeError: called inside a block.
        """
        self._refuse_inside_block("state_dict")
        self._latents.settle(self.base)
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.param_groups[0]["qsam_input_signs"] = input_signs(self._latents.coverage)
        self._note_parameters()
        if self.perturbation is not None and self.perturbation.kept_norm is not None:
            self.param_groups[0]["qsam_kept_norm"] = float(self.perturbation.kept_norm)
        packed = packing.pack(self.param_groups, self._entries())
        with pointed_at_latents(self.base, self._latents):
            own = self.base.state_dict()
        if set(own) != {"state", "param_groups"}:
            packed["qsam_base"] = own
        owned = {id(p) for p in self._parameters()}
        frozen = {s.path: s.latent.detach() for s in self._latents.slots if id(s.parameter) not in owned}
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
            TypeError: not a dict.
            ValueError: it does not fit; nothing has been changed then.
            RuntimeError: called inside a block.
        """
        self._refuse_inside_block("load_state_dict")
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"`state_dict` must be a dict, what optimizer.state_dict() returned, got {type(state_dict).__name__}."
            )
        self._latents.settle(self.base)
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
        self._note_parameters()
        packing.check(state_dict, self.param_groups)
        found = packing.entries(state_dict, self.param_groups, "qsam_latent")
        scales = packing.entries(state_dict, self.param_groups, "qsam_scale")
        weights = {id(slot.parameter): slot.path for slot in self._latents.slots}
        packing.check_latents(self.param_groups, found, weights)
        ours = [i for i, group in enumerate(self.param_groups) if "qsam_scales" not in group]
        theirs = [i for i, group in enumerate(self.param_groups) if "qsam_scales" in group]
        self._load_base(state_dict.get("qsam_base") or packing.part(state_dict, ours), ours)
        if self.scale_base is not None:
            self.scale_base.load_state_dict(self._scale_state(state_dict, theirs))
            for i, group in zip(theirs, self.scale_base.param_groups, strict=True):
                self.param_groups[i].update({k: v for k, v in state_dict["param_groups"][i].items() if k != "params"})
                group["params"] = self.param_groups[i]["params"]
        by_parameter = {id(slot.parameter): slot for slot in self._latents.slots}
        for p, value in found:
            by_parameter.pop(id(p)).latent.copy_(value)
        for s, value in scales:
            s.copy_(value)
        for slot in by_parameter.values():
            self._latents.take_frozen(slot, state_dict.get("qsam_frozen", {}).get(slot.path))
        set_input_signs(self._latents.coverage, self.param_groups[0].get("qsam_input_signs", {}))
        self._load_memories(state_dict)
        self._latents.write()

    def _scale_state(self, state_dict: dict[str, Any], positions: list[int]) -> dict[str, Any]:
        """Return the scale optimizer's state_dict; the state of a weight's scale rides in the entry of the weight."""
        found = packing.part(state_dict, positions)
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=True)
        index = {id(p): i for ours, saved in pairs for p, i in zip(ours["params"], saved["params"], strict=True)}
        for slot in self._latents.slots:
            entry = state_dict["state"].get(index.get(id(slot.parameter)), {})
            for name, s in slot.quantizer.named_parameters():
                prefix = f"qsam_{name}_"
                own = {k.removeprefix(prefix): v for k, v in entry.items() if str(k).startswith(prefix)}
                if own:
                    found["state"][index[id(s)]] = own
        return found

    def _load_memories(self, state_dict: dict[str, Any]) -> None:
        paths = {id(p): path for path, p in self._latents.root.named_parameters()}
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
        for slot in self._latents.slots:
            self._latents.take_frozen(slot, None)
        self._latents.write()
        warnings.warn(
            "this is a checkpoint of the bare base optimizer: the latents start from the model's present weights.",
            UserWarning,
            stacklevel=3,
        )

    def _note_parameters(self) -> None:
        self.param_groups[0]["qsam_parameters"] = packing.parameter_shapes(self.param_groups, self._latents.root)

    def _load_base(self, state_dict: dict[str, Any], positions: list[int]) -> None:
        with pointed_at_latents(self.base, self._latents):
            self.base.load_state_dict(state_dict)
        for i, group in zip(positions, self.base.param_groups, strict=True):
            self.param_groups[i] = group

    def _entries(self) -> dict[int, dict[str, Any]]:
        """Return every parameter's state by its id: the base's, the scales', and what qsam adds to them."""
        keys = {id(slot.parameter): slot.latent for slot in self._latents.slots}
        found: dict[int, dict[str, Any]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                found[id(p)] = dict(self.base.state.get(keys.get(id(p), p), {}))
        states = {} if self.scale_base is None else self.scale_base.state
        for scale in self.scale_slots:
            found[id(scale.parameter)] = {**states.get(scale.parameter, {}), "qsam_scale": scale.parameter.detach()}
        for slot in self._latents.slots:
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
            for path, p in self._latents.root.named_parameters():
                if path in memory and id(p) in found:
                    found[id(p)][name] = memory[path]
        return found

    def _memories(self) -> dict[str, dict[str, Tensor]]:
        """Return what the perturbation remembers from step to step, by kind and by the parameter's path."""
        if self.perturbation is None:
            return {}
        return {"qsam_direction": self.perturbation.direction.memory, "qsam_kept": self.perturbation.kept}

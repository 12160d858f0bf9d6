"""Which changes of qsam/ do the tests catch? Each change is made in a copy of the checkout, and pytest runs there.

    python -m tests.mutations --select functional --jobs 2 -- tests/units tests/contract

The outcome of each change is written to a JSON file as soon as it is known, and a second call with the same arguments
goes on where the first one stopped. A change that no test catches is a missing test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "runs"
)
OUTCOMES = {0: "survived", 1: "caught", 2: "caught"}  # 2: a test file cannot be imported


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        file: The changed file, relative to the root of the checkout.
        old: A text that occurs once in it.
        new: The text that takes its place.
    """

    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"

    def apply(self, root: Path) -> None:
        """Make the change below ``root``.

        Raises:
            ValueError: The old text does not occur, or more than once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"the old text of the mutation {self} occurs {count} times: it must occur once.")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


MUTATIONS = [
    # the maths: limits, rounding, slopes, groups
    Mutation("qsam/functional.py", "return (v <= quant_min) | (v >= quant_max)", "return (v < quant_min) | (v > quant_max)"),
    Mutation("qsam/functional.py", "return torch.clamp(v, quant_min, quant_max).round()", "return torch.clamp(v, quant_min, quant_max).add(0.5).floor()"),
    Mutation("qsam/functional.py", "return codes - v.masked_fill(outside, 0)", "return codes - v"),
    Mutation("qsam/functional.py", "return dx, torch.where(scale < 0, -ds, ds).to(scale.dtype)", "return dx, ds.to(scale.dtype)"),
    Mutation("qsam/functional.py", "return scale.abs().clamp_min(SCALE_FLOOR)", "return scale.clamp_min(SCALE_FLOOR)"),
    Mutation("qsam/functional.py", "if x_tangent is None else x_tangent.masked_fill(outside, 0)", "if x_tangent is None else x_tangent"),
    Mutation("qsam/functional.py", "return x.movedim(axes, tuple(range(len(axes)))).reshape(", "return x.reshape("),
    # initial scales
    Mutation("qsam/scales.py", "return scale.masked_fill(empty.squeeze(1), 0.0)", "return scale.masked_fill(empty.squeeze(1), 1.0)"),
    Mutation("qsam/scales.py", "for _ in range(8):\n        q = codes(best)", "for _ in range(0):\n        q = codes(best)"),
    # names
    Mutation("qsam/registry.py", "isinstance(loaded, type) and loaded not in self._classes.values()", "isinstance(loaded, type)"),
    # quantizers
    Mutation("qsam/quantizers/lsq.py", "return x.numel() // max(self.scale.numel(), 1)", "return x.numel()"),
    Mutation("qsam/quantizers/lsq.py", "return x.shape[0 if self.batch_first else 1]", "return x.shape[0]"),
    Mutation("qsam/quantizers/lsq.py", "(high - low) / (2**self.bits - 1), 1)", "1, 1)"),
    Mutation("qsam/quantizers/lsq.py", "grows = (old == 0) & rows.any(dim=1)", "grows = (old < 0) & rows.any(dim=1)"),
    Mutation("qsam/quantizers/base.py", "return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)", "return moved"),
    Mutation("qsam/quantizers/base.py", "if digest != self._set_from:", "if self._set_from is None:"),
    Mutation("qsam/quantizers/base.py", "if _is_placeholder(self.spec, values):", "if not values:"),
    Mutation("qsam/quantizers/stochastic.py", "return low + (v - low > 0.5 - u)", "return low + (v - low > 0.25 - u)"),
    Mutation("qsam/quantizers/diffq.py", "mixture = v + torch.lerp(u, rounded - v, share)", "mixture = v + torch.lerp(u, rounded - v, share * share)"),
    Mutation("qsam/quantizers/noise.py", "key = mix_(self.seed.to(torch.int32) ^ mix_(self.step.to(torch.int32)))", "key = mix_(self.step.to(torch.int32))"),
    # the inputs' first scales
    Mutation("qsam/inputs.py", "if not module.training or _CALIBRATION.forbidden:", "if not module.training:"),
    Mutation("qsam/inputs.py", "negative, broken, nothing = facts.tolist()\n    if nothing:", "negative, broken, nothing = facts.tolist()\n    if not x.numel():"),
    Mutation("qsam/inputs.py", "if low >= 0 and place.looks < _LOOKS:", "if low > 0 and place.looks < _LOOKS:"),
    Mutation("qsam/batches.py", "if isinstance(n, _NormBase) and _is_fresh(n)]", "if isinstance(n, _NormBase)]"),
    # which weight gets which quantizer, and files
    Mutation("qsam/layers.py", "return 0 if 1 < module.groups == module.in_channels else 1", "return 1"),
    Mutation("qsam/plan.py", "rule = checked[hits[0]] if hits else None", "rule = checked[hits[-1]] if hits else None"),
    Mutation("qsam/plan.py", "call, bits=max(call.bits, BOUNDARY_BITS)", "call, bits=call.bits"),
    Mutation("qsam/plan.py", 'if content["qsam_format"] != FORMAT:', 'if content["qsam_format"] < FORMAT:'),
    Mutation("qsam/plan.py", "if hashlib.sha256(packed).hexdigest() != content.get(_DIGEST):", "if _DIGEST not in content:"),
    Mutation("qsam/plan.py", "if not was_used:", "if not checked:"),
    # what qsam knows about a model
    Mutation("qsam/coverage.py", "return -(-sum(row.bits * row.numel for row in self.weights) // 8)", "return (sum(row.bits * row.numel for row in self.weights) // 8)"),
    Mutation("qsam/coverage.py", "None if owner is None else weakref.ref(owner)", "None if owner is None else (lambda: owner)"),
    Mutation("qsam/coverage.py", "if lost <= kept:", "if lost <= 20 * kept:"),
    # attaching, writing, taking off
    Mutation("qsam/attach.py", "row.quantizer.set_from_weight_(row.parameter)", "pass"),
    Mutation("qsam/attach.py", "quantizer.requires_grad_(False)", "quantizer.requires_grad_(True)"),
    Mutation("qsam/attach.py", "        owner._release()\n", "        pass\n"),
    # the exported record
    Mutation("qsam/export.py", 'axis=None if quantizer.granularity == "per_tensor" else quantizer.axis', "axis=quantizer.axis"),
    Mutation("qsam/export.py", "if torch.equal(record.dequantized(), p) and", "if record.codes.shape == p.shape and"),
    # kernels
    Mutation("qsam/fused/sweeps.c", "const int outside = v <= low || v >= end_of_grid;", "const int outside = v < low || v > end_of_grid;"),
    Mutation("qsam/fused/sweeps.c", "(A)(scale[row] < 0 ? -total : total)", "(A)total"),
    Mutation("qsam/fused/sweeps.c", "(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "(bits + 0x8000) >> 16"),
    Mutation("qsam/fused/sweeps.c", "p[i] = q + d[i] * coefficient;", "p[i] += d[i] * coefficient;"),
    Mutation("qsam/fused/kernels.py", "if not alike or not t.is_contiguous(memory_format=layout)", "if not alike"),
    Mutation("qsam/fused/kernels.py", "torch.autograd.graph.increment_version(t)", "pass"),
    Mutation("qsam/fused/linear.py", "if torch.is_grad_enabled() and not (x.requires_grad or grid.scale.requires_grad):", "if x.numel() == 0:"),
    # statistics and measures
    Mutation("qsam/batchnorm.py", "            norm.momentum = None", "            norm.momentum = 0.5"),
    Mutation("qsam/measure/flatness.py", "return d if norm <= radius else d.mul_(radius / norm)", "return d"),
    Mutation("qsam/measure/hessian.py", "if not found.value < 0:", "if found.converged:"),
    Mutation("qsam/measure/probe.py", "with self._pass(), sdpa_kernel(SDPBackend.MATH):", "with self._pass():"),
    Mutation("qsam/measure/probe.py", "with same_random_numbers(self.random), frozen(), torch.enable_grad():", "with same_random_numbers(self.random), torch.enable_grad():"),
    Mutation("qsam/measure/probe.py", "        p.grad = grad\n", "        p.grad = None\n"),
    # the step of an optimizer, its options and its checkpoint; the latents, their guard, several processes
    Mutation("qsam/optim/optimizer.py", "self.ranks.first_pass() if ascends else contextlib.nullcontext(),", "self.ranks.first_pass(),"),
    Mutation("qsam/optim/optimizer.py", 'ascends = self.blocks != ("first_pass",)', "ascends = True"),
    Mutation("qsam/optim/optimizer.py", "self._later_pass(self._first_seen[-1]) if first else contextlib.nullcontext(),", "contextlib.nullcontext(),"),
    Mutation("qsam/optim/optimizer.py", 'same_random_numbers(start if self.rng == "shared" else None)', "same_random_numbers(start)"),
    Mutation("qsam/optim/optimizer.py", "                frozen(),\n", ""),
    Mutation("qsam/latents.py", "                    slot.latent.copy_(copy)\n", "                    pass\n"),
    Mutation("qsam/optim/optimizer.py", "clip_grad_norm_(owned, self.max_grad_norm)", "clip_grad_norm_(owned, 2 * self.max_grad_norm)"),
    Mutation("qsam/optim/optimizer.py", 'return -1.0 if self.param_groups[0].get("maximize", False) else 1.0', "return 1.0"),
    Mutation("qsam/optim/optimizer.py", 'self._refuse_to_lose_micro_batches("step")', "pass"),
    Mutation("qsam/optim/optimizer.py", 'scales=not (self.alternates and self._gradients_of == "perturbed")', "scales=True"),
    Mutation("qsam/optim/optimizer.py", "if self._may_skip is None or not wanted:", "if self._may_skip is None:"),
    Mutation("qsam/optim/optimizer.py", " and not _is_watched(p)]", "]"),
    Mutation("qsam/optim/optimizer.py", "perturbation.restore_floats()", "pass"),
    Mutation("qsam/optim/perturbation.py", "(step - self.options.start) % self.options.every == 0", "step % self.options.every == 0"),
    Mutation("qsam/optim/perturbation.py", "own = torch.clone if self.direction.looks_ahead else owned_copy", "own = owned_copy"),
    Mutation("qsam/optim/perturbation.py", "usable = torch.isfinite(self.norm) & (self.norm > 0)", "usable = torch.isfinite(self.norm)"),
    Mutation("qsam/optim/perturbation.py", "rho_of(a.parameter) * (1.0 if u is None else u)", "rho_of(a.parameter) * 1.0"),
    Mutation("qsam/optim/perturbation.py", 'return slot is not None or perturb == "all"', "return slot is not None"),
    Mutation("qsam/optim/checkpoint.py", '        if not entry:\n            entry["qsam_stateless"]', '        if False:\n            entry["qsam_stateless"]'),
    Mutation("qsam/optim/checkpoint.py", '            found["state"][index[id(s)]] = own', "            pass"),
    Mutation("qsam/optim/checkpoint.py", ', "qsam_kept": o.perturbation.kept}', "}"),
    Mutation("qsam/optim/checkpoint.py", "        if id(slot.parameter) not in loaded:", "        if False:"),
    Mutation("qsam/optim/checkpoint.py", '    _check_latents(o, saved["qsam_latent"])', "    pass"),
    Mutation("qsam/optim/squat.py", "self._steps_since_scales + 1 >= self.period", "self._steps_since_scales >= self.period"),
    Mutation("qsam/optim/squat.py", '            if self.schedule == "next_batch":\n                self._first_seen.clear()', "            pass"),
    Mutation("qsam/latents.py", "torch.clear_autocast_cache()  # the cache holds Q(w), and p will not", "pass"),
    Mutation("qsam/guard.py", "        if same is not True:\n            self._differs", "        if same is None:\n            self._differs"),
    Mutation("qsam/guard.py", "changed = [slot for slot, old in zip(slots, self._fingerprints, strict=True) if slot.fingerprint() != old]", "changed: list[Slot] = []"),
    Mutation("qsam/distributed.py", "            _broadcast(tensor, group)\n        _share", "            pass\n        _share"),
    Mutation("qsam/distributed.py", '_share_rates([g for g in groups if "qsam_scales" in g], group, device)', "pass"),
    Mutation("qsam/distributed.py", "return gradient if gradient.untyped_storage().nbytes() == gradient.nbytes else gradient.clone()", "return gradient"),
    Mutation("qsam/distributed.py", "values, counts = flat[: -len(order)] / group.size(),", "values, counts = flat[: -len(order)],"),
]  # fmt: skip


def nearest_tests(root: Path, file: str) -> list[str]:
    """Return the test file of a changed module, or else the tests of its folder: they are run first."""
    units = root / "tests" / Path(file).parent.as_posix().replace("qsam", "units", 1)
    own = units / f"test_{Path(file).stem}.py"
    found = own if own.is_file() else units
    return [found.relative_to(root).as_posix()] if found.is_dir() or found.is_file() else []


def run(
    root: Path, arguments: Sequence[str], mutation: Mutation | None = None, timeout: float = 3600
) -> dict[str, Any]:
    """Return what pytest says of a copy of ``root`` with one change.

    Args:
        root: A checkout.
        arguments: Of pytest: files, ``-k``, ``-m``.
        mutation: The change; None for the copy as it is.
        timeout: Seconds after which the run counts as caught: a change may make a loop endless.

    Returns:
        ``outcome`` ("caught" or "survived"), ``by`` (the test that failed first, or "timeout") and ``seconds``.

    Raises:
        RuntimeError: pytest could not run, or found no test.
    """
    began = time.monotonic()
    nearest = [] if mutation is None else nearest_tests(root, mutation.file)
    with tempfile.TemporaryDirectory(prefix="qsam-mutation-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy, ignore=LEFT_BEHIND)
        if mutation is not None:
            mutation.apply(copy)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            *nearest,
            *arguments,
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"outcome": "caught", "by": "timeout", "seconds": round(timeout)}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # pytest and the processes that its tests started
                process.communicate()
    if process.returncode not in OUTCOMES:
        raise RuntimeError(f"pytest ended with code {process.returncode}:\n{output}")
    failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    outcome = OUTCOMES[process.returncode]
    return {"outcome": outcome, "by": failed[0] if failed else None, "seconds": round(time.monotonic() - began, 1)}


def run_all(
    mutations: Sequence[Mutation],
    root: Path,
    arguments: Sequence[str],
    file: Path,
    jobs: int = 1,
    timeout: float = 3600,
) -> dict[str, Any]:
    """Run the tests once as they are and once per mutation, and write each outcome to ``file`` when it is known.

    Outcomes that ``file`` holds for the same arguments are kept and not run again.

    Returns:
        What ``file`` holds: ``arguments`` and ``outcomes``, one per mutation.

    Raises:
        RuntimeError: The tests fail without a change.
        ValueError: ``file`` was written with other arguments.
    """
    report: dict[str, Any] = {"arguments": list(arguments), "outcomes": {}}
    if file.exists():
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["arguments"] != list(arguments):
            raise ValueError(
                f"{file} was written with the arguments {report['arguments']}: give those, or another --out."
            )
    due = [mutation for mutation in mutations if str(mutation) not in report["outcomes"]]
    if due and (plain := run(root, arguments, None, timeout))["outcome"] != "survived":
        raise RuntimeError(f"the tests fail without a change ({plain['by']}): mend them first.")
    with ThreadPoolExecutor(jobs) as pool:
        for mutation, outcome in zip(due, pool.map(lambda m: run(root, arguments, m, timeout), due), strict=True):
            report["outcomes"][str(mutation)] = outcome
            part = file.with_suffix(".part")
            part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            part.replace(file)
            print(f"{outcome['outcome']:9} {outcome['seconds']:6} s  {mutation}", flush=True)
    return report


def main(words: Sequence[str] | None = None) -> int:
    """Run the mutations that the command line selects; return the number of those that survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("--select", default="", help="only mutations whose file or texts hold this word")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mutations.json")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds per mutation")
    parser.add_argument("arguments", nargs="*", default=["tests"], help="arguments of pytest, after --")
    options = parser.parse_args(words)
    chosen = [mutation for mutation in MUTATIONS if options.select in str(mutation)]
    report = run_all(chosen, ROOT, options.arguments, options.out, options.jobs, options.timeout)
    outcomes = {str(mutation): report["outcomes"][str(mutation)]["outcome"] for mutation in chosen}
    survivors = [name for name, outcome in outcomes.items() if outcome == "survived"]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} caught.", *survivors, sep="\n")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())

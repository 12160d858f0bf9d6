"""Run the core tests as other machines would run them: ``python -m tests.variations [pytest arguments]``.

Each variation sets torch's vector instructions, the number of threads, and whether a C compiler can be found. Every
value of one setting meets every value of the others. The core is every test whose numbers, or whose way to them, could
depend on these; files that only ask what is said or written are left out. One line per variation says how it ended,
followed by the tests that failed; the last line is the sum. ``make test-all`` runs this and keeps what it prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

CORE = (
    "tests/contract/test_3_exactly_q_of_w.py", "tests/contract/test_4_twins.py", "tests/contract/test_convolutions.py",
    "tests/contract/test_export.py", "tests/contract/test_first_data.py", "tests/contract/test_interactions.py",
    "tests/contract/test_noise.py", "tests/contract/test_precision.py",
    "tests/contract/test_state_determines_the_function.py", "tests/units/fused", "tests/units/measure",
    "tests/units/optim", "tests/units/quantizers", "tests/units/test_axis.py", "tests/units/test_batchnorm.py",
    "tests/units/test_functional.py", "tests/units/test_inputs.py", "tests/units/test_laws.py",
    "tests/units/test_scales.py",
)  # fmt: skip


class Variation(NamedTuple):
    """One machine to imitate; ``capability`` is torch's ATEN_CPU_CAPABILITY, or "native" for its own choice."""

    capability: str
    threads: int
    compiler: bool

    def __str__(self) -> str:
        compiler = "a C compiler" if self.compiler else "no C compiler"
        return f"{self.capability} instructions, {self.threads} thread{'s'[: self.threads - 1]}, {compiler}"


VARIATIONS = (
    Variation("default", 1, compiler=True),
    Variation("default", 2, compiler=False),
    Variation("avx2", 1, compiler=False),
    Variation("avx2", 2, compiler=True),
    Variation("native", 1, compiler=True),
    Variation("native", 2, compiler=False),
)


def environment(variation: Variation, folder: str) -> dict[str, str]:
    """Return the environment of a variation. Its cache is ``folder``, so that it finds no kernels of another one."""
    kept = {key: value for key, value in os.environ.items() if key not in {"ATEN_CPU_CAPABILITY", "CC"}}
    kept |= {"QSAM_TEST_THREADS": str(variation.threads), "XDG_CACHE_HOME": folder}
    if variation.threads > 1:  # pytest's processes share the cores: a thread that spins keeps another from its work
        kept["OMP_WAIT_POLICY"] = "PASSIVE"
    if variation.capability != "native":
        kept["ATEN_CPU_CAPABILITY"] = variation.capability
    if not variation.compiler:
        kept["PATH"] = folder  # which holds no program at all
    return kept


def main(arguments: list[str]) -> int:
    """Run all variations; return the number of those that failed."""
    failed, began = 0, time.monotonic()
    for variation in VARIATIONS:
        with tempfile.TemporaryDirectory(prefix="qsam-variation-") as folder:
            command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *CORE, *arguments]
            run = subprocess.run(
                command, check=False, env=environment(variation, folder), capture_output=True, text=True
            )
        summary = (run.stdout.strip() or run.stderr.strip()).splitlines()[-1].strip("= ")
        print(f"{variation}: {summary}", flush=True)
        if run.returncode:
            failed += 1
            if not re.search(r"^(?:FAILED|ERROR) ", run.stdout, re.MULTILINE):  # a crash, of which pytest says nothing
                print(f"ended with code {run.returncode}: {run.stderr[-2000:]}", flush=True)
            print(*re.findall(r"^(?:FAILED|ERROR) .*$", run.stdout, re.MULTILINE), sep="\n", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(VARIATIONS) - failed} of {len(VARIATIONS)} variations are green, in {seconds / 60:.1f} minutes")
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

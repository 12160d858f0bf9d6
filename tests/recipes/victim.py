"""A process that runs the recipe in copies of itself, which may be killed: a fork costs milliseconds, an import seconds.

It reads one order a line from its standard input, forks, answers with the child's process id, waits for the child, and
answers with how it ended (as `os.waitpid` says it).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def serve() -> None:
    """Answer orders until the input ends. Nothing here may start a thread: a child has only the one that forked."""
    import matplotlib.figure  # noqa: F401  (what the recipe imports when it needs it)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification  # noqa: F401

    from recipes.bert_glue import main

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_the_recipe(order, main)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def _become_the_recipe(order: dict[str, Any], main: Any) -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    if order["last_byte"] is not None:  # the kernel ends the process in the middle of the write that goes beyond
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["last_byte"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    os._exit(main(order["arguments"]))


class Victims:
    """The other side: starts the recipe, again and again, in processes that may be killed.

    Args:
        folder: Where it may run.
    """

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join([str(ROOT), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.victim"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, arguments: list[str], last_byte: int | None = None) -> int:
        """Start the recipe; return its process id.

        Args:
            arguments: Its command line.
            last_byte: Kill it as soon as it writes a file beyond this many bytes.
        """
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({"arguments": arguments, "last_byte": last_byte}) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Wait for its end: the exit code, or the negative number of the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self._answer()))

    def close(self) -> None:
        """End the server, and the recipe if it runs."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def _answer(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server of victims has died"
        return line


if __name__ == "__main__":
    serve()

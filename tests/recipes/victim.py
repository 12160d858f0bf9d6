"""A process that runs the recipe in copies of itself, which may be killed: a fork costs milliseconds, an import seconds.

It reads an order from its standard input, forks, and answers with the child's process id; on the word `kill` it kills
the child, on `wait` it does not, and answers with how it ended (as `os.waitpid` says it). Only the parent kills, for a
child that it has not waited for keeps its number to itself.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def serve() -> None:
    """Answer orders until the input ends. Nothing here may start a thread: a child has only the one that forked."""
    import torch
    from tqdm import tqdm

    from recipes.bert_glue import main

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or it starts a thread
    silence = os.open(os.devnull, os.O_RDWR)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(silence, 1)
    main(json.loads(sys.stdin.readline()))  # what it fills are caches
    assert threading.active_count() == 1, "a thread would not live on in a child"
    print("ready", file=answers, flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_the_recipe(order, main)
        print(child, file=answers, flush=True)
        if sys.stdin.readline().strip() != "wait":
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], file=answers, flush=True)


def _become_the_recipe(order: dict[str, Any], main: Any) -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 2):
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
        arguments: A command line that is run first: what it leaves in caches, the victims need not make again.
    """

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        path = os.pathsep.join([str(ROOT), *sys.path])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.victim"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._ask(json.dumps(arguments)) == "ready\n"

    def start(self, arguments: list[str], last_byte: int | None = None) -> int:
        """Start the recipe; return its process id.

        Args:
            arguments: Its command line.
            last_byte: Kill it as soon as it writes a file beyond this many bytes.
        """
        return int(self._ask(json.dumps({"arguments": arguments, "last_byte": last_byte})))

    def wait(self) -> int:
        """Wait for its end: the exit code, or the negative number of the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self._ask("wait")))

    def kill(self) -> int:
        """Send SIGKILL; return what :meth:`wait` does, for it may have ended before."""
        return os.waitstatus_to_exitcode(int(self._ask("kill")))

    def close(self) -> None:
        """End the server, and the recipe if it runs."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def _ask(self, order: str) -> str:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(order + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        assert line, "the server of victims has died"
        return line


if __name__ == "__main__":
    serve()

"""Processes that begin with the slow imports made: forked from one server, which has made them once.

To import torch and transformers takes longer than most of what the tests run in processes of their own.
"""

import importlib.util
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "blur_optim",
]
#: What scripts and Trainers import besides.
_OF_SCRIPTS = ["rich.progress", "transformers.models.llama.modeling_llama", "transformers.trainer", "safetensors.torch"]
_is_for_scripts = False


def expect_scripts() -> None:
    """Let the server import what scripts need too. Has no effect once it has started."""
    global _is_for_scripts
    _is_for_scripts = importlib.util.find_spec("transformers") is not None


def forking_context() -> Any:
    """A context of ``multiprocessing`` whose processes come from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD + _OF_SCRIPTS * _is_for_scripts)
    return context


def spawn(world_size: int, function: Callable[..., None], *args: Any, daemon: bool = True) -> list[BaseProcess]:
    """Start ``function(rank, *args)`` on each rank, and return the processes.

    Args:
        daemon: they end with this process, and have no children.
    """
    context = forking_context()
    processes = [context.Process(target=function, args=(rank, *args), daemon=daemon) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


class Script:
    """A Python script in one process, or in several that meet as under torchrun; what it prints goes to ``output``.

    Args:
        script: its path.
        arguments: its command line.
        output: a file.
        processes: more than one get the environment that torchrun gives; ``{"RANK": ...}`` and so on.
        environment: more of it.
        daemon: it has no children.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        output: Path,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        daemon: bool = True,
    ) -> None:
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        more = {**(environment or {}), **({} if processes == 1 else _meeting_place(processes))}
        what = str(script), list(arguments), str(output), more, processes
        self.processes = spawn(processes, _run, *what, daemon=daemon)

    def printed(self) -> str:
        return self.output.read_text()

    def wait(self, timeout: float = 300) -> list[int | None]:
        """Wait for the end, and return the exit codes; None where there is no end."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def finish(self) -> str:
        """Wait for the end, which has to be a good one, and return what was printed."""
        codes = self.wait()
        assert codes == [0] * len(codes), self.printed()
        return self.printed()


def _meeting_place(processes: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"} | {
        "MASTER_PORT": str(port)
    }


def _run(rank: int, script: str, arguments: list[str], output: str, more: dict[str, str], processes: int) -> None:
    with open(output, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **more}
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")

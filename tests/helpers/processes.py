"""Several processes on this machine, joined by torch.distributed over gloo, as on several machines."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def in_processes(function: Callable[..., Any], *arguments: Any, number: int = 2) -> list[Any]:
    """What `function(rank, *arguments)` returns in each process, all in one group; an error in one is raised here.

    The function is one of a file's own: other processes find it there, as a test's module has no name that they could import.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = (inspect.getfile(function), function.__name__)
        torch.multiprocessing.spawn(_run, args=(number, Path(folder), *found, arguments), nprocs=number)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(number)]


def _run(rank: int, number: int, folder: Path, file: str, name: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    try:
        spec = importlib.util.spec_from_file_location("called_in_processes", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where Dynamo looks for it
        spec.loader.exec_module(module)
        torch.save(getattr(module, name)(rank, *arguments), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()

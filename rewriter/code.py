"""Code for a rewritten graph, by Inductor: for layers that are alike, once; and where it is kept."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule

from rewriter.passes.graph.regions import share_layers

log = logging.getLogger(__name__)


def generate_code(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A callable that computes what the graph does, for inputs like these.

    Layers share their code where there are no gradients; where the compiler cannot take subgraphs, the graph is compiled as it
    is.
    """
    from torch._inductor.compile_fx import compile_fx

    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    shared = module if learns else _copy(module)
    if not learns:
        try:
            if share_layers(shared):
                compiled: Any = compile_fx(shared, list(example_inputs))
                return compiled
        except Exception as error:
            log.info("layers are compiled one by one: %s: %s", type(error).__name__, error)
    whole: Any = compile_fx(module, list(example_inputs))
    return whole


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Inside, Inductor looks for code in this folder, and keeps what it makes there; in its own one where there is none.

    torch's artifacts of a compilation (`torch.compiler.save_cache_artifacts`) hold no machine code for CPUs, which takes most of
    the time; the folder does.
    """
    if folder is None:
        yield
        return
    with _lock:
        if not _folders:
            _folders.append(os.environ.get(_VARIABLE))
        _folders.append(str(folder))
        os.environ[_VARIABLE] = str(folder)
    try:
        yield
    finally:
        with _lock:
            _folders.reverse()
            _folders.remove(str(folder))
            _folders.reverse()
            present = _folders[-1]
            if len(_folders) == 1:
                _folders.clear()
            if present is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = present


_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_folders: list[str | None] = []
"""What the variable was before, and the folders of the calls that run now, in several threads perhaps: the last one holds."""
_lock = threading.Lock()


def _copy(module: GraphModule) -> GraphModule:
    """Another graph over the same submodules."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)

"""Code for a rewritten graph, by Inductor: for layers that are alike, once; and where it is kept."""

from __future__ import annotations

import logging
import os
import threading
import weakref
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
from rewriter.passes.graph.repeated_calls import tracing_state

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


class CodeOfSizes:
    """A graph whose code is made for each set of sizes that it is called with, and called directly.

    `torch.compile` would read the graph as Python first, which takes longer than all passes, and ask its guards at each call.
    Most inputs are weights and a cache, the same tensors as at the last call: they are compared by identity, and only the others
    are looked at. That the weights are still of the same sizes and types is for the caller to know.

    Args:
        module: takes tensors, which it may write to, and has no gradients.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self._code: dict[Any, Callable[..., Any]] = {}
        self._last: list[Callable[[], Tensor | None]] = []
        self._kinds: list[Any] = []
        self._first: tuple[int, ...] = ()  # of each input, the first one that is the same tensor
        self._state: tuple[Any, ...] = ()
        self._present: Callable[..., Any] | None = None  # the code of the last call

    def __call__(self, *tensors: Tensor) -> Any:
        if len(self._last) != len(tensors):
            self._last, self._kinds, self._first = [_none] * len(tensors), [None] * len(tensors), (0,) * len(tensors)
        changed = [n for n, (tensor, last) in enumerate(zip(tensors, self._last, strict=True)) if last() is not tensor]
        for n in changed:
            self._last[n], kind = weakref.ref(tensors[n]), _kind(tensors[n])
            if kind != self._kinds[n]:
                self._kinds[n], self._present = kind, None
        ids = list(map(id, tensors))
        if len(set(ids)) != len(set(self._first)) or any(self._first.count(self._first[n]) > 1 for n in changed):
            self._first, self._present = tuple(map(ids.index, ids)), None
        if self._state != tracing_state():
            self._state, self._present = tracing_state(), None
        if self._present is None:  # only now: hundreds of sizes are slow to hash
            key = (*self._kinds, self._first, self._state)
            if key not in self._code:
                self._code[key] = self._compiled(tensors)
            self._present = self._code[key]
        return self._present(*tensors)

    def _compiled(self, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        mode = FakeTensorMode(shape_env=ShapeEnv())  # Inductor keeps no code where there is no context with such a one
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            code: Any = compile_fx(self.module, [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors])
        return code


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device)


def _none() -> None:
    """In the place of a reference to a tensor."""


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

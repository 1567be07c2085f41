"""Code for a rewritten graph, by Inductor: for layers that are alike, once; and where it is kept."""

from __future__ import annotations

import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from typing import cast
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch import nn
from torch._dynamo.source import LocalSource
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Interpreter
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext
from torch.fx.passes.split_module import split_module

from rewriter.kernels import context_parallel
from rewriter.passes.graph.regions import FEWEST
from rewriter.passes.graph.regions import share_layers
from rewriter.passes.graph.repeated_calls import tracing_state
from rewriter.passes.lower import sharded_parameters
from rewriter.passes.lower.sharded_parameters import gathers_parameters
from rewriter.passes.lower.sharded_parameters import overlap
from rewriter.sharding import arrived
from rewriter.sharding import is_dtensor

log = logging.getLogger(__name__)


def generate_code(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A callable that computes what the graph does, for inputs like these.

    Layers share their code where there are no gradients; where the compiler cannot take subgraphs, the graph is compiled as it
    is.
    """

    if any(_is_distributed(node) for node in module.graph.nodes):
        return _compiled_in_pieces(module, example_inputs, _compiled_whole)
    return (_compiled_whole if learns(example_inputs) else _compiled_by_layer)(module, example_inputs)


def recomputing(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph as it is, without generated code, where the backward gathers parameters again that are in pieces."""

    def as_it_is(part: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.compile_fx import graph_returns_tuple
        from torch._inductor.compile_fx import make_graph_return_tuple

        if not graph_returns_tuple(part):
            return make_graph_return_tuple(part, inputs, as_it_is)
        compiler = aot_autograd(fw_compiler=_unchanged, partition_fn=min_cut_rematerialization_partition)
        return compiler(part, list(inputs))

    return _compiled_in_pieces(module, example_inputs, as_it_is)


def _unchanged(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return module.forward


def learns(inputs: Sequence[Any]) -> bool:
    """Whether there will be gradients."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _compiled_by_layer(
    module: GraphModule, example_inputs: Sequence[Any], *, fewest: int = FEWEST
) -> Callable[..., Any]:
    """`fewest` and more layers that are alike share their code; where the compiler cannot take that, each has its own. Without
    gradients."""
    shared = copy_of(module)
    try:
        if share_layers(shared, example_inputs, fewest=fewest):
            return _compiled_whole(shared, example_inputs)
    except Exception as error:
        log.info("layers are compiled one by one: %s: %s", type(error).__name__, error)
    return _compiled_whole(module, example_inputs)


def _is_distributed(node: Node) -> bool:
    """Whether a node communicates with other processes: by itself, or as it takes or gives DTensors (tensor parallelism)."""
    if node.target in context_parallel.OPERATORS:
        return True
    values = pytree.tree_leaves([n.meta.get("val") for n in (node, *node.all_input_nodes)])
    return node.op in ("call_function", "call_method") and any(is_dtensor(value) for value in values)


def _compiled_in_pieces(
    module: GraphModule, example_inputs: Sequence[Any], compiled: Callable[[GraphModule, Sequence[Any]], Any]
) -> Callable[..., Any]:
    """What stands between operators on DTensors is compiled; these run as they are, and communicate.

    Inductor (torch 2.13) takes DTensors in graphs of fixed sizes alone: `torch.compile(model, dynamic=True)` ends in a
    RecursionError, and so does its second length without `dynamic`.
    """
    if any("recompute" in node.meta and _is_distributed(node) for node in module.graph.nodes):
        warnings.warn(
            "gradient checkpoints recompute less over weights that are spread over processes (parallelize_module): what goes "
            "into and comes out of the spread operators is kept",
            stacklevel=2,
        )
    place = 0
    places: dict[Node, int] = {}
    last = False
    for node in module.graph.nodes:
        if "val" in node.meta:  # by this name parts are given the symbols of sizes that they need
            node.meta["example_value"] = node.meta["val"]
        distributed = _is_distributed(node)
        place += distributed != last
        places[node], last = place, distributed
    parts: Any = split_module(module, module, places.__getitem__, keep_original_order=True)
    mode = torch._guards.detect_fake_mode([node.meta.get("val") for node in module.graph.nodes])
    assert mode is not None
    fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in example_inputs]
    _Pieces(parts, mode, compiled).run(*fakes)
    return cast(Callable[..., Any], parts)


class _Piece(nn.Module):
    """Code of a part; what a collective before it gives is waited for, as the code reads memory."""

    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.code = code

    def forward(self, *inputs: Any) -> Any:
        return self.code(*map(arrived, inputs))


class _Pieces(Interpreter):
    """Runs the parts of a graph over fake tensors, and puts code in the place of those that hold no DTensors."""

    def __init__(
        self, module: GraphModule, mode: FakeTensorMode, compiled: Callable[[GraphModule, Sequence[Any]], Any]
    ) -> None:
        super().__init__(module)
        self.mode, self.compiled = mode, compiled

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = self.fetch_attr(target)
        with self.mode:
            results = part(*args, **kwargs)
        if not any(_is_distributed(node) for node in part.graph.nodes):
            setattr(self.module, target, _Piece(self.compiled(part, args)))
        return results


def _compiled_whole(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    options = {"post_grad_custom_pre_pass": _Overlap()} if gathers_parameters(module.graph) else None
    compiled: Any = compile_fx(module, list(example_inputs), config_patches=options)
    return compiled


class _Overlap(CustomGraphPass):
    """Inductor's graphs of a model whose parameters are gathered layer by layer."""

    def __call__(self, graph: Graph) -> None:
        overlap(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((sharded_parameters.__file__,))


@dataclass(frozen=True)
class _Code:
    """Code, and for which sizes of the inputs at these places it is: where the guards hold."""

    call: Callable[..., Any]
    shape_env: ShapeEnv
    places: Sequence[int]
    guards: str | None

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        given = [tensors[n] for n in self.places]
        return self.guards is None or self.shape_env.evaluate_guards_expression(self.guards, given)


_FEWEST_OF_A_STEP = 8
"""Layers that share their code in a graph of fixed sizes, which is that of one token: a call of a layer costs some 30 us there,
4 % of a step of a model of four small layers (`bench/never_slower.py --only "llama decode"`)."""


class CodeOfSizes:
    """A graph whose code is made for each set of sizes that it is called with, and called directly.

    `torch.compile` would read the graph as Python first, which takes longer than all passes, and ask its guards at each call.
    Most inputs are weights and a cache, the same tensors as at the last call: they are compared by identity, and only the others
    are looked at. That the weights are still of the same sizes and types is for the caller to know.

    Args:
        module: takes tensors, which it may write to, and has no gradients.
        any_size: of inputs, by their place, the dimensions that may be of any size in one code for all, but for sizes of 0 and 1,
            which have code of their own.
        first_alone: whether the first sizes have code of their own, in which all are numbers, and only others share one.
    """

    def __init__(
        self,
        module: GraphModule,
        any_size: Mapping[int, Collection[int]] = MappingProxyType({}),
        *,
        first_alone: bool = False,
    ) -> None:
        self.module, self.any_size, self.first_alone = module, any_size, first_alone
        self._code: dict[Any, list[_Code]] = {}
        self._alone: dict[Any, tuple[list[Any], _Code]] = {}
        self._last: list[Callable[[], Tensor | None]] = []
        self._kinds: list[Any] = []
        self._first: tuple[int, ...] = ()  # of each input, the first one that is the same tensor
        self._state: tuple[Any, ...] = ()
        self._present: Callable[..., Any] | None = None  # the code of the last call
        self._one_at_a_time = threading.Lock()  # threads may have a decoder in common, and each its cache

    def __call__(self, *tensors: Tensor) -> Any:
        with self._one_at_a_time:
            code = self._code_for(tensors)
        return code(*tensors)

    def _code_for(self, tensors: Sequence[Tensor]) -> Callable[..., Any]:
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
            self._present = self._fitting(tensors).call
        return self._present

    def _fitting(self, tensors: Sequence[Tensor]) -> _Code:
        """Code for these tensors; it is made if there is none."""
        if self.first_alone:
            if (self._first, self._state) not in self._alone:
                self._alone[self._first, self._state] = list(self._kinds), self._compiled(tensors, {})
            kinds, code = self._alone[self._first, self._state]
            if kinds == self._kinds:
                return code
        kinds = [_kind_of_any_size(k, self.any_size.get(n, ())) for n, k in enumerate(self._kinds)]
        known = self._code.setdefault((*kinds, self._first, self._state), [])
        fitting = next((code for code in known if code.fits(tensors)), None)
        if fitting is None:
            fitting = self._compiled(tensors, self.any_size)
            known.append(fitting)
        return fitting

    def _compiled(self, tensors: Sequence[Tensor], any_size: Mapping[int, Collection[int]]) -> _Code:
        mode = FakeTensorMode(shape_env=ShapeEnv())  # Inductor keeps no code where there is no context with such a one
        assert mode.shape_env is not None
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            inputs = [
                mode.from_tensor(tensor, symbolic_context=_symbols_for(tensor, any_size.get(n, ())))
                for n, tensor in enumerate(tensors)
            ]
            if any_size:
                # What code assumes of tensors' sizes is not kept with it: where it is found, no one else would say.
                with mode:
                    Interpreter(self.module).run(*inputs)
            with torch._inductor.config.patch(size_asserts=False):  # which are looked at here, once for all
                call = _compiled_by_layer(self.module, inputs, fewest=FEWEST if any_size else _FEWEST_OF_A_STEP)
        places = sorted(any_size)
        return _Code(call, mode.shape_env, places, all_guards(mode.shape_env, [inputs[n] for n in places]))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device)


def _kind_of_any_size(kind: tuple[Any, ...], dimensions: Collection[int]) -> tuple[Any, ...]:
    """Of a tensor's kind, what decides between codes for any size of these dimensions."""
    if not dimensions:
        return kind
    of_type, sizes, _, *rest = kind
    return (of_type, tuple(None if n in dimensions and size > 1 else size for n, size in enumerate(sizes)), *rest)


def _symbols_for(tensor: Tensor, dimensions: Collection[int]) -> StatelessSymbolicContext:
    """These dimensions are symbols, the same one where they are of the same size, and the others numbers."""
    kinds = [DimDynamic.DUCK if n in dimensions else DimDynamic.STATIC for n in range(tensor.dim())]
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def _none() -> None:
    """In the place of a reference to a tensor."""


def _guards_of(shape_env: ShapeEnv, symints: Sequence[torch.SymInt]) -> list[Any]:
    """In the place of `ShapeEnv.get_pruned_guards`, which leaves out those of sizes that have turned out to be numbers."""
    own = {symbol for size in symints for symbol in size.node._expr.free_symbols}
    return [guard for guard in shape_env.guards if guard.expr.free_symbols <= own]


def all_guards(
    shape_env: ShapeEnv, placeholders: Sequence[Any], *, guards: Any = None, ignore_static: bool = False
) -> str | None:
    """What is assumed of sizes, as text for `ShapeEnv.evaluate_guards_expression`; None where that is nothing.

    In the place of `ShapeEnv.produce_guards_expression` (torch 2.13), which joins guards without brackets, so that an `or` in one
    lets go of the others, and leaves out that a symbol has turned out to be a number. Inductor keeps that text with its code.
    """
    sources = [LocalSource(f"t{n}") for n in range(len(placeholders))]
    found = shape_env.produce_guards(placeholders, sources, guards=guards, ignore_static=False)
    return " and ".join(f"({guard})" for guard in found) or None


@contextmanager
def sizes_of_one_too() -> Iterator[None]:
    """Inside, sizes of 1 are treated as others are.

    torch calls that oblivious of sizes, and exports models so: where one way of computing is right for all sizes, and another
    for 1 alone, it takes the first, and what it assumes besides becomes a guard. Inductor's code is kept by its settings, of
    which this is none; a note that Inductor writes to packages alone, and counts as a setting, keeps both kinds of code apart.
    The strides of a view are asked for in this way by torch's own parameter, which Inductor sets for other symbols only; it
    changes nothing elsewhere.
    """
    with (
        mock.patch.object(ShapeEnv, "produce_guards_expression", all_guards),
        mock.patch.object(ShapeEnv, "get_pruned_guards", _guards_of),
        mock.patch.object(fake_impls, "_compute_stride", _oblivious(fake_impls._compute_stride)),
        torch.fx.experimental._config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        torch._inductor.config.patch({"aot_inductor.metadata": {"sizes": "one, too; all guards"}}),
    ):
        yield


def _oblivious(strides: Callable[..., Any]) -> Callable[..., Any]:
    return lambda old_shape, old_stride, new_shape, size_oblivious=True: strides(old_shape, old_stride, new_shape, True)


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


def copy_of(module: GraphModule) -> GraphModule:
    """Another graph over the same submodules."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)

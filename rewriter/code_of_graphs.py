"""Code for the graphs of one model: that of several rows is made for any number of them, and serves one row, too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from rewriter.code import copy_of
from rewriter.code import generate_code
from rewriter.code import learns
from rewriter.code import sizes_of_one_too
from rewriter.passes.graph.repeated_calls import tracing_state
from rewriter.passes.graph.special_case import as_special_case
from rewriter.passes.graph.special_case import can_be_compared
from rewriter.passes.graph.special_case import symbols_of

log = logging.getLogger(__name__)


class CodeOfGraphs:
    """Code for the graphs of one model, one for each kind of call.

    torch traces one row by itself, as sizes of 1 are numbers to it. Where that graph is the one of several rows but for the
    number, it has no code of its own, if there are no gradients.
    """

    def __init__(self) -> None:
        self._of_any_size: list[_OfAnySize] = []

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A callable that computes what the graph does, for inputs like these.

        To be called as a backend of `torch.compile` is: within a context that holds the symbols of the inputs' sizes.
        """
        context = torch._guards.TracingContext.try_get()
        shape_env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
        if shape_env is None or learns(example_inputs):
            return generate_code(module, example_inputs)
        serves = None
        try:
            comparable = can_be_compared(module.graph)
            if comparable:
                found = (known.for_graph(module.graph, shape_env) for known in self._of_any_size)
                serves = next(filter(None, found), None)
        except Exception as error:  # sizes such as `rows / (rows - 1)` cannot be read for one row
            log.info("graphs are not compared: %s: %s", type(error).__name__, error)
            comparable = False
        if serves is not None or not comparable:
            return serves or generate_code(module, example_inputs)
        symbols = _Symbols.of_inputs(module.graph, shape_env)
        code = None if symbols is None else self._made(module, symbols)
        if code is None or not code.became_guards(shape_env):
            return generate_code(module, example_inputs)
        self._of_any_size.append(code)
        return code.call

    @staticmethod
    def _made(module: GraphModule, symbols: _Symbols) -> _OfAnySize | None:
        graph = copy_of(module).graph
        try:
            return _OfAnySize(graph, symbols, symbols.generate_code(module))
        except Exception as error:
            log.info("code is made for several rows alone: %s: %s", type(error).__name__, error)
            return None


class _Symbols:
    """The symbols of a graph's inputs anew, in a context of their own, where each may also be 1.

    A context of their own, because what has once been asked of a symbol stays in caches of the old one: that it is more than 1
    would be taken for granted there.

    Args:
        values: what the graph's inputs are, fake tensors and sizes of `shape_env`.
        shape_env: the context in which the graph was traced; no size is below 2 there.
    """

    def __init__(self, values: list[Any], shape_env: ShapeEnv) -> None:
        self.shape_env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self.shape_env)
        self._own: dict[sympy.Symbol, sympy.Symbol] = {}
        for symbol in sorted(symbols_of(values), key=str):
            within = shape_env.var_to_range[symbol]
            lower = sympy.Integer(1) if within.lower == 2 else within.lower
            self._own[symbol] = self.shape_env.create_symbol(
                int(shape_env.backed_var_to_val[symbol]),
                ConstantSource(f"any_{symbol}"),
                DimDynamic.DYNAMIC,
                StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(lower, within.upper)),
                do_not_specialize_zero_one=True,
            )
        self._values = [self._anew(value) for value in values]

    @staticmethod
    def of_inputs(graph: Graph, shape_env: ShapeEnv) -> _Symbols | None:
        """None where there are no symbols, or they are other than sizes of ordinary tensors."""
        values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
        symbols = symbols_of(values)
        if not symbols or not all(map(_is_ordinary, values)) or not symbols <= shape_env.backed_var_to_val.keys():
            return None
        return _Symbols(values, shape_env)

    def generate_code(self, module: GraphModule) -> Callable[..., Any]:
        with torch._guards.tracing(torch._guards.TracingContext(self._mode)), sizes_of_one_too():
            return generate_code(module, self._values)

    def guards(self) -> list[sympy.Basic]:
        """What was assumed of the sizes, in the graph's symbols."""
        return [sympy.sympify(guard.expr).xreplace(self._back()) for guard in self.shape_env.guards]

    def ranges(self) -> dict[sympy.Symbol, ValueRanges[Any]]:
        """Between which numbers each of the graph's symbols may be."""
        return {symbol: self.shape_env.var_to_range[own] for symbol, own in self._own.items()}

    def _back(self) -> dict[sympy.Basic, sympy.Basic]:
        return {own: symbol for symbol, own in self._own.items()}

    def _anew(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            expression = value.node.expr.xreplace(self._own)
            return self.shape_env.create_symintnode(expression, hint=int(value.node.hint))
        if not isinstance(value, Tensor):
            return value
        sizes, strides = ([self._anew(n) for n in numbers] for numbers in (value.shape, value.stride()))
        with self._mode:
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


class _OfAnySize:
    """Code that was made with symbols for sizes, and what it assumes of them.

    Args:
        graph: that it computes.
        symbols: those of its inputs, after it was made.
        call: the code.
    """

    def __init__(self, graph: Graph, symbols: _Symbols, call: Callable[..., Any]) -> None:
        self.call = call
        self._graph = graph
        self._state, self._settings = tracing_state(), GlobalStateGuard()
        self._guards, self._ranges = symbols.guards(), symbols.ranges()

    def became_guards(self, shape_env: ShapeEnv) -> bool:
        """Whether what the code assumes is of its own graph's symbols alone, and is asked at each call from now on."""
        if any(guard.free_symbols - self._ranges.keys() for guard in self._guards):
            return False
        return all(bool(shape_env.evaluate_expr(guard)) for guard in self._guards)

    def for_graph(self, graph: Graph, shape_env: ShapeEnv) -> Callable[..., Any] | None:
        """The same code, called as another graph is; None where it does not serve that one.

        Args:
            shape_env: of the other graph; what the code assumes becomes guards there.
        """
        if self._state != tracing_state() or not self._settings.check():
            return None
        case = as_special_case(graph, self._graph)
        if case is None or any(guard.free_symbols - case.sizes.keys() for guard in self._guards):
            return None
        if not all(shape_env.evaluate_expr(guard.xreplace(case.sizes)) for guard in self._guards):
            return None
        # Only now: guards narrow ranges.
        if not all(self._is_within(symbol, size, shape_env) for symbol, size in case.sizes.items()):
            return None
        call = self.call
        return lambda *given: call(*case.arguments(given))

    def _is_within(self, symbol: sympy.Symbol, size: sympy.Expr, shape_env: ShapeEnv) -> bool:
        """Whether a symbol of the code may be this size, a number or a symbol of the other graph."""
        known, own = self._ranges[symbol], shape_env.var_to_range.get(size)
        if size.is_number:
            return bool(known.lower <= size <= known.upper)
        return own is not None and bool(known.lower <= own.lower and own.upper <= known.upper)


def _is_ordinary(value: Any) -> bool:
    """Whether a fake tensor is told by its sizes, strides, type and device."""
    if isinstance(value, Tensor):
        return type(value) is FakeTensor and value.layout == torch.strided and value.storage_offset() == 0
    return isinstance(value, (int, torch.SymInt))

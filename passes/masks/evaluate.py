"""The value of an index expression, as tensors: in a graph that is traced, or for a check."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from collections.abc import Mapping

import torch
from rewriter.kernels import FOREVER
from rewriter.passes.masks.expression import LARGEST
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.intervals import BATCH
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import PLACE
from torch import Tensor
from torch.fx import Node

OfForm = Callable[[Apply, Callable[[Expression], Tensor], Mapping[int, Tensor]], Tensor]
_OF_FORMS: dict[str, OfForm] = {}
"""Values of names that forms use, which are rows: from the application, the values of expressions, and the grid."""


def evaluates(*names: str) -> Callable[[OfForm], OfForm]:
    """Registers what computes the value of these names."""

    def register(function: OfForm) -> OfForm:
        _OF_FORMS.update(dict.fromkeys(names, function))
        return function

    return register


def materialize(expression: Expression, env: Mapping[Node, object], axes: Mapping[int, Tensor]) -> Tensor:
    """The expression's value over a grid.

    Args:
        env: values of the data nodes and symbolic sizes.
        axes: index tensors that broadcast to the grid, the key's along the last dimension; 0 for axes left out.
    """

    def value(e: Expression) -> Tensor:
        if isinstance(e, Const):
            fits = not isinstance(e.value, float) or not abs(e.value) < math.inf or abs(e.value) <= _LARGEST_FP32
            return torch.full((), e.value, dtype=_DTYPES[type(e.value)] if fits else torch.float64)
        if isinstance(e, Size):
            return torch.full((), env[e.node], dtype=torch.int64)  # type: ignore[call-overload]
        if isinstance(e, Axis):
            return axes[e.dim] if e.dim in axes else torch.full((), 0, dtype=torch.int64)
        if isinstance(e, Element):
            tensor = env[e.node]
            assert isinstance(tensor, Tensor)
            # Constant indices select, from the last dimension on: a traced index of no dimensions would be read as a number.
            places = [substitute(i, {KEY: Axis(PLACE)}) if PLACE in axes else i for i in e.indices]
            for dim in reversed(range(len(places))):
                if isinstance(place := places[dim], Const):
                    tensor = tensor.select(dim, int(place.value))
                    del places[dim]
            return tensor[tuple(torch.atleast_1d(value(place)) for place in places)] if places else tensor
        assert isinstance(e, Apply)
        if e.name == "cast":
            return value(e.args[0]).to(e.args[1].dtype)  # type: ignore[attr-defined]
        if e.name in ("add", "mul"):  # a number among the operands keeps its precision, and leaves them their type
            return _OPERATIONS[e.name](*(a.value if isinstance(a, Const) else value(a) for a in e.args))
        if e.name in _OF_FORMS:
            return _OF_FORMS[e.name](e, value, axes)
        return _OPERATIONS[e.name](*(value(a) for a in e.args))

    return value(expression)


_LARGEST_FP32 = torch.finfo(torch.float32).max


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float32}


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "quotient": lambda m, n: torch.div(m, n, rounding_mode="floor"),
    "remainder": torch.remainder,
    "join": lambda i, j, n: i * n + j,
    "abs": torch.abs,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
    "number": lambda x: x.to(torch.int64),
    "max": torch.maximum,
    "min": torch.minimum,
}


def key_grid(
    num_batch: int, num_heads: int, num_keys: int, device: torch.device, first: Tensor | None = None
) -> dict[int, Tensor]:
    """The indices of all keys, for `key_bounds` and `bias_tensor`.

    Args:
        first: integer `[1]`, the index of the first key where a call continues a text; what a call is given has its own
            places, from 0 on.
    """
    place = torch.arange(num_keys, device=device)[None, None, :]
    grid = {
        BATCH: torch.arange(num_batch, device=device)[:, None, None],
        HEAD: torch.arange(num_heads, device=device)[None, :, None],
        KEY: place if first is None else place + first,
    }
    return grid if first is None else {**grid, PLACE: place}


def key_bounds(expression: Expression, env: Mapping[Node, object], grid: Mapping[int, Tensor]) -> Tensor:
    """A start, end or segment of an `Interval`: int32 `[B|1, Hkv|1, K]`, in row space."""
    value = vector(materialize(expression, env, grid), grid)
    if _is_data(expression):
        value = torch.where(value > LARGEST, FOREVER, torch.where(value < -LARGEST, -LARGEST, value))
    return value.to(torch.int32)


def _is_data(expression: Expression) -> bool:
    """Whether an integer's value, and not only the choice between values, is data."""
    if isinstance(expression, Apply):
        values = expression.args[1:] if expression.name == "where" else expression.args
        return expression.name not in _OF_FORMS and any(_is_data(a) for a in values)
    return isinstance(expression, Element)


def bias_tensor(bias: Expression, env: Mapping[Node, object], grid: Mapping[int, Tensor]) -> Tensor:
    """The key bias `[B|1, Hkv|1, K]`; fp32 where it is made from integers."""
    value = vector(materialize(bias, env, grid), grid)
    return value if value.is_floating_point() else value.float()


def vector(value: Tensor, grid: Mapping[int, Tensor]) -> Tensor:
    """`[B|1, Hkv|1, K]` of what was computed over a key grid."""
    value = value.to(grid[KEY].device)
    value = value[(None,) * (3 - value.dim())]
    return value.expand(*value.shape[:2], grid[KEY].size(-1))

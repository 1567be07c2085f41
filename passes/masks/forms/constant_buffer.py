"""A mask that a model keeps as a buffer: it is read, and must hold one interval per column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rewriter.kernels import FOREVER
from rewriter.passes.masks.evaluate import materialize
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import elements_of
from rewriter.passes.masks.expression import reads_size
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import ROW
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import Unproven
from torch import Tensor

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    """A predicate over constant buffers: evaluated, and read as one interval per column."""
    del positions
    elements = elements_of(predicate)
    if (
        {ROW, HEAD} & axes_of(predicate) != {ROW}
        or not elements
        or any(e.node not in analysis.constants for e in elements)
    ):
        return None
    nodes = {e.node for e in elements_of(predicate)}
    if any(analysis.constants[node].is_meta for node in nodes):
        raise Unproven(f"a buffer on the meta device has no values{analysis.origin(predicate)}")
    for element in elements_of(predicate):
        if any(i not in (ZERO, Axis(ROW), Axis(KEY)) for i in element.indices):
            raise Unproven(f"a buffer is read at other places than [row, key]{analysis.origin(predicate)}")
    if reads_size(predicate):
        raise Unproven(f"a constant mask is another one at another length{analysis.origin(predicate)}")
    size = min(
        analysis.constants[element.node].shape[d]
        for element in elements_of(predicate)
        for d, index in enumerate(element.indices)
        if index != ZERO
    )
    index = torch.arange(size)
    env = {node: analysis.constants[node].detach().cpu() for node in nodes}
    visible = materialize(predicate, env, {ROW: index[:, None], KEY: index[None, :]}).expand(size, size)
    start, end = _column_intervals(visible)
    analysis.read.update(dict.fromkeys(nodes))
    offset = int(start[0])
    window = int(end[0])
    if not bool((start == index + offset).all()) and not bool((start == 0).all()):
        raise Unproven("a constant mask is neither causal nor a window")
    bounds = []
    if bool((start == index + offset).all()):
        bounds.append(apply("le", _key_plus(offset), Axis(ROW)))
    if not bool((end == FOREVER).all()):
        if not bool((end == torch.where(index + window < size, index + window, FOREVER)).all()):
            raise Unproven("a constant mask is neither causal nor a window")
        bounds.append(apply("lt", Axis(ROW), _key_plus(window)))
    return analysis.conjunction(bounds)


def _key_plus(offset: int) -> Expression:
    return apply("add", Axis(KEY), Const(offset))


def _column_intervals(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end `[N]` of the one run of rows that see each column of a bool `[N, N]`; the last row means forever."""
    size = visible.size(0)
    count = visible.sum(dim=0)
    first = visible.int().argmax(dim=0)
    last = size - visible.flip(0).int().argmax(dim=0)
    if bool(((last - first != count) & (count > 0)).any()):
        raise Unproven("a constant mask shows a key, hides it and shows it again")
    end = torch.where(count == 0, 0, torch.where(last == size, FOREVER, last))
    return torch.where(count == 0, 0, first), end

"""The sizes that the check of a mask by evaluation tries: those equal by chance apart, those that belong together alike."""

from __future__ import annotations

import torch
from rewriter.passes.masks.check import _symbols
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def test_sizes_of_one_input_are_no_one_size() -> None:
    """Ids and padding of 8 rows of 8 tokens, each size a symbol of its own: rows belong to rows, and the length to the length."""
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    graph, values = Graph(), []
    for name in ("ids", "padding"):
        values.append(mode.from_tensor(torch.ones(8, 8, dtype=torch.int64), static_shapes=False))
        graph.placeholder(name).meta["val"] = values[-1]
    groups = _symbols(list(graph.nodes))
    rows, lengths = ({groups[value.size(d).node.expr] for value in values} for d in (0, 1))  # type: ignore[attr-defined]
    assert len(groups) == 4 and len(rows) == len(lengths) == 1 and rows != lengths

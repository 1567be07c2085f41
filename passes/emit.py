"""Emission: new nodes at a graph's insertion point.

A small function is traced to pre-dispatch ATen and its nodes are copied (`emit`), or a submodule is called (`call`), which a
compiler reads when it compiles. What all lowering passes need stands here: the operator in a site's place, and the model's own
ranges.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from rewriter.passes.analyse_masks import KEY
from rewriter.passes.analyse_masks import MaskProof
from rewriter.passes.analyse_masks import bias_tensor
from rewriter.passes.analyse_masks import key_bounds
from rewriter.passes.analyse_masks import key_grid
from rewriter.passes.apply_policy import PolicyError
from rewriter.passes.find_attention import AttentionSite
from rewriter.passes.index_functions import Apply
from rewriter.passes.index_functions import Element
from rewriter.passes.index_functions import Expression
from rewriter.passes.index_functions import Size
from rewriter.passes.index_functions import shape
from torch import Tensor
from torch import nn
from torch.fx import Graph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


class Attend(nn.Module):
    """The operator in a site's place: its scale and softcap, its dtype, its rank and, where it matters, its layout.

    Computed in the widest dtype of its inputs, returned in that of the original.
    """

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.scale, self.softcap = site.scale, site.softcap
        self.dtype = site.node.meta["val"].dtype
        self.flat = len(shape(site.query)) == 3  # type: ignore[arg-type]
        self.needs_copy = _is_viewed(site.node)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return self.with_lse(query, key, value, start, end, query_index, bias, sinks)[0]

    def with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp of each row, fp32 `[B, Hq, Q]`."""
        query, key, value = widened(query, key, value)
        output, lse = torch.ops.rewriter.live_range_attention(
            query, key, value, start, end, query_index, None, bias, sinks, None, self.scale, self.softcap
        )
        output = (output.squeeze(1) if self.flat else output).to(self.dtype)
        return output.contiguous() if self.needs_copy else output, lse


def _is_viewed(node: Node) -> bool:
    """Whether a view of a result asks for the layout that the original product had."""
    return any(
        user.target is aten.view.default or (user.target is aten.flatten.using_ints and _is_viewed(user))
        for user in node.users
    )


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their dtypes: autocast, or a model that upcasts, leaves different ones."""
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(widest) for t in tensors)


def call(
    graph: Graph,
    module: nn.Module,
    inputs: Sequence[Node | None],
    results: int = 1,
    meta: Mapping[str, Any] | None = None,
) -> tuple[Node, ...]:
    """A submodule of the graph's module, called at the insertion point.

    Args:
        results: 1 for a tensor, else the length of the tuple that the module returns.
    """
    owner = graph.owning_module
    assert owner is not None
    kind = type(module).__name__.lstrip("_").lower()
    name = next(n for i in itertools.count() if not hasattr(owner, n := f"{kind}_{i}"))
    owner.add_module(name, module)
    node = graph.call_module(name, tuple(inputs))
    node.meta.update(meta or {})
    if results == 1:
        return (node,)
    return tuple(graph.call_function(operator.getitem, (node, i)) for i in range(results))


def emit_bounds(
    graph: Graph, proof: MaskProof, key: Node, copies: Mapping[Node, Node], length: Node | None = None
) -> tuple[Node, ...]:
    """The model's own start, end and segment, the keys' indices, and the bias of the model's own mask where it has one.

    Args:
        copies: the proof's nodes in `graph`, where that is another one.
        length: int32 `[1]`, tokens before the first key; none when left out.
    """
    data = _data_of(proof)
    before = [] if length is None else [length]

    def bounds(key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        env = dict(zip(data, rest, strict=False))
        grid = key_grid(key.size(0), key.size(1), key.size(2), key.device, rest[-1] if before else None)
        interval = proof.interval
        ranges = [key_bounds(e, env, grid) for e in (interval.start, interval.end, interval.segment)]
        bias = [] if proof.bias is None else [bias_tensor(proof.bias, env, grid)]
        return (*ranges, grid[KEY].to(torch.int32), *bias)

    return emit(graph, bounds, [key, *(copies.get(n, n) for n in data), *before])


def _data_of(proof: MaskProof) -> list[Node]:
    """The data that a proof's ranges and bias read."""
    interval = proof.interval
    expressions = (interval.start, interval.end, interval.segment, proof.bias)
    return list(dict.fromkeys(n for e in expressions for n in _data_nodes(e)))


def _data_nodes(expression: Expression | None) -> list[Node]:
    if isinstance(expression, Size):
        return [expression.node]
    if isinstance(expression, Element):
        return [expression.node, *(n for i in expression.indices for n in _data_nodes(i))]
    if isinstance(expression, Apply):
        return [n for a in expression.args for n in _data_nodes(a)]
    return []


def inherited(node: Node) -> dict[str, Any]:
    """What the nodes that replace a node take over: where it came from, and whether a backward recomputes it."""
    names = ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id")
    return {name: node.meta[name] for name in names if name in node.meta}


def emit(
    graph: Graph, function: Callable[..., tuple[Tensor, ...]], inputs: list[Node], meta: Mapping[str, Any] | None = None
) -> tuple[Node, ...]:
    """Traces `function` on the inputs' fake values and copies its nodes, with this metadata, to the insertion point."""
    fakes = [node.meta["val"] for node in inputs]
    fake_mode = next(fake.fake_mode for fake in fakes if isinstance(fake, Tensor))  # type: ignore[attr-defined]
    with fake_mode:
        traced = make_fx(function, pre_dispatch=True)(*fakes)
    traced.graph.eliminate_dead_code()
    if any(node.op == "get_attr" for node in traced.graph.nodes):
        raise PolicyError(
            "the policy's live_ranges makes a tensor from Python values, which a compiled graph cannot hold; "
            "compare with the numbers themselves, or use torch.full and torch.arange"
        )
    copies: dict[Node, Node] = {}
    sources = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(sources)
        elif node.op == "output":
            return tuple(copies[n] for n in node.args[0])
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta.update(meta or {})
    raise AssertionError("a traced graph ends with its output")

"""A captured graph is what tracing every call would give, though a layer like an earlier one is copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from crossed import crossed
from rewriter.passes.graph import capture as capturing
from rewriter.passes.graph.repeated_calls import RepeatedCalls
from torch import Tensor
from torch import nn
from torch.fx import GraphModule
from torch.fx import Node


class Traced(RepeatedCalls):
    """Counts what is traced; copies nothing where told so."""

    def __init__(self, counts: Counter[str], *, copies: bool = True) -> None:
        super().__init__()
        self.counts, self.copies = counts, copies

    def __call__(self, node: Node, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        def counted() -> Any:
            self.counts[str(node.target)] += 1
            return trace()

        return super().__call__(node, args, kwargs, counted) if self.copies else counted()


def captured(model: nn.Module, monkeypatch: pytest.MonkeyPatch, copies: bool, *inputs: Any, **named: Any) -> Any:
    """The graph, and how many calls of each function were traced."""
    graphs: list[GraphModule] = []
    counts: Counter[str] = Counter()

    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        graphs.append(capturing.capture(graph, examples).module)
        return graph.forward

    monkeypatch.setattr(capturing, "RepeatedCalls", lambda: Traced(counts, copies=copies))
    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(*inputs, **named)
    (graph,) = graphs
    graph.graph.eliminate_dead_code()
    return graph, counts


def described(graph: GraphModule) -> list[Any]:
    """All of the nodes that matters; a size is its expression, whichever node computes it."""
    places: dict[Node, int] = {}

    def is_size(node: Node) -> bool:
        return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool))

    def argument(node: Node) -> Any:
        return str(node.meta["val"].node.expr) if is_size(node) else f"%{places[node]}"

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return str(value)
        return str([*value.shape, *value.stride(), value.storage_offset(), value.dtype, value.requires_grad])

    rows = []
    for node in graph.graph.nodes:
        if is_size(node) and node.op != "placeholder":
            continue
        given = torch.fx.map_arg((node.args, dict(node.kwargs)), argument)
        places[node] = len(places)
        where = [
            str(list(node.meta.get("nn_module_stack", {}).values())),
            node.meta.get("stack_trace"),
            sorted(node.meta),
        ]
        values = pytree.tree_map(like, pytree.tree_leaves(node.meta.get("val")))
        rows.append((node.op, str(node.target), str(given), values, *where, node.meta.get("recompute")))
    return rows


@pytest.mark.parametrize(
    ("name", "attention", "gradients"),
    crossed([("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "eager"), ("bert", "sdpa")], [False, True], every=2),
)
def test_copies_are_what_tracing_gives(
    name: str, attention: str, gradients: bool, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, attention).eval()
    ids = torch.randint(0, 64, (3, 12))
    graphs = []
    with torch.set_grad_enabled(gradients):
        for copies in (False, True):
            graphs.append(captured(model, monkeypatch, copies, input_ids=ids, attention_mask=torch.ones_like(ids)))
    (traced, all_calls), (copied, calls) = graphs
    assert described(copied) == described(traced)
    assert calls.total() < 0.7 * all_calls.total(), "half of a model of two layers is like the other half"
    values = [id(n.meta["val"]) for n in copied.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert len(set(values)) == len(values), "a trace that is given two nodes' values must be able to tell them apart"


class Layers(nn.Module):
    def __init__(self, number: int, layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.number, self.layer = number, layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.number):
            x = self.layer(x)
        return x


def test_what_is_traced_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(x: Tensor) -> Tensor:
        return x + torch.softmax(x @ x.mT, -1)[:, 1:] @ x + x.flip(-1).chunk(2, -1)[0].repeat(1, 1, 2).sin()

    x = torch.randn(3, 2, 8)
    few, many = (captured(Layers(number, layer), monkeypatch, True, x)[1] for number in (3, 30))
    assert few == many and few.total() > 0


def written(x: Tensor) -> Tensor:
    y = x * 2
    y[..., 0] = 1.0
    return y.add_(x)


def constant(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0]).sum()


def other_numbers(x: Tensor) -> Tensor:
    """The same functions; other constants, types of constants, and arguments that are one tensor or two."""
    y = x * 1.0
    return (
        torch.add(x * 1, x, alpha=2)
        + torch.add(y, x, alpha=3)
        + torch.dot(x[0, 0], x[0, 0])
        + torch.dot(x[0, 0], y[0, 1])
    )


def checkpointed(x: Tensor) -> Tensor:
    y: Tensor = torch.utils.checkpoint.checkpoint(lambda x: (x.sin() * 2).cos(), x, use_reentrant=False)
    return (y.sin() * 2).cos()


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sin() * 2
    return y + x.sin() * 2


def in_bf16(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.mT
    return x + (y.float() @ x) + (x @ x.mT) @ x


def joined(x: Tensor) -> Tensor:
    """As DeepSeek-V3 joins its keys: written through views of what is new."""
    y = x.new_empty(*x.shape[:-1], 16)
    y[..., :8].copy_(x.sin())
    y[..., 8:].copy_(x.cos())
    return y[..., 4:12] * 2


def signed_zeros(x: Tensor) -> Tensor:
    return torch.copysign(x, torch.tensor(0.0)) + 2 * torch.copysign(x, 0.0) + 3 * torch.copysign(x, -0.0)


@pytest.mark.parametrize(
    "layer",
    [written, joined, constant, other_numbers, signed_zeros, checkpointed, without_gradients, in_bf16],
    ids=lambda f: f.__name__,
)
def test_what_else_a_trace_depends_on(layer: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers(3, layer)
    x = torch.randn(3, 6, 8, requires_grad=True)
    traced, copied = (captured(model, monkeypatch, copies, x)[0] for copies in (False, True))
    assert described(copied) == described(traced)
    inputs = [n.meta["val"] for n in copied.graph.nodes if n.op == "placeholder"]
    sizes = iter(x.shape)
    given = [next(sizes) if isinstance(value, torch.SymInt) else x for value in inputs]
    torch.testing.assert_close(copied(*given)[0], model(x))

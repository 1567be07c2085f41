from __future__ import annotations

import torch
from rewriter.passes.graph.canonicalize import canonicalize
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


def targets(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_what_does_nothing_is_erased() -> None:
    def noisy(x: Tensor) -> Tensor:
        y = x[:, :].to(torch.float32).expand(3, 4)
        return torch.nn.functional.dropout(y, 0.5, training=False).exp()

    x = torch.randn(3, 4)
    module = make_fx(noisy, pre_dispatch=True, tracing_mode="fake")(x)
    done = canonicalize(module)
    assert done.erased >= 3
    assert targets(module) == ["aten.exp.default"]
    assert torch.equal(module(x), noisy(x))


def test_an_in_place_operation_on_a_fresh_tensor_becomes_functional() -> None:
    def fresh(x: Tensor) -> Tensor:
        mask = torch.zeros(4, 4)
        mask.masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), -1.0)
        return x + mask

    x = torch.randn(4, 4)
    module = make_fx(fresh, pre_dispatch=True, tracing_mode="fake")(x)
    done = canonicalize(module)
    assert done.functionalized == 1
    assert not done.modified
    assert not any(name.split(".")[1].endswith("_") for name in targets(module))
    assert torch.equal(module(x), fresh(x))


def test_an_in_place_operation_that_a_view_can_see_is_reported() -> None:
    def aliased(x: Tensor) -> Tensor:
        mask = torch.zeros(4, 4)
        row = mask[1]
        row.fill_(-1.0)
        return x + mask

    x = torch.randn(4, 4)
    module = make_fx(aliased, pre_dispatch=True, tracing_mode="fake")(x)
    done = canonicalize(module)
    assert done.functionalized == 0
    assert any(str(node.target) == "aten.zeros.default" for node in done.modified)
    assert torch.equal(module(x), aliased(x))

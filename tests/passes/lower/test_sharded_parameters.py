"""Parameters in pieces: what is gathered together, and when it travels, on graphs of a process of four that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rewriter.kernels.sharded_parameters import ALL_GATHER
from rewriter.kernels.sharded_parameters import REDUCE_SCATTER
from rewriter.passes.lower import sharded_parameters
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.fx import Graph
from torch.testing._internal.distributed.fake_pg import FakeStore

import rewriter
from rewriter import SlidingWindow

PROCESSES = 4


@pytest.fixture
def mesh() -> Iterator[Any]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    yield torch.distributed.init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("dp",))
    torch.distributed.destroy_process_group()


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes, **options))


def called(graph: Graph) -> list[str]:
    """Names of what communicates, in order."""
    names = [str(node.target).removeprefix("rewriter.").removesuffix(".default") for node in graph.nodes]
    return [name for name in names if name.startswith(("all_gather", "reduce_scatter"))]


def graphs_of_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """What the compiler is given, forward and backward, once communication has its places."""
    found: list[Graph] = []
    overlap = sharded_parameters.overlap

    def watched(graph: Graph) -> None:
        overlap(graph)
        graph.lint()
        found.append(graph)

    monkeypatch.setattr("rewriter.code.overlap", watched)
    with fresh_cache():  # kept code would not be made again
        model(input_ids=torch.randint(64, (1, 12)), use_cache=False).logits.mean().backward()
    return found


def test_layers_travel_while_others_are_computed(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = rewriter.distribute(rewriter.optimize(llama(), SlidingWindow(4), strict=True), mesh, shard="layers")
    forward, backward = (called(graph) for graph in graphs_of_step(fast, monkeypatch))
    units = 5 + 3  # layers; embedding, norm and head
    assert forward == ["all_gather_start"] + ["all_gather_start", "all_gather_wait"] * (units - 1) + ["all_gather_wait"]
    gathered = [name for name in backward if name.startswith("all_gather")]
    again = len(gathered) // 2
    assert 5 <= again < units
    assert gathered == ["all_gather_start"] + ["all_gather_start", "all_gather_wait"] * (again - 1) + [
        "all_gather_wait"
    ]
    scattered = [name for name in backward if name.startswith("reduce_scatter")]
    begins, waits = "reduce_scatter_start", "reduce_scatter_wait"
    assert scattered == [begins] + [begins, waits] * (units - 1) + [waits]


def test_without_gradients_nothing_is_scattered(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    fast = rewriter.distribute(rewriter.optimize(model, SlidingWindow(4), strict=True), mesh, shard="layers")
    forward, backward = (called(graph) for graph in graphs_of_step(fast, monkeypatch))
    assert forward.count("all_gather_wait") == 8 and backward.count("reduce_scatter_wait") == 1
    norm = fast.model.model.norm._parameters["weight"]
    assert norm.grad.shape == (32,) and norm.grad.to_local().shape == (8,)


def test_a_parameter_that_the_model_changes_is_an_error(mesh: Any) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: torch.Tensor) -> Any:
            with torch.no_grad():
                self.inner.lm_head.weight[:3].clamp_(-1.0, 1.0)
            return self.inner(input_ids=input_ids, use_cache=False).logits

    fast = rewriter.optimize(Clipped(), SlidingWindow(4), strict=True, backend="eager")
    fast = rewriter.distribute(fast, mesh, shard="layers")
    with pytest.raises(rewriter.RewriteError, match=r"inner.lm_head.weight is changed in the model's forward"):
        fast(torch.randint(64, (1, 12)))


def test_operators_are_lawful(mesh: Any) -> None:
    """torch's own checks of custom operators: schemas, fakes, and gradients that compilers can trace."""
    group = mesh.get_group().group_name
    pieces = [torch.randn(3, 2, requires_grad=True), torch.randn(1, requires_grad=True)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, args in {
        ALL_GATHER: (pieces, [10, 3], PROCESSES, group),
        REDUCE_SCATTER: ([torch.randn(10, 2), torch.randn(3)], PROCESSES, group),
    }.items():
        assert set(torch.library.opcheck(operator, args, test_utils=checks).values()) == {"SUCCESS"}

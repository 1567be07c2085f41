"""Pipeline stages: cut where the slowest is as fast as can be, and together they compute what the model does."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from rewriter.passes import Layer
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.distributed import Device
from rewriter.distributed import stages

POLICIES: list[Policy] = [Exact(), SeparatorMask((3, 7), window=6), DynamicMask(6)]
LENGTH = 20


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes, **options))


def padded(rows: int, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Each row is padded on the left by two tokens more than the one before."""
    ids = torch.randint(8, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": (torch.arange(length) >= 2 * torch.arange(rows)[:, None]).long()}


def packed(rows: int, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Rows of two documents."""
    ids = torch.randint(8, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat((torch.arange(8), torch.arange(length - 8))).expand(rows, -1)
    return {"input_ids": ids, "position_ids": positions}


def optimized(policy: Policy, model: nn.Module | None = None, backend: str = "eager") -> Any:
    batch = padded(2)
    options: dict[str, Any] = {"example_inputs": batch} if policy.adds_parameters else {}
    return rewriter.optimize(llama() if model is None else model, policy, strict=True, backend=backend, **options)


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_one_after_the_other_they_are_the_model(policy: Policy, make: Any) -> None:
    fast = optimized(policy)
    plan = rewriter.plan_stages(fast, [1.0, 2.0, 1.0], length=64, rows=2, example_inputs=make(2))
    parts = stages._parts(fast, plan)
    assert len(parts) == 3
    for rows, length in ((2, LENGTH), (3, 31)):
        batch = make(rows, length, seed=rows)
        seen = batch.get("attention_mask", torch.ones(rows, length)).bool()
        received: tuple[Tensor, ...] = ()
        for part in parts:
            received = (part(*received, **batch),)  # hidden states alone are sent
        gradients = []
        for logits in (*received, fast(**batch, use_cache=False).logits):
            fast.zero_grad()
            logits[seen].square().mean().backward()
            gradients.append([parameter.grad for parameter in fast.parameters()])
        torch.testing.assert_close(received[0][seen], logits[seen], rtol=0, atol=1e-6)
        for own, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


def test_each_has_its_own_parameters() -> None:
    fast = optimized(DynamicMask(6))
    plan = rewriter.plan_stages(fast, [1.0, 1.0], length=64, rows=2, example_inputs=padded(2))
    names = [[name for name, _ in part.named_parameters()] for part in stages._parts(fast, plan)]
    assert sorted(itertools.chain(*names)) == sorted(rewriter.for_checkpoint(fast).state_dict())
    assert len(fast.report.graphs) == 2 and len(fast.report.graphs[-1].sites) == 4  # the first is of the example
    assert "model.embed_tokens.weight" in names[0] and "lm_head.weight" in names[1]
    assert {"policy_parameters.0.W", "policy_parameters.1.W"} <= set(names[0])


def train(rank: int, backend: str, schedule: str) -> dict[str, float]:
    """How far gradients of a stage are from those of the whole model."""
    from torch.distributed import pipelining

    found = {}
    for policy in POLICIES[1:] if backend == "eager" else POLICIES[1:2]:
        fast, alone = optimized(policy, backend=backend), optimized(policy)
        plan = rewriter.plan_stages(fast, [1.0, 1.0], length=64, rows=2, microbatches=4, example_inputs=padded(2))
        part = rewriter.stage(fast, plan, rank)

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)

        steps = getattr(pipelining, schedule)(part, plan.microbatches, loss_fn=loss)
        batch = padded(8)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses: list[Tensor] = []
        steps.step(**batch, target=labels, losses=losses)
        expected = [
            loss(
                alone(**{name: value[n : n + 2] for name, value in batch.items()}, use_cache=False).logits,
                labels[n : n + 2],
            )
            for n in range(0, 8, 2)
        ]
        (sum(expected) / 4).backward()
        if rank == 1:
            found["loss"] = max(float((own - one).abs()) for own, one in zip(losses, expected, strict=True))
        wanted = dict(rewriter.for_checkpoint(alone).named_parameters())
        own = dict(part.submod.named_parameters())
        assert own
        found[str(policy)] = max(float((own[n].grad - wanted[n].grad).abs().max()) for n in own)
    return found


@pytest.mark.parametrize(
    ("backend", "schedule"),
    [
        ("eager", "Schedule1F1B"),
        pytest.param("eager", "ScheduleGPipe", marks=pytest.mark.soak),
        pytest.param("inductor", "Schedule1F1B", marks=pytest.mark.soak),
    ],
)
def test_two_processes_train_as_one(backend: str, schedule: str) -> None:
    first, last = in_processes(train, backend, schedule)
    assert len(first) >= 1 and len(last) == len(first) + 1
    assert all(difference <= 1e-6 for found in (first, last) for difference in found.values())


def a_layer(flops: int, parameter_bytes: int = 0, output_bytes: int = 8, activation_bytes: int = 4) -> Layer:
    return Layer("layers.0", flops, flops // 2, parameter_bytes, activation_bytes, output_bytes)


layers = st.lists(st.builds(a_layer, st.integers(1, 50), st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=8)
devices = st.lists(
    st.builds(
        Device,
        st.sampled_from([1.0, 2.0, 5.0]),
        st.sampled_from([1.0, 4.0, math.inf]),
        st.sampled_from([60.0, math.inf]),
    ),
    min_size=1,
    max_size=4,
)


@given(layers, devices, st.integers(1, 3), st.integers(1, 5))
def test_no_other_cut_has_a_faster_slowest_stage(
    layers: list[Layer], devices: list[Device], rows: int, microbatches: int
) -> None:
    ways = {}
    for firsts in itertools.combinations(range(1, len(layers)), len(devices) - 1):
        plan = rewriter.distributed.StagePlan(tuple(devices), (0, *firsts), tuple(layers), 8, rows, microbatches, {})
        if all(held <= device.memory for held, device in zip(plan.bytes_held, devices, strict=True)):
            ways[plan.firsts] = max(plan.seconds)
    if len(layers) < len(devices):
        return
    if not ways:
        with pytest.raises(rewriter.RewriteError, match="fits into the memory"):
            stages._best_cut(layers, devices, rows, microbatches)
        return
    assert ways[stages._best_cut(layers, devices, rows, microbatches)] == min(ways.values())


def test_a_policy_moves_the_cut() -> None:
    """Dense layers cost more than those under a window: the stage that has these has more of them."""
    with torch.device("meta"):
        model = llama(max_position_embeddings=8192)
    policies = rewriter.PerLayer({"0-1": Exact(), "default": SlidingWindow(64)})
    firsts = {}
    for policy in (Exact(), policies):
        plan = rewriter.plan_stages(rewriter.optimize(model, policy, backend="eager"), [1.0, 1.0], length=8192)
        firsts[type(policy)] = plan.firsts
        attention = [layer.attention_flops for layer in plan.layers]
        assert attention[0] == attention[1] and (attention[3] < attention[0] / 10) == (policy is policies)
    assert firsts == {Exact: (0, 2), rewriter.PerLayer: (0, 1)}


def test_a_plan_is_a_table() -> None:
    plan = rewriter.plan_stages(optimized(SlidingWindow(4)), [Device(2e9, 1e9), 1e9], length=256, rows=3)
    text = str(plan)
    assert "2 stages, 8 microbatches of 3 x 256 tokens" in text
    assert "model.layers.0 to" in text and "1.00" in text and "MiB" in text
    assert plan.step_seconds == pytest.approx(sum(plan.seconds) + 7 * max(plan.seconds))
    # Products with weights of one token, by hand: queries, keys, values, output, three of the MLP.
    assert plan.layers[1].matmul_flops == 2 * 256 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    assert plan.layers[1].parameter_bytes == 4 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert plan.layers[1].output_bytes == 4 * 256 * 32


def test_misuse_is_an_error() -> None:
    fast = optimized(Exact())
    with pytest.raises(rewriter.RewriteError, match="5 stages need as many layers, and the model has 4"):
        rewriter.plan_stages(fast, [1.0] * 5, length=64)
    with pytest.raises(rewriter.RewriteError, match="speed and a bandwidth above 0"):
        rewriter.plan_stages(fast, [1.0, 0.0], length=64)
    with pytest.raises(rewriter.RewriteError, match="are 1 or more, got 0"):
        rewriter.plan_stages(fast, [1.0, 1.0], length=0)
    with pytest.raises(rewriter.RewriteError, match="no cut of 4 layers fits"):
        rewriter.plan_stages(fast, [Device(1.0, memory=1000.0), Device(1.0)], length=64)
    plan = rewriter.plan_stages(fast, [1.0, 1.0], length=64, rows=2)
    with pytest.raises(rewriter.RewriteError, match="stages 0 to 1, got 2"):
        rewriter.stage(fast, plan, 2)
    part = stages._parts(fast, plan)[0]
    with pytest.raises(rewriter.RewriteError, match="as many rows as a microbatch has"):
        part(input_ids=torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(rewriter.RewriteError, match="differing: attention_mask"):
        part(**padded(2))
    tied = rewriter.optimize(llama(tie_word_embeddings=True), Exact(), backend="eager")
    with pytest.raises(rewriter.RewriteError, match="is a parameter of stages 0 and 1"):
        rewriter.stage(tied, rewriter.plan_stages(tied, [1.0, 1.0], length=64), 0)

    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama(attention_dropout=0.5).train()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids, use_cache=False).logits

    with pytest.raises(rewriter.RewriteError, match="a stage would keep their masks"):
        rewriter.plan_stages(rewriter.optimize(Refused(), Exact(), backend="eager"), [1.0, 1.0], length=64)

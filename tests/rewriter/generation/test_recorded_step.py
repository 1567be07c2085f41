"""The step of one token, recorded and replayed: which tensors a record is of, and when it ends. What a GPU does is replaced."""

from __future__ import annotations

import gc
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from everyday_models import llama
from torch import Tensor

import rewriter
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.errors import CacheError
from rewriter.generation import decoder
from rewriter.generation import recorded_step
from rewriter.generation.recorded_step import RecordedStep


class Graphs:
    """As CUDA's: nothing is done while a graph is recorded, and a replay works on the memory that it was recorded with."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(
        self, code: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.recorded += 1
        memory = [
            t.detach() for t in inputs
        ]  # other objects, as a graph keeps none alive and looks at no one's identity
        before = [t.clone() for t in memory]
        outputs = tuple(code(*memory))
        for tensor, value in zip(memory, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            self.replayed += 1
            for output, value in zip(outputs, code(*memory), strict=True):
                output.copy_(value)

        return replay, outputs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    monkeypatch.setattr(recorded_step, "record", found.record)
    monkeypatch.setattr(decoder, "check_records", lambda device: None)
    return found


def add(token: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor]:
    """What the model of these tests computes: a sum that its state carries on."""
    state += token * weight
    return (state * 2,)


def test_replays_go_on_from_the_state(graphs: Graphs) -> None:
    step = RecordedStep(add, [0])
    weight, state = torch.tensor([2.0]), torch.zeros(1)
    outputs = [step(torch.tensor([float(n)]), weight, state)[0] for n in range(1, 6)]
    assert [float(output) for output in outputs] == [4, 12, 24, 40, 60]  # none is overwritten by a later one
    assert float(state) == 30 and (graphs.recorded, graphs.replayed) == (1, 4)
    weight.mul_(10)  # as a step of an optimizer does, in place
    assert float(step(torch.tensor([1.0]), weight, state)[0]) == 100
    assert graphs.recorded == 1


def test_other_tensors_are_another_record(graphs: Graphs) -> None:
    step = RecordedStep(add, [0])
    weight, state = torch.tensor([2.0]), torch.zeros(1)
    token = torch.tensor([1.0])
    for _ in range(3):
        step(token, weight, state)
    other = torch.zeros(1)  # another cache
    assert [float(step(token, weight, other)[0]) for _ in range(3)] == [4, 8, 12]
    assert float(state) == 6 and graphs.recorded == 2
    weight.data = torch.tensor([5.0])  # the same parameter, elsewhere now
    assert [float(step(token, weight, other)[0]) for _ in range(2)] == [22, 32]
    assert graphs.recorded == 3
    two = torch.ones(2)  # another number of rows
    assert step(two, weight, torch.zeros(2))[0].tolist() == [10, 10]
    assert graphs.recorded == 3


def test_a_graph_is_gone_with_its_cache(graphs: Graphs) -> None:
    step = RecordedStep(add, [0])
    weight, state = torch.tensor([2.0]), torch.zeros(1)
    for _ in range(3):
        step(torch.tensor([1.0]), weight, state)
    assert step._replay is not None
    del state
    gc.collect()
    assert step._replay is None and not step._outputs and not step._inputs


def test_what_cannot_be_recorded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(code: Any, inputs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded_step, "record", fails)
    step = RecordedStep(add, [0])
    weight, state, token = torch.tensor([2.0]), torch.zeros(1), torch.ones(1)
    step(token, weight, state)
    with pytest.raises(
        CacheError, match=r"cannot be recorded as a CUDA graph: .* stream is capturing; leave cuda_graphs out"
    ):
        step(token, weight, state)


@pytest.mark.parametrize("policy", [Exact(), SlidingWindow(5, sinks=1), SeparatorMask(range(3, 20), window=4)], ids=str)
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_generation_is_that_without(policy: rewriter.Policy, beams: int, backend: str, graphs: Graphs) -> None:
    """Left-padded rows, beams that change places, several turns."""
    if backend == "inductor" and (beams > 1 or policy != SlidingWindow(5, sinks=1)):
        pytest.skip("the code is compiled once")
    model = llama().eval()
    prompt = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "num_beams": beams}
    plain = rewriter.optimize(model, policy, backend=backend)
    fast = rewriter.optimize(model, policy, backend=backend, cuda_graphs=True)
    for _ in range(2):
        expected = plain.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(fast.generate(prompt, attention_mask=mask, **options), expected)
    assert graphs.recorded == 2 and graphs.replayed == 2 * 10
    with torch.no_grad():
        for parameter in model.parameters():  # trained on, in place
            parameter.mul_(1.1)
    expected = plain.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(fast.generate(prompt, attention_mask=mask, **options), expected)


def test_a_model_on_a_cpu_is_refused() -> None:
    fast = rewriter.optimize(llama().eval(), SlidingWindow(5), backend="eager", cuda_graphs=True)
    with pytest.raises(CacheError, match="cuda_graphs needs the model on a CUDA device, it is on cpu"):
        fast.new_cache()
    assert fast(input_ids=torch.arange(3, 9)[None]).logits.shape[1] == 6


def test_the_choice_is_saved(tmp_path: Any) -> None:
    fast = rewriter.optimize(llama().eval(), SlidingWindow(5), backend="eager", cuda_graphs=True)
    fast.save_pretrained(tmp_path)
    assert rewriter.from_pretrained(tmp_path).cuda_graphs
    assert not rewriter.from_pretrained(tmp_path, cuda_graphs=False).cuda_graphs

"""One schedule for several calls: the same results, made once for a model."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import transformers
from rewriter.kernels import AttentionInputError
from rewriter.kernels import LiveRanges
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu import shared_schedule

import rewriter

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="the Triton kernels run on a GPU, or with TRITON_INTERPRET=1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUERIES, KEYS = 70, 90


def tensors() -> tuple[list[torch.Tensor], LiveRanges]:
    """Query, key and value, and ranges of which some keys are alive for long."""
    torch.manual_seed(0)
    sizes = ((4, QUERIES), (2, KEYS), (2, KEYS))
    inputs = [torch.randn(2, *size, 16, device=DEVICE, requires_grad=True) for size in sizes]
    key = torch.arange(KEYS, device=DEVICE, dtype=torch.int32)
    return inputs, LiveRanges(key[None, None], (key + 30 + (key % 7 == 0).int() * 40)[None, None])


@pytest.mark.parametrize("backward", [False, True], ids=["forward alone", "both"])
@pytest.mark.parametrize("indexed", [False, True], ids=["last rows", "any rows"])
def test_a_given_schedule_changes_no_bit(backward: bool, indexed: bool) -> None:
    inputs, live = tensors()
    index = torch.randperm(KEYS, device=DEVICE)[:QUERIES].expand(2, -1) if indexed else None
    schedule = torch.ops.rewriter.schedule(live.start, live.end, index, QUERIES, 2, 16, 4, backward)
    assert len(schedule) == shared_schedule.num_tensors(indexed=indexed, backward=backward)
    results = []
    for given in (None, schedule):
        arguments = (*inputs, live.start, live.end, index, *[None] * 6, given)
        output, lse = torch.ops.rewriter.live_range_attention(*arguments)
        results.append((output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("queries", [0, QUERIES])
@pytest.mark.parametrize("indexed", [False, True])
def test_the_fake_one_has_the_sizes_of_the_real(queries: int, indexed: bool) -> None:
    _, live = tensors()
    index = torch.zeros(3, queries, dtype=torch.int32, device=DEVICE) if indexed else None
    arguments = (live.start, live.end, index, queries, 2, 16, 4, True)
    made, fake = (function(*arguments) for function in (torch.ops.rewriter.schedule, shared_schedule.make_fake))
    assert [t.shape for t in made] == [t.shape for t in fake]
    assert {t.dtype for t in (*made, *fake)} == {torch.int32}
    torch.library.opcheck(torch.ops.rewriter.schedule.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_another_one_is_refused() -> None:
    inputs, live = tensors()
    schedule = torch.ops.rewriter.schedule(live.start, live.end, None, QUERIES - 20, 2, 16, 4, False)
    arguments = (*inputs, live.start, live.end, *[None] * 7, schedule)
    with pytest.raises(AttentionInputError, match="with the same ranges"):
        torch.ops.rewriter.live_range_attention(*arguments)


def test_all_layers_of_a_model_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: collections.Counter[str] = collections.Counter()
    build = shared_schedule.build

    def counted(*arguments: Any) -> Any:
        counts["schedules"] += 1
        return build(*arguments)

    monkeypatch.setattr(shared_schedule, "build", counted)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval().to(DEVICE)
    ids = torch.randint(64, (2, 24), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    fast = rewriter.optimize(model, rewriter.Exact(), backend="eager", strict=True)
    fast(input_ids=ids, attention_mask=mask, use_cache=False)
    counts.clear()
    logits = fast(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits.sum().backward()
    assert counts["schedules"] == 2  # the forward's and the gradients'
    torch.testing.assert_close(logits[mask > 0], own[mask > 0], rtol=2e-4, atol=2e-4)

    counts.clear()
    with torch.no_grad():
        fast(input_ids=ids, attention_mask=mask, use_cache=False)
        assert counts["schedules"] == 1
        new = fast.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        counts.clear()
        again = fast.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert counts["schedules"] == 1  # of the prompt
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(new, expected) and torch.equal(again, expected)

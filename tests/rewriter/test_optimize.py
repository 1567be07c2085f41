"""The law: a rewritten model is the model. Tiny random models of all kinds, outputs and all parameter gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crossed import crossed
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SeparatorMask
from rewriter import SlidingWindow

MODELS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen3", "sdpa"),
    ("qwen3", "eager"),
    ("mistral", "sdpa"),
    ("mistral", "eager"),
    ("gemma2", "eager"),  # transformers offers no sdpa for its softcap
    ("gpt2", "sdpa"),
    ("gpt2", "eager"),
    ("bert", "sdpa"),
    ("bert", "eager"),
    ("nano", "sdpa"),
    ("nano", "eager"),
    ("torch", "sdpa"),
]
CAUSAL = [(name, attention) for name, attention in MODELS if name != "bert"]
POLICIES = [SeparatorMask((3, 4, 5), initial=2, window=4), SlidingWindow(5, sinks=1)]
WINDOWS = {"mistral": (8, 8), "gemma2": (8, None)}  # by layer


@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_exact(law: SimpleNamespace, name: str, attention: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model(name, attention).eval()
    optimized = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    comparison = law.Comparison(model, optimized, law.call)
    for size, length, left in ((3, 12, False), (5, 21, True), (3, 30, False)):
        if left and name == "torch":
            continue  # its -inf masks make the dense model itself NaN in rows that are all padding
        comparison.add(*law.batch(size, length, left=left))
    comparison.check()
    assert len(optimized.report.graphs) == 1, "one graph serves all lengths and batch sizes"
    assert len(optimized.report.sites) == (1 if name == "torch" else 2)


@pytest.mark.parametrize(("name", "attention", "policy"), crossed(CAUSAL, POLICIES, every=2))
def test_policy_equals_the_model_given_its_dense_mask(
    law: SimpleNamespace,
    name: str,
    attention: str,
    policy: Any,
    tiny_model: Callable[..., nn.Module],
    policy_mask: Callable[..., Tensor],
) -> None:
    model = tiny_model(name, attention).eval()
    optimized = rewriter.optimize(model, policy, backend="eager", strict=True)
    comparison = law.Comparison(model, optimized, with_dense_mask(name, policy, policy_mask))
    for size, length, left in ((3, 12, False), (5, 21, True), (3, 27, False)):
        if left and name == "torch":
            continue
        comparison.add(*law.batch(size, length, left=left))
    comparison.check()
    assert len(optimized.report.graphs) == 1


@pytest.mark.parametrize("capacity", [None, 11])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("mistral", "sdpa"), ("gpt2", "eager")])
def test_the_newest_separators_equal_the_model_given_their_dense_mask(
    law: SimpleNamespace,
    name: str,
    attention: str,
    capacity: int | None,
    tiny_model: Callable[..., nn.Module],
    policy_mask: Callable[..., Tensor],
) -> None:
    """Of the separators beyond the window two stay; with a capacity, what else is kept goes when the cache is full."""
    model = tiny_model(name, attention).eval()
    policy = SeparatorMask(tuple(range(3, 20)), initial=2, window=4, max_separators=2, capacity=capacity)
    optimized = rewriter.optimize(model, policy, backend="eager", strict=True)
    comparison = law.Comparison(model, optimized, with_dense_mask(name, policy, policy_mask))
    for size, length, left in ((3, 12, False), (5, 41, True)):
        comparison.add(*law.batch(size, length, left=left))
    comparison.check()


def with_dense_mask(name: str, policy: Any, policy_mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda model, ids, mask: call_with_dense_mask(model, name, policy, ids, mask, policy_mask)


def call_with_dense_mask(
    model: nn.Module, name: str, policy: Any, ids: Tensor, mask: Tensor, policy_mask: Callable[..., Tensor]
) -> Tensor:
    """The original model under the policy's 4-D mask, built from its definition."""
    windows = WINDOWS.get(name, (None, None))
    masks = [policy_mask(policy, ids, mask, window) for window in windows]
    if name in ("nano", "torch"):
        keep = masks[0] | (torch.eye(ids.size(1), dtype=torch.bool) & (mask == 0)[:, None, :, None])
        return model(ids, keep)
    dtype = next(model.parameters()).dtype
    dense = [torch.zeros(m.shape, dtype=dtype).masked_fill(~m, torch.finfo(dtype).min) for m in masks]
    given: Any = dense[0]
    if windows[0] != windows[1]:
        given = {"sliding_attention": dense[0], "full_attention": dense[1]}
    return model(input_ids=ids, attention_mask=given, use_cache=False).logits


def test_inductor_serves_several_lengths_and_trains(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module], policy_mask: Any
) -> None:
    model = tiny_model("llama", "sdpa", layers=1).eval()
    policy = POLICIES[0]
    optimized = rewriter.optimize(model, policy, strict=True)
    comparison = law.Comparison(model, optimized, with_dense_mask("llama", policy, policy_mask))
    for size, length in ((3, 12), (5, 40)):
        comparison.add(*law.batch(size, length, left=True))
    comparison.check()
    assert len(optimized.report.graphs) == 1


def test_packed_documents_are_proven_from_position_ids(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    for lengths in ((5, 7), (3, 4, 13)):
        ids = torch.randint(0, 64, (2, sum(lengths)))
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).contiguous()
        packed = optimized(input_ids=ids, position_ids=positions, use_cache=False).logits
        begin = 0
        for n in lengths:
            alone = model(input_ids=ids[:, begin : begin + n], use_cache=False).logits
            torch.testing.assert_close(packed[:, begin : begin + n], alone)
            begin += n
    assert {site.mask for site in optimized.report} == {"documents + causal"}


def test_per_layer_policies(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(
        model, PerLayer({0: Exact(), "default": SlidingWindow(3)}), backend="eager", strict=True
    )
    ids, mask = law.batch(3, 12, left=False)
    law.call(optimized, ids, mask)
    assert [site.policy for site in optimized.report] == ["Exact()", "SlidingWindow(window=3, sinks=0)"]
    windowed = rewriter.optimize(model, SlidingWindow(3), backend="eager", strict=True)
    assert not torch.equal(law.call(optimized, ids, mask), law.call(windowed, ids, mask))


def test_a_window_as_long_as_the_text_changes_nothing(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model("llama", "sdpa").eval()
    ids, mask = law.batch(3, 12, left=True)
    exact = law.call(rewriter.optimize(model, backend="eager"), ids, mask)
    for window in (12, 13, 2**31 + 5):
        torch.testing.assert_close(
            law.call(rewriter.optimize(model, SlidingWindow(window), backend="eager"), ids, mask), exact
        )


class Policy(rewriter.Policy):
    """A user's own: every second key is forgotten after two queries."""

    def live_ranges(self, site: rewriter.SiteTensors) -> rewriter.kernels.LiveRanges:
        index = torch.arange(site.live.num_keys, dtype=torch.int32, device=site.key.device)[None, None, :]
        return rewriter.kernels.LiveRanges(index, torch.where(index % 2 == 0, index + 2, rewriter.kernels.FOREVER))


def test_a_policy_of_ones_own(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(model, Policy(), backend="eager", strict=True)
    ids, _ = law.batch(3, 12, left=False)
    i, j = torch.arange(12)[:, None], torch.arange(12)[None, :]
    visible = (j <= i) & ((j % 2 == 1) | (i < j + 2))
    dense = torch.where(visible, 0.0, torch.finfo(torch.float32).min).expand(3, 1, 12, 12)
    expected = model(input_ids=ids, attention_mask=dense, use_cache=False).logits
    torch.testing.assert_close(optimized(input_ids=ids, use_cache=False).logits, expected)


def refused(model: nn.Module, policy: Any = None, **inputs: Any) -> rewriter.Report:
    torch._dynamo.reset()
    optimized = rewriter.optimize(model, policy, backend="eager")
    torch.manual_seed(1)
    actual = optimized(**inputs)
    torch.manual_seed(1)
    expected = model(**inputs)
    get = lambda out: out if isinstance(out, Tensor) else out[0]  # noqa: E731
    torch.testing.assert_close(get(actual), get(expected))
    torch._dynamo.reset()
    with pytest.raises(rewriter.RewriteError, match="attention sites are refused: site 0"):
        rewriter.optimize(model, policy, backend="eager", strict=True)(**inputs)
    return optimized.report


def test_cross_attention_under_a_causal_policy_and_relative_bias_are_refused(law: SimpleNamespace) -> None:
    from transformers import T5Config
    from transformers import T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids, mask = law.batch(3, 12, left=False)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7], "use_cache": False}
    reasons = {site.module: site.reason for site in refused(model, SlidingWindow(4), **inputs).refused}
    assert "relative position bias" in reasons["encoder.block.0.layer.0.SelfAttention"]
    assert "relative position bias" in reasons["decoder.block.0.layer.0.SelfAttention"]
    assert "this is cross-attention" in reasons["decoder.block.0.layer.1.EncDecAttention"]


def test_cross_attention_with_a_mask_from_outside() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
            return self.reader(x, memory, memory, attn_mask=hidden, need_weights=False)[0]

    hidden = torch.rand(5, 9) < 0.5
    hidden[:, 0] = False
    model, given = Cross().eval(), {"x": torch.randn(3, 5, 16), "memory": torch.randn(3, 9, 16)}
    fast = rewriter.optimize(model, backend="eager", strict=True)
    for mask in (hidden, torch.ones(5, 9, dtype=torch.bool).triu(5)):  # with holes, and without
        torch.testing.assert_close(fast(**given, hidden=mask), model(**given, hidden=mask), rtol=1e-4, atol=1e-5)
    (site,) = fast.report.sites
    assert site.module == "reader" and site.mask == "given at the call"


def test_dropout_in_training_is_refused_and_in_evaluation_is_not(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module]
) -> None:
    for attention in ("sdpa", "eager"):
        model = tiny_model("bert", attention)
        ids, mask = law.batch(3, 12, left=False)
        torch._dynamo.reset()
        optimized = rewriter.optimize(model.train(), backend="eager")
        law.call(optimized, ids, mask)
        assert all("dropout 0.1 is active" in site.reason for site in optimized.report)
        with pytest.raises(rewriter.RewriteError, match=r"dropout 0\.1 is active"):
            law.call(rewriter.optimize(model, backend="eager", strict=True), ids, mask)
        optimized.eval()
        law.call(optimized, ids, mask)
        assert all(
            site.rewritten for site in optimized.report
        )  # the graph of evaluation; that of training stays refused
        assert all("dropout 0.1 is active" in site.reason for site in optimized.report.refused)


def test_returned_weights_are_refused() -> None:
    (site,) = refused(
        nn.MultiheadAttention(16, 2, batch_first=True), query=(x := torch.randn(3, 5, 16)), key=x, value=x
    ).refused
    assert "returned or used elsewhere" in site.reason


def test_a_bidirectional_model_under_a_causal_policy_is_refused(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module]
) -> None:
    ids, mask = law.batch(3, 12, left=False)
    report = refused(tiny_model("bert", "sdpa").eval(), SlidingWindow(4), input_ids=ids, attention_mask=mask)
    assert all("SlidingWindow is defined for causal attention, the mask is: padding" in s.reason for s in report)


def test_a_model_without_attention() -> None:
    with pytest.raises(rewriter.RewriteError, match="no attention found in Linear"):
        rewriter.optimize(nn.Linear(4, 4), backend="eager")(torch.randn(2, 4))


def test_optimizing_twice(nano: type[nn.Module]) -> None:
    optimized = rewriter.optimize(nano())
    with pytest.raises(rewriter.RewriteError, match="it is optimized already"):
        rewriter.optimize(optimized)
    with pytest.raises(rewriter.RewriteError, match="its part '1' is optimized already"):
        rewriter.optimize(nn.Sequential(nn.Identity(), optimized))
    with pytest.raises(rewriter.RewriteError, match="it is optimized already"):
        rewriter.explain(optimized)


def test_embeddings_in_place_of_token_ids(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(model, POLICIES[0], backend="eager")
    with pytest.raises(rewriter.PolicyError, match=r"call the model with input_ids=\.\.\., not with inputs_embeds"):
        optimized(inputs_embeds=torch.randn(3, 12, 32), use_cache=False)


def test_a_cache_of_earlier_keys_is_refused_by_policies(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    ids = torch.randint(0, 64, (3, 12))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        optimized = rewriter.optimize(model, SlidingWindow(4), backend="eager", strict=True)
        with pytest.raises(rewriter.CacheError, match="a DynamicCache, which keeps what the policy forgets"):
            optimized(input_ids=ids[:, :2], past_key_values=cache)
        report = rewriter.explain(model, input_ids=ids[:, :2], past_key_values=cache, policy=SlidingWindow(4))
        assert len(report.refused) == 2 and "reads a cache of earlier keys" in report.refused[0].reason


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "llama"}, rewriter.RewriteError, "expected a torch.nn.Module, got str"),
        ({"backend": "tvm"}, rewriter.RewriteError, "backend 'tvm' is not known; choose one of inductor, eager"),
        ({"policy": "exact"}, rewriter.PolicyError, "policy must be a policy such as"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rewriter.optimize(**{"model": nn.Linear(2, 2), **arguments})


def test_a_model_that_is_not_one_graph() -> None:
    class Printing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    with pytest.raises(rewriter.RewriteError, match="cannot be captured as one graph"):
        rewriter.optimize(Printing(), backend="eager")(torch.randn(2))


def test_the_model_is_shared_and_not_changed(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module], tmp_path: Any
) -> None:
    model = tiny_model("llama", "sdpa").eval()
    ids, mask = law.batch(3, 12, left=False)
    before = law.call(model, ids, mask)
    optimized = rewriter.optimize(
        model, POLICIES[1], backend="eager", dump=tmp_path, example_inputs={"input_ids": ids, "use_cache": False}
    )
    assert optimized.model is model
    assert list(model.state_dict()) == list(optimized.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), optimized.parameters(), strict=True))
    assert len(optimized.report.sites) == 2
    assert torch.equal(law.call(model, ids, mask), before)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "1-capture.txt",
        "2-canonicalize.txt",
        "3-find-attention.txt",
        "4-analyse-masks.txt",
        "5-validate-masks.txt",
        "6-apply-policy.txt",
        "7-lower.txt",
    ]
    lowered = (tmp_path / "7-lower.txt").read_text()
    assert lowered.count("rewriter.live_range_attention") == 2
    assert "aten.scaled_dot_product_attention" not in lowered
    assert "[3, 1, 12, 12]" not in lowered, "the dense mask is gone"
    optimized.train()
    assert model.training
    optimized.eval()
    assert not model.training


def test_many_models_of_one_class_stay_rewritten(nano: type[nn.Module]) -> None:
    """Dynamo forgets to compile after eight entries for one code object; each optimized model has its own."""
    ids = torch.randint(0, 64, (2, 10))
    for _ in range(10):
        optimized = rewriter.optimize(nano(), SlidingWindow(2), backend="eager", strict=True)
        optimized(ids)
        assert len(optimized.report.graphs) == 1


def test_sizes_that_dynamo_traces_as_unrelated_symbols(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module]
) -> None:
    """The padding mask's length was no longer the ids' symbol once Dynamo had seen the code before: falsely refused."""
    model = tiny_model("llama", "sdpa").eval()
    rewriter.optimize(model, backend="eager")(input_ids=torch.randint(0, 64, (1, 30)), use_cache=False)
    ids, mask = law.batch(3, 16, left=True)
    report = rewriter.explain(model, input_ids=ids, attention_mask=mask, use_cache=False)
    assert [site.mask for site in report] == ["causal + padding"] * 2
    assert not report.refused


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_as_many_rows_as_columns(law: SimpleNamespace, tiny_model: Callable[..., nn.Module], name: str) -> None:
    """torch gives equal sizes one symbol: with 12 rows of 12 tokens first, the number of heads was a fraction of squares."""
    model = tiny_model(name, "sdpa").eval()
    optimized = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    comparison = law.Comparison(model, optimized, law.call)
    for rows, length in ((12, 12), (5, 9), (32, 32)):
        comparison.add(*law.batch(rows, length, left=True))
    comparison.check()
    assert len(optimized.report.graphs) == 1


@pytest.mark.parametrize(
    "policy",
    [SlidingWindow(5, sinks=1), SeparatorMask((3, 4), window=4), DynamicMask(4)],
    ids=lambda p: type(p).__name__,
)
@torch.no_grad()
def test_policies_of_as_many_rows_as_columns(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module], policy: rewriter.Policy
) -> None:
    model = tiny_model("llama", "sdpa").eval()
    square, other = (rewriter.optimize(model, policy, backend="eager", strict=True) for _ in range(2))
    ids, mask = law.batch(12, 12, left=True)
    found = square(input_ids=ids, attention_mask=mask).logits
    parts = [other(input_ids=ids[rows], attention_mask=mask[rows]).logits for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_embeddings_as_wide_as_the_text_is_long(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    for shape in ((2, model.config.hidden_size), (32, 32), (3, 7)):
        embeddings = torch.randn(*shape, model.config.hidden_size)
        expected = model(inputs_embeds=embeddings, use_cache=False).logits
        torch.testing.assert_close(
            optimized(inputs_embeds=embeddings, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
        )
    assert len(optimized.report.graphs) == 1


def test_explain_changes_nothing(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gemma2", "eager").eval()
    ids, mask = law.batch(3, 12, left=False)
    report = rewriter.explain(model, input_ids=ids, attention_mask=mask, use_cache=False, policy=SlidingWindow(4))
    assert [site.mask for site in report] == ["window 8 + causal + padding", "causal + padding"]
    assert all(site.policy == "SlidingWindow(window=4, sinks=0)" for site in report)
    assert not report.refused


def test_autocast_trains(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    ids, mask = law.batch(3, 12, left=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = law.call(optimized, ids, mask), law.call(model, ids, mask)
    actual.float().square().sum().backward()
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0.05, atol=0.02)


def test_a_copy_is_of_the_whole(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    """A deep copy, and what comes back from a pickle, run their own model and train their own parameters."""
    optimized = rewriter.optimize(tiny_model("llama", "sdpa", layers=1).eval(), DynamicMask(4), backend="eager")
    ids, mask = law.batch(3, 12, left=False)
    expected = law.call(optimized, ids, mask)
    for other in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert torch.equal(law.call(other, ids, mask), expected)
        with torch.no_grad():
            other.model.lm_head.weight.zero_()
        assert bool((law.call(other, ids, mask) == 0).all())
        assert torch.equal(law.call(optimized, ids, mask), expected)
        law.call(other, ids, mask).sum().backward()
        assert other.model.lm_head.weight.grad is not None and optimized.model.lm_head.weight.grad is None
        assert len(other.report.sites) == 1


def test_another_model_takes_effect(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    optimized = rewriter.optimize(tiny_model("llama", "sdpa").eval(), backend="eager")
    ids, mask = law.batch(3, 12, left=False)
    law.call(optimized, ids, mask)
    optimized.model = tiny_model("llama", "sdpa").eval()
    torch.testing.assert_close(
        law.call(optimized, ids, mask)[mask.bool()], law.call(optimized.model, ids, mask)[mask.bool()]
    )


@pytest.mark.parametrize("policy", [Exact(), SlidingWindow(4)], ids=str)
def test_one_row_with_padding(
    law: SimpleNamespace, policy: Any, tiny_model: Callable[..., nn.Module], policy_mask: Any
) -> None:
    """A batch size of 1 is a constant of its graph."""
    model = tiny_model("llama", "sdpa").eval()
    optimized = rewriter.optimize(model, policy, backend="eager", strict=True)
    ids = torch.randint(0, 64, (1, 14))
    mask = (torch.arange(14) >= 3).long()[None]
    if isinstance(policy, Exact):
        expected = law.call(model, ids, mask)
    else:
        expected = call_with_dense_mask(model, "llama", policy, ids, mask, policy_mask)
    torch.testing.assert_close(law.call(optimized, ids, mask)[0, 3:], expected[0, 3:])


@torch.no_grad()
def test_dropout_in_a_checkpoint_without_gradients() -> None:
    """Nothing is recomputed where there is no backward; a partitioner refuses to recompute random numbers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def part(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            return nn.functional.dropout(y, 0.5, self.training)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)

    model = Model().train()
    output = rewriter.optimize(model, strict=True)(torch.randn(2, 9, 32))
    assert bool((output == 0).any()) and bool((output != 0).any())


def test_attributes_of_the_wrapper_are_not_set_on_a_model_that_has_them(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa")
    names = ("policy", "backend", "strict", "kernel", "dump", "report")
    for name in names:
        setattr(model, name, f"the model's {name}")
    fast = rewriter.optimize(model, rewriter.SlidingWindow(4), kernel="live_range")
    assert [getattr(model, name) for name in names] == [f"the model's {name}" for name in names]
    assert fast.policy == rewriter.SlidingWindow(4) and fast.kernel == "live_range"

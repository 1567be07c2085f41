"""Dynamic mask: outputs and gradients, those of its own parameters too, against the dense form written from the paper."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.passes.masks.forms import running_topk
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import PolicyError
from rewriter import RewriteError
from rewriter import SiteTensors
from rewriter.testing import assert_within_budget


def dense_scores(value: Tensor, W: Tensor, A: Tensor, score: str) -> Tensor:
    """delta `[B, Hkv, K]`."""
    flat = value.transpose(1, 2).flatten(2)
    u = nn.functional.softplus(flat @ W.to(value.dtype).T).transpose(1, 2)
    log = A.to(value.dtype)[:, None] * u
    return log.exp() if score == "exp" else log


def rate_terms(delta: Tensor, A: Tensor, score: str) -> Tensor:
    """|d delta / d A|, of the shape of delta."""
    delta, A = delta.detach(), A.detach().to(delta.dtype)[:, None]
    return (delta * delta.log() / A).abs() if score == "exp" else (delta / A).abs()


def best_of_each_row(delta: Tensor, allowed: Tensor, keep: int) -> Tensor:
    """bool `[B, Hkv, Q, K]`: each row's `keep` best allowed keys, of equals the older."""
    masked = delta.detach().float()[:, :, None, :].masked_fill(~allowed, -math.inf)
    place = masked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (place < keep) & allowed


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: dict[str, Tensor],
    policy: DynamicMask,
    allowed: Tensor,
    window: Tensor | None = None,
    scale: float | None = None,
    magnitudes: list[Tensor] | None = None,
) -> Tensor:
    """`[B, Hq, Q, Dv]`; a row that sees nothing is 0.

    Args:
        allowed: bool `[B|1, 1, Q, K]`, the keys that compete.
        window: bool `[Q, K]`, a further mask on what has won.
        magnitudes: filled in the backward with that of the gradient of A, `[Hkv]`.
    """
    delta = dense_scores(value, parameters["W"], parameters["A"], policy.score)
    visible = best_of_each_row(delta, allowed, policy.keep)
    if policy.local:
        visible = visible | (allowed & torch.ones(allowed.shape[-2:], dtype=torch.bool).triu(1 - policy.local))
    if window is not None:
        visible = visible & window
    group = query.size(1) // key.size(1)
    if magnitudes is not None and delta.requires_grad:
        terms = rate_terms(delta, parameters["A"], policy.score)
        delta = delta[:, :, None, :].expand(visible.shape)
        delta.register_hook(lambda g: magnitudes.append((g.abs() * terms[:, :, None, :]).sum((0, 2, 3))))
    else:
        delta = delta[:, :, None, :]
    key, value, delta, visible = (t.repeat_interleave(group, dim=1) for t in (key, value, delta, visible))
    logits = query @ key.transpose(2, 3) * (scale or query.size(3) ** -0.5) + delta
    weights = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~visible, 0) @ value


# The whole model, dense: an attention function of transformers' own registry.

_dense: dict[str, Any] = {}


def _registered(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    policy, parameters, real = _dense["policy"], _dense["parameters"][str(module.layer_idx)], _dense["real"]
    length = key.size(2)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
    window = None
    if _dense["window"] is not None:
        window = torch.ones(length, length, dtype=torch.bool).triu(1 - _dense["window"])
    scale = kwargs.get("scaling")
    magnitudes = None
    if query.dtype == torch.float64:
        magnitudes = _dense["magnitudes"].setdefault(f"1.{module.layer_idx}.A", [])
    output = dense_attention(query, key, value, parameters, policy, allowed, window, scale, magnitudes)
    return output.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("dense_dynamic", _registered)


def dense_model(policy: DynamicMask, window: int | None = None) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A forward of `[model, policy parameters]` under the dense form."""

    def forward(modules: nn.ModuleList, ids: Tensor, mask: Tensor) -> Tensor:
        model, parameters = modules
        _dense.update(policy=policy, parameters=parameters, real=mask.bool(), window=window, magnitudes={})
        before = model.config._attn_implementation
        model.config._attn_implementation = "dense_dynamic"
        try:
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            model.config._attn_implementation = before

    return forward


def rate_magnitudes() -> dict[str, Tensor]:
    """Of the last fp64 form: the gradient of A is a sum over queries and keys that all but cancel, row by row."""
    assert all(len(parts) == 1 for parts in _dense["magnitudes"].values())
    return {name: parts[0] for name, parts in _dense["magnitudes"].items()}


def distinct(batch_size: int, length: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows without a repeated token, whose first-layer values would tie, padded differently."""
    ids = torch.stack([torch.randperm(64)[:length] for _ in range(batch_size)])
    mask = torch.ones(batch_size, length, dtype=torch.long)
    for row in range(1, batch_size):
        cut = row * length // (2 * batch_size)
        mask[row, slice(0, cut) if left else slice(length - cut, length)] = 0
    return ids, mask


def optimized_model(model: nn.Module, policy: rewriter.Policy, **options: Any) -> rewriter.OptimizedModel:
    """With rates A that are not small, of both signs: a bias that matters."""
    torch._dynamo.reset()
    optimized = rewriter.optimize(model, policy, **{"backend": "eager", "strict": True, **options})
    for parameters in optimized.policy_parameters.values():
        nn.init.uniform_(parameters["A"], -1.5, 1.5)
    return optimized


@pytest.mark.parametrize(
    ("name", "attention", "policy"),
    [
        ("llama", "sdpa", DynamicMask(keep=5)),
        ("llama", "eager", DynamicMask(keep=4, score="log")),
        ("llama", "sdpa", DynamicMask(keep=4, local=3)),
        ("qwen3", "sdpa", DynamicMask(keep=5, score="log", local=1)),
        ("gpt2", "sdpa", DynamicMask(keep=5)),
    ],
    ids=str,
)
def test_equals_the_dense_form(
    law: SimpleNamespace, name: str, attention: str, policy: DynamicMask, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(name, attention).eval()
    optimized = optimized_model(model, policy)
    modules = nn.ModuleList([model, optimized.policy_parameters])
    comparison = law.Comparison(modules, optimized, dense_model(policy), rate_magnitudes)
    for size, length, left in ((3, 12, False), (5, 21, True), (3, 27, False)):
        comparison.add(*distinct(size, length, left=left))
    comparison.check()
    assert len(optimized.report.graphs) == 1
    assert {"*.*.W", "*.*.A"} <= set(comparison.results), "the policy's own parameters were compared"


def test_inductor(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa", layers=1).eval()
    policy = DynamicMask(keep=5)
    optimized = optimized_model(model, policy, backend="inductor")
    modules = nn.ModuleList([model, optimized.policy_parameters])
    comparison = law.Comparison(modules, optimized, dense_model(policy), rate_magnitudes)
    for size, length, left in ((3, 12, False), (5, 40, True)):
        comparison.add(*distinct(size, length, left=left))
    comparison.check()
    assert len(optimized.report.graphs) == 1


def site_check() -> None:
    """Output and gradients of one site, against autograd through the dense form in fp64: no rounding to hide in."""
    torch.manual_seed(1)
    policy = DynamicMask(keep=6, local=2)
    inputs = {
        "query": torch.randn(2, 4, 23, 8), "key": torch.randn(2, 2, 23, 8), "value": torch.randn(2, 2, 23, 8),
        "W": torch.randn(2, 16) / 4, "A": torch.tensor([0.7, -0.4]),
    }  # fmt: skip
    inputs = {name: t.double().requires_grad_() for name, t in inputs.items()}
    live, segment = LiveRanges.causal(23), torch.ones(1, 1, 23, dtype=torch.int32)
    parameters = {"W": inputs["W"], "A": inputs["A"]}
    q, k, v = (inputs[name] for name in ("query", "key", "value"))
    own, bias = policy.live_ranges(
        SiteTensors(live, segment, live.start, live.start[..., :1], None, q, k, v, parameters)
    )
    actual = live_range_attention(q, k, v, live & own, bias=bias)
    causal = torch.ones(23, 23, dtype=torch.bool).tril()[None, None]
    expected = dense_attention(q, k, v, parameters, policy, causal)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((actual * weight).sum(), inputs.values())
    dense = torch.autograd.grad((expected * weight).sum(), inputs.values())
    for name, a, b in zip(inputs, ours, dense, strict=True):
        assert b.abs().max() > 1e-3, name
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()) + 1e-13)


def test_gradients_of_one_site_in_full_precision() -> None:
    """Both paths of the value, the bias, W and A."""
    site_check()


SCORING_FAULTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "the worst are kept": lambda rank, bias: (-rank, bias),
    "no bias": lambda rank, bias: (rank, 0 * bias),
    "a bias without a gradient": lambda rank, bias: (rank, bias.detach() + 0 * bias),
    "the bias of the other variant": lambda rank, bias: (rank, bias.log()),
}


@pytest.mark.parametrize("name", SCORING_FAULTS)
def test_a_fault_in_the_scores_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DynamicMask.score_keys
    monkeypatch.setattr(DynamicMask, "score_keys", lambda *args: SCORING_FAULTS[name](*own(*args)))
    with pytest.raises(AssertionError):
        site_check()


@pytest.mark.parametrize("by", [{"keep": 7}, {"local": 1}])
def test_a_fault_in_the_ranges_is_found(by: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    own = DynamicMask.ranked_ranges
    monkeypatch.setattr(DynamicMask, "ranked_ranges", lambda self, *args: own(dataclasses.replace(self, **by), *args))
    with pytest.raises(AssertionError):
        site_check()


def test_a_wrong_proof_of_a_topk_is_refused_by_the_check_by_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    own = running_topk.topk_membership
    one_more = lambda node: (topk := own(node)) and dataclasses.replace(topk, keep=topk.keep + 1)  # noqa: E731
    monkeypatch.setattr(running_topk, "topk_membership", one_more)
    report = rewriter.explain(doge("sdpa"), input_ids=distinct(3, 20, left=False)[0], use_cache=False)
    assert all(
        re.search(r"the proven mask \(dynamic mask 7.*disagrees with the model's", site.reason) for site in report
    )


def test_keep_beyond_the_length_is_dense_with_the_bias(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model("llama", "sdpa").eval()
    policy = DynamicMask(keep=1000)
    optimized = optimized_model(model, policy)
    ids, mask = distinct(3, 20, left=True)
    nn.init.zeros_(optimized.policy_parameters["0"]["A"])
    nn.init.zeros_(optimized.policy_parameters["1"]["A"])
    # A = 0: the bias is 1 for every key, which no softmax sees.
    torch.testing.assert_close(law.call(optimized, ids, mask)[mask.bool()], law.call(model, ids, mask)[mask.bool()])
    nn.init.constant_(optimized.policy_parameters["1"]["A"], 0.8)
    expected = dense_model(policy)(nn.ModuleList([model, optimized.policy_parameters]), ids, mask)
    actual = law.call(optimized, ids, mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    assert not torch.allclose(actual[mask.bool()], law.call(model, ids, mask)[mask.bool()], atol=1e-3)


def test_packed_documents_are_ranked_as_if_alone(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    optimized = optimized_model(model, DynamicMask(keep=3))
    lengths = (9, 14, 6)
    ids = torch.stack([torch.randperm(64)[: sum(lengths)] for _ in range(2)])
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = optimized(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert [site.mask for site in optimized.report] == ["documents + causal"] * 2
    alone = [optimized(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_a_window_of_the_models_is_refused_or_intersected(
    law: SimpleNamespace, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model("mistral", "sdpa").eval()
    with pytest.raises(
        RewriteError, match=r"the model's mask hides some of them \(window 8 \+ causal.*not one live range"
    ):
        rewriter.optimize(model, DynamicMask(keep=5), backend="eager", strict=True)
    policy = DynamicMask(keep=5, on_window="intersect")
    optimized = optimized_model(model, policy)
    modules = nn.ModuleList([model, optimized.policy_parameters])
    comparison = law.Comparison(modules, optimized, dense_model(policy, window=8), rate_magnitudes)
    comparison.add(*distinct(3, 30, left=True))
    comparison.check()


def test_parameters_belong_to_the_optimized_model(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa").eval()
    names = [name for name, _ in model.named_parameters()]
    optimized = rewriter.optimize(
        model, PerLayer({0: Exact(), "default": DynamicMask(keep=4, seed=3)}), backend="eager"
    )
    own = {name: p for name, p in optimized.named_parameters() if not name.startswith("model.")}
    assert {name: list(p.shape) for name, p in own.items()} == {
        "policy_parameters.1.W": [2, 16],
        "policy_parameters.1.A": [2],
    }
    assert all(p.dtype == torch.float32 and p.requires_grad for p in own.values())
    assert own["policy_parameters.1.A"].tolist() == pytest.approx([0.01, 0.01])
    assert [name for name, _ in model.named_parameters()] == names, "the model itself has no new parameter"
    again = rewriter.optimize(model, PerLayer({0: Exact(), "default": DynamicMask(keep=4, seed=3)}), backend="eager")
    assert torch.equal(own["policy_parameters.1.W"], again.policy_parameters["1"]["W"])
    with torch.no_grad():
        again.policy_parameters["1"]["W"].add_(1)
    optimized.load_state_dict(again.state_dict())
    assert torch.equal(own["policy_parameters.1.W"], again.policy_parameters["1"]["W"])


def test_a_sixteen_bit_model_has_scores_in_fp32(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model("llama", "sdpa").eval().to(dtype)
        optimized = optimized_model(model, DynamicMask(keep=5))
        assert optimized.policy_parameters["0"]["W"].dtype == torch.float32
        with torch.no_grad():
            # exp(A u) beyond fp16's 65504
            optimized.policy_parameters["0"]["A"].fill_(40.0)
        ids, mask = distinct(3, 20, left=True)
        logits = law.call(optimized, ids, mask)
        assert logits.dtype == dtype and bool(logits[mask.bool()].isfinite().all())
        logits[mask.bool()].float().square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in optimized.policy_parameters.parameters())


class Stop(nn.Module):
    """A model without `dummy_inputs`, two attentions in one module; the call says which of them run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 96), nn.Linear(32, 96)

    def forward(self, x: Tensor, which: str = "both") -> Tensor:
        layers = {"both": (self.first, self.second), "first": (self.first,), "second": (self.second,)}[which]
        for layer in layers:
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in layer(x).chunk(3, dim=-1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


def test_a_model_without_dummy_inputs_needs_example_inputs() -> None:
    with pytest.raises(RewriteError, match=r"Stop has no dummy_inputs to find them with; give example_inputs="):
        rewriter.optimize(Stop(), DynamicMask(4), backend="eager")
    optimized = rewriter.optimize(Stop(), DynamicMask(4), backend="eager", example_inputs=(torch.randn(2, 9, 32),))
    assert sorted(optimized.policy_parameters) == ["0", "1"]


def test_a_call_with_other_sites_than_the_parameters_is_an_error() -> None:
    x = torch.randn(2, 9, 32)
    few = rewriter.optimize(Stop(), DynamicMask(4), backend="eager", example_inputs={"x": x, "which": "first"})
    with pytest.raises(PolicyError, match=r"has no parameters for site 1 \(-\): it was not there, or was refused"):
        few(x=x, which="both")
    both = rewriter.optimize(Stop(), DynamicMask(4), backend="eager", example_inputs={"x": x})
    both(x=x, which="first")
    with pytest.raises(
        RewriteError, match=r"site 0 is - with second.bias, second.weight in this call, and was - with first.bias"
    ):
        both(x=x, which="second")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Stop(), Stop()

    def forward(self, x: Tensor, which: str) -> Tensor:
        return self.one(x, "first") if which == "one" else self.two(x, "first")


def test_a_call_that_would_mix_parameters_up_is_an_error() -> None:
    x = torch.randn(2, 9, 32)
    optimized = rewriter.optimize(Blocks(), DynamicMask(4), backend="eager", example_inputs={"x": x, "which": "one"})
    with pytest.raises(
        RewriteError, match=r"site 0 is two with two.first.bias, two.first.weight in this call, and was one with"
    ):
        optimized(x=x, which="two")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "DynamicMask: keep must be an integer of at least 1, got 0"),
        ({"keep": 2.5}, "keep must be an integer"),
        ({"score": "linear"}, "score must be one of exp, log, got 'linear'"),
        ({"on_window": "ignore"}, "on_window must be one of refuse, intersect, got 'ignore'"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_bad_policies_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        DynamicMask(**fields)


def test_a_policy_survives_its_dictionary() -> None:
    policy = DynamicMask(7, score="log", seed=2, on_window="intersect")
    assert rewriter.Policy.from_dict(policy.to_dict()) == policy


# Scores that are not numbers.


def one_site(policy: DynamicMask, W: Tensor, A: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of all inputs, of one causal site."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(value.shape, generator=random).requires_grad_() for _ in range(2))
    inputs = {
        "query": query,
        "key": key,
        "value": value.requires_grad_(),
        "W": W.requires_grad_(),
        "A": A.requires_grad_(),
    }
    live = LiveRanges.causal(value.size(2))
    site = SiteTensors(
        live, torch.ones_like(live.start), live.start, live.start[..., :1], None, query, key, value, {"W": W, "A": A}
    )
    own, bias = policy.live_ranges(site)
    output = live_range_attention(query, key, value, live & own, bias=bias)
    return output, dict(zip(inputs, torch.autograd.grad(output.sum(), inputs.values()), strict=True))


@pytest.mark.parametrize("score", ["exp", "log"])
@pytest.mark.parametrize("broken", ["W nan", "A nan", "A inf", "A -inf", "A huge", "W huge", "W inf", "A 0 and W inf"])
def test_no_nan_comes_out_of_a_score(broken: str, score: str) -> None:
    W, A = torch.randn(2, 8), torch.tensor([0.5, 0.3])
    name, _, what = broken.rpartition(" ")
    number = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 1e30}[what]
    if "W" in name:
        W[0, 3] = number
    if "A" in name:
        A[0] = 0.0 if "0" in name else number
    value = torch.randn(1, 2, 12, 4)
    output, gradients = one_site(DynamicMask(keep=4, score=score), W, A, value)
    assert bool(output.isfinite().all())
    assert all(bool(gradients[n].isfinite().all()) for n in ("query", "key", "A")), broken
    if what == "nan":
        # Every score of the head is NaN: it sees nothing.
        assert bool((output[:, 0] == 0).all()) and bool((output[:, 1] != 0).any())
    elif "W inf" not in broken and broken != "A -inf":
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values()), broken


def test_a_key_with_a_nan_score_is_never_seen() -> None:
    policy = DynamicMask(keep=4)
    value = torch.randn(1, 1, 10, 4)
    value[0, 0, 3] = math.nan
    live = LiveRanges.causal(10)
    site = SiteTensors(
        live,
        torch.ones_like(live.start),
        live.start,
        live.start[..., :1],
        None,
        value,
        value,
        value,
        policy.initial_parameters(0, 1, 4),
    )
    own, bias = policy.live_ranges(site)
    assert own.end[0, 0].tolist()[3] == 0
    assert bool(bias.isfinite().all())
    counts = (live & own).live_counts()[0, 0].tolist()
    assert counts == [1, 2, 3, 3, 4, 4, 4, 4, 4, 4], "the others are ranked as if it were not there"


# Training.


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """What autograd keeps for the backward."""
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        total[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


@pytest.mark.soak
def test_trains_compiled_with_checkpointing_and_autocast(tiny_model: Callable[..., nn.Module]) -> None:
    """AdamW, gradient checkpointing, bf16 autocast, `torch.compile`: the loss falls, and as it does without them."""
    ids = torch.randint(0, 64, (4, 33))

    def losses(**options: Any) -> tuple[list[float], rewriter.OptimizedModel]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_model("llama", "sdpa").train()
        if options.get("checkpoint"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimized = rewriter.optimize(model, DynamicMask(keep=8), backend=options["backend"], strict=True)
        optimizer = torch.optim.AdamW(optimized.parameters(), lr=1e-2)
        result = []
        for _ in range(12):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.get("autocast", False)):
                loss = optimized(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return result, optimized

    plain, _ = losses(backend="eager")
    compiled, optimized = losses(backend="inductor", checkpoint=True, autocast=True)
    assert compiled[-1] < compiled[0] - 1.5
    assert compiled == pytest.approx(plain, rel=0.1)
    assert all(bool((p != 0.01).all()) for n, p in optimized.policy_parameters.named_parameters() if n.endswith("A"))
    assert len(optimized.report.graphs) == 1


@pytest.mark.soak
def test_checkpointed_regions_are_recomputed(tiny_model: Callable[..., nn.Module]) -> None:
    """The tags of a checkpoint reach the partitioner: compiled, a checkpointed model keeps less for its backward."""
    kept = {}
    for checkpoint in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_model("llama", "sdpa").train()
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimized = rewriter.optimize(model, DynamicMask(keep=8), strict=True)
        with saved_bytes() as total:
            optimized(input_ids=torch.randint(0, 64, (4, 60)), use_cache=False)
        kept[checkpoint] = total[0]
    assert kept[True] < 0.8 * kept[False]


# A model that has a dynamic mask of its own.


def doge(attention: str, **config: Any) -> nn.Module:
    model = transformers.DogeForCausalLM(
        transformers.DogeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            keep_window_size=6,
            max_position_embeddings=64,
            attn_implementation=attention,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **{"num_key_value_heads": 2, **config},
        )
    ).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.A)
    return model


def doge_magnitudes(model: nn.Module) -> Callable[[], dict[str, Tensor]]:
    """That of the gradients of A, measured where the model adds its mask."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn

        def prepared(*, dt_states: Tensor, _own: Any = attention, _number: int = number, **kwargs: Any) -> Tensor:
            mask = type(_own).prepare_dynamic_mask(_own, dt_states=dt_states, **kwargs)
            terms = rate_terms(dt_states, _own.A, "exp")[:, :, None, :]
            name = f"model.layers.{_number}.self_attn.A"
            mask.register_hook(lambda g: found.update({name: (g.abs() * terms).sum((0, 2, 3))}))
            return mask

        attention.prepare_dynamic_mask = prepared
    return lambda: dict(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_doge_is_recognised(law: SimpleNamespace, attention: str, tmp_path: Path) -> None:
    """`topk`, `scatter` and `masked_fill` become live ranges; rows of distinct tokens, whose scores do not tie."""
    model = doge(attention)
    optimized = rewriter.optimize(model, Exact(), backend="eager", strict=True, dump=tmp_path)
    comparison = law.Comparison(model, optimized, law.call)
    comparison.magnitudes = doge_magnitudes(comparison.precise)
    for size, length, left in ((3, 12, False), (5, 21, True), (3, 40, False)):
        comparison.add(*distinct(size, length, left=left))
    comparison.check()
    assert len(optimized.report.graphs) == 1
    assert [site.mask for site in optimized.report] == ["dynamic mask 6 + causal + padding + key bias"] * 2
    assert {(s.proof, s.proof_detail) for s in optimized.report} == {
        (
            "evaluated",
            "a running top-k is not read by the solver",
        )  # whose scores may be equal, and then differ in order
    }
    rewritten = (tmp_path / "7-lower.txt").read_text()
    assert "topk.default" not in rewritten and "scatter" not in rewritten and "running_topk_end" in rewritten
    squares = re.compile(r"\[[^\]]*(\bs\d+), \1\]")  # ..., S, S]
    assert squares.search((tmp_path / "1-capture.txt").read_text()), "the model makes S x S masks"
    assert not squares.search(rewritten), "and the rewritten one has no S x S tensor"
    short = distinct(3, 5, left=True)  # at most keep_window_size keys: the model's own code has no top-k there
    comparison = law.Comparison(model, optimized, law.call)
    comparison.magnitudes = doge_magnitudes(comparison.precise)
    comparison.add(*short)
    comparison.check()
    assert [site.mask for site in optimized.report] == ["causal + padding + key bias"] * 2


def test_doge_with_a_window_is_refused() -> None:
    model = doge("sdpa", sliding_window=5)
    report = rewriter.explain(model, input_ids=distinct(2, 20, left=False)[0], use_cache=False)
    assert all("a top-k is not over the keys of a causal prefix (window 5, causal)" in site.reason for site in report)


class OwnTopk(nn.Module):
    """A top-k mask that is read one key further, or ranks what depends on the query: nothing that may be replaced."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        length = x.size(1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        score = (q @ k.transpose(2, 3)) if self.kind == "query" else v.sum(-1)[:, :, None, :].expand(-1, -1, length, -1)
        if self.kind != "future":
            score = score.masked_fill(~causal, torch.finfo(score.dtype).min)
        best = torch.zeros_like(score).scatter(-1, score.topk(4, dim=-1, largest=self.kind != "smallest").indices, 1.0)
        if self.kind == "shifted":
            best = torch.cat((best, best), dim=-1)[..., 1 : 1 + length]
        if self.kind == "transposed":
            best = best.transpose(2, 3)
        if self.kind == "one head's":
            best = best[:, :1].expand(-1, 4, -1, -1)
        mask = torch.zeros_like(score).masked_fill(best == 0.0, float("-inf")).masked_fill(~causal, float("-inf"))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("query", "an additive mask is computed from data"),
        ("future", "a top-k is not over the keys of a causal prefix"),
        ("smallest", "a mask differs between heads"),
        ("shifted", "a mask differs between heads"),
        ("transposed", "a top-k is not read at its own row and key"),
        ("one head's", "a top-k is not read at its own row and key"),
    ],
)
def test_another_topk_is_refused(kind: str, reason: str) -> None:
    report = rewriter.explain(OwnTopk(kind), torch.randn(2, 11, 32))
    assert len(report.sites) == 1 and reason in report.sites[0].reason, report.sites[0].reason


def test_a_dynamic_mask_on_top_of_the_models_own_is_refused() -> None:
    report = rewriter.explain(
        doge("sdpa"), input_ids=distinct(2, 20, left=False)[0], use_cache=False, policy=DynamicMask(4)
    )
    assert all("the model's mask hides some of them (dynamic mask 6" in site.reason for site in report)


class Chunked(Stop):
    """Attention within chunks of 6, as some layers of Llama 4 have it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.first(x).chunk(3, dim=-1))
        i = torch.arange(x.size(1))
        mask = (i[:, None] >= i) & (i[:, None] // 6 == i // 6)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def test_chunks_are_ranked_each_for_itself() -> None:
    policy, x = DynamicMask(2), torch.randn(3, 20, 32)
    model = Chunked()
    fast = optimized_model(model, policy, example_inputs={"x": x})
    q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in model.first(x).chunk(3, dim=-1))
    i = torch.arange(20)
    allowed = ((i[:, None] >= i) & (i[:, None] // 6 == i // 6))[None, None]
    expected = dense_attention(q, k, v, dict(fast.policy_parameters["0"]), policy, allowed)
    torch.testing.assert_close(fast(x=x), expected.transpose(1, 2).flatten(2))


def test_one_row_and_one_token(law: SimpleNamespace, tiny_model: Callable[..., nn.Module]) -> None:
    """Sizes of 1, which a graph has as constants: a batch of one row with padding, and a single token."""
    model = tiny_model("llama", "sdpa").eval()
    policy = DynamicMask(keep=3)
    optimized = optimized_model(model, policy)
    ids, mask = distinct(1, 20, left=True)
    mask[0, :4] = 0
    expected = dense_model(policy)(nn.ModuleList([model, optimized.policy_parameters]), ids, mask)
    torch.testing.assert_close(law.call(optimized, ids, mask)[mask.bool()], expected[mask.bool()])
    one = law.call(optimized, ids[:, :1], mask[:, 10:11])
    torch.testing.assert_close(one, law.call(model, ids[:, :1], mask[:, 10:11]))


@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 1}])
def test_doge_with_one_row(law: SimpleNamespace, config: dict[str, int]) -> None:
    model = doge("sdpa", **config)
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    ids, mask = distinct(1, 20, left=True)
    mask[0, :4] = 0
    torch.testing.assert_close(law.call(optimized, ids, mask)[0, 4:], law.call(model, ids, mask)[0, 4:])


def test_the_same_topk_in_other_words_is_proven() -> None:
    model = OwnTopk("prefix")
    x = torch.randn(2, 11, 32)
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    torch.testing.assert_close(optimized(x), model(x))
    precise = copy.deepcopy(model).double()(x.double())
    assert_within_budget(optimized(x), model(x), precise, "output")

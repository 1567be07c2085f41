"""Mutation check: deliberate faults in the kernel and in the passes, each of which the tests' own checks must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_by import in_torch
from attention_by import native_variant
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels import reference
from rewriter.passes import pipeline
from rewriter.passes.lower import eviction as slots
from rewriter.passes.masks import check as check_masks
from rewriter.passes.verify import validate
from torch import Tensor

import rewriter
from rewriter.testing import assert_within_budget


def kernel_check(kernel: Callable[..., Any]) -> None:
    """Output and all gradients against the dense reference: padding, a window, fewer queries than keys."""
    torch.manual_seed(0)
    live = LiveRanges.sliding_window(40, 9) & LiveRanges.padding(
        torch.arange(40).expand(2, 40) >= torch.tensor([[3], [20]])
    )
    shapes = {"query": (2, 4, 30, 8), "key": (2, 2, 40, 8), "value": (2, 2, 40, 8), "bias": (2, 2, 40), "sinks": (4,)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def run(attention: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        torch.set_num_threads(3)  # so that the gradients of keys are sums of several
        try:
            return compute(attention, dtype)
        finally:
            torch.set_num_threads(1)

    def compute(attention: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        output = attention(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            live,
            bias=leaves["bias"],
            sinks=leaves["sinks"],
            softcap=4.0,
        )
        return [output, *torch.autograd.grad((output * output.detach().cos()).sum(), list(leaves.values()))]

    dense = run(reference.live_range_attention, torch.float32)
    exact = run(reference.live_range_attention, torch.float64)
    for a, d, e in zip(run(kernel, torch.float32), dense, exact, strict=True):
        assert_within_budget(a.detach(), d.detach(), e.detach())


def model_check(model: torch.nn.Module) -> None:
    """A padded batch through `optimize`, every site rewritten, against the model itself."""
    torch._dynamo.reset()
    ids = torch.randint(0, 64, (2, 20))
    mask = (torch.arange(20) >= torch.tensor([[0], [5]])).long()
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    assert_within_budget(
        optimized(ids, mask)[mask.bool()].detach(),
        model(ids, mask)[mask.bool()].detach(),
        model.double()(ids, mask)[mask.bool()].detach(),
    )


KERNEL_FAULTS = {
    "an end off by one": ("(index[lane] < own_end) ?", "(index[lane] <= own_end) ?"),
    "a start off by one": ("(own_start <= index[lane]) &", "(own_start < index[lane]) &"),
    "keys that are never masked": ("if (own_start <= low && own_end > high) continue;", "continue;"),
    "keys that are left out": (
        "selected += (start[j] <= high) & (end[j] > low);",
        "selected += (start[j] <= low) & (end[j] > low);",
    ),
    "a summary that forgets keys": ("end_[first_block + block] <= low)", "end_[first_block + block] <= low + 1)"),
    "top-left alignment": ("call.num_keys - call.num_queries, call.num_queries)", "0, call.num_queries)"),
    "what was summed is not brought to the new maximum": ("V decay = (before - shift).exp_u20();", "V decay(T(1));"),
    "no softcap": ("call.softcap = softcap.value_or(0);", "call.softcap = 0;"),
    "no gradient of the softcap": ("* (V(T(1)) - t * t)", ""),
    "a missing bias gradient": ("grad_bias[keys[n]] += sum;", "grad_bias[keys[n]] += 0;"),
    "a missing sink gradient": ("if (delta[i] != 0) sum -=", "if (delta[i] != 0) sum = 0 *"),
    "a sum of the keys' gradients is left out": ("own[d] += other[d];", "own[d] += 0 * other[d];"),
}
"""Text of the kernel in C++, and what stands in its place."""

SMALL_BLOCKS = (
    ("kBlock = 128", "kBlock = 7"),
    ("kScan = 64", "kScan = 3"),
    ("kPanels = 8", "kPanels = 1"),
    ("kVectors = 2", "kVectors = 1"),
)


def test_the_kernel_has_no_fault() -> None:
    kernel_check(live_range_attention)
    kernel_check(native_variant("rewriter_no_fault", *SMALL_BLOCKS))
    kernel_check(in_torch())


@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_a_fault_in_the_kernel_is_found(name: str) -> None:
    number = list(KERNEL_FAULTS).index(name)
    faulty = native_variant(f"rewriter_fault_{number}", KERNEL_FAULTS[name], *SMALL_BLOCKS, optimized=False)
    with pytest.raises(AssertionError):
        kernel_check(faulty)


def without_padding(original: Any) -> Any:
    """A mask analysis that drops every predicate of the key alone."""
    from rewriter.passes.masks.expression import Axis
    from rewriter.passes.masks.expression import Const
    from rewriter.passes.masks.expression import apply

    def faulty(site: Any, functions: Any, constants: Any) -> Any:
        from dataclasses import replace

        proof = original(site, functions, constants)
        del functions
        forever = rewriter.kernels.FOREVER
        causal = replace(
            proof.interval,
            start=Axis(3),
            end=apply("add", Axis(3), Const(forever // 2)),
        )
        return replace(proof, interval=causal)

    return faulty


def test_a_dropped_padding_is_refused_by_the_check_by_evaluation(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "prove_mask", without_padding(pipeline.prove_mask))
    with pytest.raises(rewriter.RewriteError, match="disagrees with the model's"):
        model_check(nano())


def test_a_dropped_padding_is_found_by_the_tests_where_that_check_is_off(
    nano: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_check(nano())
    monkeypatch.setattr(pipeline, "prove_mask", without_padding(pipeline.prove_mask))
    monkeypatch.setattr(pipeline, "check_mask", lambda *_: None)
    with pytest.raises(rewriter.RewriteError, match="disagrees with the model's"):
        model_check(nano())  # the solver finds it, too
    monkeypatch.setattr(validate, "HAS_SOLVER", False)
    with pytest.raises(AssertionError):
        model_check(nano())


def test_the_check_by_evaluation_is_not_vacuous() -> None:
    assert check_masks.LONGEST >= 1024
    assert len(check_masks.PATTERNS) >= 5


def cache_check(fast: rewriter.OptimizedModel) -> None:
    """A text in pieces over a cache of four blocks, against one forward."""
    ids = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(b))[:40] for b in range(2)])
    full = fast(input_ids=ids, use_cache=False).logits
    cache, outputs, begin = fast.new_cache(), [], 0
    for size in (9, 1, 1, 1, 15, 1, 12):
        outputs.append(fast(input_ids=ids[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), full, rtol=1e-3, atol=1e-3)


def results_changed(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function whose result is passed through `change`."""
    return lambda original: lambda *args, **kwargs: change(original(*args, **kwargs))


def new_key_in_the_first_slot(original: Any) -> Any:
    def faulty(*args: Any) -> Any:
        table, shared = original(*args)
        return table, {**shared, "slot": torch.zeros_like(shared["slot"])}

    return faulty


CACHE_FAULTS = {
    "ends one query late": ("_visible_end", results_changed(lambda end: end + 1)),
    "dead keys are read": ("_visible_end", results_changed(lambda end: torch.full_like(end, rewriter.kernels.FOREVER))),
    "a key goes to another's slot": ("_decode_key", new_key_in_the_first_slot),
    "places do not change": (
        "_prefill_positions",
        results_changed(lambda result: (torch.zeros_like(result[0]), result[1])),
    ),
}


@pytest.mark.parametrize("name", CACHE_FAULTS)
@torch.no_grad()
def test_a_fault_in_the_cache_is_found(
    name: str, tiny_model: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = "cache" if name.startswith("places") else "text"
    separators = tuple(range(3, 20))
    policy = rewriter.SeparatorMask(separators, 1, 3, max_separators=2, capacity=9, positions=positions)
    model = tiny_model("llama", "sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    fast = rewriter.optimize(model, policy, backend="eager", strict=True)
    cache_check(fast)
    attribute, wrap = CACHE_FAULTS[name]
    monkeypatch.setattr(slots, attribute, wrap(getattr(slots, attribute)))
    with pytest.raises(AssertionError):
        cache_check(fast)

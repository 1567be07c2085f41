"""Which kernel computes the sites of whole models, by mask and policy; each choice gives the same results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rewriter.passes.lower.kernel import CHOICES
from rewriter.passes.lower.kernel import Kernel
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import PerLayer
from rewriter import Policy
from rewriter import RewriteError
from rewriter import SeparatorMask
from rewriter import SlidingWindow

IDS = torch.arange(36).view(3, 12) % 60
PADDED = torch.ones(3, 12, dtype=torch.long)
PADDED[1, :5] = 0
CAUSAL, FULL, MASKED = (kernel.value for kernel in (Kernel.CAUSAL, Kernel.FULL, Kernel.MASKED))
LIVE = Kernel.LIVE_RANGE.on("cpu")


def kernels(
    model: nn.Module, policy: Policy | None = None, choice: str = "auto", mask: Tensor | None = None
) -> list[str]:
    """Of each site, by the report."""
    given = {"input_ids": IDS, "attention_mask": mask}
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    report = rewriter.explain(model.eval(), policy=policy, kernel=choice, **given)
    assert not report.refused
    return [site.kernel for site in report.sites]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_torchs_own_kernel_where_it_is_asked_for_and_a_mask_is_causal_and_nothing_else(
    tiny_model: Callable[..., nn.Module], attention: str
) -> None:
    model = tiny_model("llama", attention)
    assert kernels(model) == kernels(model, choice="live_range") == [LIVE, LIVE]
    assert kernels(model, choice="dense") == [CAUSAL, CAUSAL]


def test_live_ranges_where_a_mask_hides_more_or_a_policy_drops_keys(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", "sdpa")
    assert kernels(model, mask=PADDED) == [LIVE, LIVE]
    assert kernels(model, mask=PADDED, choice="dense") == [MASKED, MASKED]
    assert kernels(model, SlidingWindow(4)) == [LIVE, LIVE]
    assert kernels(model, SlidingWindow(4), choice="dense") == [MASKED, MASKED]
    assert kernels(model, PerLayer({0: SlidingWindow(4), "default": Exact()}), choice="dense") == [MASKED, CAUSAL]
    assert kernels(tiny_model("mistral", "sdpa")) == [LIVE, LIVE]  # a window of its own


def test_no_mask_at_all(tiny_model: Callable[..., nn.Module]) -> None:
    assert kernels(tiny_model("bert", "sdpa")) == [LIVE, LIVE]
    assert kernels(tiny_model("bert", "sdpa"), choice="dense") == [FULL, FULL]


def test_what_torchs_kernel_cannot_compute(tiny_model: Callable[..., nn.Module]) -> None:
    softcapped = tiny_model("gemma2", "eager")
    assert set(kernels(softcapped)) == {LIVE}
    with pytest.raises(RewriteError, match=r"kernel='dense' cannot compute site 0 .* softcap; use kernel='auto'"):
        kernels(softcapped, choice="dense")
    with pytest.raises(RewriteError, match="kernel 'flash' is not known; choose one of auto, live_range, dense"):
        rewriter.optimize(softcapped, kernel="flash")


def results(model: nn.Module, policy: Policy, choice: str, mask: Tensor | None) -> dict[str, Tensor]:
    """Logits of the rows that are no padding, and all gradients."""
    fast = rewriter.optimize(model, policy, kernel=choice, backend="eager", strict=True)
    real = torch.ones_like(IDS) if mask is None else mask
    model.zero_grad()
    logits = fast(input_ids=IDS, attention_mask=mask, use_cache=False).logits[real.bool()]
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("name", "policy", "mask"),
    [
        ("llama", Exact(), PADDED),
        ("llama", SlidingWindow(4, sinks=1), None),
        ("llama", SeparatorMask((3, 7, 40), window=3), PADDED),
        ("gpt2", Exact(), None),
    ],
    ids=["exact, padded", "window", "separators, padded", "exact, heads not grouped"],
)
def test_each_choice_gives_the_same_results(
    tiny_model: Callable[..., nn.Module], name: str, policy: Policy, mask: Tensor | None
) -> None:
    model = tiny_model(name, "sdpa").double().eval()
    expected, *others = (results(model, policy, choice, mask) for choice in CHOICES)
    for other in others:
        for key, tensor in expected.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-11, rtol=1e-9)


def test_the_choice_is_saved_with_the_model(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    fast = rewriter.optimize(tiny_model("llama", "sdpa"), kernel="live_range")
    fast.save_pretrained(tmp_path)
    assert rewriter.from_pretrained(tmp_path).kernel == "live_range"
    assert rewriter.from_pretrained(tmp_path, kernel="dense").kernel == "dense"

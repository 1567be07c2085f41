"""Which kernel computes a site, by what is proven of its mask and by what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rewriter.passes.lower import kernel
from rewriter.passes.lower.kernel import Kernel
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Policy
from rewriter import RewriteError
from rewriter import SlidingWindow

CAUSAL, FULL, MASKED = (kernel.value for kernel in (Kernel.CAUSAL, Kernel.FULL, Kernel.MASKED))
LIVE = Kernel.LIVE_RANGE.on("cpu")
X = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
KEEP = torch.ones(2, 12, dtype=torch.bool)
KEEP[1, :5] = False

attend = nn.functional.scaled_dot_product_attention


class Flag(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attend(x, x, x, is_causal=True)


class Written(nn.Module):
    """Causal, in single operations."""

    def forward(self, x: Tensor) -> Tensor:
        future = torch.ones(x.size(2), x.size(2), dtype=torch.bool).triu(1)
        return (x @ x.mT).masked_fill(future, float("-inf")).softmax(-1) @ x


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attend(x, x, x)


class Padded(nn.Module):
    """Causal, and padded on the left."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        causal = torch.ones(x.size(2), x.size(2), dtype=torch.bool).tril()
        return attend(x, x, x, attn_mask=causal & keep[:, None, None, :])


class Windowed(nn.Module):
    """A window that the model has itself."""

    def forward(self, x: Tensor) -> Tensor:
        visible = torch.ones(x.size(2), x.size(2), dtype=torch.bool).tril()
        return attend(x, x, x, attn_mask=visible & torch.ones_like(visible).triu(-4))


class Softcapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        future = torch.ones(x.size(2), x.size(2), dtype=torch.bool).triu(1)
        return (5 * torch.tanh(x @ x.mT / 5)).masked_fill(future, float("-inf")).softmax(-1) @ x


class Biased(nn.Module):
    """Attention in 16 bits with a bias of each key in fp32, as eager attention has it."""

    def forward(self, x: Tensor) -> Tensor:
        logits = (x @ x.transpose(-2, -1)).float() + 0.5 * torch.arange(x.size(-2)).float()
        return logits.softmax(-1).to(x.dtype) @ x


@pytest.mark.parametrize(
    ("model", "policy", "dense"),
    [
        (Flag(), None, CAUSAL),
        (Written(), None, CAUSAL),
        (Whole(), None, FULL),
        (Padded(), None, MASKED),
        (Windowed(), None, MASKED),
        (Flag(), SlidingWindow(4), MASKED),
    ],
    ids=["flag", "written", "no mask", "padded", "its own window", "a policy's window"],
)
def test_the_choice(model: nn.Module, policy: Policy | None, dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU live ranges are the fastest; elsewhere torch's kernel, where it has a flag for the mask."""
    given = (X, KEEP) if isinstance(model, Padded) else (X,)
    plain = dense if dense in (CAUSAL, FULL) else LIVE
    for choice, expected in (("auto", LIVE), ("auto", plain), ("live_range", LIVE), ("dense", dense)):
        monkeypatch.setattr(kernel, "_is_slow_in_torch", lambda _, slow=expected == LIVE: slow)
        report = rewriter.explain(model, *given, policy=policy, kernel=choice)
        assert not report.refused
        assert [site.kernel for site in report.sites] == [expected], choice


def test_what_torchs_kernel_cannot_compute() -> None:
    (site,) = rewriter.explain(Softcapped(), X).sites
    assert site.kernel == LIVE
    with pytest.raises(RewriteError, match=r"kernel='dense' cannot compute site 0 .* softcap; use kernel='auto'"):
        rewriter.explain(Softcapped(), X, kernel="dense")
    with pytest.raises(RewriteError, match="kernel 'flash' is not known; choose one of auto, live_range, dense"):
        rewriter.optimize(Softcapped(), kernel="flash")


def test_nothing_is_left_of_masks_and_ranges_where_torchs_kernel_needs_none(tmp_path: Path) -> None:
    rewriter.optimize(Written(), kernel="dense", backend="eager", dump=tmp_path, example_inputs={"x": X})
    lines = (tmp_path / "7-lower.txt").read_text().splitlines()
    lowered = "\n".join(line for line in lines if "torch.ops." in line)
    assert lowered.count("aten.scaled_dot_product_attention") == 1
    for gone in ("rewriter.", "softmax", "aten.where", "aten.le", "masked_fill", "triu"):
        assert gone not in lowered, gone


def test_a_bias_is_not_rounded_to_16_bits() -> None:
    x = X.bfloat16()
    with pytest.raises(RewriteError, match=r"would round the key's bias to torch.bfloat16; use kernel='auto'"):
        rewriter.optimize(Biased(), kernel="dense", backend="eager", strict=True)(x)
    for choice in ("auto", "dense"):
        wide = rewriter.optimize(Biased(), kernel=choice, backend="eager", strict=True)(x.float())
        torch.testing.assert_close(wide, Biased()(x.float()))


@pytest.mark.parametrize(
    ("device", "dtype", "has_amx", "slow"),
    [
        ("cpu", torch.float32, True, True),
        ("cpu", torch.bfloat16, False, True),
        ("cpu", torch.bfloat16, True, False),
        ("meta", torch.float32, False, True),
    ],
)
def test_where_torchs_kernel_is_the_slower_one(
    device: str, dtype: torch.dtype, has_amx: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    query = torch.empty(2, 3, 12, 8, device=device, dtype=dtype)
    report = rewriter.explain(Flag(), query)
    assert [site.kernel for site in report.sites] == [Kernel.LIVE_RANGE.on(device) if slow else CAUSAL]

"""Attention under a mask that is data: over live ranges where they are all of it, dense elsewhere, the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import given_mask
from rewriter.kernels.given_mask import ADDED
from rewriter.kernels.given_mask import RANGES
from rewriter.kernels.given_mask import ROWS
from rewriter.kernels.given_mask import SHOWN
from rewriter.kernels.given_mask import attention_under_mask
from rewriter.kernels.given_mask import mask_ranges

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_fp64(
    mask: torch.Tensor, added: torch.Tensor | None, query: Any, key: Any, value: Any, options: Any
) -> torch.Tensor:
    """By definition; a row that sees no key is 0."""
    group = query.size(1) // key.size(1)
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (key, value))
    logits = query.double() @ keys.transpose(2, 3) * (options.get("scale") or query.size(3) ** -0.5)
    if (cap := options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    if (bias := options.get("bias")) is not None:
        logits = logits + bias.double().expand(-1, key.size(1), -1).repeat_interleave(group, dim=1)[:, :, None]
    if added is not None:
        logits = logits + added
    visible = mask if mask.size(1) == 1 else mask.repeat_interleave(group, dim=1)
    weights = torch.where(visible, logits, -torch.inf)
    if (sinks := options.get("sinks")) is not None:
        weights = torch.cat((weights, sinks.double()[:, None, None].expand(*weights.shape[:3], 1)), dim=3)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    sees = visible.any(dim=-1, keepdim=True)
    return torch.nan_to_num(torch.softmax(weights, dim=-1)) @ values * sees


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**16), st.sampled_from(["runs", "random"]))
def test_ranges_are_the_columns_runs(queries: int, more: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = queries + more
    if kind == "runs":
        bounds = torch.randint(0, queries + 1, (2, 1, 3, keys), generator=generator).sort(dim=0).values
        index = torch.arange(queries)[:, None]
        mask = (bounds[0][:, :, None] <= index) & (index < bounds[1][:, :, None])
    else:
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.5
    start, end, form, *_ = mask_ranges(mask.to(DEVICE), None, torch.float32)
    shown = LiveRanges(start, end).visible(torch.arange(more, keys, dtype=torch.int32, device=DEVICE)).cpu()
    edges = torch.nn.functional.pad(mask, (0, 0, 1, 1))
    assert (int(form) == RANGES) == bool(((edges[:, :, 1:] != edges[:, :, :-1]).sum(dim=2) <= 2).all())
    if int(form) == RANGES:
        assert torch.equal(mask, shown.expand(mask.shape))
        assert bool((end[mask[:, :, -1].to(DEVICE)] == FOREVER).all())


def test_long_masks_are_read_in_parts() -> None:
    length = 2 * ROWS + 7
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
    start, _, form, *_ = mask_ranges(mask, None, torch.float32)
    assert int(form) == RANGES and torch.equal(start[0, 0], torch.arange(length, dtype=torch.int32, device=DEVICE))
    mask[0, 0, ROWS, 3] = False
    assert int(mask_ranges(mask, None, torch.float32)[2]) == SHOWN


def test_what_is_added_counts() -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=DEVICE).tril()
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert int(mask_ranges(mask, added, torch.float32)[2]) == RANGES
    added[0, 0, 2, 1] = 0.5
    assert int(mask_ranges(mask, added, torch.float32)[2]) == SHOWN


@pytest.mark.parametrize("kind", ["ranges", "holes", "added", "zeros", "alone", "alone, padded", "alone, ranges"])
@pytest.mark.parametrize(
    "options", [(), ("bias",), ("sinks", "softcap"), ("bias", "sinks", "softcap", "scale")], ids=str
)
@pytest.mark.parametrize("group", [1, 2])
def test_values_and_gradients(kind: str, options: tuple[str, ...], group: int) -> None:
    torch.manual_seed(0)
    batch, heads, queries, keys, dim = 2, 2, 9, 12, 8
    query, key, value = (
        torch.randn(batch, h, n, dim, device=DEVICE, requires_grad=True)
        for h, n in ((heads * group, queries), (heads, keys), (heads, keys))
    )
    rows, columns = torch.arange(queries, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)
    mask = (columns <= rows + 3)[None, None].expand(batch, 1, -1, -1).clone()
    mask[0, :, :2] = False  # rows that see no key
    added = None
    if kind == "holes":
        mask = mask & (torch.rand(batch, heads if group == 1 else 1, queries, keys, device=DEVICE) < 0.7)
    if kind == "added":
        added = torch.randn(mask.shape, device=DEVICE, requires_grad=True)
    if kind == "zeros":
        added = torch.where(mask, 0.0, -1e9).requires_grad_()
    if kind.startswith("alone"):  # nothing but what is added
        hides = torch.finfo(torch.float32).min
        added = torch.where((columns <= rows + 3)[None, None], 0.0, hides).expand(batch, 1, -1, -1).clone()
        added[1, 0, 4, :3] = hides if kind == "alone, ranges" else torch.tensor([0.5, -2, hides], device=DEVICE)
        mask = torch.ones_like(mask)
        if kind == "alone, ranges":
            added[1, 0, :, :3] = hides
        if kind == "alone, padded":
            added[0, :, :2] = hides
            mask[0, :, :2] = False
        added.requires_grad_()
    every: dict[str, Any] = {
        "bias": torch.randn(batch, 1, keys, device=DEVICE, requires_grad=True),
        "sinks": torch.randn(heads * group, device=DEVICE, requires_grad=True),
        "softcap": 5.0,
        "scale": 0.3,
    }
    own = {name: every[name] for name in options}
    given = None if kind.startswith("alone") else mask
    found = mask_ranges(given, None if added is None else added.detach(), torch.float32)
    forms = dict.fromkeys(("ranges", "zeros", "alone, ranges"), RANGES) | {"alone": ADDED}
    assert int(found[2]) == forms.get(kind, SHOWN)
    output, _ = attention_under_mask(query, key, value, *found, added, **own)
    expected = in_fp64(mask, added, query, key, value, own)
    leaves = [query, key, value, *(t for t in own.values() if isinstance(t, torch.Tensor))]
    leaves += [] if added is None else [added]
    grad = torch.randn_like(output)
    grads, exact = (torch.autograd.grad(out, leaves, grad.to(out.dtype)) for out in (output, expected))
    for actual, wanted in zip((output, *grads), (expected, *exact), strict=True):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="the fused kernel is that of CPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_kernel_trains_where_it_can(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would by itself; dense weights, of which a long row has no room, are made for gradients of the mask alone."""
    query, key, value = (torch.randn(2, h, 40, 8, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    mask = torch.rand(2, 1, 40, 40) < 0.5
    mask[0, 0, 7] = False  # a row that sees no key
    mask[:, :, 8:, 0] = True
    found = mask_ranges(mask, None, dtype)
    monkeypatch.setattr(given_mask, "dense_gradients", None)
    output, _ = attention_under_mask(query, key, value, *found)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | ~mask.any(-1, keepdim=True), enable_gqa=True
    ).masked_fill(~mask.any(-1, keepdim=True), 0)
    grad = torch.randn_like(output)
    grads, wanted = (torch.autograd.grad(out, (query, key, value), grad) for out in (output, expected))
    for one, other in zip((output, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_added_alone_is_of_the_querys_type() -> None:
    added = torch.randn(1, 1, 4, 4, device=DEVICE)
    assert int(mask_ranges(None, added, torch.float32)[2]) == ADDED
    *_, form, shown, sees = mask_ranges(None, added, torch.bfloat16)
    assert int(form) == SHOWN and torch.equal(shown, added) and bool(sees.all())
    with pytest.raises(ValueError, match="got neither"):
        mask_ranges(None, None, torch.float32)


@pytest.mark.parametrize("holes", [False, True])
def test_opcheck(holes: bool) -> None:
    query, key, value = (torch.randn(2, h, 6, 8, device=DEVICE, requires_grad=True) for h in (4, 2, 2))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool, device=DEVICE).tril()
    mask[0, 0, 3, 1] = not holes
    torch.library.opcheck(mask_ranges, (mask, None, torch.float32), test_utils=("test_schema", "test_faketensor"))
    found = mask_ranges(mask, None, torch.float32)
    torch.library.opcheck(attention_under_mask, (query, key, value, *found))
    added = torch.where(mask, 0.0, -1e9) if holes else torch.randn(2, 1, 6, 6, device=DEVICE)
    torch.library.opcheck(mask_ranges, (None, added, torch.float32), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(attention_under_mask, (query, key, value, *mask_ranges(None, added, torch.float32), added))

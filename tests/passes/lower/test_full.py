"""What a lowered graph is, as text: small modules, all their nodes."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter
from rewriter import SlidingWindow

attend = nn.functional.scaled_dot_product_attention


def lowered(model: nn.Module, *args: Tensor, **options: Any) -> str:
    """The graph's calls: nodes in order, sizes and the names of symbols left out."""
    report = rewriter.explain(model, *args, **options)
    assert not report.refused
    lines = report.graphs[0].graphs["lower"].splitlines()
    calls = [line.split("  #")[0] for line in lines if not line.startswith(("input ", "output "))]
    return "\n".join(re.sub(r", (device|pin_memory|layout)=[\w.]+", "", line) for line in calls)


def is_text(actual: str, expected: str) -> None:
    assert actual == textwrap.dedent(expected).strip()


def tensors(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 6, 8), torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 8)


class Written(nn.Module):
    """Causal attention as it is written by hand."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        return (q @ k.transpose(-2, -1) * 0.5).masked_fill(future, float("-inf")).softmax(-1) @ v


class Padded(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(q, k, v, attn_mask=keep[:, None, None, :])


class Twice(nn.Module):
    """An attention whose query, key and value are another attention's result, with nothing between."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attend(q, k, v, is_causal=True)
        return attend(first, first, first, is_causal=True)


def test_a_mask_written_by_hand_is_a_flag_of_torchs_kernel() -> None:
    is_text(
        lowered(Written(), *tensors(), kernel="dense"),
        """
        to = aten.to.dtype(arg4_1, torch.float32)
        to_1 = aten.to.dtype(arg5_1, torch.float32)
        to_2 = aten.to.dtype(arg6_1, torch.float32)
        scaled_dot_product_attention = aten.scaled_dot_product_attention.default(to, to_1, to_2, None, 0.0, True, scale=0.5)
        to_3 = aten.to.dtype(scaled_dot_product_attention, torch.float32)
        """,
    )


def test_padding_becomes_the_ends_of_ranges() -> None:
    is_text(
        lowered(Padded(), *tensors(), torch.ones(2, 6, dtype=torch.bool)),
        """
        sym_size_int = aten.sym_size.int(arg6_1, 2)
        arange = aten.arange.default(sym_size_int)
        unsqueeze_2 = aten.unsqueeze.default(arange, 0)
        unsqueeze_3 = aten.unsqueeze.default(unsqueeze_2, 1)
        slice_3 = aten.slice.Tensor(unsqueeze_3, 2, 0, 9223372036854775807)
        sym_size_int_2 = aten.sym_size.int(arg6_1, 0)
        arange_1 = aten.arange.default(sym_size_int_2)
        slice_4 = aten.slice.Tensor(arange_1, 0, 0, 9223372036854775807)
        unsqueeze_4 = aten.unsqueeze.default(slice_4, 1)
        unsqueeze_5 = aten.unsqueeze.default(unsqueeze_4, 2)
        full = aten.full.default([], 0, dtype=torch.int64)
        to = aten.to.dtype_layout(full, dtype=torch.int64)
        unsqueeze_6 = aten.unsqueeze.default(to, 0)
        unsqueeze_7 = aten.unsqueeze.default(unsqueeze_6, 1)
        unsqueeze_8 = aten.unsqueeze.default(unsqueeze_7, 2)
        sym_size_int_6 = aten.sym_size.int(slice_3, 2)
        expand = aten.expand.default(unsqueeze_8, [1, 1, sym_size_int_6])
        to_1 = aten.to.dtype(expand, torch.int32)
        atleast_1d = aten.atleast_1d.default(unsqueeze_5)
        atleast_1d_1 = aten.atleast_1d.default(slice_3)
        index = aten.index.Tensor(arg2_1, [atleast_1d, atleast_1d_1])
        full_1 = aten.full.default([], 2147483647, dtype=torch.int64)
        full_2 = aten.full.default([], 0, dtype=torch.int64)
        where = aten.where.self(index, full_1, full_2)
        to_2 = aten.to.dtype_layout(where, dtype=torch.int64)
        alias = aten.alias.default(to_2)
        sym_size_int_7 = aten.sym_size.int(slice_4, 0)
        expand_1 = aten.expand.default(alias, [sym_size_int_7, 1, sym_size_int_6])
        to_3 = aten.to.dtype(expand_1, torch.int32)
        to_7 = aten.to.dtype(arg5_1, torch.float32)
        to_8 = aten.to.dtype(arg6_1, torch.float32)
        to_9 = aten.to.dtype(arg7_1, torch.float32)
        live_range_attention = rewriter.live_range_attention.default(to_7, to_8, to_9, to_1, to_3)
        getitem = getitem(live_range_attention, 0)
        to_10 = aten.to.dtype(getitem, torch.float32)
        """,
    )


def test_two_sites_share_their_ranges() -> None:
    is_text(
        lowered(Twice(), *tensors(), policy=SlidingWindow(3)),
        """
        sym_size_int = aten.sym_size.int(arg5_1, 2)
        arange = aten.arange.default(sym_size_int)
        unsqueeze = aten.unsqueeze.default(arange, 0)
        unsqueeze_1 = aten.unsqueeze.default(unsqueeze, 1)
        slice_1 = aten.slice.Tensor(unsqueeze_1, 2, 0, 9223372036854775807)
        to = aten.to.dtype_layout(slice_1, dtype=torch.int64)
        alias = aten.alias.default(to)
        sym_size_int_6 = aten.sym_size.int(slice_1, 2)
        expand = aten.expand.default(alias, [1, 1, sym_size_int_6])
        to_1 = aten.to.dtype(expand, torch.int32)
        full = aten.full.default([], 2147483647, dtype=torch.int64)
        to_2 = aten.to.dtype_layout(full, dtype=torch.int64)
        unsqueeze_6 = aten.unsqueeze.default(to_2, 0)
        unsqueeze_7 = aten.unsqueeze.default(unsqueeze_6, 1)
        unsqueeze_8 = aten.unsqueeze.default(unsqueeze_7, 2)
        expand_1 = aten.expand.default(unsqueeze_8, [1, 1, sym_size_int_6])
        to_3 = aten.to.dtype(expand_1, torch.int32)
        to_6 = aten.to.dtype(to, torch.int32)
        zeros_like = aten.zeros_like.default(to_6, dtype=torch.bool)
        add = aten.add.Tensor(to_6, 3)
        where_1 = aten.where.ScalarSelf(zeros_like, 2147483647, add)
        maximum = aten.maximum.default(to_1, to_6)
        minimum = aten.minimum.default(to_3, where_1)
        to_7 = aten.to.dtype(arg4_1, torch.float32)
        to_8 = aten.to.dtype(arg5_1, torch.float32)
        to_9 = aten.to.dtype(arg6_1, torch.float32)
        live_range_attention = rewriter.live_range_attention.default(to_7, to_8, to_9, maximum, minimum)
        getitem = getitem(live_range_attention, 0)
        to_10 = aten.to.dtype(getitem, torch.float32)
        to_11 = aten.to.dtype(to_10, torch.float32)
        to_12 = aten.to.dtype(to_11, torch.float32)
        to_13 = aten.to.dtype(to_12, torch.float32)
        live_range_attention_1 = rewriter.live_range_attention.default(to_13, to_13, to_13, maximum, minimum)
        getitem_1 = getitem(live_range_attention_1, 0)
        to_14 = aten.to.dtype(getitem_1, torch.float32)
        """,
    )


def test_an_attention_of_an_attention_is_under_the_policy() -> None:
    """Each was replaced, and the second was given the first as it was before."""
    i, j = torch.arange(6)[:, None], torch.arange(6)[None, :]
    mask = (j <= i) & (i - j < 3)
    q, k, v = tensors()
    first = attend(q, k, v, attn_mask=mask)
    expected = attend(first, first, first, attn_mask=mask)
    for kernel in ("auto", "dense"):
        fast = rewriter.optimize(Twice(), SlidingWindow(3), backend="eager", kernel=kernel)
        torch.testing.assert_close(fast(q, k, v), expected)


def test_what_is_left_of_a_site_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.passes.lower import full

    own = full._replace

    def forgets(plan: Any, proof: Any, shared: Any, replaced: Any) -> Any:
        return own(plan, proof, shared, {})

    monkeypatch.setattr(full, "_replace", forgets)
    with pytest.raises(rewriter.RewriteError, match="was replaced and is still used"):
        rewriter.optimize(Twice(), SlidingWindow(3), backend="eager")(*tensors())

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter


def pass_seconds(layers: int) -> tuple[float, float, int]:
    """Seconds of all passes, of those after capture, and the number of sites."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    torch._dynamo.reset()
    ids = torch.randint(0, 64, (3, 12))
    optimized = rewriter.optimize(model, rewriter.SeparatorMask((3,)), backend="eager", strict=True)
    with torch.no_grad():
        optimized(input_ids=ids, use_cache=False)
    seconds = optimized.report.graphs[0].seconds
    assert len(optimized.report.sites) == layers
    return (
        sum(seconds.values()),
        sum(s for name, s in seconds.items() if name != "capture"),
        len(optimized.report.sites),
    )


@pytest.mark.soak
def test_time_is_linear_in_the_layers() -> None:
    """`bench/compile.py` measures a hundred layers."""
    pass_seconds(2)  # imports and caches
    _, ours_10, _ = pass_seconds(10)
    _, ours_40, sites = pass_seconds(40)
    assert sites == 40
    assert ours_40 < 4 * 2 * ours_10


def test_ranges_are_computed_once_and_shared(tiny_model: Callable[..., nn.Module], tmp_path: Any) -> None:
    model = tiny_model("llama", "sdpa").eval()
    ids = torch.randint(0, 64, (3, 12))
    policy = rewriter.SeparatorMask((3, 17), window=4)
    rewriter.optimize(
        model, policy, backend="eager", dump=tmp_path, example_inputs={"input_ids": ids, "use_cache": False}
    )
    lowered = (tmp_path / "7-lower.txt").read_text()
    assert lowered.count("torch.ops.aten.eq.Tensor") + lowered.count("torch.ops.aten.eq.Scalar") == len(
        policy.separators
    )
    assert lowered.count("torch.ops.rewriter.live_range_attention") == 2


class Stacked(nn.Module):
    """Rank-3 attention: `[N, S, D]`, one head."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_attention_of_rank_3() -> None:
    optimized = rewriter.optimize(Stacked(), rewriter.SlidingWindow(3), backend="eager", strict=True)
    x = torch.randn(5, 9, 6)
    i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
    mask = (j <= i) & (i - j < 3)
    expected = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    torch.testing.assert_close(optimized(x), expected)


def test_explain_compiles_nothing(nano: Any, monkeypatch: Any) -> None:
    import torch._inductor.compile_fx as compiler

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("explain must not compile")

    monkeypatch.setattr(compiler, "compile_fx", fail)
    torch._dynamo.reset()
    begin = time.perf_counter()
    report = rewriter.explain(nano(), torch.randint(0, 64, (2, 10)))
    assert time.perf_counter() - begin < 60
    assert report.summary() == "2 of 2 attention sites rewritten"
    assert "rewriter.live_range_attention" in report.graphs[0].graphs["lower"]

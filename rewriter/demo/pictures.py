"""The demo's pictures. Needs matplotlib, which the extra `rewriter[demo]` installs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from rewriter.kernels import LiveRanges


def draw_masks(masks: dict[str, LiveRanges], path: Path) -> None:
    """One square per policy: query rows, key columns, dark where visible."""
    figure, axes = plt.subplots(1, len(masks), figsize=(4 * len(masks), 4.4))
    for axis, (name, live) in zip(axes, masks.items(), strict=True):
        visible = live.visible(torch.arange(live.num_keys))[0, 0]
        causal = live.num_keys * (live.num_keys + 1) / 2
        axis.imshow(visible.numpy(), cmap="Greys", interpolation="nearest")
        axis.set_title(f"{name}\n{live.live_pairs() / causal:.0%} of the causal pairs", fontsize=9)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_times(lengths: list[int], seconds: dict[str, list[float]], path: Path) -> None:
    """Prefill time against length, one line per model."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, times in seconds.items():
        axis.plot(lengths, times, marker="o", label=name, linestyle="--" if name.startswith("original") else "-")
    axis.set_xlabel("tokens")
    axis.set_ylabel("prefill, seconds")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

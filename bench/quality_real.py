"""What do policies that nobody trained for cost a pretrained model, at equal kept keys? SmolLM2-135M-Instruct reads a book.

Each policy keeps a half, a quarter and an eighth of the (query, key) pairs that a causal mask shows; its window is chosen for
that. Bits per token by position, over `--windows` rows of each text, and the seconds of a forward. The model was trained on rows
of 8,192 tokens.

    python bench/quality_real.py --out bench/results/quality-real.json

What is in `--out` already is not run again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter import DynamicMask
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.comparison.budget import at_budget
from rewriter.comparison.compare import bits_of_tokens
from rewriter.comparison.compare import borders
from rewriter.demo.models import load_smollm2
from rewriter.errors import PolicyError

TEXTS = Path(__file__).parent / "texts"
SHARES = (1 / 2, 1 / 4, 1 / 8)
SINKS = 4
LOCAL = 64
"""Last keys that a dynamic mask shows besides the best, for text needs its neighbours."""

ORIGINAL = "original"
FAMILIES = ("window and sinks", "separators", "dynamic mask, untrained")


def policies(tokenizer: Any, ids: Tensor) -> Iterator[tuple[str, float, rewriter.Policy | None]]:
    """Family, share of the pairs, and the policy that keeps it on these ids; None where the family cannot."""
    contestants = (SlidingWindow(1, sinks=SINKS), SeparatorMask.from_tokenizer(tokenizer), DynamicMask(1, local=LOCAL))
    for share, (family, policy) in itertools.product(SHARES, zip(FAMILIES, contestants, strict=True)):
        try:
            yield family, share, at_budget(policy, share, ids)
        except PolicyError:
            yield family, share, None


@torch.no_grad()
def bits_by_position(call: Any, ids: Tensor) -> tuple[list[float], float]:
    """Bits of each token but the first, averaged between `borders`; and the seconds of the forward."""
    begin = time.perf_counter()
    logits = call(input_ids=ids, use_cache=False).logits
    seconds = time.perf_counter() - begin
    bits = bits_of_tokens(logits, ids)
    return [float(bits[a:b].mean()) for a, b in itertools.pairwise(borders(ids.size(1)))], seconds


def measure(texts: list[Path], length: int, windows: int, out: Path, rows: list[dict[str, Any]]) -> None:
    model, tokenizer = load_smollm2()
    model.eval()
    done = {(row["text"], row["family"], row["share"]) for row in rows}
    for text in texts:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        if ids.size(1) < windows * length:
            raise typer.BadParameter(f"{text} has {ids.size(1)} tokens, fewer than {windows} times --length {length}")
        parts = list(ids[:, : windows * length].split(length, dim=1))
        for family, share, policy in [(ORIGINAL, 1.0, None), *policies(tokenizer, parts[0])]:
            if (text.name, family, share) in done:
                continue
            row: dict[str, Any] = {"text": text.name, "family": family, "share": share}
            if policy is None and family != ORIGINAL:
                row["reason"] = "more of the text than this share are separators"
            else:
                torch._dynamo.reset()
                call = model if policy is None else rewriter.optimize(model, policy, strict=True, progress=False)
                found = [bits_by_position(call, part) for part in parts]
                columns = zip(*(bits for bits, _ in found), strict=True)
                row["bits"] = [sum(column) / len(column) for column in columns]
                row["seconds"] = min(seconds for _, seconds in found)
                row["policy"] = str(policy)
            rows.append(row)
            out.write_text(
                json.dumps({"length": length, "windows": windows, "rows": rows}, indent=1) + "\n", encoding="utf-8"
            )
            print(row["text"], family, f"{share:.3f}", row.get("bits", row.get("reason")), flush=True)


def overall(row: dict[str, Any], length: int) -> float:
    """Bits per token over all positions."""
    edges = borders(length)
    sizes = [b - a - (b == length) for a, b in itertools.pairwise(edges)]
    return sum(n * bits for n, bits in zip(sizes, row["bits"], strict=True)) / sum(sizes)


def table(result: dict[str, Any]) -> Table:
    length = result["length"]
    edges = borders(length)
    shown = Table(title=f"Bits per token by position, rows of {length:,} tokens", title_justify="left")
    parts = [f"to {b:,}" for b in edges[1:]]
    for column in ("text", "policy", "pairs", *parts, "all", "of the original", "forward"):
        shown.add_column(column, justify="left" if column in ("text", "policy") else "right")
    originals = {row["text"]: row for row in result["rows"] if row["family"] == ORIGINAL}
    for row in result["rows"]:
        begin = (row["text"], row["family"], f"{row['share']:.1%}")
        if "reason" in row:
            shown.add_row(*begin, row["reason"])
            continue
        base = originals[row["text"]]
        bits = (f"{value:.3f}" for value in row["bits"])
        worse = overall(row, length) / overall(base, length) - 1
        speed = base["seconds"] / row["seconds"]
        shown.add_row(*begin, *bits, f"{overall(row, length):.3f}", f"{worse:+.1%}", f"{speed:.2f}x")
    return shown


def plot(result: dict[str, Any], path: Path) -> None:
    """Bits per token against the pairs that are kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    length = result["length"]
    figure, axes = plt.subplots(figsize=(6, 4))
    for family in FAMILIES:
        points: dict[float, list[float]] = {}
        for row in result["rows"]:
            if row["family"] in (family, ORIGINAL) and "bits" in row:
                points.setdefault(row["share"], []).append(overall(row, length))
        shares = sorted(points)
        axes.plot(shares, [sum(points[s]) / len(points[s]) for s in shares], marker="o", label=family)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("pairs kept, of a causal mask's")
    axes.set_ylabel("bits per token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="JSON to write, and to go on with; a picture is drawn beside it.")] = Path(
        "quality-real.json"
    ),
    text: Annotated[Path, typer.Option(help="A text file, or a folder of them.")] = TEXTS,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 8192,
    windows: Annotated[int, typer.Option(help="Rows of each text.")] = 2,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        if (before["length"], before["windows"]) != (length, windows):
            raise typer.BadParameter(
                f"{out} was measured with --length {before['length']}, --windows {before['windows']}"
            )
        rows = before["rows"]
    measure(sorted(text.glob("*.txt")) if text.is_dir() else [text], length, windows, out, rows)
    result = {"length": length, "windows": windows, "rows": rows}
    plot(result, out.with_suffix(".png"))
    Console(width=170).print(table(result))


if __name__ == "__main__":
    typer.run(main)

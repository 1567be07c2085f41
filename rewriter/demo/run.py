"""`rewriter demo`: the small trained model reads a real file under each policy, and one table says what it gained and lost."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.progress import SpinnerColumn
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch import nn

from rewriter.api import optimize
from rewriter.demo.corpus import held_out_text
from rewriter.demo.models import MODELS
from rewriter.kernels import LiveRanges
from rewriter.kernels.costs import live_range_work
from rewriter.optimized_model import OptimizedModel
from rewriter.passes.policy import Policy
from rewriter.policies.exact import Exact
from rewriter.policies.per_layer import PerLayer
from rewriter.policies.ranges import policy_ranges
from rewriter.policies.separator_mask import SeparatorMask
from rewriter.policies.sliding_window import SlidingWindow

NUM_BYTES = 16_384
LISTED = 64
"""Most separators that are printed."""

SMALL = 10_000_000
"""Parameters of a model whose prefill takes less than a second, and is timed several times."""

LENGTHS = (512, 1024, 2048, 4096)
SEEN = {"bundled": ", which it has never seen", "smollm2": ""}
PICTURED = ("Exact", "SlidingWindow(512, sinks=4)", "SeparatorMask(window=256)")


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, `None` where a column does not apply."""

    name: str
    sites: str
    seconds: float
    speedup: float
    work_ratio: float | None
    live_keys: int
    kept: float
    bits_per_byte: float
    largest_difference: float | None


def demo_policies(tokenizer: Any) -> dict[str, Policy]:
    separators = SeparatorMask.from_tokenizer(tokenizer, window=256)
    return {
        "Exact": Exact(),
        "SlidingWindow(512, sinks=4)": SlidingWindow(512, sinks=4),
        "SeparatorMask(window=256)": separators,
        "PerLayer: 0 exact, then separators": PerLayer({0: Exact(), "default": separators}),
    }


def run(out: Path, console: Console, name: str = "bundled") -> list[Row]:
    """Prints the table of one of `MODELS`, and writes it with two pictures to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = MODELS[name]()
    repeats = 5 if model.num_parameters() < SMALL else 1
    text = held_out_text(NUM_BYTES)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    policies = demo_policies(tokenizer)
    separators = policies["SeparatorMask(window=256)"]
    assert isinstance(separators, SeparatorMask)
    console.print(
        f"A Llama-type model of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters reads the first "
        f"{len(text.encode()):,} bytes of argparse.py{SEEN[name]}: {ids.size(1):,} tokens, "
        f"{torch.get_num_threads()} threads."
    )
    listed = " ".join(map(repr, separators.names[:LISTED]))
    more = f" and {len(separators.names) - LISTED} more" if len(separators.names) > LISTED else ""
    console.print(f"Separators found in its tokenizer: {listed}{more}", markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    rows: list[Row] = []
    optimized: dict[str, OptimizedModel] = {}
    with torch.no_grad(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("the original model")
        logits, dense_seconds = _timed(lambda: _logits(model, ids), repeats)
        dense_bits = _bits_per_byte(logits, ids, text)
        rows.append(
            Row("original (transformers, sdpa)", "-", dense_seconds, 1.0, None, ids.size(1), 1.0, dense_bits, None)
        )
        progress.update(task, description="the original model, compiled")
        compiled = torch.compile(model, dynamic=True)
        _, seconds = _timed(lambda: _logits(compiled, ids), repeats)
        rows.append(
            Row(
                "original, torch.compile",
                "-",
                seconds,
                dense_seconds / seconds,
                None,
                ids.size(1),
                1.0,
                dense_bits,
                None,
            )
        )
        for label, policy in policies.items():
            progress.update(task, description=f"{label}: compiling and reading")
            fast = optimized[label] = optimize(model, policy, strict=True)
            logits, seconds = _timed(lambda: _logits(fast, ids), repeats)  # noqa: B023
            progress.update(task, description=f"{label}: the same with its dense mask")
            rows.append(_row(label, policy, fast, model, ids, text, logits, seconds, dense_seconds))
        progress.update(task, description="time against length")
        lengths = [length for length in (*LENGTHS, ids.size(1)) if length <= ids.size(1)]
        runners = {"original": model, "original, torch.compile": compiled, **optimized}
        times = {
            label: [_timed(lambda: _logits(runner, ids[:, :length]), repeats)[1] for length in lengths]  # noqa: B023
            for label, runner in runners.items()
        }
    console.print(_table(rows))
    console.print(optimized["SeparatorMask(window=256)"].report)
    (out / "demo.json").write_text(
        json.dumps({"rows": [asdict(r) for r in rows], "lengths": lengths, "seconds": times}, indent=1)
    )
    try:
        from rewriter.demo import pictures
    except ImportError:
        console.print("matplotlib is not installed, so no pictures: pip install 'rewriter[demo]'", markup=False)
    else:
        masks = {name: policy_ranges(policies[name], ids[:, :1024]) for name in PICTURED}
        pictures.draw_masks(masks, out / "masks.png")
        pictures.draw_times(lengths, times, out / "time-against-length.png")
        optimized["SeparatorMask(window=256)"].report.to_html(out / "report.html")
        console.print(f"Written: {out}/demo.json, masks.png, time-against-length.png, report.html", markup=False)
    return rows


def _row(
    name: str,
    policy: Policy,
    fast: OptimizedModel,
    model: Any,
    ids: Tensor,
    text: str,
    logits: Tensor,
    seconds: float,
    dense_seconds: float,
) -> Row:
    num_layers, query_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    policies = [policy.for_layer(layer) for layer in range(num_layers)]
    ranges_of = {own: policy_ranges(own, ids) for own in set(policies)}
    layers_of = Counter(policies)
    last = torch.tensor([ids.size(1) - 1])
    computed = visible = live_keys = 0
    for own, live in ranges_of.items():
        work = live_range_work(live, ids.size(1), query_heads, model.config.num_key_value_heads, 1)
        computed += layers_of[own] * work.pairs
        visible += layers_of[own] * live.live_pairs() * query_heads // live.shape[1]
        live_keys += layers_of[own] * int(live.live_counts(last).sum())
    live_keys = round(live_keys / num_layers)
    with _dense_masks(model, [ranges_of[own] for own in policies]):
        difference = float((_logits(model, ids) - logits).abs().max())
    return Row(
        name=name,
        sites=fast.report.summary().split(" attention")[0],
        seconds=seconds,
        speedup=dense_seconds / seconds,
        work_ratio=computed / visible,
        live_keys=live_keys,
        kept=live_keys / ids.size(1),
        bits_per_byte=_bits_per_byte(logits, ids, text),
        largest_difference=difference,
    )


@contextmanager
def _dense_masks(model: nn.Module, ranges: list[LiveRanges]) -> Iterator[None]:
    """Gives each layer of the original model the dense form of its live ranges as its attention mask."""

    def hook(live: LiveRanges) -> Callable[..., Any]:
        mask = live.visible(torch.arange(live.num_keys))

        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, {**kwargs, "attention_mask": mask}

        return replace

    layers: Any = model.model.layers  # type: ignore[union-attr]
    handles = [
        layer.self_attn.register_forward_pre_hook(hook(live), with_kwargs=True)
        for layer, live in zip(layers, ranges, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _bits_per_byte(logits: Tensor, ids: Tensor, text: str) -> float:
    nats = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def _timed(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """The result and the shortest of `repeats` times, after one call that compiles."""
    result = call()
    best = math.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - begin)
    return result, best


def _table(rows: list[Row]) -> Table:
    table = Table(title="Prefill of one file; times of this run on this machine", title_justify="left")
    for name in (
        "policy",
        "sites",
        "prefill s",
        "speed-up",
        "work ratio",
        "live keys at end",
        "KV kept",
        "bits/byte",
        "off its dense mask",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        table.add_row(
            row.name,
            row.sites,
            f"{row.seconds:.3f}",
            f"{row.speedup:.2f}x",
            "-" if row.work_ratio is None else f"{row.work_ratio:.2f}",
            f"{row.live_keys:,}",
            f"{row.kept:.0%}",
            f"{row.bits_per_byte:.3f}",
            "-" if row.largest_difference is None else f"{row.largest_difference:.1e}",
        )
    return table

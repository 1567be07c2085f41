"""Does decoding stay as fast, and as small, as the context grows? Time per token and memory, 1,024 to 262,144 tokens.

The bundled small model takes a prompt in chunks, then single tokens: over the cache of each policy, and over transformers'
`DynamicCache` with the model as it is (as far as its prefill is affordable). In each round the contestants take turns.

    python bench/generate.py --out bench/results/generate.json

With `--stream N` it instead reads one stream of N tokens over the separator cache, and writes a log of speed, resident memory
and bits per byte to `--log`.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
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
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.demo.corpus import training_files
from rewriter.demo.models import load_bundled

LENGTHS = (1024, 4096, 16_384, 65_536, 262_144)
LONGEST_DENSE = 16_384
"""Beyond it the original is not run: its prefill grows with the square of the length."""

CHUNK = 1024
STEPS = 64


def policies(tokenizer: Any) -> dict[str, rewriter.Policy]:
    four = {"initial": 4, "window": 224, "max_separators": 64, "capacity": 512}
    return {
        "SlidingWindow(508, sinks=4)": SlidingWindow(508, sinks=4),
        "separator cache of 512": SeparatorMask.from_tokenizer(tokenizer, **four),
        "separator cache of 512, positions are places": SeparatorMask.from_tokenizer(
            tokenizer, **four, positions="cache"
        ),
        "DynamicMask(256, local=256)": DynamicMask(256, local=256),
    }


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def stream_ids(tokenizer: Any, count: int) -> Iterator[int]:
    """Source code without an end: the standard library, again and again."""
    given = 0
    while True:
        for path in training_files():
            yield tokenizer.bos_token_id
            for token in tokenizer(
                path.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False
            ).input_ids:
                yield token
                given += 1
                if given == count:
                    return


class Contestant:
    """Something that takes tokens and can be asked how long one more takes."""

    def __init__(self, name: str, take: Callable[[Tensor], Any], cache_bytes: Callable[[], int]) -> None:
        self.name, self.take, self.cache_bytes = name, take, cache_bytes
        self.length = 0

    def grow(self, ids: Tensor, length: int) -> None:
        while self.length < length:
            step = min(CHUNK, length - self.length)
            self.take(ids[:, self.length : self.length + step])
            self.length += step

    def step_seconds(self, ids: Tensor) -> float:
        """Of one token, the mean of `STEPS`."""
        begin = time.perf_counter()
        for _ in range(STEPS):
            self.take(ids[:, self.length : self.length + 1])
            self.length += 1
        return (time.perf_counter() - begin) / STEPS


def contestants(model: Any, tokenizer: Any) -> list[Contestant]:
    from transformers import DynamicCache

    result = []
    for name, policy in policies(tokenizer).items():
        fast = rewriter.optimize(model, policy, strict=True)
        cache = fast.new_cache()

        def take(ids: Tensor, fast: Any = fast, cache: Any = cache) -> Any:
            return fast(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits

        result.append(Contestant(name, take, lambda cache=cache: cache.num_bytes))
    exact = rewriter.optimize(model, Exact(), strict=True)
    whole = exact.new_cache(LONGEST_DENSE + 4 * STEPS * len(LENGTHS))
    result.append(
        Contestant(
            "Exact()",
            lambda ids: exact(input_ids=ids, past_key_values=whole, logits_to_keep=1).logits,
            lambda: whole.num_bytes,
        )
    )
    dynamic = DynamicCache(config=model.config)
    result.append(
        Contestant(
            "original, DynamicCache",
            lambda ids: model(input_ids=ids, past_key_values=dynamic, logits_to_keep=1).logits,
            lambda: sum(t.numel() * t.element_size() for layer in dynamic.layers for t in (layer.keys, layer.values)),
        )
    )
    return result


def measure(
    model: Any, tokenizer: Any, lengths: tuple[int, ...], rounds: int, only: str | None
) -> list[dict[str, Any]]:
    ids = torch.tensor([list(stream_ids(tokenizer, lengths[-1] + 2 * STEPS * rounds * len(lengths)))])
    everyone = [c for c in contestants(model, tokenizer) if c.name.startswith(("original", only or ""))]
    rows = []
    for length in lengths:
        running = [
            c for c in everyone if length <= LONGEST_DENSE or c.name not in ("Exact()", "original, DynamicCache")
        ]
        for contestant in running:
            contestant.grow(ids, length)
            contestant.step_seconds(ids)  # compiles at the first length
        seconds = {c.name: math.inf for c in running}
        for _ in range(rounds):
            for contestant in running:
                seconds[contestant.name] = min(seconds[contestant.name], contestant.step_seconds(ids))
        gc.collect()
        rows.extend(
            {
                "contestant": c.name,
                "length": length,
                "seconds_per_token": seconds[c.name],
                "cache_bytes": c.cache_bytes(),
                "resident_bytes": resident_bytes(),
            }
            for c in running
        )
        print(f"{length:,} tokens: " + ", ".join(f"{n} {s * 1e3:.2f} ms" for n, s in seconds.items()), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Times as ratios to the shortest context of the same contestant, and to the original at its side."""
    result = Table(title="One more token: time against the same at 1,024 tokens; cache", title_justify="left")
    lengths = sorted({row["length"] for row in rows})
    for column in (
        "",
        *(f"{length:,}" for length in lengths),
        "time against DynamicCache at 1,024",
        "cache, first and last",
    ):
        result.add_column(column, justify="left" if not column else "right")
    by = {(row["contestant"], row["length"]): row for row in rows}
    dense = by["original, DynamicCache", lengths[0]]["seconds_per_token"]
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [by.get((name, length)) for length in lengths]
        first = own[0]
        assert first is not None
        last = [row for row in own if row is not None][-1]
        ratios = ["-" if r is None else f"{r['seconds_per_token'] / first['seconds_per_token']:.2f}x" for r in own]
        against = f"{first['seconds_per_token'] / dense:.2f}x"
        result.add_row(
            name, *ratios, against, f"{first['cache_bytes'] / 2**20:.1f} MiB, {last['cache_bytes'] / 2**20:.1f} MiB"
        )
    return result


def read_stream(count: int, log: Path) -> None:
    """One stream, once: a line for each 16th of it."""
    model, tokenizer = load_bundled()
    policy = policies(tokenizer)["separator cache of 512, positions are places"]
    fast = rewriter.optimize(model, policy, strict=True)
    list(rewriter.stream(fast, None, stream_ids(tokenizer, 1024)))  # compiles
    lines = [f"{count:,} tokens of the standard library's sources, {policy}, {torch.get_num_threads()} threads"]
    begin, nats = time.perf_counter(), 0.0
    first = resident_bytes()
    for seen, log_p in enumerate(rewriter.stream(fast, None, stream_ids(tokenizer, count)), 1):
        nats -= log_p
        if seen % (count // 16) == 0:
            rate = seen / (time.perf_counter() - begin)
            lines.append(
                f"{seen:>9,} tokens  {rate:7,.0f} tokens/s so far  resident {resident_bytes() / 2**20:,.0f} MiB "
                f"({(resident_bytes() - first) / 2**20:+.0f})  {nats / seen / math.log(2):.3f} bits/token so far"
            )
            print(lines[-1], flush=True)
    log.write_text("\n".join(lines) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("bench/results/generate.json"),
    rounds: Annotated[int, typer.Option(help="Times that the contestants take turns.")] = 3,
    lengths: Annotated[str, typer.Option(help="Contexts, ascending.")] = ",".join(map(str, LENGTHS)),
    only: Annotated[str | None, typer.Option(help="Policies whose names begin so, beside the original.")] = None,
    stream: Annotated[int | None, typer.Option(help="Read one stream of so many tokens instead.")] = None,
    log: Annotated[Path, typer.Option(help="Its log.")] = Path("bench/results/stream.log"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if stream is not None:
        read_stream(stream, log)
        return
    model, tokenizer = load_bundled()
    rows = measure(model, tokenizer, tuple(int(n) for n in lengths.split(",")), rounds, only)
    out.write_text(json.dumps({"threads": threads, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    typer.run(main)

"""What does reading a long text in chunks cost, against reading it as a whole? Time, attention work and peak memory.

The bundled small model reads source code: (a) as a whole, dense; (b) one chunk of 1,024 tokens at a time; (c) eight at once;
the last two with and without eviction of keys. Then the time of one more token over what was kept. Each in a process of its
own, on the rewritten graph without code generation, as the original is.

    python bench/prefill.py --out bench/results/prefill.json

The 23.5x that ParallelComp reports (arXiv 2502.14317, table 7) is (c) over (b), on a GPU: batching, not chunks.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile

import rewriter
from rewriter import ChunkedEviction
from rewriter.demo.corpus import training_files
from rewriter.demo.models import load_bundled

CHUNK, BATCH, CAPACITY, STEPS = 1024, 8, 256, 32
CHUNKS = (8, 16, 32)
KINDS = ("dense", "one chunk at a time", f"{BATCH} chunks at once")
QUERY = "\n\nimport os\n\n\ndef main(argv):\n    return "
ATTENTION = ("rewriter::live_range_attention", "aten::scaled_dot_product_attention")


def text_ids(tokenizer: Any, count: int) -> Tensor:
    ids: list[int] = [tokenizer.bos_token_id]
    for path in training_files():
        ids.extend(tokenizer(path.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False).input_ids)
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


def pairs(kind: str, lengths: list[int], query: int, kept: int) -> int:
    """(query, key) pairs that attention computes in a head until the query has been read."""
    if kind == "dense":
        total = sum(lengths) + query
        return total * (total + 1) // 2
    own = sum((n + query) * (n + query + 1) // 2 for n in lengths)
    return own + query * kept + query * (query + 1) // 2


def best_of(rounds: int, call: Callable[[], Any]) -> float:
    best = math.inf
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def memory(name: str) -> int:
    """Bytes of this process: VmRSS at present, VmHWM at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def attention_seconds(call: Callable[[], Any]) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return sum(e.cpu_time_total for e in profiled.key_averages() if e.key in ATTENTION) / 1e6


@torch.no_grad()
def measure(kind: str, num_chunks: int, evict: bool, rounds: int) -> dict[str, Any]:
    from transformers import DynamicCache

    model, tokenizer = load_bundled()
    model.config.max_position_embeddings = 2**20  # the time of the dense model counts here, not what it says
    ids = text_ids(tokenizer, num_chunks * (CHUNK - 1) + 1)
    query = torch.tensor(tokenizer(QUERY, add_special_tokens=False).input_ids)
    last: dict[str, Any] = {}
    if kind == "dense":
        whole = torch.cat((ids, query))[None]

        def prefill() -> None:
            last["cache"] = DynamicCache(config=model.config)
            model(input_ids=whole, past_key_values=last["cache"], logits_to_keep=1)

        def step() -> None:
            model(input_ids=whole[:, :1], past_key_values=last["cache"], logits_to_keep=1)
    else:
        policy = ChunkedEviction(CHUNK, keep_chunks=num_chunks, capacity=CAPACITY if evict else None)
        fast = rewriter.optimize(model, policy, backend="eager", strict=True)
        batch = 1 if kind == KINDS[1] else BATCH
        small = fast.read(ids[: 3 * CHUNK], query, chunk_batch=batch, max_new_tokens=1)  # captures
        fast(input_ids=query[None], past_key_values=small.cache)

        def prefill() -> None:
            last["reading"] = fast.read(ids, query, chunk_batch=batch, max_new_tokens=4 * STEPS)
            last["cache"] = last["reading"].cache
            fast(input_ids=query[None], past_key_values=last["cache"], logits_to_keep=1)

        def step() -> None:
            fast(input_ids=query[None, :1], past_key_values=last["cache"], logits_to_keep=1)

    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    prefill()
    peak = memory("VmHWM") - before
    seconds = best_of(rounds, prefill)
    lengths = [len(ids)] if kind == "dense" else [c.numel() for c in last["reading"].chunks[0]]
    kept = len(ids) if kind == "dense" else last["cache"].length - len(query)
    step()
    token = best_of(rounds, lambda: [step() for _ in range(STEPS)]) / STEPS
    return {
        "kind": kind,
        "chunks": num_chunks,
        "evict": evict,
        "tokens": len(ids),
        "seconds": seconds,
        "attention_seconds": attention_seconds(prefill),
        "peak_bytes": peak,
        "kept_keys": kept,
        "pairs": pairs(kind, lengths, len(query), kept),
        "seconds_per_token": token,
    }


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("bench/results/prefill.json"),
    rounds: Annotated[int, typer.Option(help="The shortest time of so many counts.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    chunks: Annotated[str, typer.Option(help="Numbers of chunks.")] = ",".join(map(str, CHUNKS)),
    one: Annotated[str | None, typer.Option(help="Measure one case and print it as JSON.", hidden=True)] = None,
) -> None:
    torch.set_num_threads(threads)
    if one is not None:
        print(json.dumps(measure(**json.loads(one), rounds=rounds)))
        return
    rows = []
    for number in (int(n) for n in chunks.split(",")):
        for kind in KINDS:
            for evict in (False,) if kind == "dense" else (False, True):
                case = json.dumps({"kind": kind, "num_chunks": number, "evict": evict})
                options = ["--one", case, "--rounds", str(rounds), "--threads", str(threads)]
                command = [sys.executable, __file__, *options]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append(json.loads(printed.splitlines()[-1]))
    out.write_text(json.dumps({"threads": threads, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    Console(width=170).print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title=f"Reading a text in chunks of {CHUNK:,} tokens", title_justify="left")
    columns = (
        "chunks",
        "how",
        "keys",
        "time against dense",
        "against one at a time",
        "pairs of dense",
        "attention time of dense",
    )
    for column in (*columns, "peak memory", "kept keys", "one more token, of dense"):
        result.add_column(column, justify="left" if column in ("how", "keys") else "right")
    for number in dict.fromkeys(r["chunks"] for r in rows):
        own = [r for r in rows if r["chunks"] == number]
        whole = own[0]
        for row in own:
            serial = [r for r in own if r["kind"] == KINDS[1] and r["evict"] == row["evict"]]
            dense = row["kind"] == "dense"
            result.add_row(
                str(number),
                row["kind"],
                "all" if not row["evict"] else f"{CAPACITY} of each chunk",
                f"{row['seconds'] / whole['seconds']:.2f}",
                "-" if dense else f"{row['seconds'] / serial[0]['seconds']:.2f}",
                f"1/{whole['pairs'] / row['pairs']:.1f}",
                f"1/{whole['attention_seconds'] / row['attention_seconds']:.1f}",
                f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                f"{row['kept_keys']:,}",
                f"{row['seconds_per_token'] / whole['seconds_per_token']:.2f}",
            )
    return result


if __name__ == "__main__":
    typer.run(main)

"""How long does the compiler itself take, and how often does it run?

Models of 10, 30 and 100 layers: each pass by itself, and Dynamo's trace before them, for comparison. Then one small model is
called with many lengths and batch sizes, and the graphs that this took are counted; and another one with three rows, then one.

    python bench/compile.py --out bench/results/compile.json
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import rewriter

POLICY = rewriter.SeparatorMask((3,))
CALLS = 40
"""Of the mixed workload."""


def model_of(layers: int) -> Any:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def first_call(layers: int) -> dict[str, float]:
    """Seconds of each pass, and of all that is not ours."""
    torch._dynamo.reset()
    fast = rewriter.optimize(model_of(layers), POLICY, backend="eager", strict=True)
    began = time.perf_counter()
    fast(input_ids=torch.randint(0, 64, (3, 12)), use_cache=False)
    seconds = fast.report.graphs[0].seconds
    dynamo = time.perf_counter() - began - sum(seconds.values())
    return {"layers": layers, "sites": len(fast.report.sites), "dynamo": dynamo, **seconds}


def mixed_workload() -> dict[str, Any]:
    """Calls of random sizes, one row and several, padded; how many graphs they took."""
    torch._dynamo.reset()
    choose = random.Random(0)
    fast = rewriter.optimize(model_of(2), POLICY, backend="eager", strict=True)
    sizes = [(choose.choice((1, 2, 3, 5, 8)), choose.randint(2, 700)) for _ in range(CALLS)]
    for rows, length in sizes:
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, : length // 3] = 0
        fast(input_ids=torch.randint(0, 64, (rows, length)), attention_mask=mask, use_cache=False)
    return {"calls": len(sizes), "sizes": len(set(sizes)), "graphs": len(fast.report.graphs)}


def one_row_after_three(layers: int) -> list[dict[str, Any]]:
    """Seconds of the first call with three padded rows, and then of the first one with a single row; Inductor, nothing kept."""
    model, rows = model_of(layers), []
    fast = rewriter.optimize(model, POLICY, strict=True, progress=False)
    for name, call in (("rewriter", fast), ("torch.compile", torch.compile(model, dynamic=True))):
        torch._dynamo.reset()
        seconds = []
        with torch._inductor.utils.fresh_inductor_cache():
            for number in (3, 1):
                ids = torch.randint(0, 64, (number, 40))
                began = time.perf_counter()
                call(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                seconds.append(time.perf_counter() - began)
        rows.append({"name": name, "layers": layers, "three": seconds[0], "one": seconds[1]})
    return rows


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    layers: Annotated[str, typer.Option(help="Numbers of layers, separated by commas.")] = "10,30,100",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    first_call(2)  # imports and caches
    rows = [first_call(int(number)) for number in layers.split(",")]
    names = [name for name in rows[0] if name not in ("layers", "sites", "dynamo")]
    table = Table(title="Seconds of the first call: tiny Llama, separator mask", title_justify="left")
    for name in ("layers", *names, "all passes", "without capture", "of each layer, to the first row", "Dynamo before"):
        table.add_column(name, justify="right")
    first = sum(rows[0][name] for name in names) / rows[0]["layers"]
    for row in rows:
        total = sum(row[name] for name in names)
        cells = [row[name] for name in names] + [total, total - row["capture"]]
        share = total / row["layers"] / first
        table.add_row(str(int(row["layers"])), *(f"{c:.2f}" for c in cells), f"{share:.2f}x", f"{row['dynamo']:.2f}")
    Console(width=170).print(table)
    mixed = mixed_workload()
    print(f"{mixed['calls']} calls of {mixed['sizes']} sizes, 1 to 8 rows of 2 to 700 tokens: {mixed['graphs']} graphs")
    after = one_row_after_three(10)
    for row in after:
        print(f"{row['name']}, 10 layers: {row['three']:.1f} s for three rows, then {row['one']:.1f} s for one")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"torch": torch.__version__, "layers": rows, "mixed": mixed, "rows": after}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)

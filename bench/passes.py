"""How long do the passes take? Models of 25, 50 and 100 layers, each pass by itself.

python bench/passes.py --out bench/results/passes.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import rewriter


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    layers: Annotated[str, typer.Option(help="Numbers of layers, separated by commas.")] = "25,50,100",
) -> None:
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    results = []
    table = Table(title="seconds of each pass, tiny Llama, separator mask", title_justify="left")
    for number in [2, *(int(part) for part in layers.split(","))]:  # the first one warms imports and caches
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=number,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config).eval()
        fast = rewriter.optimize(model, rewriter.SeparatorMask((3,)), backend="eager", strict=True)
        with torch.no_grad():
            fast(input_ids=torch.randint(0, 64, (3, 12)), use_cache=False)
        seconds = fast.report.graphs[0].seconds
        results.append({"layers": number, "sites": len(fast.report.sites), **seconds})
    for name in ("layers", *seconds, "without capture", "all"):
        table.add_column(name, justify="right")
    for row in results[1:]:
        times = [row[name] for name in seconds]
        cells = [*times, sum(times) - row["capture"], sum(times)]
        table.add_row(str(row["layers"]), *(f"{t:.2f}" for t in cells))
    Console(width=150).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results[1:], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

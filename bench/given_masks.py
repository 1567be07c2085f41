"""Masks that a call gives: what does it cost to ask whether they are ranges, and what is gained where they are?

A Llama of four layers under `Exact()`, one row, the forward with the last token's logits, beside the original and `torch.compile`
in turns; one thread. Two masks, as bool and as what is added: documents of an eighth of the row, whose columns are ranges, and a
random half of the causal pairs, where nothing is to be gained and the question is lost time.

    python bench/given_masks.py --out bench/results/given-masks.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter

ROUNDS = 12


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return transformers.LlamaForCausalLM(config).eval()


def masks(length: int) -> dict[str, Tensor]:
    """bool `[1, 1, length, length]`."""
    index = torch.arange(length)
    causal = index[:, None] >= index
    document = index // (length // 8)
    random = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.5
    return {
        "documents": (causal & (document[:, None] == document))[None, None],
        "random": (causal & random | torch.eye(length, dtype=torch.bool))[None, None],
    }


@torch.no_grad()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("given-masks.json"),
    lengths: Annotated[str, typer.Option(help="Tokens of a row, separated by commas.")] = "512,2048,4096",
) -> None:
    torch.set_num_threads(1)
    original = model()
    contestants = {
        "original": original,
        "compiled": torch.compile(original, dynamic=True),
        "rewriter": rewriter.optimize(original, strict=True, progress=False),
    }
    rows: list[dict[str, Any]] = []
    for length in (int(each) for each in lengths.split(",")):
        ids = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(1))
        for kind, mask in masks(length).items():
            for form in ("bool", "added"):
                given = mask if form == "bool" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
                seconds = dict.fromkeys(contestants, float("inf"))
                for turn in range(ROUNDS + 1):
                    for name, call in contestants.items():
                        begin = time.perf_counter()
                        call(input_ids=ids, attention_mask=given, use_cache=False, logits_to_keep=1)
                        if turn:  # the first one compiles
                            seconds[name] = min(seconds[name], time.perf_counter() - begin)
                rows.append({"length": length, "mask": kind, "form": form, "seconds": seconds})
                out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    table = Table(
        title="Speed under a mask that the call gives, of the original and of torch.compile", title_justify="left"
    )
    for column in ("tokens", "mask", "given as", "of the original", "of torch.compile"):
        table.add_column(column, justify="left" if column in ("mask", "given as") else "right")
    for row in rows:
        own = row["seconds"]["rewriter"]
        speeds = (f"{row['seconds'][name] / own:.2f}x" for name in ("original", "compiled"))
        table.add_row(f"{row['length']:,}", row["mask"], row["form"], *speeds)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)

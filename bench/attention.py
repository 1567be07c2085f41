"""How fast is live-range attention beside dense attention and FlexAttention, and how near to the ideal?

    python bench/attention.py                   the CPU kernel (bench/attention_cpu.py)
    python bench/attention.py --device cuda     the Triton kernels (bench/attention_cuda.py)

One table to read, one JSON file for scripts: bench/results/attention-cpu.json or attention-cuda.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import attention_cpu
import attention_cuda
import typer
from rich.console import Console

RESULTS = Path(__file__).parent / "results"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    lengths: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "4096,8192,16384,32768,65536,131072",
    dense_up_to: Annotated[
        int | None,
        typer.Option(help="Longest length for what is quadratic; 32768 on a CPU, 131072 on a GPU.", show_default=False),
    ] = None,
    mask_up_to: Annotated[int, typer.Option(help="Longest length for masks of S x S.")] = 16384,
    flex_up_to: Annotated[int, typer.Option(help="Longest length for FlexAttention's block masks.")] = 32768,
    rounds: Annotated[int, typer.Option(help="Rounds of timing on a CPU.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    out = out or RESULTS / f"attention-{device}.json"
    sizes = [int(part) for part in lengths.split(",")]
    console = Console(width=190)
    if device == "cpu":
        attention_cpu.run(console, out, sizes, dense_up_to or 32768, mask_up_to, rounds, threads)
    elif device == "cuda":
        attention_cuda.run(console, out, sizes, dense_up_to or 131072, mask_up_to, flex_up_to)
    else:
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device!r}")


if __name__ == "__main__":
    typer.run(main)

"""Counts what the loops of every Triton kernel hold, at every entry of the launch table, and writes it as the bounds to keep to.

python bench/loops.py            # after a change of a kernel that is meant; no GPU is needed
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import triton
import typer
from rewriter.kernels.gpu import loops
from rewriter.kernels.gpu.targets import TARGETS

from rewriter.testing.verify import compile_table


def main(out: Annotated[Path, typer.Option(help="JSON to write.")] = loops.BOUNDS) -> None:
    if not loops.BOUNDS.is_file():
        loops.BOUNDS.write_text(json.dumps({"triton": "", "loops": {}}), encoding="utf-8")
    counted = {}
    for entry in compile_table(tuple(TARGETS)):
        if entry.compiled is None:
            raise typer.BadParameter(f"{entry.architecture}, head dim {entry.head_dim}: {entry.failure}")
        if entry.compiled.loops:
            key = loops.key(entry.architecture, entry.compiled.kernel, entry.bits, entry.head_dim)
            counted[key] = list(entry.compiled.loops)
    stored = {"triton": triton.__version__, "loops": dict(sorted(counted.items()))}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in stored["loops"].items()]
    out.write_text(
        f'{{"triton": "{triton.__version__}", "loops": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8"
    )
    print(f"{len(counted)} kernels, {sum(map(len, counted.values()))} loops: {out}")


if __name__ == "__main__":
    typer.run(main)

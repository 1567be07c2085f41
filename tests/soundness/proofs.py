"""How many proofs a solver verifies, and how long it takes: of the zoo's models, and of random mask-building programs.

PYTHONPATH=tests/zoo python tests/soundness/proofs.py --out bench/results/proofs.json
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from architectures import ARCHITECTURES
from random_masks import DATA
from random_masks import SIZES
from random_masks import Masks
from random_masks import Writer
from random_masks import inputs
from random_masks import runs_of
from rewriter.passes.verify import validate
from rich.console import Console
from rich.table import Table

import rewriter
from rewriter.report import Report

MOST_RUNS = 3
"""Runs of queries of a key that are counted one by one."""


class Seconds:
    """Of each question that the solver is asked, what is kept by structure left out."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self._inner = validate._asked

    def __enter__(self) -> list[float]:
        def asked(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return self._inner(*arguments)
            finally:
                self.taken.append(time.perf_counter() - began)

        validate._asked = asked
        validate._known.clear()
        return self.taken

    def __exit__(self, *_: object) -> None:
        validate._asked = self._inner


def zoo() -> Iterator[tuple[str, Report]]:
    for architecture in ARCHITECTURES:
        for implementation in architecture.implementations:
            for padding in architecture.paddings[-1:]:
                torch._dynamo.reset()
                torch.manual_seed(0)
                model = architecture.build(implementation)
                given = architecture.inputs(padding, torch.Generator().manual_seed(0))
                try:
                    yield f"{architecture.name}, {implementation}", rewriter.explain(model, **given)
                except rewriter.RewriteError:
                    continue  # what is no graph has no masks to be proven


def counted(report: Report, counts: Counter[str], reasons: Counter[str]) -> None:
    for site in report.sites:
        counts[site.proof if site.rewritten else "refused"] += 1
        if site.rewritten and site.proof != "verified":
            reasons[f"{site.mask}: {site.proof_detail}"] += 1


def result_of(counts: Counter[str], reasons: Counter[str], taken: list[float]) -> dict[str, Any]:
    ordered = sorted(taken)
    times = {"questions": len(taken)}
    if ordered:
        times |= {"median": ordered[len(ordered) // 2], "percentile_99": ordered[int(0.99 * (len(ordered) - 1))]}
    return {"sites": dict(counts), "seconds": times, "evaluated_only": dict(reasons.most_common())}


def of_zoo() -> dict[str, Any]:
    counts, reasons = Counter[str](), Counter[str]()
    with Seconds() as taken:
        for _, report in zoo():
            counted(report, counts, reasons)
    return result_of(counts, reasons, taken)


def of_random(count: int, seed: int, batch: int = 50) -> dict[str, Any]:
    """Besides, of the refused programs, the most runs of queries that see one key, at all sizes that are tried."""
    writer = Writer(seed)
    programs = [writer.mask() for _ in range(count)]
    counts, reasons, runs = Counter[str](), Counter[str](), Counter[str]()
    with Seconds() as taken:
        for first in range(0, count, batch):
            torch._dynamo.reset()
            model = Masks(programs[first : first + batch])
            report = rewriter.explain(model, **inputs(*SIZES[0], seed=0))
            counted(report, counts, reasons)
            most: list[int | None] = [0] * len(report.sites)
            for number, (rows, length) in enumerate(SIZES):
                given = inputs(rows, length, seed=number)
                masks = list(model.masks(model, *(given[name] for name in DATA)))
                own = [runs_of(mask) for mask in masks]
                most = [None if m is None or o is None else max(m, o) for m, o in zip(most, own, strict=True)]
            for site, number_of_runs in zip(report.sites, most, strict=True):
                if not site.rewritten:
                    kind = "adds other values" if number_of_runs is None else str(min(number_of_runs, MOST_RUNS + 1))
                    runs[kind] += 1
    return {**result_of(counts, reasons, taken), "refused_by_runs": dict(sorted(runs.items()))}


def table(results: dict[str, Any]) -> Table:
    shown = Table(title="Proofs put to a solver", title_justify="left")
    for name in ("", "verified", "evaluated only", "refused", "questions", "median, ms", "99 %, ms"):
        shown.add_column(name, justify="right" if name else "left")
    for name, result in results.items():
        sites, seconds = result["sites"], result["seconds"]
        times = (f"{1000 * seconds[key]:.0f}" for key in ("median", "percentile_99"))
        shown.add_row(
            name,
            *(str(sites.get(kind, 0)) for kind in ("verified", "evaluated", "refused")),
            str(seconds["questions"]),
            *times,
        )
    return shown


def main(
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    count: Annotated[int, typer.Option(help="Random programs.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the first one.")] = 2**21,
) -> None:
    torch.set_num_threads(1)
    results = {"zoo": of_zoo(), "random programs": of_random(count, seed)}
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console(width=120).print(table(results))
    for name, result in results.items():
        for reason, number in list(result["evaluated_only"].items())[:10]:
            print(f"{name}: {number} {reason}")
    print(
        "refused random programs, by the most runs of queries of one key:",
        results["random programs"]["refused_by_runs"],
    )


if __name__ == "__main__":
    typer.run(main)

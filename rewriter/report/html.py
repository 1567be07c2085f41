"""The report as one page: `page.html.j2` filled with what it needs, no external resources."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rewriter.passes import Prediction
from rewriter.report import Report
from rewriter.report.data import ModuleReport
from rewriter.report.data import SiteGroup
from rewriter.report.data import readable_bytes

PICTURE = 240
"""Pixels of a mask's side."""

DIFFERENCES = 400
"""Most lines of a difference between two graphs that are shown; both graphs are there whole."""


def page(report: Report) -> str:
    """HTML of the newest graph."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["bytes"] = readable_bytes
    environment.filters["number"] = _readable
    graph = report.graphs[-1] if report.graphs else None
    return environment.get_template("page.html.j2").render(
        report=report,
        groups=report.groups,
        totals=_totals(report.groups),
        picture=_picture,
        modules=graph.modules if graph else None,
        refused=_refused_numbers(report),
        holds=_holds,
        seconds=graph.seconds if graph else {},
        changes=list(_changes(graph.graphs)) if graph else [],
    )


def _totals(groups: list[SiteGroup]) -> dict[str, Any] | None:
    """Sums over all sites that have a prediction."""
    predicted = [(len(alike.sites), p) for alike in groups if (p := alike.first.prediction) is not None]
    if not predicted:
        return None
    names = ("dense_pairs", "own_pairs", "live_pairs", "computed_pairs", "flops", "kv_bytes", "dense_kv_bytes")
    return {
        "tokens": max(p.num_keys for _, p in predicted),
        **{name: sum(count * getattr(p, name) for count, p in predicted) for name in names},
    }


def _picture(prediction: Prediction) -> Markup:
    """SVG of a mask, one bar per key from the first query that sees it to the last: the model's own, and the policy's on it."""
    width = PICTURE / max(1, min(prediction.num_keys, len(prediction.own_bars) or 1)) + 0.4  # no gaps where pixels end

    def bars(rows: tuple[tuple[int, int, int], ...]) -> str:
        return "".join(
            f"M{key / prediction.num_keys * PICTURE:.1f} {begin / prediction.num_queries * PICTURE:.1f}"
            f"h{width:.1f}V{end / prediction.num_queries * PICTURE:.1f}h-{width:.1f}z"
            for key, begin, end in rows
        )

    return Markup(
        f'<svg viewBox="-1 -1 {PICTURE + 2} {PICTURE + 2}" width="{PICTURE}" height="{PICTURE}" role="img">'
        f'<rect class="frame" width="{PICTURE}" height="{PICTURE}"/>'
        f'<path class="own" d="{bars(prediction.own_bars)}"/><path class="live" d="{bars(prediction.bars)}"/></svg>'
    )


def _refused_numbers(report: Report) -> frozenset[int]:
    return frozenset(site.layer for site in report.sites if not site.rewritten)


def _holds(module: ModuleReport) -> int:
    """Attention sites in a module and its parts."""
    return len(module.sites) + sum(_holds(child) for child in module.children)


def _changes(graphs: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Each graph with what the pass before it changed."""
    before: list[str] | None = None
    for name, text in graphs.items():
        lines = text.split("\n")
        difference: list[str] = []
        if before is not None:
            difference = list(difflib.unified_diff(before, lines, lineterm="", n=1))[2:]
        yield {
            "name": name,
            "text": text,
            "nodes": len(lines),
            "added": sum(line.startswith("+") for line in difference),
            "removed": sum(line.startswith("-") for line in difference),
            "difference": difference[:DIFFERENCES],
            "left_out": max(0, len(difference) - DIFFERENCES),
            "is_first": before is None,
        }
        before = lines


def _readable(number: float) -> str:
    for unit in ("", " thousand", " million", " billion"):
        if number < 1000:
            return f"{number:.0f}{unit}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.1f} trillion"

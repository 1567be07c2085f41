"""The report as one page: `page.html.j2` filled with what it needs, no external resources."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from collections.abc import Sequence
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


def template(name: str, folder: Path) -> jinja2.Template:
    """A page's template in a folder; `style.html.j2` is the same for all pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader((folder, Path(__file__).parent)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["bytes"] = readable_bytes
    environment.filters["number"] = _readable
    return environment.get_template(name)


def page(report: Report, beside: Sequence[Report] = ()) -> str:
    """HTML of the newest graph, and a table that compares it with other reports."""
    graph = report.graphs[-1] if report.graphs else None
    return template("page.html.j2", Path(__file__).parent).render(
        report=report,
        groups=report.groups,
        totals=_totals(report.groups),
        compared=[_compared(each) for each in (report, *beside)] if beside else [],
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
        "sites": sum(count for count, _ in predicted),
        **{name: sum(count * getattr(p, name) for count, p in predicted) for name in names},
        # A pair costs the same whether it is dense or not.
        "own_flops": sum(count * p.flops * p.own_pairs // max(1, p.computed_pairs) for count, p in predicted),
    }


def _compared(report: Report) -> dict[str, Any]:
    return {
        "policy": report.subject.policy if report.subject else report.sites[0].policy if report.sites else "-",
        "summary": report.summary(),
        "totals": _totals(report.groups),
    }


MARGIN = 34
"""Pixels left of a picture and below it, for its axes."""

THINNEST = 1.5
"""Pixels that a bar is at least high: a narrow band of a long row would not be seen."""


def _picture(prediction: Prediction) -> Markup:
    """SVG of a mask, one bar per key from the first query that sees it to the last: the model's own, and the policy's on it."""
    keys, queries = prediction.num_keys, prediction.num_queries
    width = PICTURE / max(1, min(keys, len(prediction.own_bars) or 1)) + 0.4  # no gaps where pixels end

    def bars(kind: str, rows: tuple[tuple[int, int, int], ...]) -> str:
        drawn = []
        for key, begin, end in rows:
            if end > begin:
                top, height = begin / queries * PICTURE, max(THINNEST, (end - begin) / queries * PICTURE)
                seen = f"key {key:,}: queries {begin:,} to {end - 1:,}"
                at = f'x="{key / keys * PICTURE:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
                drawn.append(f'<rect class="{kind}" {at}><title>{seen}{_WHOSE[kind]}</title></rect>')
        return "".join(drawn)

    size = PICTURE + MARGIN + 8
    labels = (
        f'<text x="0" y="{PICTURE + 13}">0</text><text x="{PICTURE}" y="{PICTURE + 13}" text-anchor="end">{keys - 1:,}</text>'
        f'<text x="{PICTURE / 2}" y="{PICTURE + 26}" text-anchor="middle">key</text>'
        f'<g transform="rotate(-90)"><text x="0" y="-5" text-anchor="end">0</text>'
        f'<text x="-{PICTURE}" y="-5">{queries - 1:,}</text>'
        f'<text x="-{PICTURE / 2}" y="-18" text-anchor="middle">query</text></g>'
    )
    return Markup(
        f'<svg viewBox="-{MARGIN} -4 {size} {size}" width="{size}" height="{size}" role="img" aria-label="mask">'
        f'<rect class="frame" width="{PICTURE}" height="{PICTURE}"/>'
        f"{bars('own', prediction.own_bars)}{bars('live', prediction.bars)}{labels}</svg>"
    )


_WHOSE = {"own": ", by the model's own mask", "live": ", under the policy"}


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

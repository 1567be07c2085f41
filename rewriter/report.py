"""The report: every attention site of a model, rewritten or refused, and why."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rewriter.passes import Rewritten
from rewriter.passes.analyse_masks import source_line

KERNEL = "live_range_attention (CPU)"


@dataclass(frozen=True)
class SiteReport:
    """One attention site.

    Attributes:
        layer: number of the site, from 0 in the order of the graph.
        module: qualified name of the module that it belongs to.
        form: "sdpa", "eager" or "fused".
        mask: the proven mask, or "-".
        policy: the policy of this site.
        kernel: what computes it now, or "-".
        reason: why it was refused, or "".
        source: `file:line` of the attention.
    """

    layer: int
    module: str
    form: str
    mask: str
    policy: str
    kernel: str
    reason: str
    source: str

    @property
    def rewritten(self) -> bool:
        return not self.reason


@dataclass
class GraphReport:
    """One captured graph: its sites and the time of each pass, in seconds."""

    sites: list[SiteReport]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """What became of a model's attention. One entry per captured graph, the newest last; printing shows the newest."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteReport]:
        return self.graphs[-1].sites if self.graphs else []

    @property
    def refused(self) -> list[SiteReport]:
        return [site for site in self.sites if not site.rewritten]

    def add(self, result: Rewritten) -> None:
        """Records what the passes did to one graph."""
        sites = []
        for plan in result.sites:
            reason = plan.site.reason or ""
            sites.append(
                SiteReport(
                    layer=plan.layer,
                    module=plan.site.module_path,
                    form=plan.site.form,
                    mask=plan.proof.name if plan.proof is not None else "-",
                    policy=str(plan.policy),
                    kernel="-" if reason else KERNEL,
                    reason=reason,
                    source=source_line(plan.site.node),
                )
            )
        self.graphs.append(GraphReport(sites, dict(result.seconds)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"graphs": [{"sites": [...], "seconds": {...}}]}`."""
        return asdict(self)

    def to_html(self, path: str | Path) -> None:
        """Writes the newest graph's sites as a page."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "".join(
            f'<tr class="{"ok" if site.rewritten else "no"}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(site))
            + "</tr>\n"
            for site in self.sites
        )
        Path(path).write_text(_PAGE.format(summary=html.escape(self.summary()), head=head, body=body), encoding="utf-8")

    def summary(self) -> str:
        if not self.graphs:
            return "nothing captured yet: call the model once, or give example_inputs to optimize()"
        count = len(self.sites)
        return f"{count - len(self.refused)} of {count} attention sites rewritten"

    def __rich__(self) -> Table:
        table = Table(title=self.summary(), title_justify="left")
        for name in _COLUMNS:
            table.add_column(name, overflow="fold")
        for site in self.sites:
            table.add_row(*_cells(site), style=None if site.rewritten else "yellow")
        return table

    def __str__(self) -> str:
        console = Console(width=160, record=False, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)


_COLUMNS = ("site", "module", "form", "mask", "policy", "kernel or reason", "source")

_PAGE = """<!doctype html><meta charset="utf-8"><title>rewriter report</title>
<style>body{{font:14px sans-serif}}table{{border-collapse:collapse}}td,th{{border:1px solid #ccc;padding:4px 8px;text-align:left}}
.no{{background:#fff3d6}}</style>
<h1>{summary}</h1><table><tr>{head}</tr>
{body}</table>
"""


def _cells(site: SiteReport) -> tuple[str, ...]:
    outcome = site.kernel if site.rewritten else f"refused: {site.reason}"
    return (str(site.layer), site.module or "-", site.form, site.mask, site.policy, outcome, site.source or "-")

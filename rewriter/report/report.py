"""`Report`: every attention site of a model, rewritten or refused, and why; from `explain` also what it would cost."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.console import Group
from rich.console import RenderableType
from rich.table import Table

from rewriter.passes import Analysed
from rewriter.passes import Explained
from rewriter.passes import Prediction
from rewriter.passes import Validation
from rewriter.passes import in_words
from rewriter.passes.graph.origin import source_line
from rewriter.report.data import GraphReport
from rewriter.report.data import SiteGroup
from rewriter.report.data import SiteReport
from rewriter.report.data import Subject
from rewriter.report.data import _ranges
from rewriter.report.data import readable_bytes


@dataclass
class Report:
    """What became of a model's attention. One entry per captured graph, the newest last; printing shows all that differ.

    Attributes:
        graphs: that were captured.
        subject: the model and the policy that it is of; None for a report that was made by hand.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    subject: Subject | None = None

    @property
    def sites(self) -> list[SiteReport]:
        """Of the newest graph."""
        return self.graphs[-1].sites if self.graphs else []

    @property
    def refused(self) -> list[SiteReport]:
        """Refused sites of all graphs, each once."""
        return list(dict.fromkeys(site for graph in self.graphs for site in graph.sites if not site.rewritten))

    @property
    def groups(self) -> list[SiteGroup]:
        """The newest graph's sites, those that are alike together."""
        return _groups(self.sites)

    @property
    def outcomes(self) -> list[tuple[list[int], list[SiteReport]]]:
        """The numbers of the graphs whose sites are the same, and these sites; the newest last."""
        found: dict[tuple[SiteReport, ...], list[int]] = {}
        for number, graph in enumerate(self.graphs):
            found.setdefault(tuple(graph.sites), []).append(number)
        return sorted(((numbers, list(sites)) for sites, numbers in found.items()), key=lambda outcome: outcome[0][-1])

    def add(self, result: Analysed) -> None:
        """Records what the passes did to one graph."""
        predictions = result.predictions if isinstance(result, Explained) else {}
        texts = result.graphs if isinstance(result, Explained) else {}
        examples = result.examples if isinstance(result, Explained) else {}
        sites = []
        for plan, validation in zip(result.sites, result.validations, strict=True):
            reason = plan.reason or ""
            sites.append(
                SiteReport(
                    layer=plan.layer,
                    module=plan.site.module_path,
                    form=plan.site.form,
                    mask=plan.proof.name if plan.proof is not None else "-",
                    proof=validation.answer.value if validation is not None and plan.proof is not None else "-",
                    proof_detail=_detail(validation) if plan.proof is not None else "",
                    policy=str(plan.policy),
                    kernel="-" if reason else plan.kernel.on(plan.site.node.meta["val"].device.type),
                    reason=reason,
                    source=source_line(plan.site.node),
                    visible="" if plan.proof is None else in_words(plan.proof),
                    example=examples.get(plan.layer, ""),
                    prediction=predictions.get(plan.layer),
                )
            )
        self.graphs.append(GraphReport(sites, dict(result.seconds), graphs=dict(texts)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"graphs": [{"sites": [...], "seconds": {...}, "modules": {...}, "graphs": {...}}], "subject": {...}}`."""
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict()` as a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_html(self, path: str | Path, beside: Sequence[Report] = ()) -> None:
        """Writes the newest graph as one page without external resources: modules, masks as pictures, costs, graphs.

        Args:
            path: of the file.
            beside: reports of the same model under other policies, to be compared in a table on the page.
        """
        from rewriter.report.html import page

        Path(path).write_text(page(self, beside), encoding="utf-8")

    def summary(self) -> str:
        if not self.graphs:
            return "nothing captured yet: call the model once, or give example_inputs to optimize()"
        outcomes = self.outcomes
        if len({_summary(sites) for _, sites in outcomes}) == 1:
            return _summary(outcomes[0][1])
        return "; ".join(f"{_summary(sites)} in graph {_ranges(numbers)}" for numbers, sites in outcomes)

    def __rich__(self) -> RenderableType:
        outcomes = self.outcomes
        if len(outcomes) < 2:
            return _tables(self.summary(), self.sites)
        return Group(*(_tables(f"{_summary(s)} in graph {_ranges(numbers)}", s) for numbers, s in outcomes))

    def __str__(self) -> str:
        console = Console(width=160, record=False, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def _repr_html_(self) -> str:
        """For notebooks: what `print` shows."""
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)


def _groups(sites: Sequence[SiteReport]) -> list[SiteGroup]:
    found: dict[Any, list[SiteReport]] = {}
    for site in sites:
        module = re.sub(r"\d+", "0", site.module)
        same = (
            module,
            site.form,
            site.mask,
            site.proof,
            site.policy,
            site.kernel,
            site.reason,
            site.source,
            site.prediction,
        )
        found.setdefault(same, []).append(site)
    return [SiteGroup(tuple(alike)) for alike in found.values()]


def _summary(sites: Sequence[SiteReport]) -> str:
    return f"{sum(site.rewritten for site in sites)} of {len(sites)} attention sites rewritten"


def _tables(title: str, sites: Sequence[SiteReport]) -> RenderableType:
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, overflow="fold")
    groups = _groups(sites)
    predicted = [alike for alike in groups if alike.first.prediction is not None]
    explained = [alike for alike in groups if alike.first.example or (predicted and alike.first.visible)]
    for alike in groups:
        cells = _cells(alike, says_proof=not explained)
        table.add_row(*cells, style=None if alike.first.rewritten else "yellow")
    shown = [table]
    if explained:
        proofs = Table(title="Which queries see a key", title_justify="left")
        for name in ("sites", "what is known", "how it is known"):
            proofs.add_column(name, overflow="fold")
        for alike in explained:
            site = alike.first
            known = f"{site.proof} {site.proof_detail}" if site.visible else "computed: the smallest example"
            proofs.add_row(alike.numbers, site.visible or site.example, known)
        shown.append(proofs)
    if predicted:
        costs = Table(title="Predicted for one row without padding", title_justify="left")
        for name in _PREDICTED:
            costs.add_column(name, justify="left" if name == "sites" else "right")
        for alike in predicted:
            costs.add_row(alike.numbers, *_predicted(alike.first.prediction))
        shown.append(costs)
    return Group(*shown) if len(shown) > 1 else table


_COLUMNS = ("sites", "modules", "form", "mask", "policy", "kernel or reason", "source")


_PREDICTED = (
    "sites",
    "tokens",
    "live pairs, of all",
    "computed for each",
    "most keys alive",
    "keys and values kept",
    "attention's speed",
)


def _cells(alike: SiteGroup, *, says_proof: bool) -> tuple[str, ...]:
    site = alike.first
    outcome = site.kernel if site.rewritten else f"refused: {site.reason}"
    mask = f"{site.mask} ({site.proof})" if says_proof and site.proof != "-" else site.mask
    return (alike.numbers, alike.modules, site.form, mask, site.policy, outcome, site.source or "-")


def _detail(validation: Validation | None) -> str:
    if validation is None:
        return ""
    return validation.reason if validation.limit is None else f"at all sizes up to {validation.limit:,}, for all data"


def _predicted(prediction: Prediction | None) -> tuple[str, ...]:
    assert prediction is not None
    ratio = prediction.computed_pairs / prediction.live_pairs if prediction.live_pairs else 0.0
    return (
        f"{prediction.num_keys:,}",
        f"{prediction.live_pairs / prediction.dense_pairs:.1%}",
        f"{ratio:.2f}",
        f"{prediction.pressure:,}",
        f"{readable_bytes(prediction.kv_bytes)} of {readable_bytes(prediction.dense_kv_bytes)}",
        "-" if prediction.speed is None else f"{prediction.speed:.2f}x",
    )

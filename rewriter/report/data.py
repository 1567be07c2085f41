"""What a report holds: sites, modules, graphs, and which of them are alike.

Sites that are alike, as those of a hundred layers are, are one row of the table and one section of the page."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import nn

from rewriter import __version__
from rewriter.passes import Prediction

MOST_RUNS = 4
"""Numbers that are more runs than this are counted and not listed."""


@dataclass(frozen=True)
class SiteReport:
    """One attention site.

    Attributes:
        layer: number of the site, from 0 in the order of the graph.
        module: qualified name of the module that it belongs to.
        form: "sdpa", "eager" or "fused".
        mask: the proven mask, or "-".
        proof: "verified" where a solver has shown that the ranges are the mask at all sizes and for all data, "evaluated" where
            they were compared at some, or "-".
        proof_detail: up to which size it is verified, or why it is not.
        visible: the proof in words, such as "key j is visible to queries j <= i < j + 4096", or "".
        example: of a refused mask, a key that more than one run of queries sees; from `explain` only, and "" where there is none.
        policy: the policy of this site.
        kernel: what computes it now, or "-".
        reason: why it was refused, or "".
        source: `file:line` of the attention.
        prediction: what it would compute and keep; from `explain` only, and None for a refused site.
    """

    layer: int
    module: str
    form: str
    mask: str
    proof: str
    proof_detail: str
    policy: str
    kernel: str
    reason: str
    source: str
    visible: str = ""
    example: str = ""
    prediction: Prediction | None = None

    @property
    def rewritten(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Subject:
    """What a report is of.

    Attributes:
        model: its class.
        parameters: of the model, in all.
        dtype, device: of its first parameter; "-" where it has none.
        policy: as it was given.
        made: when, in ISO 8601 to the second, with the offset from UTC.
        versions: of rewriter and torch.
    """

    model: str
    parameters: int
    dtype: str
    device: str
    policy: str
    made: str
    versions: str

    @classmethod
    def of(cls, model: nn.Module, policy: object) -> Subject:
        first = next(model.parameters(), None)
        return cls(
            model=type(model).__name__,
            parameters=sum(p.numel() for p in model.parameters()),
            dtype="-" if first is None else str(first.dtype).removeprefix("torch."),
            device="-" if first is None else str(first.device),
            policy=str(policy),
            made=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            versions=f"rewriter {__version__}, torch {torch.__version__}",
        )


@dataclass(frozen=True)
class ModuleReport:
    """A module, or several of a list that are alike, and what they hold.

    Attributes:
        name: within its parent; "0 .. 31" for several of a list.
        kind: its class.
        parameters: of one of them, its parts included.
        sites: numbers of the attention sites of its own, of all of them.
        children: of one of them.
    """

    name: str
    kind: str
    parameters: int
    sites: tuple[int, ...] = ()
    children: tuple[ModuleReport, ...] = ()


@dataclass
class GraphReport:
    """One captured graph.

    Attributes:
        sites: in the order of the graph.
        seconds: of each pass.
        modules: the model's; from `explain` only.
        graphs: the graph's text after each pass that changed it; from `explain` only.
    """

    sites: list[SiteReport]
    seconds: dict[str, float] = field(default_factory=dict)
    modules: ModuleReport | None = None
    graphs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that differ in nothing but their number and the numbers in their modules' names."""

    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        return self.sites[0]

    @property
    def numbers(self) -> str:
        return _ranges([site.layer for site in self.sites])

    @property
    def modules(self) -> str:
        """`model.layers.{0 .. 31}.self_attn`"""
        if len(self.sites) == 1:
            return self.first.module or "-"
        pieces = [re.split(r"(\d+)", site.module) for site in self.sites]
        columns = [list(dict.fromkeys(column)) for column in zip(*pieces, strict=True)]
        return "".join(c[0] if len(c) == 1 else "{" + _ranges([int(n) for n in c]) + "}" for c in columns) or "-"


def readable_bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _ranges(numbers: Sequence[int]) -> str:
    """`0 .. 7`, `1 .. 31 by 2`, `0, 1, 5`, `0 .. 99, 84 of them`."""
    numbers = sorted(numbers)
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1:
        (step,) = steps
        return f"{numbers[0]} .. {numbers[-1]}" + (f" by {step}" if step != 1 else "")
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(runs) > MOST_RUNS:
        return f"{numbers[0]} .. {numbers[-1]}, {len(numbers)} of them"
    return ", ".join(f"{r[0]} .. {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def module_tree(model: Any, sites: Sequence[SiteReport], name: str = "", path: str = "") -> ModuleReport:
    """The modules of a model with the numbers of their sites; those of a list that are alike become one entry."""
    children: dict[Any, list[ModuleReport]] = {}
    for child_name, child in model.named_children():
        own = module_tree(child, sites, child_name, f"{path}.{child_name}".lstrip("."))
        children.setdefault(_shape(own, sites) if child_name.isdigit() else child_name, []).append(own)
    count = sum(p.numel() for p in model.parameters())
    numbers = tuple(site.layer for site in sites if site.module == path)
    return ModuleReport(
        name or "model", type(model).__name__, count, numbers, tuple(_merged(alike) for alike in children.values())
    )


def _shape(module: ModuleReport, sites: Sequence[SiteReport]) -> Any:
    """What makes two modules alike: classes, sizes, and what became of their sites."""
    outcomes = tuple(dict.fromkeys((s.mask, s.policy, s.reason, s.form) for s in sites if s.layer in module.sites))
    return (module.kind, module.parameters, outcomes, tuple(_shape(child, sites) for child in module.children))


def _merged(alike: Sequence[ModuleReport]) -> ModuleReport:
    first = alike[0]
    if len(alike) == 1:
        return first
    children = tuple(_merged(parts) for parts in zip(*(module.children for module in alike), strict=True))
    # Parts have the same name in each.
    names = [module.name for module in alike]
    name = names[0] if len(set(names)) == 1 else _ranges([int(n) for n in names])
    return ModuleReport(name, first.kind, first.parameters, tuple(n for m in alike for n in m.sites), children)

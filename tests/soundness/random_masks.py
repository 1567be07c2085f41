"""Random mask-building programs, as source text, and whether what is claimed of them is true.

    python tests/soundness/random_masks.py --count 20000 --out bench/results/soundness.json

A program takes `i` `[n, 1]`, `j` `[1, n]`, `n`, `ids` and `real` (int64 `[B, n]`: token ids, 1 where a token is), and `given`
(bool `[B, 1, n, n]`, a mask that the call gives), and makes a mask: bool, true where visible, or one that is added to the
logits. Many become the attentions of one model, which is captured once and then run at sizes that neither the analysis nor its
check has seen. A site that is rewritten must give what the model's own mask gives; the check by evaluation, which would hide a
wrong claim, must have had nothing to say.
"""

from __future__ import annotations

import json
import linecache
import multiprocessing
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
from torch import Tensor
from torch import nn

import rewriter
from rewriter.report.data import SiteReport

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min
SIZES = ((3, 11), (4, 29), (5, 50))
"""Rows and length of the runs; the first is the one that is captured."""


DATA = ("ids", "real", "positions", "given")
"""What programs read."""


class Writer:
    """Writes random programs; the same seed, the same programs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, *options: str) -> str:
        return self.random.choice(options)

    def small(self) -> int:
        return self.random.choice((0, 1, 1, 2, 3, 4, 5, 7, 8, 12))

    def per_key(self, tensor: str) -> str:
        """`[B, 1, 1, n]` of a `[B, n]`; sometimes of the query instead."""
        at = "[:, None, :, None]" if self.random.random() < 0.12 else "[:, None, None, :]"
        return f"{tensor}{at}"

    def row(self) -> str:
        """The query's index, in one of its disguises."""
        return self.pick(
            "i", "i", "i", f"(i + {self.small()})", f"(i - {self.small()})", "(torch.ones_like(i).cumsum(0) - 1)"
        )

    def key(self) -> str:
        return self.pick("j", "j", "j", f"(j + {self.small()})", f"(j - {self.small()})", "torch.arange(n)[None, :]")

    def per_row(self) -> str:
        """A number of each batch row, from data."""
        return self.pick(
            "real.sum(-1)[:, None, None, None]",
            "(real == 0).sum(-1)[:, None, None, None]",
            "((real.cumsum(-1) == 0).sum(-1))[:, None, None, None]",
            "(ids == 9).sum(-1)[:, None, None, None]",
            "(ids[:, :1] % 5)[:, :, None, None]",
            "(real.sum(-1) * 0.5)[:, None, None, None]",
        )

    def comparison(self) -> str:
        return self.pick("<", "<=", ">", ">=", "<", "<=", ">", ">=", "==", "!=")

    def atom(self) -> str:
        small = self.small()
        window = self.random.choice((1, 2, 3, 5, 8, 13, 21, 40))
        flag = "torch.ones(n, n, dtype=torch.bool)"
        kinds = {
            "causal": lambda: self.pick(
                f"{self.row()} >= {self.key()}",
                f"{self.key()} {self.comparison()} {self.row()}",
                f"torch.{self.pick('greater', 'greater_equal', 'less', 'less_equal', 'not_equal')}({self.row()}, {self.key()})",
                f"{flag}.tril({self.pick('', '0', '1', '-1', '2', '-3')})",
                f"~{flag}.triu({self.pick('1', '0', '2', '-1')})",
                f"torch.tril(torch.ones(n, n), {small}) {self.pick('!= 0', '== 0', '> 0.5', '== 1')}",
                "self.triangle[:n, :n]",
                "(self.triangle[:n, :n] == 0)",
                f"by_pairs(lambda a, b: a {self.comparison()} b + {small}, i, j)",
                f"by_pairs(lambda a, b: (a >= b) & (a - b < {window}), i, j)",
            ),
            "given": lambda: self.pick(
                "given", "given", "given.logical_not()", "(given.long() == 1)", "given.transpose(-1, -2)"
            ),
            "wraps": lambda: self.pick(
                f"(j * {2**62} * 4 + j) {self.comparison()} i",
                f"(i - j) * {2**61} < {window % 4} * {2**61}",
                f"(j + {2**63 - 1}) {self.comparison()} i",
                f"(i.int() * {2**30}) {self.comparison()} (j.int() * {2**30})",
                f"i.to(torch.int8) * 16 {self.comparison()} j.to(torch.int8) * 16",
            ),
            "window": lambda: self.pick(
                f"{self.row()} - {self.key()} {self.comparison()} {window}",
                f"({self.row()} - {self.key()}).abs() {self.pick('<', '<=', '>')} {window}",
                f"{flag}.triu({-window})",
                f"({flag}.tril({small}) & {flag}.triu({-window}))",
                f"(j > i - {window})",
                f"2 * i - j < {window}",
                f"i - 2 * j < {window}",
            ),
            "chunk": lambda: self.pick(
                f"i // {window + 1} == j // {window + 1}",
                f"(i + {small}) // {window + 1} == (j + {small}) // {window + 1}",
                f"(i + {small}) // {window + 1} == j // {window + 1}",
                f"i // {window + 1} {self.comparison()} j // {window + 1}",
                f"(i - {self.per_row()}) // {window + 1} == (j - {self.per_row()}) // {window + 1}",
                f"i % {window + 1} == j % {window + 1}",
                f"torch.div(i, {window + 1}, rounding_mode='floor') == torch.div(j, {window + 1}, rounding_mode='floor')",
                f"torch.div(i - 7, {window + 1}, rounding_mode='trunc') == torch.div(j - 7, {window + 1}, rounding_mode='trunc')",
            ),
            "padding": lambda: self.pick(
                self.per_key("real.bool()"),
                self.per_key("(real == 0)"),
                self.per_key("(real != 0)"),
                self.per_key("(ids > 3)"),
                self.per_key("(real.float() > 0.5)"),
                "(real[:, :, None] * real[:, None, :])[:, None].bool()",
                "real.bool().flip(-1)[:, None, None, :]",
                "real.bool().roll(1, -1)[:, None, None, :]",
                "(real.cumsum(-1) > 0)[:, None, None, :]",
            ),
            "prefix": lambda: self.pick(
                f"{self.key()} {self.comparison()} {small}",
                f"{self.row()} {self.comparison()} {small}",
                f"{self.key()} {self.comparison()} {self.per_row()}",
                f"{self.row()} {self.comparison()} {self.per_row()}",
                f"{self.key()} {self.comparison()} n - {small}",
            ),
            "documents": lambda: self.pick(
                f"{self.documents('q')} == {self.documents('k')}",
                f"{self.documents('q')} {self.comparison()} {self.documents('k')}",
                "ids[:, None, :, None] == ids[:, None, None, :]",
                "((positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)[:, None, :, None]"
                " == (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)[:, None, None, :])",
                "positions[:, None, :, None] >= positions[:, None, None, :]",
            ),
            "image": lambda: self.pick(self.image(), f"({self.key()} <= {self.row()}) | {self.image()}"),
            "data": lambda: self.pick(
                "ids[:, None, :, None] < ids[:, None, None, :]",
                "(ids[:, None, :, None] + j) % 3 != 0",
                "(ids == 3)[:, None, None, :]",
                "i * j < 40",
                "(i - j) * (i - j) < 30",
                "(i ^ j) < 8",
            ),
        }
        names = ["causal"] * 6 + ["window"] * 4 + ["padding"] * 4 + ["documents"] * 2 + ["chunk"] * 2 + ["prefix"] * 2
        names += ["image", "given", "wraps"]
        return f"({kinds[self.random.choice([*names, 'data'])]()})"

    def image(self) -> str:
        """Whether query and key are of one run of marked tokens; sometimes of something much like it."""
        marked = self.pick("(ids % 4 != 1)", "(ids > 2)", "(real == 1)", "(ids % 4 == 1)")
        before = self.pick(*["torch.nn.functional.pad({}, (1, 0))[:, :-1]"] * 5, "{}.roll(1, -1)", "{}").format(marked)
        begins = self.pick(*[f"({marked} & ~{before})"] * 4, f"(~{before} & {marked})", marked)
        shift, none = self.pick("- 1", "- 1", "- 1", "+ 3", "- 2"), self.pick("-1", "-1", "-1", "-5", "0")
        numbers = f"torch.where({marked}, {begins}.int().cumsum(-1) {shift}, {none})"
        query, key = f"{numbers}[:, None, :, None]", f"{numbers}[:, None, None, :]"
        return self.pick(
            *[f"(({query} == {key}) & ({query} >= 0))"] * 3,
            f"(({query} == {key}) & ({key} >= 0))",
            f"(({query} == {key}) & ({query} > 0))",
            f"({query} == {key})",
        )

    def documents(self, axis: str) -> str:
        at = "[:, None, :, None]" if axis == "q" else "[:, None, None, :]"
        return self.pick(
            f"(ids == 7).cumsum(-1){at}",
            f"(ids == 7).cumsum(-1){at}",
            f"ids.cumsum(-1){at}",
            f"(ids == 7).cumsum(0){at}",
        )

    def predicate(self, depth: int) -> str:
        if depth == 0 or self.random.random() < 0.25:
            return self.atom()
        one, two = self.predicate(depth - 1), self.predicate(depth - 1)
        whole = f"{one}.expand(ids.size(0), 1, n, n)"
        return self.random.choice(
            [f"({one} & {two})"] * 6
            + [f"({one} | {two})"] * 2
            + [
                f"(~{one})",
                f"torch.logical_and({one}, {two})",
                f"torch.logical_not({one})",
                f"({one} ^ {two})",
                f"torch.where({self.atom()}, {one}, {two})",
                f"({one} * {two})",
                f"({one}.long() + {two}.long() == 2)",
                f"({one}.long() + {two}.long() > 0)",
                f"(torch.full_like({one}, True) & {one})",
                whole,
                f"{whole}.transpose(-1, -2)",
                f"{whole}.flip(-1)",
                f"torch.cat([{whole}[..., :1, :], {whole}[..., 1:, :]], -2)",
                f"torch.cat([{whole}[..., 1:, :], {whole}[..., :1, :]], -2)",
            ]
        )

    def mask(self) -> str:
        """A whole program: bool, or float64 to be added."""
        predicate = self.predicate(self.random.choice((0, 1, 1, 2, 2, 3)))
        hidden = self.pick("-INF", "LOWEST", "-1e9", "-1e4", "-10000.0")
        zeros = "torch.zeros(1, 1, n, n, dtype=torch.float64)"
        full = f"torch.full((n, n), {hidden}, dtype=torch.float64)"
        added, other = (f"torch.where({p}, 0.0, {hidden}).double()" for p in (predicate, self.atom()))
        return self.random.choice(
            [predicate] * 8
            + [
                added,
                f"torch.where({predicate}, {hidden}, 0.0).double()",
                f"{zeros}.masked_fill(~{predicate}, {hidden})",
                f"{zeros} + {added} + {other}",
                f"(1.0 - {predicate}.double()) * -10000.0",
                f"(1.0 - {predicate}.double()) * LOWEST",
                f"(1.0 - {predicate}.double()) * -5.0",
                f"({predicate}.double() - 1.0) * 1e9",
                f"({predicate} * 1e9 - 1e9).double()",
                f"{zeros} - 1e9 * ~{predicate}",
                f"torch.subtract({zeros}, torch.multiply({predicate}, {self.pick('1e9', '-3.0', '3.0')}))",
                f"{full}.triu(1) + {added}",
                f"{full}.triu({self.small()})",
                f"torch.minimum({added}, {other})",
                f"torch.maximum({added}, {other})",
                f"{added} * 0.5",
                f"{added} + (ids % 3)[:, None, None, :].double()",
                f"{added} - 0.25 * (i - j).abs()",
                f"{predicate}.double().log()",
            ]
        )


def by_pairs(function: Callable[[Tensor, Tensor], Tensor], i: Tensor, j: Tensor) -> Tensor:
    """A function of two indices for all pairs, by `torch.vmap`, as transformers makes masks."""
    return torch.vmap(torch.vmap(function, in_dims=(None, 0)), in_dims=(0, None))(i[:, 0], j[0])


class Masks(nn.Module):
    """One attention per program."""

    def __init__(self, programs: list[str]) -> None:
        super().__init__()
        self.programs = programs
        self.register_buffer("triangle", torch.ones(64, 64, dtype=torch.bool).tril())
        lines = ["def masks(self, ids, real, positions, given):", " n = ids.size(1)"]
        lines += [" i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]"]
        lines += [f" yield {program}" for program in programs]
        # Dynamo reads the source of what it traces.
        source = "\n".join(lines)
        name = f"<masks {abs(hash(source))}>"
        linecache.cache[name] = (len(source), None, [line + "\n" for line in lines], name)
        space: dict[str, Any] = {"torch": torch, "INF": INF, "LOWEST": LOWEST, "by_pairs": by_pairs}
        exec(compile(source, name, "exec"), space)
        self.masks = space["masks"]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, real: Tensor, positions: Tensor, given: Tensor
    ) -> list[Tensor]:
        outputs = []
        for mask in self.masks(self, ids, real, positions, given):
            while mask.dim() < 4:
                mask = mask[None]
            outputs.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return outputs


def inputs(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Awkward data: padding on either side, in the middle or nowhere, few distinct tokens, positions that begin anew."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(length).expand(rows, length)
    cut = torch.randint(0, length, (rows, 1), generator=generator)
    kinds = [place >= cut, place < cut + 1, torch.ones_like(place).bool(), (place - cut).abs() > 1]
    real = torch.stack([kinds[int(k)][r] for r, k in enumerate(torch.randint(0, 4, (rows,), generator=generator))])
    begin = torch.randint(0, 6, (rows, length), generator=generator) == 0
    begin[:, 0] = True
    starts = torch.where(begin, place, 0).cummax(-1).values
    pair = torch.arange(length)
    bounds = torch.randint(0, length + 1, (2, rows, 1, 1, length), generator=generator).sort(dim=0).values
    runs = (bounds[0] <= pair[:, None]) & (pair[:, None] < bounds[1]) | (pair[:, None] == pair)
    holes = torch.rand(rows, 1, length, length, generator=generator) < 0.7
    return {
        "given": runs if seed % 2 else holes | (pair[:, None] == pair),
        **{name: torch.randn(rows, 2, length, 8, generator=generator, dtype=torch.float64) for name in ("q", "k", "v")},
        "ids": torch.randint(0, 12, (rows, length), generator=generator),
        "real": real.long(),
        "positions": place - starts,
    }


@dataclass
class Tally:
    """What became of many programs.

    Attributes:
        proven: before the call.
        verified: of the proven, those that a solver says are true at all sizes.
        found: computed, too: whether the mask is ranges is found at the call.
        one_interval: programs of which each key, at all sizes that were tried, is seen by one run of queries, and to which
            nothing is added but 0 and masking values.
        one_interval_proven: of them, those that are proven.
        wrong: claims that are not true, each as its program and what was seen.
        caught: claims that the check by evaluation refused: wrong ones that the analysis alone would have made.
    """

    count: int = 0
    proven: int = 0
    verified: int = 0
    found: int = 0
    one_interval: int = 0
    one_interval_proven: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    caught: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.count += other.count
        self.proven += other.proven
        self.verified += other.verified
        self.found += other.found
        self.one_interval += other.one_interval
        self.one_interval_proven += other.one_interval_proven
        self.reasons += other.reasons
        self.wrong += other.wrong
        self.caught += other.caught


def examine(programs: list[str], tally: Tally) -> None:
    """One model of these programs, captured once and compared at all sizes."""
    torch._dynamo.reset()
    model = Masks(programs)
    fast = rewriter.optimize(model, backend="eager")
    tally.count += len(programs)
    may_be_ranges = [True] * len(programs)
    for number, (rows, length) in enumerate(SIZES):
        given = inputs(rows, length, seed=number)
        with torch.no_grad():
            actual = fast(**given)
            if number == 0:
                continue  # the sizes that were traced
            expected = model(**given)
            masks = list(model.masks(model, *(given[name] for name in DATA)))
        may_be_ranges = [known and is_one_interval(mask) for known, mask in zip(may_be_ranges, masks, strict=True)]
        for program, site, a, e, mask in zip(programs, fast.report.sites, actual, expected, masks, strict=True):
            if site.rewritten:
                visible = mask if mask.dtype == torch.bool else mask > -1e4
                seen = visible.expand(rows, 1, length, length).any(-1).expand(rows, 2, length)
                if not torch.allclose(a[seen], e[seen], rtol=1e-9, atol=1e-12):
                    tally.wrong.append(f"{program}  # said to be {site.mask}; sizes {rows, length}")
    assert len(fast.report.graphs) == 1, "the programs were captured more than once"
    tally.one_interval += sum(may_be_ranges)
    sites = zip(may_be_ranges, fast.report.sites, strict=True)
    tally.one_interval_proven += sum(one and _is_proven(site) for one, site in sites)
    for program, site in zip(programs, fast.report.sites, strict=True):
        tally.proven += _is_proven(site)
        tally.verified += _is_proven(site) and site.proof == "verified"
        tally.found += site.rewritten and not _is_proven(site)
        if not site.rewritten:
            tally.reasons[re.sub(r"\(.*?\)|\d+|_\w+", "", site.reason).split(",")[0].strip()] += 1
            if "disagrees" in site.reason or "could not be evaluated" in site.reason:
                tally.caught.append(f"{program}  # {site.reason}")


def _is_proven(site: SiteReport) -> bool:
    """Before the call; what is given is looked at there."""
    return site.rewritten and "given at the call" not in site.mask


def runs_of(mask: Tensor) -> int | None:
    """The most runs of queries that see one key; None where something but 0 is added to what is shown."""
    visible = mask if mask.dtype == torch.bool else mask > -1e4
    if mask.dtype != torch.bool and bool((mask[visible] != 0).any()):
        return None
    if visible.size(-2) == 1:
        return 1
    visible = torch.nn.functional.pad(visible, (0, 0, 1, 1))
    return int((visible[..., 1:, :] != visible[..., :-1, :]).sum(-2).max()) // 2


def is_one_interval(mask: Tensor) -> bool:
    """Whether each key is seen by one run of queries, or by none, and shown pairs have nothing added to them."""
    runs = runs_of(mask)
    return runs is not None and runs <= 1


def soak(
    count: int, seed: int, batch: int = 50, save: Callable[[Tally], None] = lambda tally: None, workers: int = 1
) -> Tally:
    """`count` programs in models of `batch`; what is known so far is saved after each.

    Args:
        workers: processes that examine models.
    """
    writer, total = Writer(seed), Tally()
    programs = [writer.mask() for _ in range(count)]
    batches = [programs[first : first + batch] for first in range(0, count, batch)]
    with ExitStack() as stack:
        examined = map(_tally, batches)
        if workers > 1:
            spawned = multiprocessing.get_context("spawn")
            examined = stack.enter_context(ProcessPoolExecutor(workers, spawned)).map(_tally, batches)
        for own in examined:
            total.add(own)
            save(total)
    return total


def _tally(programs: list[str]) -> Tally:
    torch.set_num_threads(1)
    tally = Tally()
    examine(programs, tally)
    return tally


if __name__ == "__main__":
    import typer

    def main(
        count: Annotated[int, typer.Option(help="Programs.")] = 20_000,
        seed: Annotated[int, typer.Option(help="Of the first one.")] = 0,
        out: Annotated[Path | None, typer.Option(help="File of the results.")] = None,
        workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    ) -> None:
        """Ask for the proof of many random masks, and see whether any claim is wrong."""
        began = time.perf_counter()

        def save(tally: Tally) -> None:
            if out is not None:
                plain = {"seed": seed, "count": tally.count, "proven": tally.proven, "verified": tally.verified}
                plain |= {"one_interval": tally.one_interval, "one_interval_proven": tally.one_interval_proven}
                plain |= {"found": tally.found, "wrong": tally.wrong}
                plain |= {"caught": tally.caught, "refused": dict(tally.reasons.most_common())}
                out.write_text(json.dumps(plain, indent=1) + "\n")

        tally = soak(count, seed, save=save, workers=workers)
        print(
            f"{tally.count:,} masks, {tally.proven:,} proven ({tally.proven / tally.count:.0%}), {len(tally.wrong)} wrong"
        )
        print(f"{tally.found:,} more are computed as what is found of them at the call")
        print(
            f"{tally.verified:,} of them for all sizes; {tally.one_interval:,} are one interval for each key where tried, "
            f"{tally.one_interval_proven:,} of these proven ({tally.one_interval_proven / max(1, tally.one_interval):.0%})"
        )
        print(f"{len(tally.caught)} claims refused by the check; {time.perf_counter() - began:.0f} s")
        for line in (*tally.wrong[:20], *tally.caught[:20]):
            print(" ", line)
        for reason, number in tally.reasons.most_common(15):
            print(f"{number:>6}  {reason}")
        raise typer.Exit(1 if tally.wrong else 0)

    typer.run(main)

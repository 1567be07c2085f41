"""One mask in many words: commuted, negated, split, shifted, in other types. Each must get the verdict of the plain one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from random_masks import DATA
from random_masks import SIZES
from random_masks import Masks
from random_masks import inputs

import rewriter

Comparison = tuple[str, str, str]
"""Left, one of <= and <, right; over i, j, n and data."""

MASKS: dict[str, list[Comparison | str]] = {
    "causal": [("j", "<=", "i")],
    "window": [("j", "<=", "i"), ("i - j", "<", "5")],
    "band": [("j", "<=", "i + 3"), ("i", "<=", "j + 4")],
    "chunks": [("j", "<=", "i"), ("j // 4", "<=", "i // 4"), ("i // 4", "<=", "j // 4")],
    "padding": [("j", "<=", "i"), "real.bool()[:, None, None, :]"],
    "separators and a window": [("j", "<=", "i"), "((i - j < 4) | (ids == 3)[:, None, None, :])"],
    "a prefix by row": [("j", "<=", "i"), ("j", "<", "(ids[:, :1] % 5 + 3)[:, :, None, None]")],
}
"""Each a conjunction."""

OPPOSITE = {"<=": ">", "<": ">="}
TURNED = {"<=": ">=", "<": ">"}


class Speaker:
    """Says the same in other words; the same seed, the same words."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def comparison(self, left: str, relation: str, right: str) -> str:
        shift = self.random.randrange(1, 9)
        ways: list[Callable[[], str]] = [
            lambda: f"({left} {relation} {right})",
            lambda: f"({right} {TURNED[relation]} {left})",
            lambda: f"(~({left} {OPPOSITE[relation]} {right}))",
            lambda: f"torch.logical_not({left} {OPPOSITE[relation]} {right})",
            lambda: f"(({left}) + {shift} {relation} ({right}) + {shift})",
            lambda: f"(({left}) - ({right}) {relation} 0)",
            lambda: f"(({left}) - ({right}) - {shift} {relation} -{shift})",
            lambda: f"(-({right}) + {shift} {relation} -({left}) + {shift})",
            lambda: f"(({left}) {'<' if relation == '<=' else '<='} ({right}) {'+ 1' if relation == '<=' else '- 1'})",
            lambda: f"((torch.zeros_like(i) + ({left})).int() {relation} (torch.zeros_like(i) + ({right})).int())",
            lambda: (
                f"((torch.zeros_like(i) + ({left})).double() {relation} (torch.zeros_like(i) + ({right})).double())"
            ),
        ]
        return self.random.choice(ways)()

    def predicate(self, plain: str) -> str:
        ways = [
            "{}",
            "(~(~{}))",
            "({0} & {0})",
            "({0} | {0})",
            "({}.long() == 1)",
            "({}.long() > 0)",
            "({}.double() != 0)",
            "torch.where({}, 1, 0).bool()",
            "({} ^ False)",
            "torch.logical_and({}, torch.ones_like(i == i))",
            "({} | (j < 0))",
            "({} & (j >= 0))",
            "{}.clone()",
        ]
        return self.random.choice(ways).format(plain)

    def conjunction(self, parts: list[str]) -> str:
        self.random.shuffle(parts)
        if len(parts) == 1:
            return self.predicate(parts[0])
        cut = self.random.randrange(1, len(parts))
        one, two = self.conjunction(parts[:cut]), self.conjunction(parts[cut:])
        ways = ["({} & {})", "({} * {})", "torch.logical_and({}, {})", "(~(~{} | ~{}))", "({}.long() + {}.long() == 2)"]
        return self.random.choice(ways).format(one, two)

    def mask(self, parts: list[Comparison | str]) -> str:
        said = [part if isinstance(part, str) else self.comparison(*part) for part in parts]
        visible = self.conjunction(said)
        ways = [
            "{}",
            "torch.where({}, 0.0, -INF).double()",
            "torch.where(~{}, -1e9, 0.0).double()",
            "(1.0 - {}.double()) * LOWEST",
            "torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~{}, -INF)",
        ]
        return self.random.choice(ways).format(visible)


@pytest.mark.parametrize("name", MASKS)
def test_in_other_words_it_is_the_same_mask(name: str) -> None:
    speaker = Speaker(seed=sum(map(ord, name)))
    programs = [speaker.mask(list(MASKS[name])) for _ in range(15)]
    plain = " & ".join(part if isinstance(part, str) else f"({' '.join(part)})" for part in MASKS[name])
    torch._dynamo.reset()
    model = Masks([plain, *programs])
    # They are what they are said to be: the words are right.
    given = inputs(*SIZES[1], seed=3)
    first, *others = model.masks(model, *(given[name] for name in DATA))
    shown = first.expand(SIZES[1][0], 1, SIZES[1][1], SIZES[1][1])
    for program, mask in zip(programs, others, strict=True):
        visible = mask if mask.dtype == torch.bool else mask > -1e4
        assert torch.equal(visible.expand_as(shown), shown), program
    site, *sites = rewriter.explain(model, **inputs(*SIZES[0], seed=0)).sites
    assert (site.rewritten, site.proof) == (True, "verified"), site.reason
    different = [(p, s.reason or s.proof_detail) for p, s in zip(programs, sites, strict=True) if s.proof != "verified"]
    assert not different, "\n".join(f"{p}  # {why}" for p, why in different)

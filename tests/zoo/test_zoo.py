"""The zoo: each architecture's attentions are found, rewritten or refused for the right reason, and give what they gave."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from architectures import ARCHITECTURES
from architectures import Architecture
from examine import RESULTS
from examine import TOLERANCE
from examine import examine


def results() -> dict[tuple[str, str], dict[str, Any]]:
    """What `make zoo` found last."""
    rows = json.loads(RESULTS.read_text())
    return {(row["name"], row["attention"]): row for row in rows}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_found_proven_and_equal(architecture: Architecture) -> None:
    """One implementation, padded, outputs and gradients; `make zoo` does all of it."""
    found = examine(architecture, architecture.implementations[0], quick=True)
    if architecture.error:
        assert re.search(architecture.error, found.error)
        return
    assert not found.error
    rewritten = {site for sites in found.masks.values() for site in sites}
    assert rewritten | found.refused.keys() == set(range(architecture.sites))
    assert found.refused.keys() == architecture.refused.keys(), found.refused
    for site, reason in architecture.refused.items():
        assert re.search(reason, found.refused[site])
    assert max(found.exact.values()) <= TOLERANCE, found.exact
    last = results()[architecture.name, architecture.implementations[0]]
    assert found.masks == last["masks"], "run `make zoo` again"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_the_last_results_are_what_is_expected(architecture: Architecture) -> None:
    for attention in architecture.implementations:
        row = results()[architecture.name, attention]
        if architecture.error:
            assert re.search(architecture.error, row["error"])
            continue
        assert not row["error"]
        assert sum(map(len, row["masks"].values())) + len(row["refused"]) == architecture.sites
        assert {int(site) for site in row["refused"]} == architecture.refused.keys()
        assert row["exact"].keys() == set(architecture.paddings)
        compared = [*row["exact"].values(), *row["policy"].values()]
        if row["inductor"] is not None:
            compared.append(row["inductor"])
        if architecture.causal:
            assert row["policy"].keys() == set(architecture.paddings)
        if architecture.packs:
            compared.append(row["packed"])
        if architecture.dynamic_cache:
            compared.append(row["dynamic_cache"])
        if architecture.caches:
            assert re.search(architecture.caches, row["cache"])
        elif architecture.caches == "":
            compared.append(row["cache"])
        assert all(isinstance(difference, float) and difference <= TOLERANCE for difference in compared), row

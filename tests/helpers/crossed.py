"""All pairs of two lists of parameters: a part that covers both lists in `make test`, the others in `make soak`."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(models: Sequence[tuple[str, str]], choices: Sequence[Any] | Mapping[str, Any], every: int = 5) -> list[Any]:
    """Parameters `(name, attention, choice)`; of the pairs each `every`th, along the diagonals, is not left to the soak."""
    named = choices if isinstance(choices, Mapping) else {str(choice): choice for choice in choices}
    pairs = [(i, j) for i in range(len(models)) for j in range(len(named))]
    now = [(i, j) for i, j in pairs if (i + j) % every == 0]
    assert {i for i, _ in now} == set(range(len(models))) and {j for _, j in now} == set(range(len(named)))
    names, values = list(named), list(named.values())
    return [
        pytest.param(
            *models[i],
            values[j],
            id=f"{'-'.join(models[i])}-{names[j]}",
            marks=() if (i, j) in now else pytest.mark.soak,
        )
        for i, j in pairs
    ]

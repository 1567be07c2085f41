"""All pairs of two lists of parameters: a part that covers both lists in `make test`, the others in `make soak`."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import pytest


def crossed(
    models: Sequence[tuple[str, str]], policies: Sequence[Any] | Mapping[str, Any], every: int = 3
) -> list[Any]:
    """Parameters `(name, attention, policy)`; of the pairs each `every`th, along the diagonals, is not left to the soak."""
    named = policies if isinstance(policies, Mapping) else {str(policy): policy for policy in policies}
    return [
        pytest.param(
            *model,
            policy,
            id=f"{'-'.join(model)}-{name}",
            marks=() if (i + j) % every == 0 else pytest.mark.soak,
        )
        for i, model in enumerate(models)
        for j, (name, policy) in enumerate(named.items())
    ]

"""A policy as people write it down: JSON on a command line, a mapping in a settings file."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from rewriter.errors import PolicyError
from rewriter.passes.policy import Policy
from rewriter.policies.separator_mask import SeparatorMask

FROM_TOKENIZER = "from tokenizer"
"""As the `separators` of a `SeparatorMask`: those that its `from_tokenizer` finds."""


def read_policy(given: Policy | Mapping[str, Any] | str, tokenizer: Callable[[], Any]) -> Policy:
    """The policy that is meant.

    Args:
        given: a policy; `Policy.to_dict`'s data; or this as JSON, such as `{"policy": "SlidingWindow", "window": 256}`.
        tokenizer: loads the model's tokenizer; called where `"separators": "from tokenizer"` asks for it.

    Raises:
        PolicyError: it is no JSON object, no policy, or has other fields.
    """
    if isinstance(given, Policy):
        return given
    data: Any = given
    if isinstance(given, str):
        try:
            data = json.loads(given)
        except json.JSONDecodeError as error:
            raise PolicyError(f"a policy must be JSON, got {given!r}: {error}") from None
    if not isinstance(data, Mapping):
        raise PolicyError(f'a policy must be a JSON object such as {{"policy": "Exact"}}, got {given!r}')
    return Policy.from_dict(_with_separators(data, tokenizer))


def _with_separators(data: Any, tokenizer: Callable[[], Any]) -> Any:
    if not isinstance(data, Mapping):
        return data
    data = {name: _with_separators(value, tokenizer) for name, value in data.items()}
    if data.get("policy") == SeparatorMask.__name__ and data.get("separators") == FROM_TOKENIZER:
        found = SeparatorMask.from_tokenizer(tokenizer())
        data.update(separators=list(found.separators), names=list(found.names))
    return data

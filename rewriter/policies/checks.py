"""Checks of a policy's fields."""

from __future__ import annotations

from rewriter.errors import PolicyError


def check_int(policy: object, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{type(policy).__name__}: {name} must be an integer of at least {least}, got {value!r}")


def check_choice(policy: object, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PolicyError(f"{type(policy).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")

"""Error budgets that come from the data, never from a tolerance set by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor,
    dense: Tensor,
    exact: Tensor,
    what: str = "result",
    *,
    magnitude: Tensor | None = None,
    spread: Tensor | None = None,
) -> None:
    """Asserts that `actual` is at most twice as far from the exact result as the dense form in the same precision.

    Distances are 2-norms. The dense form may be exact by luck, so one unit in the last place is always allowed: of the
    result; of the `magnitude` in fp32, where the result is a sum whose terms cancel; and of the `spread` in the precision
    of `dense`, where that is a 16-bit one and the terms themselves are rounded to it.

    Args:
        actual: what is tested.
        dense: the dense form, computed in the precision of `actual`.
        exact: the dense form, computed in fp64.
        what: its name, for the message.
        magnitude: the result with all terms of its sums in absolute value, fp64.
        spread: the root of the sum of the squares of these terms, fp64.

    Raises:
        AssertionError: with both errors.
    """
    assert actual.shape == exact.shape, f"{what} has shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{what} is not finite"
    error = (actual.double() - exact).norm().item()
    dense_error = (dense.double() - exact).norm().item()
    unit = exact.norm().item() * torch.finfo(dense.dtype).eps
    if magnitude is not None:
        unit = max(unit, magnitude.norm().item() * torch.finfo(torch.float32).eps)
    if spread is not None and dense.dtype in (torch.float16, torch.bfloat16):
        unit = max(unit, spread.norm().item() * torch.finfo(dense.dtype).eps / 2)
    allowed = 2 * max(dense_error, unit)
    assert error <= allowed, (
        f"{what} is {error:.3e} off, more than {allowed:.3e}; the dense form is {dense_error:.3e} off"
    )

"""Testing kernels against their dense form, with error budgets that come from the data."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, dense: Tensor, exact: Tensor, what: str = "result", *, magnitude: Tensor | None = None
) -> None:
    """Asserts that `actual` is at most twice as far from the exact result as the dense form in the same precision.

    Distances are 2-norms. One unit in the last place is always allowed, since the dense form may be exact by luck: of the
    result, or of `magnitude` where the result is a sum whose terms cancel.

    Args:
        actual: what is tested.
        dense: the dense form, computed in the precision of `actual`.
        exact: the dense form, computed in fp64.
        what: its name, for the message.
        magnitude: the result with all terms of its sums in absolute value, fp64.

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
    allowed = 2 * max(dense_error, unit)
    assert error <= allowed, (
        f"{what} is {error:.3e} off, more than {allowed:.3e}; the dense form is {dense_error:.3e} off"
    )

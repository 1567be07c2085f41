"""Testing attention kernels against the dense reference, in this project's tests and in yours.

    from hypothesis import given
    from rewriter.testing import assert_equivalent, attention_cases

    @given(case=attention_cases())
    def test_my_kernel(case):
        assert_equivalent(my_kernel, case)

`my_kernel` has the signature of `rewriter.kernels.live_range_attention`, as much of it as it supports. `rewriter verify
--kernel package.module:my_kernel` runs a whole suite. Needs hypothesis (`pip install rewriter[test]`).
"""

from __future__ import annotations

from rewriter.testing.budgets import assert_within_budget
from rewriter.testing.cases import ADVERSARIAL_RANGES
from rewriter.testing.cases import RANGE_KINDS
from rewriter.testing.cases import Case
from rewriter.testing.equivalence import Features
from rewriter.testing.equivalence import assert_equivalent
from rewriter.testing.strategies import attention_cases
from rewriter.testing.strategies import live_ranges

__all__ = [
    "ADVERSARIAL_RANGES",
    "RANGE_KINDS",
    "Case",
    "Features",
    "assert_equivalent",
    "assert_within_budget",
    "attention_cases",
    "live_ranges",
]

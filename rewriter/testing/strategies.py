"""Hypothesis strategies for live ranges and for the inputs of an attention kernel."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from rewriter.kernels import FOREVER
from rewriter.testing.cases import RANGE_KINDS
from rewriter.testing.cases import Case
from rewriter.testing.equivalence import Features

DTYPES = ("float32", "bfloat16", "float16")


def live_ranges(num_keys: int) -> st.SearchStrategy[str | tuple[tuple[int, int], ...]]:
    """The `ranges` of a `Case`: a family, or any starts and ends at all, around the tiles' borders and beyond the keys."""
    return st.one_of(st.sampled_from(RANGE_KINDS), _listed(num_keys))


def _listed(num_keys: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    start = st.integers(-2, num_keys + 2)
    end = st.one_of(st.integers(-2, num_keys + 2), st.just(FOREVER))
    pairs = st.lists(st.tuples(start, end), min_size=num_keys, max_size=num_keys)
    return pairs.map(lambda listed: tuple(listed))


@st.composite
def attention_cases(
    draw: st.DrawFn,
    *,
    features: Features | None = None,
    dtypes: Sequence[str] = DTYPES,
    max_keys: int = 70,
    max_head_dim: int = 24,
) -> Case:
    """Cases with any sizes, groups, strides, ranges and options that `features` allows (all, when left out)."""
    features = features or Features()
    # Listed starts and ends are for few keys: a failing list should be short enough to read. The choice comes first, so
    # that the number of keys can shrink without another kind of ranges being drawn.
    listed = draw(st.booleans())
    keys = draw(st.integers(1, min(max_keys, 40) if listed else max_keys))
    batch = draw(st.integers(1, 2))
    index = st.sampled_from([None, "all", "row"])
    alibi = features.alibi_slopes and draw(st.booleans())
    return Case(
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from(list(dtypes))),
        batch=batch,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        queries=draw(st.one_of(st.just(keys), st.integers(1, max_keys))),
        keys=keys,
        head_dim=draw(st.integers(1, max_head_dim)),
        value_dim=draw(st.integers(1, max_head_dim)),
        ranges=draw(_listed(keys)) if listed else draw(st.sampled_from(RANGE_KINDS)),
        strided=draw(st.booleans()),
        bias=draw(st.sampled_from([None, "all", "row", "head"])) if features.bias else None,
        sinks=features.sinks and draw(st.booleans()),
        alibi=alibi,
        scale=draw(st.sampled_from([None, 0.25, 1.0])) if features.scale else None,
        softcap=draw(st.sampled_from([None, 0.5, 30.0])) if features.softcap else None,
        query_index=draw(index) if features.query_index else None,
        key_index=draw(index) if alibi and features.key_index else None,
    )

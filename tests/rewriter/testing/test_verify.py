"""`rewriter.testing` and `rewriter verify`: right kernels pass, wrong ones fail with a line that repeats the failure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import reference
from torch import Tensor
from typer.testing import CliRunner

from rewriter.cli import app
from rewriter.testing import Case
from rewriter.testing import Features
from rewriter.testing import assert_equivalent
from rewriter.testing.verify import run_suite

# What a project writes to have its kernel tested: here a dense one with the arguments that it supports.
OWN_KERNEL = """
import torch

def attention(query, key, value, live, *, scale=None):
    rows = torch.arange(key.size(2) - query.size(2), key.size(2))
    mask = live.visible(rows).expand(query.size(0), -1, -1, -1)
    group = query.size(1) // key.size(1)
    if mask.size(1) > 1:
        mask = mask.repeat_interleave(group, dim=1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )

def top_left(query, key, value, live, *, scale=None):
    rows = torch.arange(query.size(2))
    mask = live.visible(rows).expand(query.size(0), key.size(1), -1, -1).repeat_interleave(
        query.size(1) // key.size(1), dim=1
    )
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
"""


@pytest.fixture
def own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_kernels.py").write_text(OWN_KERNEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def test_the_built_in_kernels_pass() -> None:
    outcomes = run_suite(examples=5, derandomize=True)
    assert [o.failure for o in outcomes if o.failure] == []
    assert sum(o.cases for o in outcomes) > 80
    assert {o.skipped for o in outcomes if o.skipped} == {"only a GPU is fast enough for long inputs"}


def test_a_kernel_of_ones_own_passes(own_kernels: Path) -> None:
    code, output = verify("--kernel", "own_kernels:attention", "--examples", "20", "--junit", "report.xml")
    assert code == 0, output
    suite = ElementTree.parse(own_kernels / "report.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.attrib["failures"] == "0"
    assert int(suite.attrib["tests"]) > 40


def test_a_wrong_kernel_fails_and_says_how_to_repeat_it(own_kernels: Path) -> None:
    code, output = verify(
        "--kernel", "own_kernels:top_left", "--dtypes", "float32", "--only", "random_cases", "--junit", "report.xml"
    )
    assert code == 1
    assert "FAILED" in output
    line = re.search(r"assert_equivalent\(top_left, (Case\(.*\))\)", output)
    assert line is not None, output
    case = eval(line[1], {"Case": Case})
    # Hypothesis found a smallest case: it takes fewer queries than keys to tell the alignments apart, or more.
    assert case.keys <= 3
    assert case.queries <= 3
    from own_kernels import top_left  # type: ignore[import-not-found]

    with pytest.raises(AssertionError, match="output is"):
        assert_equivalent(top_left, case)
    suite = ElementTree.parse(own_kernels / "report.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.attrib["failures"] == "1"


def faulty(change: str) -> Any:
    """The dense reference with one fault."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, **options: Any) -> Any:
        if change == "end off by one":
            live = LiveRanges(live.start, live.end - (live.end != 2**31 - 1).int())
        if change == "bias times scale":
            options["bias"] = options["bias"] / math.sqrt(query.size(3))
        if change == "no gradient of the key":
            key = key.detach() + 0 * key
        if change == "softcap after bias":
            options.pop("softcap", None)
        return reference.live_range_attention(query, key, value, live, **options)

    return kernel


@pytest.mark.parametrize(
    "change", ["end off by one", "bias times scale", "no gradient of the key", "softcap after bias"]
)
def test_faults_are_found(change: str) -> None:
    case = Case(keys=20, queries=20, group=2, ranges="window", bias="head", softcap=0.5)
    assert_equivalent(faulty("none"), case)
    with pytest.raises(AssertionError, match=r"off, more than .*\nrepeat it with: assert_equivalent\(kernel, Case"):
        assert_equivalent(faulty(change), case)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda lse: lse * 1.001, "lse is"), (lambda lse: lse.clamp(min=-1e30), "rows without keys is")],
    ids=["a wrong one", "a number for an empty row"],
)
def test_faults_of_the_log_sum_exp_are_found_beside_rows_without_keys(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    def kernel(*inputs: Any, return_lse: bool) -> Any:
        output, lse = reference.live_range_attention(*inputs, return_lse=return_lse)
        return output, change(lse)

    case = Case(ranges=((3, FOREVER),) * 8)
    assert_equivalent(reference.live_range_attention, case)
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(kernel, case)


def test_an_error_of_the_kernel_says_how_to_repeat_it() -> None:
    def without_bias(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, *, return_lse: bool) -> None: ...

    with pytest.raises(
        AssertionError,
        match=r"raised TypeError: .*'bias'\nrepeat it with: assert_equivalent\(without_bias, Case\(bias='all'",
    ):
        assert_equivalent(without_bias, Case(bias="all"))


def test_features_are_what_the_signature_names() -> None:
    def few(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, *, scale: float | None = None) -> None: ...

    assert Features.of(few) == Features(False, False, False, True, False, False, False, False, True)
    assert Features.of(lambda q, k, v, live, **options: None) == Features()


def test_a_case_is_one_line_of_python() -> None:
    case = Case(seed=3, dtype="float16", keys=2, ranges=((0, 1), (1, 2)), sinks=True)
    assert repr(case) == "Case(seed=3, dtype='float16', keys=2, ranges=((0, 1), (1, 2)), sinks=True)"
    assert eval(repr(case)) == case
    for name, tensor in eval(repr(case)).tensors().items():
        assert torch.equal(tensor, case.tensors()[name])


ERRORS = {
    "kernel without a function": (["--kernel", "module"], "--kernel must be package.module:function, got 'module'"),
    "unknown module": (["--kernel", "nowhere:f"], "No module named 'nowhere'"),
    "unknown function": (["--kernel", "math:attention"], "module math has no function attention"),
    "unknown device": (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    "unknown dtype": (["--dtypes", "float32,float8"], "float8 is not one of float32, bfloat16, float16"),
    "unknown GPU": (["--compile-only", "--architectures", "sm42"], "no such GPU as sm42; there are sm80, sm90"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name: str) -> None:
    arguments, message = ERRORS[name]
    code, output = verify(*arguments)
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    code, output = verify("--device", "cuda")
    assert code == 2
    assert "torch sees no GPU here" in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("ranges", "message"), [("diagonal", "ranges must be one of"), (((0, 1),), "1 entries for 8 keys")]
)
def test_a_bad_case_is_named(ranges: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(ranges=ranges)

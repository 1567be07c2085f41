"""`rewriter verify`: the suite of `rewriter.testing` for a kernel on a device, and the launch table compiled without one."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from dataclasses import field
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.table import Table

from rewriter.errors import VerifyError
from rewriter.kernels import dispatch
from rewriter.kernels import live_range_attention
from rewriter.kernels.gpu import compiled
from rewriter.kernels.gpu import launch
from rewriter.kernels.gpu import loops
from rewriter.kernels.gpu.targets import TARGETS
from rewriter.testing import Case
from rewriter.testing import Features
from rewriter.testing import assert_equivalent
from rewriter.testing.equivalence import Kernel

SUITE = Path(__file__).parent / "suite.py"


@dataclass
class Outcome:
    """One check: its name, cases tried, seconds taken, and the message of its failure or the reason why it was skipped."""

    name: str
    cases: int
    seconds: float
    failure: str | None = None
    skipped: str | None = None


@dataclass
class Verification:
    """What the suite reads: the kernel, where it runs, and how hard to try. A pytest plugin, which collects the outcomes."""

    kernel: Kernel
    device: str
    examples: int
    dtypes: tuple[str, ...]
    features: Features
    max_keys: int
    derandomize: bool
    outcomes: list[Outcome] = field(default_factory=list)
    count: int = 0

    def check(self, case: Case) -> None:
        self.count += 1
        assert_equivalent(self.kernel, case, device=self.device, features=self.features)

    def pytest_configure(self, config: object) -> None:
        config.verification = self  # type: ignore[attr-defined]

    def pytest_runtest_setup(self, item: object) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: object) -> None:
        when, outcome = report.when, report.outcome  # type: ignore[attr-defined]
        if when != "call" and outcome == "passed":
            return
        name = report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")  # type: ignore[attr-defined]
        result = Outcome(name, self.count, report.duration)  # type: ignore[attr-defined]
        if outcome == "skipped":
            result.skipped = report.longrepr[2].removeprefix("Skipped: ")  # type: ignore[attr-defined]
        elif outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)  # type: ignore[attr-defined]
            message = str(crash.message if crash else report.longrepr)  # type: ignore[attr-defined]
            # Hypothesis adds its own account of the failing case, which the last line of ours says in one line.
            repeat = re.search(r"repeat it with: .*", message)
            result.failure = message[: repeat.end()] if repeat else message
        self.outcomes.append(result)


def load_kernel(path: str) -> Kernel:
    """The function named `package.module:function`; modules of the working directory are found too.

    Raises:
        VerifyError: there is no such module, or no such function in it.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise VerifyError(f"--kernel must be package.module:function, got {path!r}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise VerifyError(f"--kernel {path}: {error}; run from the folder that holds it, or install it") from None
    finally:
        sys.path.pop(0)
    kernel = getattr(module, function_name, None)
    if not callable(kernel):
        raise VerifyError(f"--kernel {path}: module {module_name} has no function {function_name}")
    return kernel


def run_suite(
    kernel: Kernel = live_range_attention,
    *,
    device: str = "cpu",
    examples: int | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16"),
    gradients: bool = True,
    junit: Path | None = None,
    only: str | None = None,
    derandomize: bool = False,
) -> list[Outcome]:
    """Runs the suite and returns the outcome of each check.

    Args:
        kernel: see `rewriter.testing.assert_equivalent`.
        device: "cpu" or "cuda". The built-in Triton kernels run on the CPU, in the interpreter, with `TRITON_INTERPRET=1`.
        examples: random cases for each dtype; 100, or 10 in the interpreter, when left out.
        dtypes: what the kernel is asked for.
        gradients: whether it has a backward.
        junit: a file for the outcomes in JUnit's XML.
        only: an expression over the names of the checks, as pytest's `-k` takes it.
        derandomize: try the same cases each time.

    Raises:
        VerifyError: the device is not there, or pytest and hypothesis are not installed.
    """
    try:
        import hypothesis  # noqa: F401
        import pytest
    except ImportError:
        raise VerifyError("rewriter verify needs pytest and hypothesis: pip install 'rewriter[test]'") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise VerifyError(
            "--device cuda: torch sees no GPU here; use --device cpu, with TRITON_INTERPRET=1 for Triton kernels"
        )
    if device not in ("cpu", "cuda"):
        raise VerifyError(f"--device must be cpu or cuda, got {device!r}")
    slow = dispatch.INTERPRETED
    verification = Verification(
        kernel,
        device,
        (10 if slow else 100) if examples is None else examples,
        dtypes,
        Features.of(kernel, gradients=gradients),
        40 if slow else (300 if device == "cuda" else 70),
        derandomize,
    )
    # Nothing of the working directory's own pytest settings, and no files but the one asked for.
    arguments = [str(SUITE), "-c", os.devnull, "--rootdir", str(SUITE.parent), "--noconftest", "-p", "no:cacheprovider"]
    arguments += ["--import-mode=importlib", "-p", "no:xdist", "-q"]
    arguments += [f"--junitxml={junit}", "-o", "junit_suite_name=rewriter verify"] if junit is not None else []
    arguments += ["-k", only] if only is not None else []
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main(arguments, plugins=[verification])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise VerifyError(f"the suite did not run:\n{output.getvalue()}")
    return verification.outcomes


def outcome_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="rewriter verify", title_justify="left")
    for name, justify in (("check", "left"), ("cases", "right"), ("seconds", "right"), ("result", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for outcome in outcomes:
        result = (
            "[red]FAILED[/red]" if outcome.failure else f"skipped: {outcome.skipped}" if outcome.skipped else "passed"
        )
        cases = "" if outcome.skipped else f"{outcome.cases}"
        table.add_row(outcome.name.replace("[", r"\["), cases, f"{outcome.seconds:.1f}", result)
    return table


@dataclass(frozen=True)
class CompiledEntry:
    """A kernel compiled at an entry of the launch table, and why it fails, if it does."""

    architecture: str
    bits: int
    head_dim: int
    config: str
    compiled: compiled.Compiled | None
    failure: str | None


def compile_table(
    architectures: tuple[str, ...], head_dims: tuple[int, ...] = launch.HEAD_DIMS
) -> Iterator[CompiledEntry]:
    """Compiles every kernel at every entry of the launch table, in as many processes as there are CPUs.

    More registers spilled than `MAX_SPILLED`, more shared memory than a program can have, or more in a loop than
    `loop_bounds.json` allows, is a failure.
    """
    if dispatch.INTERPRETED:
        raise VerifyError("--compile-only cannot run in the interpreter; unset TRITON_INTERPRET")
    work = [(name, bits, head_dim) for name in architectures for bits in (16, 32) for head_dim in head_dims]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for entries in pool.map(compile_entries, work):
            yield from entries


def compile_entries(work: tuple[str, int, int]) -> list[CompiledEntry]:
    """All kernels for one architecture, element size in bits and head dim."""
    architecture, bits, head_dim = work
    dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
    results = []
    names = ("forward", "backward_query", "backward_key", "decode", "key_scores")
    recorded = compiled.launches(architecture, names, dtype, head_dim)
    if (bits, head_dim) == (16, launch.HEAD_DIMS[0]):
        recorded += compiled.launches(architecture, (), dtype, head_dim)
    for item in recorded:
        constants = item.constants
        sizes = "x".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N") if name in constants)
        config = f"{sizes or '-'}, {constants['num_warps']} warps, {constants.get('num_stages', '-')} stages"
        result, failure = None, None
        try:
            result = compiled.compile_launch(item, architecture)
        except Exception as error:
            failure = f"{item.kernel.__name__} does not compile: {type(error).__name__}: {str(error).splitlines()[-1]}"
        if result is not None and result.spilled > compiled.MAX_SPILLED:
            failure = f"{result.spilled} bytes of registers spilled, more than {compiled.MAX_SPILLED}"
        if result is not None and result.shared > TARGETS[architecture].shared_memory:
            failure = f"{result.shared} bytes of shared memory, more than {TARGETS[architecture].shared_memory}"
        if result is not None and failure is None:
            bound = loops.bounds().get(loops.key(architecture, result.kernel, bits, head_dim))
            over = None if bound is None else loops.exceeded(result.loops, bound)
            if over is not None:
                failure = f"{over}; if that is meant, python bench/loops.py writes the bounds anew"
        results.append(CompiledEntry(architecture, bits, head_dim, config, result, failure))
    return results


def compiled_table(entries: list[CompiledEntry]) -> Table:
    table = Table(title="kernels compiled without a GPU", title_justify="left")
    for name in ("GPU", "kernel", "bits", "head dim", "block, warps, stages", "registers", "spilled", "shared KiB"):
        table.add_column(
            name, justify="right" if name in ("registers", "spilled", "shared KiB", "bits", "head dim") else "left"
        )
    table.add_column("instructions of each loop", justify="right")
    table.add_column("of them in all: products, waits, barriers, copies, loads", justify="right")
    table.add_column("instructions")
    table.add_column("result")
    for entry in entries:
        result = f"[red]{entry.failure}[/red]" if entry.failure else "fits"
        key = (str(entry.bits), str(entry.head_dim), entry.config)
        if entry.compiled is None:
            table.add_row(entry.architecture, "?", *key, "", "", "", "", "", "", result)
            continue
        c = entry.compiled
        kinds = ", ".join(f"{count} {kind}" for kind, count in c.instructions.items()) or "none of these"
        numbers = (str(c.registers), str(c.spilled), f"{c.shared / 1024:.0f}")
        lengths = " ".join(str(loop["instructions"]) for loop in c.loops) or "-"
        parts = ("matrix products", "waits", "barriers", "asynchronous copies", "loads")
        sums = " ".join(str(sum(loop[part] for loop in c.loops)) for part in parts)
        table.add_row(
            entry.architecture, c.kernel.lstrip("_"), *key, *numbers, lengths, sums if c.loops else "-", kinds, result
        )
    return table

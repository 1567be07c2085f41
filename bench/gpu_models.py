"""The section "models" of `gpu_session.py`: `tests/rewriter/test_on_gpu.py`, each test a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gpu_cache
from gpu_machine import Machine
from gpu_sections import Figures
from gpu_sections import Row
from gpu_sections import Sizes

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "rewriter" / "test_on_gpu.py"
GROUPS = (
    "short_text",
    "generation",
    "outputs_and_gradients and eager",
    "package",
    "sixteen_bits",
    "outputs_and_gradients and inductor",
    "",
)
"""As pytest's -k takes them, in the order in which they run; the last one is the rest."""


def rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    groups = {group: group or " and ".join(f"not ({g})" for g in GROUPS if g) for group in GROUPS}
    for group, expression in groups.items():
        if not machine.rehearsed or group == "short_text":
            yield Row(group or "the rest", partial(run_tests, machine, expression))


def run_tests(machine: Machine, expression: str) -> Figures:
    """Outcome of each test; an error, with the outcomes, where one failed."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        # Without what pytest has told a process of its own, of which this may be a part.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment |= {"REWRITER_TEST_OUTCOMES": str(outcomes), "REWRITER_TEST_DEVICE": machine.device}
        workers = [] if machine.rehearsed else ["-n", str(min(12, os.cpu_count() or 1))]
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_models", *workers]
        done = subprocess.run(
            [*command, str(TESTS), "-k", expression], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        results = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
    failed = {r["test"]: r["message"] for r in results if r["outcome"] == "failed"}
    assert results, f"no test ran: {done.stdout[-500:]} {done.stderr[-500:]}"
    assert not failed, f"{len(failed)} of {len(results)} failed: {failed}"
    skipped = [r["test"] for r in results if r["outcome"] == "skipped"]
    assert not skipped, f"skipped: {skipped}"
    return {"passed": len(results), "seconds": {r["test"]: round(r["seconds"], 1) for r in results}}


# This module is also a plugin of the tests' own process: there it uses the compiled kernels and writes outcomes down.


def pytest_configure(config: object) -> None:
    gpu_cache.use_key_of(gpu_cache.FOLDER)


def pytest_runtest_logreport(report: object) -> None:
    path = os.environ.get("REWRITER_TEST_OUTCOMES")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    when, outcome = report.when, report.outcome  # type: ignore[attr-defined]
    if when != "call" and outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)  # type: ignore[attr-defined]
    message = str(crash.message if crash else report.longrepr or "")  # type: ignore[attr-defined]
    name = report.nodeid.split("::")[-1].removeprefix("test_")  # type: ignore[attr-defined]
    row = {"test": name, "outcome": outcome, "seconds": report.duration, "message": message[:300]}  # type: ignore[attr-defined]
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")

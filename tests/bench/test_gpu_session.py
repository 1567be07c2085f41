"""The session on a GPU cannot rot: every section is rehearsed here, and what its driver and its cache promise holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"

PLANTED = """
import os, time
import gpu_session
from gpu_sections import Row

def fails():
    raise RuntimeError("planted")

def rows(*named):
    return lambda machine, sizes: iter([Row(name, call) for name, call in named])

fine = lambda: {"ms": 1.23456}
gpu_session.SECTIONS[:] = [
    gpu_session.Section("hangs", "", 1, 5, rows(("first", fine), ("second", lambda: time.sleep(60)), ("third", fine))),
    gpu_session.Section("crashes", "", 1, 30, rows(("first", lambda: os.abort()), ("second", fine))),
    gpu_session.Section("fails", "", 1, 30, rows(("first", fails), ("second", fine))),
]
gpu_session.typer.run(gpu_session.main)
"""


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["section"], row["row"]): row for row in json.loads(path.read_text())["rows"]}


def test_every_section_runs_and_is_not_run_again(tmp_path: Path) -> None:
    command = ["bash", "bench/on_gpu.sh", "--rehearse"]
    printed = run(command, OUT=str(tmp_path), PYTHON=sys.executable)
    path = tmp_path / "gpu-rehearsal.json"
    found = rows(path)
    sections = {"machine", "correct", "attention", "compiled", "peers", "models", "whole", "llama", "tune", "counters"}
    assert {section for section, _ in found} == sections
    assert {key: row["error"] for key, row in found.items() if "error" in row} == {}
    for row in found.values():
        assert row["figures"] and row["commit"] and row["card"] == "rehearsal" and row["torch"] and row["triton"]
    measured = {name for name, row in found.items() if row["section"] == "attention"}
    assert any(found[name]["figures"].get("kernels", {}).keys() >= {"_forward", "_list_gradients"} for name in measured)
    assert "written" in printed.splitlines()[-1]
    before = path.read_text()
    run([*command, "--only", "machine,peers"], OUT=str(tmp_path), PYTHON=sys.executable)
    assert path.read_text() == before


def test_predictions_fit_into_a_session() -> None:
    printed = run(
        [sys.executable, "-c", "import gpu_session as g; print(sum(s.predicted for s in g.SECTIONS if not s.asked))"],
        PYTHONPATH=str(BENCH),
    )
    assert int(printed) <= 660


def test_a_hang_a_crash_and_an_error_lose_one_row_each(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    command = [sys.executable, "-P", str(script), "--rehearse", "--out", str(tmp_path)]
    printed = run(command, PYTHONPATH=str(BENCH), TRITON_INTERPRET="1")
    found = rows(tmp_path / "gpu-rehearsal.json")
    assert "hangs: ended at its limit" in printed
    assert found["hangs", "first"]["figures"] == {"ms": 1.235}
    assert "did not end" in found["hangs", "second"]["error"] and ("hangs", "third") not in found
    assert "did not end" in found["crashes", "first"]["error"] and "figures" in found["crashes", "second"]
    assert found["fails", "first"]["error"] == "RuntimeError: planted" and "figures" in found["fails", "second"]
    # A second call tries again what failed, and goes on behind what hung; what was measured stays as it was.
    run([*command, "--only", "fails"], PYTHONPATH=str(BENCH), TRITON_INTERPRET="1")
    again = rows(tmp_path / "gpu-rehearsal.json")
    assert again["fails", "first"]["attempt"] != found["fails", "first"]["attempt"]
    assert again["fails", "second"] == found["fails", "second"]


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    command = ["bash", "bench/on_gpu.sh", "--rehearse", "--only", "machine,speed"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "speed" in done.stderr and "correct" in done.stderr


def test_a_second_call_leaves_the_sources_of_the_first(tmp_path: Path) -> None:
    """What stands for Python here calls the script once more, and then looks for what it was to run."""
    python = tmp_path / "python"
    python.write_text(
        """#!/usr/bin/env bash
own=${PYTHONPATH%%:*}
if [ -z "${INNER:-}" ]; then INNER=1 bash bench/on_gpu.sh --rehearse; fi
ls "$own/rewriter/kernels/gpu/forward.py"
"""
    )
    python.chmod(0o755)
    found = run(["bash", "bench/on_gpu.sh", "--rehearse"], OUT=str(tmp_path), PYTHON=str(python)).split()
    assert len(found) == 2 and found[0] != found[1]
    assert not any(Path(path).exists() for path in found)


CACHE = """
import json, sys
from pathlib import Path
import gpu_cache, triton
from triton.runtime import cache
from rewriter.kernels.gpu.compiled import standing_in
from rewriter.testing import Case

folder, into = Path(sys.argv[2]), Path(sys.argv[3])

def warm(item):
    with standing_in(gpu_cache.ARCHITECTURE):
        item.kernel.warmup(*item.arguments, grid=(1,), **item.constants)

case = Case(kv_heads=1, group=2, head_dim=16, value_dim=16, keys=20, queries=20)
if sys.argv[1] == "fill":
    # As on another Python: the binary, and so the key, differ.
    own = cache.triton_key().replace(gpu_cache._hash_of_binary(), "0" * 64)
    cache.triton_key = lambda: own
    gpu_cache._hash_of_binary = lambda: "0" * 64
    gpu_cache.ALL = ("decode",)
    gpu_cache.use_folder(str(folder / "kernels"))
    (folder / "kernels").mkdir(parents=True)
    gpu_cache.compile_case(case)
    print(json.dumps(gpu_cache.finish(folder).__dict__))
else:
    if sys.argv[1] == "another":
        gpu_cache.make_backend = lambda target: type("Backend", (), {"hash": lambda self: "another ptxas"})()
    found = gpu_cache.install(folder, into)
    triton.knobs.cache.dir = str(into)
    gpu_cache.use_key_of(folder) if sys.argv[1] != "plain" else None
    counts = gpu_cache.count_compilations()
    gpu_cache.ALL = ("decode",)
    for item in gpu_cache.launches_of(case):
        warm(item)
    print(json.dumps({**found, **counts}))
"""


def test_kernels_compiled_elsewhere_are_found(tmp_path: Path) -> None:
    """By another Python's build of the same Triton, in another folder; and not where more than that differs."""
    script = tmp_path / "cache.py"
    script.write_text(CACHE)

    def call(what: str, into: str) -> dict[str, Any]:
        command = [sys.executable, "-P", str(script), what, str(tmp_path / "filled"), str(tmp_path / into)]
        return json.loads(run(command, PYTHONPATH=str(BENCH)).splitlines()[-1])

    filled = call("fill", "unused")
    assert filled["kernels"] >= 2 and filled["backend"].endswith("90")
    matching = call("matching", "a")
    assert matching["reason"] is None and matching["kernels"] == filled["kernels"]
    assert matching["hits"] == filled["kernels"] and "misses" not in matching
    plain = call("plain", "b")
    assert plain["misses"] == filled["kernels"] and "hits" not in plain
    another = call("another", "c")
    assert another["kernels"] == 0 and "backend" in another["reason"] and "another ptxas" in another["reason"]
    assert another["misses"] == filled["kernels"]

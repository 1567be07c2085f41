"""The tables of the documentation say what `bench/results/` says, and a figure that changes is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import tables

    return tables


def names(tables: ModuleType, page: Path) -> list[str]:
    return [block[2] for block in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))]


def test_the_pages_agree_with_the_results(tables: ModuleType) -> None:
    assert tables.differing() == [], "run `python bench/tables.py`"


def test_every_table_stands_once_and_nothing_else_is_asked_for(tables: ModuleType) -> None:
    found = [name for page in tables.pages() for name in names(tables, page)]
    assert sorted(found) == sorted(tables.TABLES)


def test_each_mark_that_begins_a_table_has_one_that_ends_it(tables: ModuleType) -> None:
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- generated:") == text.count("<!-- end -->") == len(names(tables, page)), page


def test_every_row_has_as_many_cells_as_its_header(tables: ModuleType) -> None:
    for page in tables.pages():
        for block in tables.BLOCK.finditer(page.read_text(encoding="utf-8")):
            assert len({line.count("|") for line in block[3].strip().splitlines()}) == 1, block[2]


def _first(stored: Any) -> Any:
    return stored["results"][0]


CHANGES: dict[str, Callable[[Any], None]] = {
    "attention-cpu": lambda s: _first(s).update(forward=2 * _first(s)["forward"]),
    "attention-cpu-bf16": lambda s: _first(s).update(forward=2 * _first(s)["forward"]),
    "compile": lambda s: (
        s["layers"][-1].update(capture=1 + s["layers"][-1]["capture"]),
        s["rows"][0].update(one=99.0),
    ),
    "context-parallel": lambda s: (
        s["counted"][0].update(of_ring=9.0),
        s["measured"][0].update(sent=9),
    ),
    "scale": lambda s: (
        next(r for r in s["steps"] if r["gpus"] == 2048 and r["place"] != "one site").update(seconds=99.0, fits=True),
        next(r for r in s["steps"] if r["gpus"] == 2048 and r["place"] == "one site").update(inside_bytes=9e15),
        s["deeplink"][0].update(gbits=9.0),
    ),
    "crossover-cpu": lambda s: s["forward"][0].update(seconds=9.0),
    "engines": lambda s: (
        s["models"]["GPT-2"]["engines"]["forward"].update(layers=1),
        s["memory"]["1024"]["engines"]["forward"].update(activation_bytes=1),
    ),
    "export": lambda s: s["rows"][0]["load_seconds"].__setitem__(0, 9.0),
    "generate": lambda s: s["rows"][-1].update(cache_bytes=1),
    "given-masks": lambda s: s["rows"][0]["seconds"].update(rewriter=9.0),
    "kernels-h200": lambda s: _first(s)["forward"].update(forward=9.0),
    "memory": lambda s: s["results"]["original"]["peaks"].update({"512": 9.0}),
    "never-slower": lambda s: next(iter(s["seconds"].values())).update({"Exact()": 9.0}),
    "prefill": lambda s: s["rows"][1].update(kept_keys=1),
    "proofs": lambda s: s["zoo"]["sites"].update(verified=1),
    "quality-chunked": lambda s: [sample.update(right=not sample["right"]) for sample in s[0]["samples"]],
    "quality-dynamic-mask": lambda s: s["results"]["text/full attention"]["after"].update({"1024": 9.0}),
    "quality-real": lambda s: s["rows"][0]["bits"].__setitem__(0, 9.0),
    "quality-streaming": lambda s: s["full attention"]["parts"][0].update(bits=1e6),
    "real-model": lambda s: s["contestants"]["Exact()"].update(perplexity=9.0),
    "soundness": lambda s: s["wrong"].append("a program"),
    "work-ratio": lambda s: s["schedules"][0].update(ideal=9.0),
    "zoo": lambda s: s[0]["exact"].update(left=1e-2),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_changed_figure_is_found(tables: ModuleType, tmp_path: Path, name: str) -> None:
    results = tmp_path / "results"
    shutil.copytree(BENCH / "results", results)
    stored = json.loads((results / f"{name}.json").read_text())
    CHANGES[name](stored)
    (results / f"{name}.json").write_text(json.dumps(stored))
    assert tables.differing(results)


def test_every_file_of_results_is_read(tables: ModuleType) -> None:
    read: set[str] = set()

    def recording(name: str) -> Any:
        read.add(name)
        return json.loads((BENCH / "results" / f"{name}.json").read_text())

    for table in tables.TABLES.values():
        table(recording)
    assert read == {path.stem for path in (BENCH / "results").glob("*.json")} == CHANGES.keys()


def test_the_check_says_which_page_differs(tmp_path: Path) -> None:
    for folder in ("bench/results", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(BENCH / "tables.py", tmp_path / "bench")
    shutil.copy(ROOT / "README.md", tmp_path)

    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "bench" / "tables.py"), "--check"]
        return subprocess.run(command, capture_output=True, text=True)

    assert check().returncode == 0
    page = tmp_path / "docs" / "support.md"
    page.write_text(page.read_text(encoding="utf-8").replace("| Qwen2 |", "| Qwen 2 |"), encoding="utf-8")
    done = check()
    assert done.returncode == 1
    assert "docs/support.md" in done.stdout and "benchmarks.md" not in done.stdout

"""The Python of README and documentation runs as it is printed: the blocks of a page are one program, from top to bottom."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?P<not_run><!-- not run: [^\n]*-->\s*)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
QUICK = ("README.md", "docs/index.md", "docs/concepts/live-ranges.md")
"""Pages that `make test` runs; `make soak` runs the others, which compile and generate."""

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def program(page: Path) -> str:
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return "\n\n".join(block["code"] for block in blocks if not block["not_run"])


def pages() -> list[object]:
    found = []
    for page in PAGES:
        if program(page):
            name = str(page.relative_to(ROOT))
            found.append(pytest.param(page, id=name, marks=[] if name in QUICK else [pytest.mark.soak]))
    return found


@pytest.mark.parametrize("page", pages())
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text(program(page))
    done = subprocess.run([sys.executable, "-P", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pages_with_programs_are_found() -> None:
    assert {p.id for p in pages()} >= {*QUICK, "docs/guides/policies.md", "docs/guides/export.md"}  # type: ignore[attr-defined]

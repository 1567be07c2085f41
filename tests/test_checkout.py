"""A clone can be tried where it lies: the package is found from its root, from examples/ and from anywhere, installed or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NOT_INSTALLED = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
TRY = (
    "import rewriter, rewriter.export, rewriter.kernels.ops, rewriter.passes.pipeline; "
    "print(rewriter.kernels.__file__, rewriter.SlidingWindow(4))"
)


@pytest.mark.parametrize(
    ("folder", "before", "path"),
    [
        (ROOT, "", ""),
        (ROOT, NOT_INSTALLED, ""),
        (ROOT / "examples", "", ""),
        (ROOT / "examples", NOT_INSTALLED, ""),
        (Path("/"), NOT_INSTALLED, str(ROOT)),
    ],
    ids=["root", "root, not installed", "examples", "examples, not installed", "anywhere, not installed"],
)
def test_the_package_is_found(folder: Path, before: str, path: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", before + TRY],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "SlidingWindow(window=4, sinks=0)" in done.stdout
    assert Path(done.stdout.split()[0]).resolve() == (ROOT / "kernels" / "__init__.py").resolve()


def test_help_comes_without_torch() -> None:
    """The command line answers at once; torch takes seconds to import."""
    code = "import sys; from rewriter.cli import app; app(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "explain" in done.stdout, done.stderr


def test_the_command_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "rewriter", "--help"], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: rewriter" in done.stdout, done.stderr


def test_public_names_are_found_whatever_was_imported_before() -> None:
    names = "[getattr(rewriter, name) for name in rewriter.__all__]"
    code = f"import rewriter.api, rewriter.streaming; {names}; assert callable(rewriter.optimize); print(dir(rewriter))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "'optimize'" in done.stdout, done.stderr

"""Before a build of the site: the package's sources in one tree, as they are imported.

The folders of the repository are not those of the package: `kernels/` is imported as `rewriter.kernels`. mkdocstrings reads
sources without importing them, and so needs them where their names say. `[tool.setuptools.package-dir]` of `pyproject.toml`
says which folder is which package.

It happens at start-up, before the plugins are configured: mkdocstrings passes over a search path that does not exist yet and
reads the folders of the repository instead, without a word.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    raise RuntimeError("the documentation needs Python 3.11 or newer")

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "api"


def on_startup(**_: Any) -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items()):
        for source in sorted((ROOT / folder).rglob("*.py")):
            copy = OUT.joinpath(*package.split(".")) / source.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)

"""rewriter: attention keys have live ranges.

A model in, the same model with its attention proven, rewritten and run over the keys that are alive.
"""

from __future__ import annotations

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

if not (_Path(__file__).parent / "kernels").is_dir():
    # In a checkout the package's other folders, kernels, passes and export, stand beside this one.
    __path__.append(str(_Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from rewriter.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """The public names, and the packages `rewriter.export` and `rewriter.testing`, when one of them is first asked for.

    torch takes seconds to import, and `rewriter --help` needs none of it.
    """
    if name in ("export", "testing"):
        return _importlib.import_module(f"rewriter.{name}")
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
    public = _importlib.import_module("rewriter.public")
    if name == "__all__":
        return public.__all__
    if name in public.__all__:
        return getattr(public, name)
    raise AttributeError(f"module 'rewriter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), "export", "testing"})

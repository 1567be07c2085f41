"""The text behind the small trained model: the Python standard library's own source files.

Every machine with Python has them, so training and evaluation need no download. Some modules are held out:
`held_out_files` never enter the tokenizer or the training set.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT = (
    "argparse.py",
    "configparser.py",
    "fractions.py",
    "heapq.py",
    "ipaddress.py",
    "mailbox.py",
    "shlex.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
)
"""Modules of the standard library (paths below its root) that the small model has never seen."""

# Tests, vendored copies and generated tables: not prose that a model of source code should learn by heart.
_SKIPPED_FOLDERS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "__pycache__",
    ]
)


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_files() -> list[Path]:
    """The held-out modules that this interpreter has, in the order of `HELD_OUT`."""
    return [path for name in HELD_OUT if (path := standard_library() / name).is_file()]


def training_files() -> list[Path]:
    """All other source files of the standard library, sorted by path."""
    root = standard_library()
    held_out = {root / name for name in HELD_OUT}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if path not in held_out and not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def held_out_text(num_bytes: int, module: str = "argparse.py") -> str:
    """The first `num_bytes` bytes of a held-out module, cut at a character border.

    Raises:
        ValueError: `module` is not held out, or is shorter than `num_bytes` in this Python version.
    """
    if module not in HELD_OUT:
        raise ValueError(f"{module!r} is not a held-out module; choose one of {', '.join(HELD_OUT)}")
    data = (standard_library() / module).read_bytes()
    if len(data) < num_bytes:
        raise ValueError(f"{module} has {len(data):,} bytes in this Python version, {num_bytes:,} were asked for")
    return data[:num_bytes].decode("utf-8", errors="ignore")

"""Compiles, without a GPU, the Triton kernels that `gpu_session.py` launches, for a session whose minutes are counted.

    make gpu-cache        fills build/gpu-cache for sm_90 with Triton 3.6; the folder goes along with the checkout

Triton finds a compiled kernel by a key. It is made of: Triton's own Python files (front end, compiler, backends, language)
and its binary `libtriton.so`; the kernel's source with all that it calls, its line number and its global constants; the
types of the arguments and which of them are multiples of 16; the version of `ptxas` and the architecture; the launch's
options; and a few environment variables. All but one of these are the same on two machines with the same release of
Triton. `libtriton.so` is not: each version of Python has a build of its own. So the key is taken along, too, and a session
uses it where everything else of Triton is the same, byte for byte; where it is not, the session says so and compiles.

A group of files in the cache names them by absolute paths, which are written anew for the folder that it is copied to.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rewriter.kernels.gpu import launch
from rewriter.kernels.gpu.compiled import compile_launch
from rewriter.kernels.gpu.compiled import record
from rewriter.kernels.gpu.targets import TARGETS
from triton.compiler.compiler import make_backend
from triton.runtime import cache as triton_cache

from rewriter.testing import Case

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "gpu-cache"
ARCHITECTURE = "sm90"
KEPT = (".cubin", ".json")
"""What of a compiled kernel a launch reads; the intermediate forms are nine tenths of the size."""

ALL = ("forward", "backward_query", "backward_key", "decode", "key_scores")


@dataclass(frozen=True)
class Manifest:
    """What a folder of compiled kernels was compiled with.

    Attributes:
        triton: release.
        sources: hash of Triton's key without its binary.
        key: Triton's key, the binary's hash included.
        backend: version of `ptxas` and architecture.
        kernels: how many compiled kernels the folder holds.
        commit: of this repository.
    """

    triton: str
    sources: str
    key: str
    backend: str
    kernels: int
    commit: str

    @classmethod
    def of_this_process(cls, kernels: int = 0) -> Manifest:
        key = triton_cache.triton_key()
        return cls(
            triton=triton.__version__,
            sources=hashlib.sha256(key.replace(_hash_of_binary(), "").encode()).hexdigest(),
            key=key,
            backend=make_backend(TARGETS[ARCHITECTURE].triton).hash(),
            kernels=kernels,
            commit=commit(),
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        path = folder / "manifest.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def differs(self, other: Manifest) -> str | None:
        """Why kernels compiled with this cannot be used by the other; None if they can."""
        for name in ("triton", "backend", "sources"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} of the cache: {ours[:40]}, here: {theirs[:40]}"
        return None


def _hash_of_binary() -> str:
    suffix = sysconfig.get_config_var("EXT_SUFFIX").split(".")[-1]
    return hashlib.sha256((Path(triton.__file__).parent / "_C" / f"libtriton.{suffix}").read_bytes()).hexdigest()


def commit() -> str:
    """The commit of the checkout, and a hash of what was changed since; from `build/gpu-cache` where there is no git."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    if head is None:
        manifest = Manifest.read(FOLDER)
        return manifest.commit if manifest else "unknown"
    # What is measured; results and documents may change.
    changed = git("diff", "HEAD", "--", "kernels", "passes", "rewriter", "export", "bench/*.py", "tests/rewriter")
    return head.strip() + ("+" + hashlib.sha256(changed.encode()).hexdigest()[:6] if changed else "")


def install(folder: Path, into: Path) -> dict[str, Any]:
    """Copies a folder of compiled kernels to where Triton will look, and says whether it can be used.

    Returns:
        "kernels": how many there are to be found, "reason": why none are, or None.
    """
    into.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.read(folder)
    if manifest is None:
        return {"kernels": 0, "reason": f"there is no {folder.name}; make gpu-cache makes it"}
    reason = manifest.differs(Manifest.of_this_process())
    if reason is not None:
        return {"kernels": 0, "reason": reason}
    shutil.copytree(folder / "kernels", into, dirs_exist_ok=True)
    for path in into.glob("*/__grp__*.json"):
        group = json.loads(path.read_text())
        # Newer releases of Triton take a group only where all its files are there.
        there = {name: str(path.parent / name) for name in group["child_paths"] if (path.parent / name).exists()}
        group["child_paths"] = there
        path.write_text(json.dumps(group))
    return {"kernels": manifest.kernels, "reason": None}


def use_key_of(folder: Path) -> None:
    """From here on this process looks for compiled kernels by the key that the folder was filled with, if it fits."""
    manifest = Manifest.read(folder)
    if manifest is not None and manifest.differs(Manifest.of_this_process()) is None:
        triton_cache.triton_key = lambda: manifest.key


def count_compilations() -> Counter[str]:
    """Counts from here on: "hits" and "misses" of Triton's cache in this process, and "seconds" compiling."""
    counts: Counter[str] = Counter()

    def listen(*, cache_hit: bool, times: Any, **rest: Any) -> None:
        counts["hits" if cache_hit else "misses"] += 1
        if not cache_hit:
            counts["seconds"] += times.total / 1e6

    triton.knobs.compilation.listener = listen
    return counts


def fill(cases: list[Case], folder: Path = FOLDER, processes: int | None = None) -> Manifest:
    """Compiles the kernels of some cases for sm_90 into a folder that `install` takes."""
    kernels = folder / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    workers = ProcessPoolExecutor(
        processes or os.cpu_count(),
        mp_context=get_context("spawn"),
        initializer=use_folder,
        initargs=(str(kernels),),
    )
    with workers as pool:
        for done, name in enumerate(pool.map(compile_case, cases), 1):
            print(f"{done} of {len(cases)}: {name}", flush=True)
    return finish(folder)


def finish(folder: Path) -> Manifest:
    """Leaves of a folder's compiled kernels what a launch reads, and writes down what they were compiled with."""
    kernels = folder / "kernels"
    used = {path.parent for path in kernels.glob("*/*.cubin")}
    for entry in kernels.iterdir():
        if entry not in used:
            shutil.rmtree(entry)
            continue
        for path in entry.iterdir():
            if path.suffix not in KEPT:
                path.unlink()
    manifest = Manifest.of_this_process(len(used))
    (folder / "manifest.json").write_text(json.dumps(manifest.__dict__, indent=1) + "\n")
    return manifest


def use_folder(folder: str) -> None:
    triton.knobs.cache.dir = folder


def compile_case(case: Case) -> str:
    for item in launches_of(case):
        compile_launch(item, ARCHITECTURE)
    return repr(case)


def launches_of(case: Case) -> Iterator[launch.Launch]:
    """What the operators launch on a case, forward and backward: those for few query rows where it has few."""
    dtype = case.torch_dtype
    tensors = {name: t.to("meta", dtype) for name, t in case.tensors().items()}
    live = case.live()
    options = {
        name: t.to("meta", dtype if t.is_floating_point() else t.dtype) if isinstance(t, torch.Tensor) else t
        for name, t in {**case.options(), **{n: t for n, t in tensors.items() if n in ("bias", "sinks")}}.items()
    }
    seen = set()
    for kernels in (ALL, ()):
        for item in record(
            ARCHITECTURE,
            kernels,
            *(tensors[name] for name in ("query", "key", "value")),
            type(live)(live.start.to("meta"), live.end.to("meta")),
            **options,
        ):
            key = (item.kernel.__name__, str([getattr(a, "dtype", a) for a in item.arguments]), str(item.constants))
            if key not in seen:
                seen.add(key)
                yield item


def main() -> None:
    from gpu_sections import cached_cases

    manifest = fill(cached_cases())
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{manifest.kernels} kernels for {ARCHITECTURE}, Triton {manifest.triton}, {size / 2**20:.1f} MiB: {FOLDER}")


if __name__ == "__main__":
    sys.exit(main())

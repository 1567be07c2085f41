"""Compiling the kernels for GPUs that are not there, and reading from the result what a table entry costs.

The launches of an operator are recorded on tensors without data and compiled by Triton as they would be on the device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.gpu.backward import backward
from rewriter.kernels.gpu.decode import decode
from rewriter.kernels.gpu.forward import forward
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.key_scores import key_scores
from rewriter.kernels.gpu.launch import Launch
from rewriter.kernels.gpu.launch import record_launches
from rewriter.kernels.gpu.loops import AMD
from rewriter.kernels.gpu.loops import NVIDIA
from rewriter.kernels.gpu.loops import Counts
from rewriter.kernels.gpu.loops import loops_of
from rewriter.kernels.gpu.running_topk import ends
from rewriter.kernels.gpu.schedule import SCHEDULE_KERNELS
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.gpu.targets import TARGETS
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MAX_SPILLED = 128
"""Bytes of registers that a thread may spill: 32 of its 255 registers. A tile with no spill at all can be too small: see
what was measured in `bench/README.md`."""


class CompiledToNothing(Exception):
    """What Triton 3.9 made of the keys' gradients for sm_100 at 32 x 128 x 256: a program that ends at once, without an error."""


INSTRUCTIONS = {
    "cp.async": r"cp\.async\.c[ag]",
    "mma": r"\bmma\.sync|\bv_mfma",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "atomic": r"\batom\.|\bred\.|atomic_",
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel became: registers of a thread, bytes spilled by a thread, bytes of shared memory, kinds of
    instructions and how often each occurs in the assembly text, and what each of its loops holds."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]
    loops: tuple[Counts, ...]


def launches(architecture: str, kernels: Collection[str], dtype: torch.dtype, head_dim: int) -> list[Launch]:
    """What the operators launch for an architecture with a bias per key, as a dynamic mask has: one launch of each kernel
    of the named entries of the launch table, and of the kernels without an entry if none is named."""
    meta = torch.device("meta")
    query = torch.empty(1, 8, 64, head_dim, dtype=dtype, device=meta)
    key = torch.empty(1, 2, 64, head_dim, dtype=dtype, device=meta)
    live, bias = LiveRanges.causal(64, device=meta), torch.empty(1, 2, 64, device=meta)
    recorded = record(architecture, kernels, query, key, key, live, bias=bias)
    shared = () if not kernels else SCHEDULE_KERNELS
    return [launch for launch in recorded if launch.kernel.__name__ not in shared]


def record(
    architecture: str,
    kernels: Collection[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    live: LiveRanges,
    **options: Any,
) -> list[Launch]:
    """What the operators launch on these inputs: the kernels of the named entries of the launch table, with those of their
    schedules, and the kernels without an entry if none is named.

    Args:
        architecture: one of `TARGETS`.
        kernels: "forward", "backward_query", "backward_key", "decode", "key_scores".
        query, key, value, live: as `live_range_attention` takes them, on device "meta".
        options: its optional arguments but `return_lse`.
    """
    meta = torch.device("meta")
    arguments = AttentionArguments(query, key, value, live.start, live.end, **options)

    def made(sort: bool) -> KernelInputs:
        return KernelInputs.make(arguments, sort=sort)

    lse = torch.empty(query.shape[:3], device=meta)
    with record_launches(architecture) as recorded:
        if "forward" in kernels:
            forward(made(True))
        if "backward_query" in kernels or "backward_key" in kernels:
            output = made(True).empty_output()
            backward(made(True), output, lse, output, lse)
        if "decode" in kernels:
            decode(made(False))
        if "key_scores" in kernels:
            key_scores(made(False), lse, "mean")
        if not kernels:
            build(live.start, live.end, made(True).query_index, 16, 16, 1)
            ends(torch.empty(1, 64, dtype=torch.int64, device=meta), 8)
    return recorded


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compiles one recorded launch; Triton's cache on disk then has what the launch would compile on that GPU.

    Raises:
        triton.CompilationError and others: the kernel does not compile for the architecture.
        CompiledToNothing: it does, to a program that stores nothing.
    """
    with standing_in(architecture):
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants)
    if re.search(r"^\s*unreachable\b", compiled.asm["llir"], re.MULTILINE):
        raise CompiledToNothing(
            f"{launch.kernel.__name__}, for {architecture}: the compiler took a part of it for unreachable, and it would leave "
            "what was in its outputs; take another entry of the launch table"
        )
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = _metadata(text, "vgpr_count"), _metadata(text, "vgpr_spill_count")
        loops = loops_of(text, AMD)
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _resource_usage(compiled.asm["cubin"])
        loops = loops_of(_printed_by("nvdisasm", "-c", compiled.asm["cubin"]), NVIDIA)
    counts = Counter({kind: len(re.findall(pattern, text)) for kind, pattern in INSTRUCTIONS.items()})
    return Compiled(launch.kernel.__name__, registers, spilled, compiled.metadata.shared, dict(+counts), tuple(loops))


@dataclass(frozen=True)
class _StandIn:
    """As much of Triton's driver as compiling asks for, for a GPU that need not be there."""

    architecture: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.architecture].triton

    def get_current_device(self) -> str:
        return self.architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def standing_in(architecture: str) -> Iterator[None]:
    """Inside, Triton takes a GPU of the architecture for the one that is there."""
    before = driver._active
    driver.set_active(_StandIn(architecture))
    try:
        yield
    finally:
        driver._active = before


def _metadata(assembly: str, name: str) -> int:
    """A number that AMD's assembler file states about the kernel."""
    match = re.search(rf"\.{name}:\s*(\d+)", assembly)
    assert match is not None, f"the assembly does not state its {name}"
    return int(match[1])


def _printed_by(tool: str, option: str, cubin: bytes) -> str:
    """What one of CUDA's tools, which Triton brings along, prints of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, which is where registers are spilled."""
    usage = _printed_by("cuobjdump", "-res-usage", cubin)
    registers = re.search(r"\bREG:(\d+)", usage)
    stack, local = re.search(r"\bSTACK:(\d+)", usage), re.search(r"\bLOCAL:(\d+)", usage)
    assert registers and stack and local, f"cuobjdump printed no resource usage: {usage}"
    return int(registers[1]), int(stack[1]) + int(local[1])

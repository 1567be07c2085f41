"""Compiling the kernels for GPUs that are not there, and reading from the result what a table entry costs.

The launches of an operator are recorded on small CPU tensors and compiled as they would be on the device: sizes of 1 are
constants, multiples of 16 and pointers are known to be aligned.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rewriter.kernels.gpu.arguments import Arguments
from rewriter.kernels.gpu.backward import backward
from rewriter.kernels.gpu.decode import decode
from rewriter.kernels.gpu.forward import forward
from rewriter.kernels.gpu.key_scores import key_scores
from rewriter.kernels.gpu.launch import Launch
from rewriter.kernels.gpu.launch import record_launches
from rewriter.kernels.gpu.running_topk import descend
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_MEMORY = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that a program can have."""

INSTRUCTIONS = {
    "cp.async": r"cp\.async\.c[ag]",
    "mma": r"\bmma\.sync|\bv_mfma",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "atomic": r"\batom\.|\bred\.|atomic_",
}

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel became: registers of a thread, bytes spilled by a thread, bytes of shared memory, kinds of
    instructions and how often each occurs in the assembly text."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]


def launches(architecture: str, kernels: Collection[str], dtype: torch.dtype, head_dim: int) -> list[Launch]:
    """What the operators launch for an architecture with a bias per key, as a dynamic mask has: one launch of each kernel
    of the named entries of the launch table, and of the kernels without an entry if none is named."""
    query = torch.empty(1, 8, 64, head_dim, dtype=dtype)
    key = torch.empty(1, 2, 64, head_dim, dtype=dtype)
    live = LiveRanges.causal(64)
    bias = torch.empty(1, 2, 64)
    arguments = Arguments.make(
        query, key, key, live.start, live.end, None, None, bias, None, None, None, None, sort=False
    )
    with record_launches(architecture) as recorded:
        if "forward" in kernels:
            forward(arguments)
        if "backward_query" in kernels or "backward_key" in kernels:
            output = arguments.empty_output()
            lse = torch.empty(query.shape[:3])
            backward(arguments, output, lse, output, lse)
        if "decode" in kernels:
            decode(arguments)
        if "key_scores" in kernels:
            key_scores(arguments, torch.empty(query.shape[:3]), "mean")
        if not kernels:
            build(live.start, live.end, arguments.query_index, 16, 16, 1)
            values = torch.zeros(1, 64, dtype=torch.int32)
            descend(
                values,
                torch.zeros(1, 65, dtype=torch.int32),
                torch.zeros(2, 1, 32, dtype=torch.int32),
                values,
                values,
                0,
            )
    shared = () if not kernels else ("_fill_lists",)
    return [launch for launch in recorded if launch.kernel.__name__ not in shared]


def compile_launch(launch: Launch, architecture: str) -> Compiled:
    """Compiles one recorded launch.

    Raises:
        triton.CompilationError and others: the kernel does not compile for the architecture.
    """
    source = _source(launch)
    options = {k: launch.constants[k] for k in ("num_warps", "num_stages") if k in launch.constants}
    compiled = triton.compile(source, target=TARGETS[architecture], options=options)
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = _metadata(text, "vgpr_count"), _metadata(text, "vgpr_spill_count")
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _resource_usage(compiled.asm["cubin"])
    counts = Counter({kind: len(re.findall(pattern, text)) for kind, pattern in INSTRUCTIONS.items()})
    return Compiled(launch.kernel.__name__, registers, spilled, compiled.metadata.shared, dict(+counts))


def _source(launch: Launch) -> Any:
    names = launch.kernel.arg_names
    values = {**dict(zip(names, launch.arguments, strict=False))}
    values.update({k: v for k, v in launch.constants.items() if k in names})
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(names):
        value = values[name]
        aligned = isinstance(value, Tensor)
        if name.isupper() or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _metadata(assembly: str, name: str) -> int:
    """A number that AMD's assembler file states about the kernel."""
    match = re.search(rf"\.{name}:\s*(\d+)", assembly)
    assert match is not None, f"the assembly does not state its {name}"
    return int(match[1])


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, which is where registers are spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers = re.search(r"\bREG:(\d+)", usage)
    stack, local = re.search(r"\bSTACK:(\d+)", usage), re.search(r"\bLOCAL:(\d+)", usage)
    assert registers and stack and local, f"cuobjdump printed no resource usage: {usage}"
    return int(registers[1]), int(stack[1]) + int(local[1])

"""The GPUs that the Triton kernels are compiled and tuned for: each one's facts, once.

A new one is an entry here and one in `launch_table.json` (`bench/tune.py --compile-only --architectures NAME` writes it).
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Target:
    """Attributes:
    triton: what Triton compiles for.
    shared_memory: bytes of shared memory that a program can have.
    capabilities: of NVIDIA's GPUs that take this target's entries of the launch table.
    matrix_unit: the instruction of 16-bit matrix products, by its name in `compiled.INSTRUCTIONS`.
    processors: streaming multiprocessors, or compute units, of its largest product.
    """

    triton: GPUTarget
    shared_memory: int
    capabilities: tuple[tuple[int, int], ...]
    matrix_unit: str
    processors: int


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, ((8, 0),), "mma", 108),
    "sm90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, ((9, 0),), "wgmma", 132),
    "sm100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, ((10, 0), (10, 3)), "tcgen05", 148),
    "sm120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, ((12, 0), (12, 1), (8, 6), (8, 9)), "mma", 188),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, (), "mma", 304),
}
"""By the name that the launch table has."""

SMALLEST = "gfx942"
"""Other GPUs (7.5, 8.7) take these tiles, made for 64 KiB of shared memory."""


def of_capability(capability: tuple[int, int]) -> str:
    """The target of a GPU of NVIDIA's."""
    return next((name for name, target in TARGETS.items() if capability in target.capabilities), SMALLEST)

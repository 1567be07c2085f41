"""The machine that `gpu_session.py` measures, and its clocks; in a rehearsal, stand-ins for them on a CPU.

A rehearsal runs the same code at tiny sizes on CPU tensors, with the Triton kernels in the interpreter
(`TRITON_INTERPRET=1`). Its times mean nothing; what it shows is that every section still runs.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile


@dataclass(frozen=True)
class KernelTimes:
    """What one call launched.

    Attributes:
        own: milliseconds of each of this project's Triton kernels, by name.
        other_ms: milliseconds of all other kernels together.
        other_launches: how many launches of other kernels.
        longest: names of the two kernels that took longest.
    """

    own: dict[str, float]
    other_ms: float
    other_launches: int
    longest: list[str]

    @property
    def total_ms(self) -> float:
        return sum(self.own.values()) + self.other_ms


@dataclass(frozen=True)
class Machine:
    """A GPU, or the CPU that stands in for one in a rehearsal. All times are milliseconds."""

    rehearsed: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsed else "cuda"

    @property
    def card(self) -> str:
        return "rehearsal" if self.rehearsed else torch.cuda.get_device_name()

    def synchronize(self) -> None:
        if not self.rehearsed:
            torch.cuda.synchronize()

    def graph_ms(self, call: Callable[[], Any]) -> float:
        """Median of replays of a CUDA graph: without what the CPU needs to launch kernels."""
        if self.rehearsed:
            return self.wall(call)["wall_ms"]
        return triton.testing.do_bench_cudagraph(call, rep=100, return_mode="median")

    def wall(self, call: Callable[[], Any], repeats: int = 10) -> dict[str, float]:
        """`wall_ms` of a call, and `cpu_ms`, the part of it after which the CPU was free again. Medians."""
        if self.rehearsed:
            repeats = 1
        else:
            for _ in range(3):
                call()
        cpu, wall = [], []
        for _ in range(repeats):
            self.synchronize()
            begin = time.perf_counter()
            call()
            cpu.append(time.perf_counter() - begin)
            self.synchronize()
            wall.append(time.perf_counter() - begin)
        return {"wall_ms": 1e3 * statistics.median(wall), "cpu_ms": 1e3 * statistics.median(cpu)}

    def kernels(self, call: Callable[[], Any], repeats: int = 5) -> KernelTimes:
        """Times of the kernels that a call launches, by torch's profiler."""
        if self.rehearsed:
            return _interpreted_kernels(call)
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        events = [e for e in profiled.key_averages() if e.device_time_total]
        times = {e.key: e.device_time_total / repeats / 1e3 for e in events}
        own = {name: ms for name, ms in times.items() if is_own(name)}
        others = [e for e in events if not is_own(e.key)]
        return KernelTimes(
            own,
            sum(times[e.key] for e in others),
            round(sum(e.count for e in others) / repeats),
            sorted(times, key=times.__getitem__, reverse=True)[:2],
        )

    def peak_mib(self, call: Callable[[], Any]) -> float:
        """Most memory of the device that a call takes beyond what was taken before, in MiB; 0 in a rehearsal."""
        if self.rehearsed:
            call()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def sdpa(self, variant: str) -> contextlib.AbstractContextManager[Any]:
        """Inside, `scaled_dot_product_attention` takes this kernel: "flash", "cudnn", or torch's own choice, "default"."""
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        if variant == "default" or self.rehearsed:
            return contextlib.nullcontext()
        return sdpa_kernel(backends[variant])

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.compile`, with static sizes; the function itself in a rehearsal, for there is no GPU to compile for."""
        return function if self.rehearsed else torch.compile(function, dynamic=False)


def is_own(kernel: str) -> bool:
    """Whether a kernel is one of this project's: their names begin with an underscore, other libraries' do not."""
    return kernel.startswith("_") and not kernel.startswith("_Z")


def _interpreted_kernels(call: Callable[[], Any]) -> KernelTimes:
    """Times of the kernels that a call runs in Triton's interpreter; torch's operators are not seen."""
    with _interpreter_clock() as (times, launches):
        call()
    return KernelTimes(dict(times), 0.0, 0, sorted(launches, key=times.__getitem__, reverse=True)[:2])


@contextlib.contextmanager
def _interpreter_clock() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Inside, milliseconds and launches of each interpreted kernel are counted, by name."""
    from triton.runtime.interpreter import GridExecutor

    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    original = GridExecutor.__call__

    def timed(self: Any, *arguments: Any, **constants: Any) -> Any:
        begin = time.perf_counter()
        result = original(self, *arguments, **constants)
        times[self.fn.__name__] += 1e3 * (time.perf_counter() - begin)  # type: ignore[assignment]
        launches[self.fn.__name__] += 1
        return result

    GridExecutor.__call__ = timed
    try:
        yield times, launches
    finally:
        GridExecutor.__call__ = original

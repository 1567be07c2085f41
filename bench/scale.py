"""Training on 8 to 10,000 GPUs at 1 to 16 sites: a simulation of step time, bytes and memory; nothing here is a measurement.

It adds up what a step of a dense transformer does, by the formulas of `docs/benchmarks.md`, with what was measured on one H200
(`bench/results/kernels-h200.json`: the matrix product, and attention of 32,768 tokens, forward and backward, under each mask) and
what was counted of keys that travel (`bench/results/context-parallel.json`). Networks are assumptions, printed with the results.

    python bench/scale.py --out bench/results/scale.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
LENGTH = 32_768
BATCH = 512
"""Rows of a step, 16.8 million tokens: more GPUs than rows share the tokens of each."""

NODE = 8
HEAD_DIM, MEASURED_HEADS = 128, 32
TWO_BYTES, FOUR_BYTES = 2, 4
OPTIMIZER_BYTES = 16
"""Of each parameter: itself and its gradient in 2 bytes each, and in 4 a copy and Adam's two moments."""


@dataclass(frozen=True)
class Model:
    """A dense transformer with grouped KV heads."""

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int


MODELS = (
    Model("1B", 1.2e9, 16, 2048, 16, 8),
    Model("8B", 8.0e9, 32, 4096, 32, 8),
    Model("70B", 70.6e9, 80, 8192, 64, 8),
    Model("405B", 405e9, 126, 16384, 128, 8),
)


@dataclass(frozen=True)
class Gpu:
    """What was measured on one card, and what is assumed of its network.

    Attributes:
        flops: of matrix products, per second.
        attention: of each mask the seconds of one layer of 32 heads for one row, forward and backward.
        keys_sent: of each mask the keys that travel in context parallelism, of a ring's.
        network: bytes per second of a node of eight GPUs to others of its site: eight links of 400 Gbit/s. What one of them gets
            from elsewhere it shares with the other seven, over faster links that are left out.
        memory: bytes.
    """

    flops: float
    attention: dict[str, tuple[float, float]]
    keys_sent: dict[str, float]
    network: float = 400e9
    memory: float = 141e9


@dataclass(frozen=True)
class Between:
    """Sites, and how their parameters are brought together.

    Attributes:
        sites: with as many GPUs each.
        bandwidth: bits per second of a site.
        round_trip: seconds.
        every: steps between two times that parameters are brought together; 1 is data parallelism.
        number_bytes: of each number that is sent.
        fragments: parts that are sent one after the other while training goes on (Streaming DiLoCo, arXiv 2501.18512).
    """

    sites: int = 1
    bandwidth: float = 10e9
    round_trip: float = 0.03
    every: int = 1
    number_bytes: float = FOUR_BYTES
    fragments: int = 1


MASKS = {
    "causal": ("causal", "causal"),
    "separators": ("separator", "separators, a tenth of the tokens, window of 256"),
    "a window": ("window", "window of 512, 4 sinks"),
    "best 1,024 keys": ("dynamic", "the best 1,024 keys of random scores"),
}
"""Of each mask its names where kernels were measured (a window of 256, separators of real text), and where keys were counted."""


def measured() -> Gpu:
    kernels = json.loads((RESULTS / "kernels-h200.json").read_text())
    counted = json.loads((RESULTS / "context-parallel.json").read_text())["counted"]
    rows = {row["mask"]: row for row in kernels["results"] if row["length"] == LENGTH}
    some = rows["dynamic"]
    attention = {"causal": (some["flash_causal_forward"] / 1e3, some["flash_causal_backward"] / 1e3)}
    for mask, (name, _) in MASKS.items():
        if mask != "causal":
            attention[mask] = tuple(_kernel_ms(rows[name][way]) / 1e3 for way in ("forward", "backward"))
    sent = {
        mask: next(row["of_ring"] for row in counted if row["mask"] == name and row["processes"] == 8)
        for mask, (_, name) in MASKS.items()
    }
    return Gpu(kernels["machine"]["matmul_tflops"] * 1e12, attention, sent)


def _kernel_ms(parts: dict[str, float]) -> float:
    """Of all kernels; the schedule's many small operations, which layers share, are counted once a layer all the same."""
    return sum(ms for part, ms in parts.items() if part != "kinds of kernels")


@dataclass(frozen=True)
class Step:
    """What one step takes, in seconds and bytes of one GPU.

    Attributes:
        compute: products with weights and attention; layers are computed again in the backward.
        inside: communication within the site that computing does not cover.
        between: the same between sites, in the mean over the steps of a round.
        efficiency: of the compute alone.
        inside_bytes, between_bytes: that a node gets from its site, and a site sends to others, in a step.
        memory: bytes of a GPU.
        fits: whether that is there.
    """

    compute: float
    inside: float
    between: float
    inside_bytes: float
    between_bytes: float
    memory: float
    fits: bool

    @property
    def seconds(self) -> float:
        return self.compute + self.inside + self.between

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def step(model: Model, gpus: int, mask: str, gpu: Gpu, between: Between) -> Step:
    """A step of `BATCH` rows over all GPUs: weights in pieces within a site, tokens of a row spread where GPUs outnumber rows."""
    of_site = gpus // between.sites
    context = max(1, gpus // BATCH)  # GPUs that share a row
    rows = BATCH / gpus  # of a GPU; less than one where it has a part
    times = max(1.0, rows)  # a GPU takes its rows one after the other, and all weights for each
    tokens = rows * LENGTH
    forward, backward = (
        seconds * model.layers * model.heads / MEASURED_HEADS * rows for seconds in gpu.attention[mask]
    )
    linear = 8 * model.parameters * tokens / gpu.flops
    compute = linear + 2 * forward + backward

    share = max(0.0, 1 - NODE / of_site)  # what is not in the same node
    weights = 3 * TWO_BYTES * model.parameters * share * times  # gathered forward and backward, gradients scattered
    ring = max(0.0, 1 - NODE / context) * LENGTH * 2 * model.kv_heads * HEAD_DIM * TWO_BYTES * model.layers
    keys = 4 * gpu.keys_sent[mask] * ring * times  # forward, again, backward, and gradients
    inside_bytes = weights + keys
    inside = max(0.0, inside_bytes / gpu.network - compute)

    ways = 2 * (between.sites - 1) / between.sites if between.sites > 1 else 0.0
    sent = ways * model.parameters * between.number_bytes
    fragment = (
        sent * 8 / between.bandwidth / between.fragments + (ways > 0) * 2 * (between.sites - 1) * between.round_trip
    )
    if between.every == 1:
        hidden = compute / 2  # gradients of the last layers are sent while those of the first are computed
        waited = max(0.0, fragment - hidden)
    elif between.fragments == 1:
        waited = fragment / between.every
    else:
        room = (compute + inside) * between.every / between.fragments
        waited = max(0.0, fragment - room) * between.fragments / between.every
    activations = model.layers * tokens / times * model.hidden * TWO_BYTES  # of each layer what comes in
    memory = OPTIMIZER_BYTES * model.parameters / of_site + activations
    if between.every > 1:
        memory += 2 * FOUR_BYTES * model.parameters / of_site  # the last round's parameters, and the outer momentum
    return Step(compute, inside, waited, inside_bytes, sent / between.every, memory, memory <= gpu.memory)


PLACES = {
    "one site": Between(),
    "2 sites, 10 ms, 100 Gbit/s, each step": Between(2, 100e9, 0.010),
    "2 sites, 30 ms, 10 Gbit/s, each step": Between(2, 10e9, 0.030),
    "2 sites, 30 ms, 10 Gbit/s, every 100, 4 fragments": Between(2, 10e9, 0.030, 100, TWO_BYTES, 4),
    "16 sites, 80 ms, 1 Gbit/s, every 100, 4 fragments": Between(16, 1e9, 0.080, 100, TWO_BYTES, 4),
    "16 sites, 80 ms, 1 Gbit/s, every 500, 4 fragments, 4 bits": Between(16, 1e9, 0.080, 500, 0.5, 4),
}
COUNTS = (8, 64, 512, 2048, 10240)


def needed_bandwidth(model: Model, gpus: int, gpu: Gpu, between: Between, efficiency: float) -> float:
    """Bits per second of a site for so much of one site's speed, by bisection; infinite where time on the way is too much."""
    low, high = 1e6, 1e15
    fields = asdict(between)

    alone = step(model, gpus, "causal", gpu, Between()).seconds

    def reached(bandwidth: float) -> bool:
        return (
            alone / step(model, gpus, "causal", gpu, Between(**{**fields, "bandwidth": bandwidth})).seconds
            >= efficiency
        )

    if not reached(high):
        return float("inf")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


DEEPLINK = {
    "each step": Between(2, round_trip=0.015),
    "every 100 steps, 4 fragments": Between(2, round_trip=0.015, every=100, number_bytes=TWO_BYTES, fragments=4),
}
"""Two centres 1,500 km apart, 7.5 ms of light in glass each way, with over 95 % of one cluster's compute: what its press releases
say of DeepLink; the bandwidth is not published."""


def simulate() -> dict[str, Any]:
    gpu = measured()
    rows = []
    for model in MODELS:
        for gpus in COUNTS:
            for place, between in PLACES.items():
                if gpus < 8 * between.sites:
                    continue
                for mask in MASKS:
                    found = step(model, gpus, mask, gpu, between)
                    own = {**asdict(found), "seconds": found.seconds, "efficiency": found.efficiency}
                    rows.append({"model": model.name, "gpus": gpus, "place": place, "mask": mask, **own})
    needed = []
    for model in MODELS:
        for how, between in DEEPLINK.items():
            bits = needed_bandwidth(model, 2048, gpu, between, 0.95)
            needed.append({"model": model.name, "how": how, "gbits": bits / 1e9})
    assumed = {"network": gpu.network, "memory": gpu.memory, "flops": gpu.flops, "length": LENGTH, "rows": BATCH}
    return {"assumed": assumed, "steps": rows, "deeplink": needed}


def main(out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("scale.json")) -> None:
    results = simulate()
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table(title="Efficiency (seconds of a step), causal", title_justify="left")
    for column in ("model", "sites", *(f"{gpus:,} GPUs" for gpus in COUNTS)):
        table.add_column(column, justify="left" if column in ("model", "sites") else "right")
    for model in MODELS:
        for place in PLACES:
            found = {
                r["gpus"]: r
                for r in results["steps"]
                if (r["model"], r["place"], r["mask"]) == (model.name, place, "causal")
            }
            cells = [
                f"{r['efficiency']:.0%} ({r['seconds']:.2f})" if (r := found.get(g)) and r["fits"] else "-"
                for g in COUNTS
            ]
            table.add_row(model.name, place, *cells)
    Console(width=160).print(table)
    for row in results["deeplink"]:
        print(f"{row['model']}, {row['how']}: 95 % over 1,500 km from {row['gbits']:.3g} Gbit/s on")


if __name__ == "__main__":
    typer.run(main)

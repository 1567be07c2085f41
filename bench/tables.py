"""Writes the tables of the documentation from the results of the benchmarks.

    python bench/tables.py            # writes them
    python bench/tables.py --check    # fails where a page and the results differ

A page says where a table goes, and which one:

    <!-- generated: attention-cpu -->
    <!-- end -->

What stands between the two lines is replaced. Nothing is measured here, and nothing but `bench/results/` is read.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

ZOO_TOLERANCE = 1e-5
"""Largest relative difference that counts as equal, as in `tests/zoo/examine.py`."""

TRAINED_ROWS = 6144
"""Tokens in a row of the bundled model's training: the unit of the stretches of `quality-streaming.json`."""

QUERY_HEADS = 8
"""Of `bench/attention.py`."""

Rows = list[dict[str, Any]]
Results = Callable[[str], Any]


def render(page: str, results: Path = RESULTS) -> str:
    """The page with each generated block made anew.

    Raises:
        KeyError: a block has a name that is not in `TABLES`.
    """

    def read(name: str) -> Any:
        return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))

    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]](read)}\n\n{block[4]}", page)


def pages() -> list[Path]:
    """The pages that hold generated blocks."""
    everything = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in everything if BLOCK.search(page.read_text(encoding="utf-8"))]


def differing(results: Path = RESULTS) -> list[Path]:
    """The pages that do not say what the results say."""
    return [page for page in pages() if render(text := page.read_text(encoding="utf-8"), results) != text]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], *, text_columns: int = 1) -> str:
    """A table; the first columns hold text, the others numbers, which stand on the right."""
    header = list(header)
    align = ["---" if i < text_columns else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


MASKS = {"dynamic": "dynamic mask", "separator": "separator mask, real text", "window": "sliding window 256"}


def attention_cpu_bf16(read: Results) -> str:
    """Forward and backward against dense attention, in bf16 all of them."""
    rows = []
    for name in MASKS:
        for r in (r for r in read("attention-cpu-bf16")["results"] if r["mask"] == name):
            speeds = ((r["dense_forward"], r["forward"]), (r["dense_backward"], r["backward"]))
            cells = (f"{dense / own:.1f}x ({dense / own / r['ideal']:.0%})" for dense, own in speeds)
            rows.append((_cpu_mask(name), f"{r['length']:,}", f"{r['ideal']:.1f}x", *cells))
    return markdown(("mask", "length", "ideal", "forward, of the ideal", "backward, of the ideal"), rows)


def attention_cpu(read: Results) -> str:
    header = ("mask", "length", "forward against dense, of the ideal", "forward against FlexAttention")
    header += ("backward against dense", "work ratio", "ranges, of all time")
    header += ("peak memory, forward and backward", "fp32 mask of S x S")
    rows = []
    for name in MASKS:
        for r in (r for r in read("attention-cpu")["results"] if r["mask"] == name):
            ideal = f"{r['ideal']:.0f}x" if r["ideal"] >= 100 else f"{r['ideal']:.1f}x"
            speedup = None if r["dense_forward"] is None else r["dense_forward"] / r["forward"]
            mask = 4 * QUERY_HEADS * r["length"] ** 2 / 2**20
            rows.append(
                (
                    _cpu_mask(name),
                    f"{r['length']:,}",
                    f"- of {ideal}" if speedup is None else f"{speedup:.1f}x of {ideal} ({speedup / r['ideal']:.0%})",
                    _times(r["against_flex"]),
                    _times(None if r["dense_backward"] is None else r["dense_backward"] / r["backward"]),
                    f"{r['work_ratio']:.2f}",
                    f"{r['ranges'] / (r['forward'] + r['backward']):.1%}",
                    f"{r['peak_memory']:.0f} MiB",
                    "-" if name != "dynamic" else f"{mask / 1024:.0f} GiB" if mask >= 4096 else f"{mask:,.0f} MiB",
                )
            )
    return markdown(header, rows)


def summary(read: Results) -> str:
    """Forward and backward against dense causal attention: the CPU kernel, and the whole operator on the GPU; a whole model."""
    lengths = (4096, 16384, 32768)
    cpu = {(r["mask"], r["length"]): r for r in read("attention-cpu")["results"]}
    gpu = {(r["mask"], r["length"]): r for r in read("kernels-h200")["results"]}
    rows = []
    for name in MASKS:
        own = [cpu[name, n] for n in lengths]
        cells = (f"{r['dense_forward'] / r['forward']:.1f}x, {r['dense_backward'] / r['backward']:.1f}x" for r in own)
        rows.append(("CPU", _cpu_mask(name), *cells))
    for name in MASKS:
        rows.append(("GPU", _gpu_mask(name), *(_operator(gpu.get((name, n))) for n in lengths)))
    real = read("real-model")
    assert real["length"] == lengths[0]
    prefill = {name: row["prefill"] for name, row in real["contestants"].items()}
    for name in (name for name in prefill if "(" in name):
        rows.append(("CPU, SmolLM2-135M", f"`{name}`", f"{prefill['original'] / prefill[name]:.2f}x", "-", "-"))
    return markdown(("", "mask", *(f"{n:,} tokens" for n in lengths)), rows, text_columns=2)


def _operator(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    forward = row["flash_causal_forward"] / row["eager_forward"]
    return f"{forward:.1f}x, {row['flash_causal_backward'] / row['eager_backward']:.1f}x"


def gpu_kernels(read: Results) -> str:
    header = ("mask", "length", "forward kernel, ms", "flash forward, ms", "backward kernels, ms", "flash backward, ms")
    header += ("operator forward, ms", "operator backward, ms", "ranges, ms")
    rows = []
    for r in sorted(read("kernels-h200")["results"], key=lambda r: list(MASKS).index(r["mask"])):
        forward = r["forward"]["forward"]
        backward = sum(r["backward"][name] for name in ("query_gradient", "list_gradients", "key_gradients"))
        flash = r["flash_causal_forward"], r["flash_causal_backward"]
        rows.append(
            (
                _gpu_mask(r["mask"]),
                f"{r['length']:,}",
                _against(forward, flash[0]),
                f"{flash[0]:.2f}",
                _against(backward, flash[1]),
                f"{flash[1]:.2f}",
                _against(r["eager_forward"], flash[0]),
                _against(r["eager_backward"], flash[1]),
                f"{r['eager_ranges']:.2f}",
            )
        )
    return markdown(header, rows)


def _against(own: float, other: float) -> str:
    return f"{own:.2f} ({other / own:.1f}x)"


def _cpu_mask(name: str) -> str:
    return MASKS[name] + {"dynamic": ", keep 512", "separator": ", window 256", "window": ""}[name]


def _gpu_mask(name: str) -> str:
    return MASKS[name] + {"dynamic": ", keep 1024", "separator": ", window 256", "window": ""}[name]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


def work_ratio(read: Results) -> str:
    header = ("mask", "length", "ideal speed-up", "work ratio, forward", "work ratio, backward: query; key and value")
    header += ("keys and values read, of what a dense causal kernel of the same tile reads",)
    rows = [
        (
            _gpu_mask(r["mask"]),
            f"{r['length']:,}",
            f"{r['ideal']:.1f}x",
            f"{r['work_ratio_forward']:.2f}",
            f"{r['work_ratio_query_gradient']:.2f}; {r['work_ratio_key_gradients']:.2f}",
            f"{r['key_bytes_against_flash']:.1%}",
        )
        for r in read("work-ratio")["schedules"]
        if r["mask"] in MASKS
    ]
    return markdown(header, rows)


def grouping(read: Results) -> str:
    header = ("length", "keys kept", "neighbours", "like lifetimes", "slots", "tiles between changes of a slot group")
    header += ("lists of segments (in use)",)
    names = ("neighbours", "like_lifetimes", "slots", "tiles_between_changes", "segments")
    rows = (
        (f"{r['length']:,}", f"{r['keep']:,}", *(f"{r[name]:.2f}" for name in names))
        for r in read("work-ratio")["grouping"]
    )
    return markdown(header, rows, text_columns=0)


def real_model(read: Results) -> str:
    """`bench/real_model.py`, as it prints it."""
    rows = read("real-model")["contestants"]
    original = rows["original"]
    header = ("", "prefill", "one more token", "memory of keys and values", "perplexity")
    header += ("first call, with a warm cache", "first generate, with a warm cache")
    return markdown(
        header,
        (
            (
                f"`{name}`" if "(" in name else name,
                f"{original['prefill'] / row['prefill']:.2f}x",
                f"{original['token'] / row['token']:.2f}x",
                f"{row['kept'] / original['kept']:.0%}",
                f"{row['perplexity']:.2f}",
                *(f"{row['cold'][what]:.0f} s, {row['warm'][what]:.0f} s" for what in ("prefill", "generate")),
            )
            for name, row in rows.items()
        ),
    )


def quality_real(read: Results) -> str:
    """`bench/quality_real.py`: bits per token by position, and how many more than the original's at the end."""
    result = read("quality-real")
    ends = [2**n for n in range(9, result["length"].bit_length()) if 2**n < result["length"]] + [result["length"]]
    header = ("", "pairs kept", *(f"to {end:,}" for end in ends), "the last part, of the original's")
    last = {row["text"]: row["bits"][-1] for row in result["rows"] if row["family"] == "original"}
    rows = []
    for row in result["rows"]:
        share = f"{row['share']:.1%}"
        if "reason" in row:
            rows.append((row["family"], share, *["-"] * (len(ends) + 1)))
            continue
        rise = row["bits"][-1] / last[row["text"]] - 1
        rows.append((row["family"], share, *(f"{bits:.3f}" for bits in row["bits"]), f"{rise:+.1%}"))
    return markdown(header, rows)


def crossover(read: Results) -> str:
    """Speed relative to torch's causal kernel, measured and predicted, of 8 query heads of 64."""
    result = read("crossover-cpu")
    rows = []
    for mode in ("forward", "training"):
        own = {(r["kernel"], r["mask"], r["length"]): r for r in result[mode] if r["heads"] == [8, 2, 64]}
        lengths = sorted({length for _, _, length in own})
        for kernel, mask in dict.fromkeys((k, m) for k, m, _ in own if k != "causal"):
            cells = []
            for length in lengths:
                point, base = own.get((kernel, mask, length)), own["causal", "causal", length]
                if point is None:
                    cells.append("-")
                    continue
                measured, predicted = (base[what] / point[what] for what in ("seconds", "predicted"))
                cells.append(f"{measured:.2f}x ({predicted:.2f}x)")
            name = "torch's kernel under a mask" if kernel == "masked" else mask
            rows.append((mode.replace("training", "forward and backward"), name, *cells))
    return markdown(("", "mask", *(f"{n:,}" for n in lengths)), rows, text_columns=2)


def never_slower(read: Results) -> str:
    """`bench/never_slower.py`: speed relative to the faster of the original and `torch.compile`."""
    seconds = read("never-slower")["seconds"]
    originals = ("original", "torch.compile")
    policies = [name for name in next(iter(seconds.values())) if name not in originals]
    rows = []
    for place, own in seconds.items():
        model, mode, batch, length = place.split()
        fastest = min(own[name] for name in originals if name in own)
        rows.append((model, mode, batch, f"{int(length):,}", *(f"{fastest / own[name]:.2f}x" for name in policies)))
    header = ("model", "mode", "rows", "tokens", *(f"`{name}`" if "(" in name else name for name in policies))
    return markdown(header, rows, text_columns=2)


def memory(read: Results) -> str:
    """`bench/memory.py`: MiB, and relative to the original's."""
    results = read("memory")["results"]
    base = results["original"]["peaks"]
    rows = []
    for name, own in results.items():
        cells = (
            f"{mebibytes:,.0f} MiB ({mebibytes / base[length]:.2f}x)" for length, mebibytes in own["peaks"].items()
        )
        rows.append((f"`{name}`" if "(" in name else name, f"{own['compiled']:.0f} MiB", *cells))
    return markdown(("", "held after compiling", *(f"{int(length):,}" for length in base)), rows)


def compile_rows(read: Results) -> str:
    rows = read("compile")["rows"]
    cells = ((row["name"], f"{row['three']:.1f} s", f"{row['one']:.1f} s") for row in rows)
    return markdown((f"{rows[0]['layers']} layers", "three rows", "then one row"), cells)


def compile_time(read: Results) -> str:
    rows = read("compile")["layers"]

    def passes(row: dict[str, Any]) -> float:
        return sum(seconds for name, seconds in row.items() if name not in ("layers", "sites", "dynamo"))

    first = passes(rows[0]) / rows[0]["layers"]
    header = ("layers", "capture", "all other passes", f"passes in all, of each layer, to {rows[0]['layers']} layers")
    return markdown(
        (*header, "Dynamo's trace"),
        (
            (
                str(r["layers"]),
                f"{r['capture']:.2f} s",
                f"{passes(r) - r['capture']:.2f} s",
                f"{passes(r) / r['layers'] / first:.2f}x",
                f"{r['dynamo']:.2f} s",
            )
            for r in rows
        ),
        text_columns=0,
    )


def generate(read: Results) -> str:
    rows = read("generate")["rows"]
    by = {(r["contestant"], r["length"]): r for r in rows}
    lengths = sorted({r["length"] for r in rows})
    beside = [n for n in lengths if ("original, DynamicCache", n) in by]
    against = "; ".join(f"{n:,}" for n in beside)
    header = ("cache", *(f"{n:,}" for n in lengths[1:]), f"against `DynamicCache` at {against}")
    table = []
    for name in dict.fromkeys(r["contestant"] for r in rows):
        own = {n: by[name, n] for n in lengths if (name, n) in by}
        seconds = {n: r["seconds_per_token"] for n, r in own.items()}
        first, last = own[lengths[0]], own[max(own)]
        original = name.startswith("original")
        beside_it = [f"{seconds[n] / by['original, DynamicCache', n]['seconds_per_token']:.2f}x" for n in beside]
        table.append(
            (
                "`DynamicCache`" if original else name if name.startswith("separator") else f"`{name}`",
                *(f"{seconds[n] / seconds[lengths[0]]:.2f}x" if n in own else "-" for n in lengths[1:]),
                "1" if original else "; ".join(beside_it),
                f"{_mib(first['cache_bytes'])}, {_mib(last['cache_bytes'])}",
            )
        )
    return markdown((*header, "memory of the cache, first and last"), table)


def _mib(count: float, digits: int = 1) -> str:
    return f"{count / 2**20:,.{digits}f} MiB"


def prefill(read: Results) -> str:
    letters = {"dense": "(a)", "one chunk at a time": "(b)", "8 chunks at once": "(c)"}
    header = ("chunks", "how", "time of (a)", "time of (b)", "pairs of (a)", "attention time of (a)", "peak memory")
    rows = read("prefill")["rows"]
    table = []
    for r in rows:
        own = [s for s in rows if s["chunks"] == r["chunks"]]
        whole = next(s for s in own if s["kind"] == "dense")
        serial = [s for s in own if s["kind"] == "one chunk at a time" and s["evict"] == r["evict"]]
        table.append(
            (
                str(r["chunks"]),
                letters[r["kind"]] + (", 256 keys of each chunk" if r["evict"] else ""),
                f"{r['seconds'] / whole['seconds']:.2f}",
                "-" if r["kind"] == "dense" else f"{r['seconds'] / serial[0]['seconds']:.2f}",
                f"1/{whole['pairs'] / r['pairs']:.1f}",
                f"1/{whole['attention_seconds'] / r['attention_seconds']:.1f}",
                _mib(r["peak_bytes"], 0),
                f"{r['kept_keys']:,}",
                f"{r['seconds_per_token'] / whole['seconds_per_token']:.2f}",
            )
        )
    return markdown((*header, "kept keys", "one more token, of (a)"), table, text_columns=2)


def export(read: Results) -> str:
    header = ("model, policy", "package, ONNX file", "loading, s", "off the model, relative")
    header += ("prefill of the package, of eager; of `torch.compile`", "one token, the same")
    table = []
    for r in read("export")["rows"]:
        best = r["prefill_and_token_seconds"]
        ratios = [[best["package"][i] / best[who][i] for who in ("eager", "torch.compile")] for i in (0, 1)]
        table.append(
            (
                f"{r['model']}, `{r['policy']}`",
                ", ".join(map(_mib, r["bytes"])),
                ", ".join(f"{s:.2f}" for s in r["load_seconds"]),
                ", ".join(f"{d:.0e}" for d in r["relative_difference"]),
                *("; ".join(f"{ratio:.2f}x" for ratio in pair) for pair in ratios),
                f"{r['onnx_forward_seconds'] / best['eager'][0]:.2f}x",
            )
        )
    return markdown((*header, "ONNX forward, of the eager prefill"), table)


def engines(read: Results) -> str:
    header = (
        "model, policy",
        "engine of",
        "layers",
        "size",
        "activation memory",
        "parsed and built in",
        "off the model, relative: ONNX Runtime, OpenVINO",
    )
    table = []
    for name, row in read("engines")["models"].items():
        policy = f"{name}, `{row['policy']}`"
        if "refused" in row:
            table.append((policy, row["refused"], *[""] * 5))
            continue
        other = row["openvino"] if isinstance(row["openvino"], str) else f"{row['openvino']:.0e}"
        for point, engine in row["engines"].items():
            table.append(
                (
                    policy,
                    f"`{point}`",
                    f"{engine['layers']:,}",
                    _mib(engine["num_bytes"]),
                    _mib(engine["activation_bytes"]),
                    f"{engine['build_seconds']:.1f} s",
                    f"{row['relative']:.0e}, {other}",
                )
            )
    return markdown(header, table)


def engine_memory(read: Results) -> str:
    rows = read("engines")["memory"]
    table = [("activation memory", *(_mib(r["engines"]["forward"]["activation_bytes"]) for r in rows.values()))]
    return markdown(("most tokens, of one row", *(f"{int(most):,}" for most in rows)), table)


DYNAMIC = {
    "full attention": "full attention",
    "sliding window": "sliding window {}",
    "dynamic mask": "`DynamicMask({})`",
    "dynamic mask, half of it local": "`DynamicMask({half}, local={half})`",
}


def _dynamic(name: str, keep: int) -> str:
    return DYNAMIC[name].format(keep, half=keep // 2)


def recall(read: Results) -> str:
    stored = read("quality-dynamic-mask")
    seeds, results = stored["recall"]["seeds"], stored["results"]
    rows = (
        (
            _dynamic(name, stored["recall"]["keep"]),
            *(f"{100 * results[f'recall/{name}/seed {seed}']['accuracy']:.1f} %" for seed in seeds),
        )
        for name in DYNAMIC
    )
    return markdown(("", *(f"seed {seed}" for seed in seeds)), rows)


def text_quality(read: Results) -> str:
    stored = read("quality-dynamic-mask")
    lengths = stored["text"]["read_in"]
    rows = []
    for name in DYNAMIC:
        run = stored["results"][f"text/{name}"]
        cells = (f"{run['before'][str(n)]:.3f} -> {run['after'][str(n)]:.3f}" for n in lengths)
        rows.append((_dynamic(name, stored["text"]["keep"]), *cells))
    return markdown(("", *(f"{n:,}" for n in lengths)), rows)


def first_bias(read: Results) -> str:
    stored = read("quality-dynamic-mask")
    context = stored["text"]["context"]
    rows = (
        (f"{a:g}", f"{stored['results'][f'text/first A {a:g}']['before'][str(context)]:.3f}")
        for a in stored["text"]["first_rates"]
    )
    return markdown(("A", f"bits per byte, rows of {context:,}"), rows)


def streaming(read: Results) -> str:
    names = {
        "full attention": "full attention, all keys",
        "StreamingLLM": "StreamingLLM: 4 first keys, a window of 508",
        "separator cache": "separator cache: 4 first keys, 64 separators, a window of 224, at most 512",
    }
    ends = [0, *(times * TRAINED_ROWS for times in (1, 4, 16, 64))]
    stretches = list(itertools.pairwise(ends))
    rows = []
    for name, label in names.items():
        parts = read("quality-streaming")[name]["parts"]
        cells = []
        for begin, end in stretches:
            own = [p for p in parts if begin < p["end"] <= end]
            cells.append(f"{sum(p['bits'] for p in own) / sum(p['bytes'] for p in own):.3f}")
        rows.append((label, *cells))
    header = (f"{begin // TRAINED_ROWS}x to {end // TRAINED_ROWS}x" for begin, end in stretches)
    return markdown(("cache", *header), rows)


CHUNKED = {
    "middle cut out": "the middle cut out",
    "dense": "dense, all of it",
    "window with sinks": "4 first keys and a window of 444 to 504, positions are places",
    "chunked": "chunks, all their keys",
    "chunked, evicting": "chunks, 128 keys of each head",
    "chunked, calibrated": "chunks, `MIXED_CALIBRATION`",
    "chunked, evicting, calibrated": "chunks, 128 keys, `MIXED_CALIBRATION`",
    "chunked, one chunk kept": "one chunk kept",
}


def retrieval(read: Results) -> str:
    results = read("quality-chunked")
    times = sorted({r["times"] for r in results})
    tasks = list(dict.fromkeys(r["task"] for r in results))
    by = {(r["task"], r["contestant"], r["times"]): r["samples"] for r in results}
    lengths = "; ".join(f"{t}x" for t in times)
    rows = (
        (label, *("; ".join(_right(by[task, name, t]) for t in times) for task in tasks))
        for name, label in CHUNKED.items()
    )
    return markdown(("right answers, %, at times the trained length", *(f"{task}: {lengths}" for task in tasks)), rows)


def retrieval_by_depth(read: Results) -> str:
    results, quarters = read("quality-chunked"), range(4)
    tasks = list(dict.fromkeys(r["task"] for r in results))
    rows = []
    for name, label in CHUNKED.items():
        cells = []
        for task in tasks:
            own = (r["samples"] for r in results if (r["task"], r["contestant"]) == (task, name) and r["times"] > 1)
            samples = [s for run in own for s in run]
            cells.append("; ".join(_right([s for s in samples if int(4 * s["depth"]) == q]) for q in quarters))
        rows.append((label, *cells))
    return markdown(("right answers, %, by quarter of the context", *tasks), rows)


def _right(samples: Rows) -> str:
    return f"{sum(s['right'] for s in samples) / len(samples):.0%}".removesuffix("%")


def soundness(read: Results) -> str:
    """Why the random masks that are not proven were refused; figures in a reason were cut off when it was counted."""
    stored = read("soundness")
    counts: dict[str, int] = {}
    for reason, count in stored["refused"].items():
        plain = re.sub(r"the values -[-.+e]*$", "values that are not those of a mask", reason)
        plain = re.sub(r"a mask of -[-.+e]*$", "a mask whose hidden value is finite", plain)
        counts[plain] = counts.get(plain, 0) + count
    rows = [("**proven**", f"**{stored['proven']:,}**")]
    rows += [("of them verified by a solver for all sizes", f"{stored['verified']:,}")]
    rows += [
        ("one range of queries for each key at all sizes that were tried, proven or not", f"{stored['one_interval']:,}")
    ]
    share = f"{stored['one_interval_proven']:,} ({stored['one_interval_proven'] / stored['one_interval']:.0%})"
    rows += [("proven of these", share)]
    if "found" in stored:
        rows += [("not proven, but computed: whether they are ranges is found at the call", f"{stored['found']:,}")]
    rows += [(f"refused: {reason}", f"{count:,}") for reason, count in sorted(counts.items(), key=lambda c: -c[1])]
    rows += [("proven, and wrong at a size that nothing had seen", f"{len(stored['wrong']):,}")]
    rows += [("proven, and refused by the check by evaluation", f"{len(stored['caught']):,}")]
    return markdown((f"of {stored['count']:,} random masks", "masks"), rows)


def given_masks(read: Results) -> str:
    """`given_masks.py`."""
    rows = []
    for row in read("given-masks")["rows"]:
        own = row["seconds"]["rewriter"]
        speeds = (f"{row['seconds'][name] / own:.2f}x" for name in ("original", "compiled"))
        rows.append((f"{row['length']:,}", row["mask"], row["form"], *speeds))
    return markdown(("tokens", "mask", "given as", "of the original", "of `torch.compile`"), rows)


def context_parallel_counted(read: Results) -> str:
    """`context_parallel.py`, without processes."""
    rows = read("context-parallel")["counted"]
    sizes = sorted({row["processes"] for row in rows})
    table = []
    for mask in dict.fromkeys(row["mask"] for row in rows):
        own = {row["processes"]: row for row in rows if row["mask"] == mask}
        cells = [f"{own[size]['of_ring']:.1%}, {own[size]['busiest']:.2f}" for size in sizes]
        table.append((mask, *cells))
    return markdown(("mask", *(f"{size} processes: keys sent, busiest" for size in sizes)), table)


def scale(read: Results) -> str:
    """`scale.py`: of one site's speed, at the causal mask, by sites."""
    rows = {(r["model"], r["gpus"], r["place"]): r for r in read("scale")["steps"] if r["mask"] == "causal"}
    counts = [512, 2048, 10240]
    header = (
        "sites, round trip, link of a site, parameters brought together",
        "model",
        *(f"{n:,} GPUs" for n in counts),
    )
    lines = []
    for place in dict.fromkeys(place for *_, place in rows):
        for model in ("1B", "8B", "70B", "405B"):
            alone = [rows[model, n, "one site"] for n in counts]
            found = [rows.get((model, n, place)) for n in counts]
            cells = [
                f"{a['seconds'] / f['seconds']:.0%} of {a['seconds']:.2f} s" if f and f["fits"] else "-"
                for a, f in zip(alone, found, strict=True)
            ]
            lines.append((place, model, *cells))
    return markdown(header, lines, text_columns=2)


def scale_masks(read: Results) -> str:
    """`scale.py`: steps under each mask at one site, of the causal one's, and keys that nodes exchange."""
    rows = {(r["model"], r["gpus"], r["mask"]): r for r in read("scale")["steps"] if r["place"] == "one site"}
    masks = list(dict.fromkeys(mask for *_, mask in rows))
    header = ("model", "GPUs", *(f"{mask}: step; GB for a node" for mask in masks))
    lines = []
    for model in ("1B", "8B", "70B", "405B"):
        for n in (2048, 10240):
            causal = rows[model, n, "causal"]["seconds"]
            found = [rows[model, n, mask] for mask in masks]
            lines.append(
                (model, f"{n:,}", *(f"{causal / r['seconds']:.2f}x; {r['inside_bytes'] / 1e9:,.0f}" for r in found))
            )
    return markdown(header, lines)


def scale_deeplink(read: Results) -> str:
    """`scale.py`: links for two sites 1,500 km apart."""
    rows = read("scale")["deeplink"]
    ways = list(dict.fromkeys(row["how"] for row in rows))
    found = {(row["model"], row["how"]): row["gbits"] for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ((model, *(f"{found[model, how]:.3g} Gbit/s" for how in ways)) for model in models)
    return markdown(("model", *(f"parameters brought together {how}" for how in ways)), lines)


def context_parallel(read: Results) -> str:
    """`context_parallel.py`, over two processes."""
    rows = []
    for row in read("context-parallel")["measured"]:
        speed = row["seconds"]["alone"] / row["seconds"]["spread"]
        rows.append((row["policy"], f"{row['length']:,}", f"{speed:.2f}x", f"{row['sent'] / row['counted']:.3f}"))
    return markdown(("policy", "tokens", "speed of two", "bytes sent, of those counted"), rows)


def proofs(read: Results) -> str:
    """`tests/soundness/proofs.py`."""
    rows = []
    for name, result in read("proofs").items():
        sites, seconds = result["sites"], result["seconds"]
        counts = (f"{sites.get(kind, 0):,}" for kind in ("verified", "evaluated", "refused"))
        times = (f"{1000 * seconds[key]:.0f} ms" for key in ("median", "percentile_99"))
        rows.append((name, *counts, f"{seconds['questions']:,}", *times))
    header = ("masks of", "verified for all sizes", "evaluated only", "refused", "questions asked", "median", "99 %")
    return markdown(header, rows)


def zoo(read: Results) -> str:
    """One line for each architecture; implementations of which the same is found stand together."""
    header = ("architecture", "attention", "sites", "masks proven, of a padded call", "`Exact()`", "`SeparatorMask`")
    by_name: dict[str, Rows] = {}
    for row in read("zoo"):
        by_name.setdefault(row["name"], []).append(row)
    table = []
    for name, own in by_name.items():
        compiled = own[0]["inductor"]  # in one of the implementations
        cells = [_zoo_cells(row, compiled) for row in own]
        if any(c != cells[0] for c in cells):
            table.extend([name, row["attention"], *c] for row, c in zip(own, cells, strict=True))
        else:
            table.append([name, ", ".join(row["attention"] for row in own), *cells[0]])
    return markdown((*header, "its cache", "`DynamicCache`", "packed"), table, text_columns=9)


def _zoo_cells(row: dict[str, Any], compiled: float | None) -> list[str]:
    if row["error"]:
        return ["-", f"an error: {row['error']}", *["-"] * 5]
    refused = "; ".join(dict.fromkeys(map(_shortened, row["refused"].values())))
    count = sum(len(sites) for sites in row["masks"].values())
    return [
        f"{count} of {count + len(row['refused'])}",
        "; ".join([*row["masks"], *([f"refused: {refused}"] if refused else [])]),
        _equal(row["exact"].values()) + ("" if compiled is None else f"; compiled: {_outcome(compiled)}"),
        _equal(row["policy"].values()),
        *(_outcome(row[name]) for name in ("cache", "dynamic_cache", "packed")),
    ]


def _shortened(reason: str) -> str:
    """A reason without its places and figures."""
    return re.sub(r" \([^()]*\)", "", reason)


def _outcome(outcome: float | str | None) -> str:
    if isinstance(outcome, str):
        return f"refused: {_shortened(outcome.split('cannot go on from a cache: ')[-1])}"
    return _equal([] if outcome is None else [outcome])


def _equal(differences: Iterable[float]) -> str:
    worst = max(differences, default=None)
    if worst is None:
        return "-"
    return "equal" if worst <= ZOO_TOLERANCE else f"differs by {worst:.0e}"


TABLES: dict[str, Callable[[Results], str]] = {
    "summary": summary,
    "attention-cpu": attention_cpu,
    "attention-cpu-bf16": attention_cpu_bf16,
    "gpu-kernels": gpu_kernels,
    "work-ratio": work_ratio,
    "grouping": grouping,
    "real-model": real_model,
    "quality-real": quality_real,
    "crossover": crossover,
    "never-slower": never_slower,
    "memory": memory,
    "compile-rows": compile_rows,
    "compile-time": compile_time,
    "generate": generate,
    "prefill": prefill,
    "export": export,
    "engines": engines,
    "engine-memory": engine_memory,
    "recall": recall,
    "text-quality": text_quality,
    "first-bias": first_bias,
    "streaming": streaming,
    "retrieval": retrieval,
    "retrieval-by-depth": retrieval_by_depth,
    "soundness": soundness,
    "scale": scale,
    "scale-masks": scale_masks,
    "scale-deeplink": scale_deeplink,
    "context-parallel": context_parallel,
    "context-parallel-counted": context_parallel_counted,
    "given-masks": given_masks,
    "proofs": proofs,
    "zoo": zoo,
}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where a page differs.")] = False,
) -> None:
    """Write the generated tables of the documentation."""
    changed = differing()
    for page in changed:
        name = page.relative_to(ROOT)
        if check:
            typer.echo(f"{name} does not agree with bench/results; run: python bench/tables.py")
        else:
            page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
            typer.echo(f"written: {name}")
    if check and changed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

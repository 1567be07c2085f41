"""What does a model lose when its cache holds 512 keys of a text that is up to 64 times as long as its training rows?

The bundled small model (rows of up to 6,144 tokens) reads one stream of source code that it has never seen: the held-out
modules of the standard library, then torch's own. Full attention with positions in the text; StreamingLLM (arXiv
2309.17453), the first keys and a window; the separator cache (arXiv 2412.12094, section 4). The last two number keys by
their place in the cache and have the same capacity. Bits per byte in each part of the stream, from a length to the next.

    python bench/quality_streaming.py --out bench/results/quality-streaming.json

What is in `--out` already is not run again. Full attention at 64 times the length takes about two hours of one core; stopped,
it goes on from its last block of queries.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rewriter
from rewriter import SeparatorMask
from rewriter.demo.corpus import held_out_files
from rewriter.demo.models import load_bundled

TRAINED = 6144
TIMES = (1, 4, 16, 64)
CAPACITY, INITIAL, SEPARATORS, WINDOW = 512, 4, 64, 224
PARTS = 8  # of the stream between a length and the next, for the plot
BLOCK = 16_384  # queries of full attention at once
BLOCKS = {"StreamingLLM": 16, "separator cache": 256}


def stream_ids(tokenizer: Any) -> Tensor:
    """int64 `[64 * TRAINED]`."""
    paths = [*held_out_files(), *sorted(Path(torch.__file__).parent.joinpath("nn").rglob("*.py"))]
    paths += sorted(Path(torch.__file__).parent.joinpath("distributed").rglob("*.py"))
    ids: list[int] = []
    for path in paths:
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
        if len(ids) >= TIMES[-1] * TRAINED:
            return torch.tensor(ids[: TIMES[-1] * TRAINED])
    raise RuntimeError(f"only {len(ids)} tokens of source code")


def token_bytes(tokenizer: Any, ids: Tensor) -> Tensor:
    """Bytes of each token: a byte-level vocabulary writes each byte as one character."""
    special = set(tokenizer.all_special_ids)
    size = [0 if i in special else len(t) for i, t in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))]
    return torch.tensor(size)[ids]


@torch.no_grad()
def full_attention(model: Any, ids: Tensor, progress: Path) -> Tensor:
    """log p of each token but the first, all keys seen.

    One layer takes half an hour of a core at 64 times the length: each block of queries is kept in the folder `progress`, and a
    run that was stopped goes on from there.
    """

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        blocks = []
        key, value = (t.repeat_interleave(query.size(1) // t.size(1), dim=1) for t in (key, value))
        for begin in range(0, query.size(2), BLOCK):
            file = progress / f"{len(ids)}-{module.layer_idx}-{begin}.pt"
            if not file.exists():
                end = begin + BLOCK
                torch.save(_causal_rows(query[:, :, begin:end], key[:, :, :end], value[:, :, :end]), file)
                print(f"full attention: layer {module.layer_idx}, {min(end, query.size(2)):,} tokens", flush=True)
            blocks.append(torch.load(file))
        return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("in blocks", attention)
    progress.mkdir(exist_ok=True)
    model.set_attn_implementation("in blocks")
    hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    parts = [
        model.lm_head(h).log_softmax(-1).gather(1, t[:, None])[:, 0]
        for h, t in zip(hidden.split(4096), ids[1:].split(4096), strict=True)
    ]
    shutil.rmtree(progress)
    return torch.cat(parts)


def _causal_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last rows of a causal attention: all keys before them, and their own, joined by their log-sum-exp."""
    before = key.size(2) - query.size(2)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_lse = flash(query, key[:, :, before:], value[:, :, before:], 0.0, True)
    if not before:
        return own
    earlier, earlier_lse = flash(query, key[:, :, :before], value[:, :, :before], 0.0, False)
    return torch.lerp(earlier, own, torch.sigmoid(own_lse - earlier_lse)[..., None])


def policy(name: str, tokenizer: Any) -> SeparatorMask:
    if name == "StreamingLLM":
        separators, window = 0, CAPACITY - INITIAL
    else:
        separators, window = SEPARATORS, WINDOW
    return SeparatorMask.from_tokenizer(
        tokenizer, initial=INITIAL, window=window, max_separators=separators, capacity=CAPACITY, positions="cache"
    )


def borders(times: int) -> list[int]:
    """Where the parts of the stream up to `times` training lengths end, the last ones between it and the length before."""
    before = [0, *(t for t in TIMES if t < times)][-1] * TRAINED
    step = (times * TRAINED - before) // PARTS
    return [before + step * (i + 1) for i in range(PARTS)]


def binned(log_p: Tensor, num_bytes: Tensor) -> list[dict[str, float]]:
    """Bits per byte of each part."""
    rows, begin = [], 0
    for times in TIMES:
        for end in borders(times):
            if end - 1 <= len(log_p):
                own = slice(begin, end - 1)
                bits = -log_p[own].double().sum().item() / math.log(2)
                rows.append({"end": end, "bits": bits, "bytes": int(num_bytes[1:][own].sum())})
                begin = end - 1
    return rows


def between(rows: list[dict[str, float]], times: int) -> float | None:
    """Bits per byte in the stretch that ends at `times` training lengths; None where it was not run."""
    ends = set(borders(times))
    own = [row for row in rows if row["end"] in ends]
    return sum(r["bits"] for r in own) / sum(r["bytes"] for r in own) if len(own) == len(ends) else None


def run(name: str, ids: Tensor, num_bytes: Tensor, longest: int, progress: Path) -> dict[str, Any]:
    model, tokenizer = load_bundled()
    ids = ids[: longest * TRAINED]
    begin = time.perf_counter()
    if name == "full attention":
        log_p, keys = full_attention(model, ids, progress), float(len(ids)) / 2
    else:
        log_p = torch.tensor(list(rewriter.stream(model, policy(name, tokenizer), ids, block=BLOCKS[name])))
        keys = float(CAPACITY)
    return {"seconds": time.perf_counter() - begin, "keys": keys, "parts": binned(log_p, num_bytes)}


def main(
    out: Annotated[Path, typer.Option(help="File of the results; what it has is not run again.")],
    only: Annotated[str | None, typer.Option(help="One of the three.")] = None,
    longest: Annotated[int, typer.Option(help="Stop at so many training lengths.")] = TIMES[-1],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    _, tokenizer = load_bundled()
    ids = stream_ids(tokenizer)
    num_bytes = token_bytes(tokenizer, ids)
    for name in ("full attention", *BLOCKS):
        results = json.loads(out.read_text()) if out.exists() else {}
        if only in (None, name) and len(results.get(name, {}).get("parts", [])) < PARTS * len(
            [t for t in TIMES if t <= longest]
        ):
            result = run(name, ids, num_bytes, longest, out.with_suffix(".progress"))
            results = json.loads(out.read_text()) if out.exists() else {}
            results[name] = result
            out.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(out.read_text())
    table = Table(title="Bits per byte in each stretch of one stream", title_justify="left")
    stretches = [f"{0 if i == 0 else TIMES[i - 1]}x to {t}x" for i, t in enumerate(TIMES)]
    for column in ("", "keys in the cache, at most", *stretches):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        values = [between(result["parts"], t) for t in TIMES]
        kept = "all" if name == "full attention" else f"{CAPACITY + 1}"
        table.add_row(name, kept, *("-" if v is None else f"{v:.3f}" for v in values))
    Console(width=120).print(table)
    draw(results, out.with_suffix(".png"))


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, result in results.items():
        parts = result["parts"]
        axes.plot([p["end"] / TRAINED for p in parts], [p["bits"] / p["bytes"] for p in parts], marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("place in the stream, in rows of the training length (6,144 tokens)")
    axes.set_ylabel("bits per byte of the part up to there")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)

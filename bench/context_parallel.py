"""Context parallelism: how many keys travel, how even is the work, and what is gained?

Counted from live ranges of 32,768 tokens: the keys that processes send, of those that a ring moves under a causal mask (each
process sees all keys of the others, forward; gradients come back over the same ways), and the pairs of query and key of the
busiest process, of the mean. Measured: two processes of one thread each against one of one thread, forward and backward of a
Llama of four layers in turns, and the bytes that they sent, of the bytes counted.

    python bench/context_parallel.py --out bench/results/context-parallel.json
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import torch.multiprocessing
import transformers
import typer
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.context_parallel import needed_keys
from rewriter.kernels.context_parallel import share_tokens
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter

COUNTED_LENGTH = 32_768
GROUPS = (2, 8, 64)
POLICIES: dict[str, rewriter.Policy] = {
    "Exact()": rewriter.Exact(),
    "SlidingWindow(512, sinks=4)": rewriter.SlidingWindow(512, sinks=4),
    "SeparatorMask, a tenth of the tokens, window=256": rewriter.SeparatorMask(tuple(range(0, 4096, 10)), window=256),
}


def ranges(length: int) -> dict[str, LiveRanges]:
    """Of eight KV heads where they differ."""
    generator = torch.Generator().manual_seed(0)
    causal = LiveRanges.causal(length)
    is_separator = torch.rand(length, generator=generator) < 0.1
    window = LiveRanges.sliding_window(length, 256)
    separators = torch.where(is_separator | (torch.arange(length) < 4), causal.end, window.end)
    scores = torch.randn(1, 8, length, generator=generator)
    document = torch.arange(length) // (length // 8)
    ends = ((document + 1) * (length // 8)).to(torch.int32).expand_as(causal.start)
    return {
        "causal": causal,
        "8 documents": LiveRanges(causal.start, ends),
        "window of 512, 4 sinks": LiveRanges.sliding_window(length, 512, sinks=4),
        "separators, a tenth of the tokens, window of 256": LiveRanges(causal.start, separators),
        "the best 512 keys of random scores": running_topk_ranges(scores, 512),
        "the best 1,024 keys of random scores": running_topk_ranges(scores, 1024),
    }


def counted(live: LiveRanges, size: int) -> dict[str, float]:
    length = live.start.size(2)
    known = [live.start], [live.end]
    tokens = share_tokens(*known, length, size, torch.device("cpu"))
    needed = needed_keys(live.start, live.end, tokens)
    is_own = torch.zeros(size, length, dtype=torch.bool).scatter_(1, tokens, True)
    travels = (needed & ~is_own[:, None, None]).sum(dim=3).double().mean() * size
    row = torch.zeros(length + 1)
    begins, ends = (
        bound.flatten(0, 1).clamp(0, length).long() for bound in torch.broadcast_tensors(live.start, live.end)
    )
    alive = (begins < ends).float()
    row.index_add_(0, begins.flatten(), alive.flatten()).index_add_(0, ends.flatten(), -alive.flatten())
    pairs = row.cumsum(0)[:-1][tokens].sum(dim=1)
    return {"of_ring": float(travels) / ((size - 1) * length), "busiest": float(pairs.max() / pairs.mean())}


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return transformers.LlamaForCausalLM(config)


def step(call: Any, ids: Tensor) -> None:
    call(input_ids=ids, labels=ids).loss.backward()
    for parameter in call.parameters():
        parameter.grad = None


def measure(rank: int, folder: str, lengths: tuple[int, ...], rounds: int) -> None:
    """One of two processes; the first one also runs everything alone, while the other waits."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    sent: list[int] = []
    send = torch.distributed.all_to_all_single

    def noted(output: Tensor, rows: Tensor, *rest: Any, **options: Any) -> Any:
        sent.append(rows.numel() * rows.element_size())
        return send(output, rows, *rest, **options)

    torch.distributed.all_to_all_single = noted
    results = []
    for name, policy in POLICIES.items():
        alone = rewriter.optimize(model(), policy, strict=True, progress=False)
        spread = rewriter.distribute(
            rewriter.optimize(model(), policy, strict=True, progress=False), mesh, gather_outputs=False
        )
        for length in lengths:
            ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0))
            seconds = {"alone": float("inf"), "spread": float("inf")}
            for turn in range(rounds + 1):  # the first one compiles
                sent.clear()
                begin = time.perf_counter()
                step(spread, ids)
                torch.distributed.barrier()
                between = time.perf_counter()
                if rank == 0:
                    step(alone, ids)
                own = {"spread": between - begin, "alone": time.perf_counter() - between}
                torch.distributed.barrier()
                if turn:
                    seconds = {way: min(seconds[way], own[way]) for way in seconds}
            total = torch.tensor(sum(sent))
            torch.distributed.all_reduce(total)
            results.append({"policy": name, "length": length, "seconds": seconds, "sent": int(total)})
    torch.distributed.destroy_process_group()
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results), encoding="utf-8")


def bytes_counted(policy: rewriter.Policy, length: int) -> int:
    """Of a step over two processes: keys and values of two heads of 32, and their gradients, in four layers."""
    live = LiveRanges.causal(length)
    if isinstance(policy, rewriter.SlidingWindow):
        live = LiveRanges.sliding_window(length, policy.window, sinks=policy.sinks)
    if isinstance(policy, rewriter.SeparatorMask):
        ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0))
        kept = torch.isin(ids[0], torch.tensor(policy.separators)) | (torch.arange(length) < policy.initial)
        end = torch.where(kept, live.end, LiveRanges.sliding_window(length, policy.window).end)
        live = LiveRanges(live.start, end)
    return round(counted(live, 2)["of_ring"] * length) * 2 * (32 + 32) * 4 * 2 * 4


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("context-parallel.json"),
    lengths: Annotated[str, typer.Option(help="Tokens that are measured, separated by commas.")] = "2048,4096,8192",
    rounds: Annotated[int, typer.Option(help="Rounds of the timings.")] = 5,
) -> None:
    console = Console(width=150)
    rows = [
        {"mask": name, "processes": size, **counted(live, size)}
        for name, live in ranges(COUNTED_LENGTH).items()
        for size in GROUPS
    ]
    shown = Table(title=f"Counted, {COUNTED_LENGTH:,} tokens", title_justify="left")
    for column in ("mask", "processes", "keys sent, of a causal ring's", "work of the busiest, of the mean"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(row["mask"], str(row["processes"]), f"{row['of_ring']:.4f}", f"{row['busiest']:.3f}")
    console.print(shown)
    with tempfile.TemporaryDirectory() as folder:
        sizes = tuple(map(int, lengths.split(",")))
        torch.multiprocessing.spawn(measure, args=(folder, sizes, rounds), nprocs=2)
        measured = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    shown = Table(title="Measured, two processes of one thread against one", title_justify="left")
    for column in ("policy", "tokens", "speed", "bytes sent, of those counted"):
        shown.add_column(column)
    for row in measured:
        row["counted"] = bytes_counted(POLICIES[row["policy"]], row["length"])
        speed = row["seconds"]["alone"] / row["seconds"]["spread"]
        shown.add_row(row["policy"], f"{row['length']:,}", f"{speed:.2f}x", f"{row['sent'] / row['counted']:.3f}")
    console.print(shown)
    result = {"torch": torch.__version__, "length": COUNTED_LENGTH, "counted": rows, "measured": measured}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

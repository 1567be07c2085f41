"""Can a model small enough to commit be good enough to evaluate on? Trains the one that `rewriter demo` loads.

A byte-level BPE tokenizer and a Llama-type causal model (grouped heads, RoPE) on the Python standard library's own
source files, some modules held out. Two phases: most steps on short rows, the last ones on rows as long as the demo's
text. Writes tokenizer, checkpoint (half precision) and loss curve to `--out`; resumes from `--checkpoint` if it exists.

    python bench/train_tiny.py --out rewriter/demo/model --checkpoint .cache/train_tiny.pt
"""

from __future__ import annotations

import gzip
import json
import math
import time
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

from rewriter.demo.corpus import HELD_OUT
from rewriter.demo.corpus import held_out_files
from rewriter.demo.corpus import training_files

BOS = "<|file|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the Python version whose sources are read."""

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    intermediate_size: int = 704
    rope_theta: float = 100_000.0
    short_context: int = 1024
    short_batch: int = 8
    short_steps: int = 1700
    long_context: int = 6144
    long_batch: int = 1
    long_steps: int = 300
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1

    @property
    def steps(self) -> int:
        return self.short_steps + self.long_steps


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row, each behind a BOS. `[N]` int64."""
    ids: list[int] = []
    for text in texts:
        ids.append(tokenizer.bos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(ids)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int) -> float:
    """Mean over the texts' bytes; each text is read in rows of `context` tokens that begin with a BOS."""
    model.eval()
    nats = 0.0
    num_bytes = 0
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        num_bytes += len(text.encode())
        for begin in range(0, len(ids), context - 1):
            row = torch.tensor([[tokenizer.bos_token_id, *ids[begin : begin + context - 1]]])
            logits = model(input_ids=row).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    model.train()
    return nats / math.log(2) / num_bytes


def main(
    out: Annotated[Path, typer.Option(help="Folder for tokenizer, checkpoint and loss curve.")],
    checkpoint: Annotated[Path, typer.Option(help="State to resume from, written every 100 steps.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Stop early, to try the script.")] = None,
) -> None:
    recipe = Recipe()
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    train_texts = [path.read_text(encoding="utf-8", errors="ignore") for path in training_files()]
    test_texts = [path.read_text(encoding="utf-8", errors="ignore") for path in held_out_files()]
    tokenizer = train_tokenizer(train_texts, recipe.vocab_size)
    stream = token_stream(tokenizer, train_texts)
    test_bytes = "".join(test_texts).encode()
    typer.echo(
        f"{len(train_texts)} files, {sum(len(t.encode()) for t in train_texts) / 1e6:.1f} MB, {len(stream) / 1e6:.2f} M tokens; "
        f"held out: {len(test_texts)} files, {len(test_bytes) / 1e6:.2f} MB"
    )
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.long_context,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    rows = torch.Generator().manual_seed(recipe.seed)
    curve: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows.set_state(state["rows"])
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
        typer.echo(f"resumed at step {first}")
    running = math.nan
    for step in range(first, steps if steps is not None else recipe.steps):
        begin = time.monotonic()
        short = step < recipe.short_steps
        batch, context = (
            (recipe.short_batch, recipe.short_context) if short else (recipe.long_batch, recipe.long_context)
        )
        offsets = torch.randint(len(stream) - context, (batch,), generator=rows)
        ids = torch.stack([stream[offset : offset + context] for offset in offsets.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.monotonic() - begin
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            held_out = bits_per_byte(model, tokenizer, test_texts[:3], context)
            curve.append({"step": step + 1, "train_nats_per_token": running, "held_out_bits_per_byte": held_out})
            typer.echo(
                f"step {step + 1:5d}  train {running:.3f} nats/token  held out {held_out:.3f} bits/byte  {seconds:.0f} s"
            )
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rows": rows.get_state(),
                "step": step + 1,
                "seconds": seconds,
                "curve": curve,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    final = bits_per_byte(model, tokenizer, test_texts, recipe.long_context)
    gzipped = 8 * sum(len(gzip.compress(text.encode(), 9)) for text in test_texts) / len(test_bytes)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_modules": list(HELD_OUT),
        "held_out_bits_per_byte": final,
        "gzip_9_bits_per_byte": gzipped,
        "training_seconds": seconds,
        "threads": threads,
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(f"held out: {final:.3f} bits/byte; gzip -9: {gzipped:.3f} bits/byte; {seconds / 60:.0f} minutes")


if __name__ == "__main__":
    typer.run(main)

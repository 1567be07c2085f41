"""Trains a small model that retrieves within its context, for `quality_chunked.py`: 512 tokens, RoPE, grouped heads.

    python bench/train_retrieval.py --out bench/retrieval_model --checkpoint .cache/train_retrieval.pt

Rows of 64 tokens first, then longer ones, up to 512. Writes model (half precision), tokenizer and loss curve; resumes from
`--checkpoint` if it exists.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

import retrieval
import torch
import typer
from transformers import LlamaConfig
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 352
    rope_theta: float = 10_000.0
    context: int = 512
    tokens_per_step: int = 4096
    phases: tuple[tuple[int, int, float], ...] = ((64, 1000, 0.7), (128, 800, 0.3), (256, 600, 0.1), (512, 900, 0.1))
    """(length of a row, steps, share of rows of repeated words)"""
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01

    @property
    def steps(self) -> int:
        return sum(steps for _, steps, _ in self.phases)

    def phase(self, step: int) -> tuple[int, float]:
        """(length of a row, share of repeated words)"""
        for length, steps, repeated in self.phases:
            if step < steps:
                return length, repeated
            step -= steps
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """Linear warm-up, constant, linear to 0 over the last third."""
        left = (self.steps - step) / (self.steps / 3)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)


def make_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.context,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: Any, length: int, samples: int = 64) -> dict[str, float]:
    """Share of answers that are right, of questions behind contexts of `length` tokens with the question."""
    model.eval()
    result = {}
    for name, task in retrieval.TASKS.items():
        rng = random.Random(1)
        right = 0
        for number in range(samples):
            sample = task(rng, length - 12, number / (samples - 1))
            words = [retrieval.BOS, *sample.context, *sample.question, *sample.answer]
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
            guess = model(input_ids=ids, use_cache=False).logits[0, -3:-1].argmax(-1)
            right += bool((guess == ids[0, -2:]).all())
        result[name] = right / samples
    model.train()
    return result


def main(
    out: Annotated[Path, typer.Option(help="Folder for model, tokenizer and loss curve.")],
    checkpoint: Annotated[Path, typer.Option(help="State to resume from, written every 100 steps.")],
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Stop early, to try the script.")] = None,
) -> None:
    recipe = Recipe()
    torch.set_num_threads(threads)
    tokenizer = retrieval.make_tokenizer()
    model = make_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    curve: list[dict[str, float]] = []
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
        typer.echo(f"resumed at step {first}")
    running = 0.0
    for step in range(first, recipe.steps if steps is None else min(steps, recipe.steps)):
        begin = time.monotonic()
        rng = random.Random(f"{recipe.seed} {step}")
        length, repeated = recipe.phase(step)
        ids, asked = retrieval.training_batch(rng, tokenizer, recipe.tokens_per_step // length, length, repeated)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[asked[:, 1:]]), ids[:, 1:][asked[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.monotonic() - begin
        running = loss.item() if step == first else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            right = accuracy(model, tokenizer, length)
            curve.append({"step": step + 1, "row": length, "train_nats_per_token": running, **right})
            typer.echo(
                f"step {step + 1:5d}  row {length:3d}  train {running:.3f} nats/token  right: "
                + ", ".join(f"{name} {value:.0%}" for name, value in right.items())
                + f"  {seconds:.0f} s"
            )
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds,
                "curve": curve,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    right = accuracy(model, tokenizer, recipe.context, 200)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy_at_the_trained_length": right,
        "training_seconds": seconds,
        "threads": threads,
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(f"at {recipe.context} tokens right: {right}; {seconds / 60:.0f} minutes")


if __name__ == "__main__":
    typer.run(main)

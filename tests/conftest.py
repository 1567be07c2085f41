"""Shared by all tests: tiny models and the dense masks of the policies."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings
from rewriter.kernels.separator_cache import CacheSizes
from torch import Tensor
from torch import nn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default")
torch.set_num_threads(1)
# Tracing makes millions of objects that live for one graph: collecting as often as by default takes up to a tenth of the time.
gc.set_threshold(100_000, 20, 100)


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Each test draws the same random numbers, and compiles anew what it compiles."""
    torch.manual_seed(0)
    torch._dynamo.reset()


class NanoAttention(nn.Module):
    """A hand-written causal model in the manner of small teaching repositories; `mask` says how it hides the future."""

    def __init__(
        self, mask: str = "buffer", attention: str = "eager", width: int = 32, heads: int = 4, length: int = 64
    ):
        super().__init__()
        self.mask, self.attention, self.heads = mask, attention, heads
        self.embedding = nn.Embedding(64, width)
        self.position = nn.Embedding(length, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 64)
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        batch, length = input_ids.shape
        x = self.embedding(input_ids) + self.position(torch.arange(length))
        for qkv, out in zip(self.qkv, self.out, strict=True):
            parts = qkv(x).split(x.size(-1), dim=2)
            q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in parts)
            y = self.attend(q, k, v, attention_mask)
            x = x + out(y.transpose(1, 2).contiguous().view(batch, length, -1))
        return self.head(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.attention == "sdpa":
            mask = None
            if attention_mask is not None:
                if attention_mask.dim() == 4:
                    mask = attention_mask
                else:
                    causal = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()
                    mask = causal & attention_mask.bool()[:, None, None, :]
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(k.size(-1)))
        length = q.size(2)
        if attention_mask is not None and attention_mask.dim() == 4:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1) @ v


class TorchAttention(nn.Module):
    """`torch.nn.MultiheadAttention`, causal and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if attention_mask.dim() == 4:
            heads = self.attention.num_heads
            hidden = ~attention_mask.expand(-1, heads, -1, -1).flatten(0, 1)
            return self.head(x + self.attention(x, x, x, need_weights=False, attn_mask=hidden)[0])
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        padding = attention_mask == 0
        return self.head(x + self.attention(x, x, x, need_weights=False, attn_mask=future, key_padding_mask=padding)[0])


def build_model(name: str, attention: str, layers: int = 2) -> nn.Module:
    """A tiny random model; window models have a window of 8."""
    import transformers

    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
    }
    grouped = {**common, "num_key_value_heads": 2}
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped))
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**grouped, head_dim=8))
    if name == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**grouped, sliding_window=8))
    if name == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**grouped, head_dim=8, sliding_window=8))
    if name == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
        return transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**grouped, **experts, head_dim=8, sliding_window=8)
        )
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, attn_implementation=attention
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**common))
    if name == "nano":
        return NanoAttention(attention=attention)
    assert name == "torch"
    return TorchAttention()


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    return build_model


@pytest.fixture
def nano() -> type[NanoAttention]:
    return NanoAttention


def dense_visible(policy: object, ids: Tensor, attention_mask: Tensor, model_window: int | None) -> Tensor:
    """bool `[B, 1, S, S]`: a policy's mask, written out from its definition and not from live ranges."""
    length = ids.size(1)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    real = attention_mask.bool()
    visible = torch.zeros(ids.size(0), length, length, dtype=torch.bool)
    separators = set(getattr(policy, "separators", ()))
    first = getattr(policy, "initial", getattr(policy, "sinks", 0))
    window = getattr(policy, "window", length)
    for b in range(ids.size(0)):
        begin = int(real[b].nonzero()[0])
        if getattr(policy, "max_separators", None) is not None:
            seen = newest_separators(policy, [int(token) in separators for token in ids[b, begin:]])
            for q, keys in enumerate(seen, begin):
                visible[b, q, [begin + k for k in keys]] = True
            visible[b] &= real[b]
            continue
        for q in range(length):
            for k in range(q + 1):
                kept = q - k < window or begin <= k < begin + first or int(ids[b, k]) in separators
                visible[b, q, k] = kept and bool(real[b, k])
    if model_window is not None:
        visible &= i - j < model_window
    return visible[:, None]


def newest_separators(policy: Any, is_separator: list[bool]) -> list[list[int]]:
    """What each query sees where only the newest separators stay."""
    if policy.capacity is not None:
        return _cache_itself(is_separator, policy)[0]
    visible = []
    for q in range(len(is_separator)):
        past = [k for k in range(policy.initial, q + 1 - policy.window) if is_separator[k]]
        near = [k for k in range(q + 1) if k < policy.initial or q - k < policy.window]
        visible.append([*near, *past[max(0, len(past) - policy.max_separators) :]])
    return visible


@pytest.fixture
def policy_mask() -> Callable[..., Tensor]:
    return dense_visible


def _cache_itself(is_separator: list[bool], sizes: Any) -> tuple[list[list[int]], list[int]]:
    assert sizes.capacity is not None
    cache: list[int] = []
    visible, times = [], []
    num_separators = sizes.separators if isinstance(sizes, CacheSizes) else sizes.max_separators
    separators = 0
    for query in range(len(is_separator)):
        cache.append(query)
        visible.append(list(cache))
        if len(cache) > sizes.capacity:
            first, rest = cache[: sizes.initial], cache[sizes.initial :]
            window = cache[-sizes.window :]
            past = rest[separators : len(rest) - sizes.window]
            kept = rest[:separators] + [key for key in past if is_separator[key]]
            kept = kept[len(kept) - min(num_separators, len(kept)) :]
            cache, separators = first + kept + window, len(kept)
            times.append(query)
    return visible, times


@pytest.fixture(scope="session")
def cache_itself() -> Callable[..., tuple[list[list[int]], list[int]]]:
    """(what each query sees, when the cache was compacted): SepLLM's streaming cache, kept as lists of keys."""
    return _cache_itself

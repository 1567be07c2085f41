"""The zoo: one small model per architecture, random weights, and what is to be found in it.

`ARCHITECTURES` is all there is to change to add one: how to build it, how to call it, how many attentions it has, and
which of them are refused, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import nn

VOCABULARY, LENGTH = 64, 14
WINDOW = 6
"""Of the models that have one; `attention_chunk_size` too."""


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        build: the model for an attention implementation, "sdpa" or "eager".
        sites: attentions of one call.
        inputs: keyword arguments of a call for `(padding, generator)`, padding "none", "left" or "right".
        implementations: those that the library offers.
        paddings: those that its call knows.
        refused: by number of the site, a pattern of the reason; all others are rewritten.
        causal: the sites that are causal self-attention, which `SeparatorMask` is for.
        caches: a pattern of the reason why it cannot go on from a cache of ours; "" where it can; None where it generates
            nothing.
        dynamic_cache: it takes transformers' `DynamicCache`.
        packs: it takes packed documents, as position ids that begin anew.
        error: a pattern of the error with which the whole model is refused, "" for none.
    """

    name: str
    build: Callable[[str], nn.Module]
    sites: int
    inputs: Callable[[str, torch.Generator], dict[str, Any]]
    implementations: tuple[str, ...] = ("sdpa", "eager")
    paddings: tuple[str, ...] = ("none", "left", "right")
    refused: Mapping[int, str] = field(default_factory=dict)
    causal: frozenset[int] = frozenset()
    caches: str | None = None
    dynamic_cache: bool = False
    packs: bool = False
    error: str = ""


def real_tokens(padding: str, rows: int = 3, length: int = LENGTH) -> Tensor:
    """int64 `[rows, length]`: 1 where a token is; rows are padded differently, the last one not."""
    place = torch.arange(length)
    cut = torch.tensor([[5], [2], [0]])[:rows]
    if padding == "none":
        return torch.ones(rows, length, dtype=torch.int64)
    return ((place >= cut) if padding == "left" else (place < length - cut)).long()


def text(padding: str, generator: torch.Generator, **others: Any) -> dict[str, Any]:
    ids = torch.randint(2, VOCABULARY, (3, LENGTH), generator=generator)
    mask = {} if padding == "none" else {"attention_mask": real_tokens(padding)}
    return {"input_ids": ids, **mask, **others}


def generating(padding: str, generator: torch.Generator) -> dict[str, Any]:
    return text(padding, generator, use_cache=False)


def pictures(padding: str, generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}


def pictures_and_text(padding: str, generator: torch.Generator) -> dict[str, Any]:
    words = text(padding, generator)
    last = LENGTH - 1 - real_tokens(padding).flip(-1).argmax(-1)
    words["input_ids"][torch.arange(3), last] = 1  # the last token is the one whose output is pooled
    return {**words, **pictures(padding, generator)}


def speech(padding: str, generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(2, VOCABULARY, (3, LENGTH), generator=generator)
    mask = {} if padding == "none" else {"decoder_attention_mask": real_tokens(padding)}
    features = torch.randn(3, 8, 24, generator=generator)
    return {"input_features": features, "decoder_input_ids": ids, "use_cache": False, **mask}


def translation(padding: str, generator: torch.Generator) -> dict[str, Any]:
    target = torch.randint(2, VOCABULARY, (3, 7), generator=generator)
    return {**text(padding, generator), "decoder_input_ids": target, "use_cache": False}


def vectors(padding: str, generator: torch.Generator) -> dict[str, Any]:
    hidden = {} if padding == "none" else {"hidden": real_tokens(padding) == 0}
    return {"x": torch.randn(3, LENGTH, 32, generator=generator), **hidden}


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
HEADS_OF_8: dict[str, Any] = {**GROUPED, "head_dim": 8}
LOCAL_AND_GLOBAL: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}


def transformers_model(kind: str, **options: Any) -> Callable[[str], nn.Module]:
    """`kind` is the name of a model class; its configuration's class has the same name without its task."""

    def build(attention: str) -> nn.Module:
        import transformers

        model = getattr(transformers, kind)
        own = {**options, "attn_implementation": attention}
        return model(model.config_class(**own)).eval()

    return build


def language_model(name: str, kind: str, layers: int = 2, *, options: Mapping[str, Any], **others: Any) -> Architecture:
    """A causal model of text, all of whose attentions are causal self-attention."""
    arguments: dict[str, Any] = {"caches": "", "dynamic_cache": True, "packs": True, **others}
    return Architecture(
        name,
        transformers_model(kind, **options),
        sites=layers,
        inputs=generating,
        causal=frozenset(range(layers)),
        **arguments,
    )


class TorchEncoder(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=hidden)


class TorchDecoder(nn.Module):
    """Causal over itself, and reading another text that is padded."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True), 2)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        target = x[:, :9].flip(-1)
        future = nn.Transformer.generate_square_subsequent_mask(target.size(1), dtype=x.dtype)
        return self.decoder(target, x, tgt_mask=future, tgt_is_causal=True, memory_key_padding_mask=hidden)


class TorchAttention(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        return self.attention(x, x, x, need_weights=False, attn_mask=future, key_padding_mask=hidden)[0]


class HandWritten(nn.Module):
    """One layer of causal attention, written in one of the ways that people write it."""

    def __init__(self, phrasing: str) -> None:
        super().__init__()
        self.phrasing = phrasing
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        drop = future if hidden is None else future | hidden[:, None, None, :]
        lowest = torch.finfo(x.dtype).min
        projected = self.qkv(x)
        if self.phrasing == "fused qkv":
            q, k, v = projected.view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (t.view(batch, length, 4, 8).transpose(1, 2) for t in projected.split(width, dim=-1))
        if self.phrasing == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5
            y = torch.einsum("bhij,bhjd->bhid", scores.masked_fill(drop, lowest).softmax(-1), v)
        elif self.phrasing == "baddbmm":
            bias = torch.zeros_like(drop, dtype=x.dtype).masked_fill(drop, lowest).expand(batch, 4, length, length)
            q, k, v = (t.reshape(batch * 4, length, 8) for t in (q, k, v))
            flat = bias.reshape(batch * 4, length, length)
            y = torch.baddbmm(flat, q, k.transpose(1, 2), alpha=8**-0.5).softmax(-1) @ v
            y = y.view(batch, 4, length, 8)
        elif self.phrasing == "fp32 softmax":
            scores = (q @ k.transpose(2, 3)) / math.sqrt(8)
            y = nn.functional.softmax(scores.masked_fill(drop, lowest), dim=-1, dtype=torch.float32).to(v.dtype) @ v
        elif self.phrasing == "heads by chunk":
            q, k, v = (torch.stack(t.chunk(4, dim=-1), dim=1) for t in projected.chunk(3, dim=-1))
            y = (q @ k.mT * 8**-0.5).masked_fill(drop, lowest).softmax(-1) @ v
        else:
            scores = q @ k.transpose(-1, -2) * 8**-0.5 + torch.where(drop, -1e9, 0.0)
            y = torch.softmax(scores, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class GraphBreak(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = HandWritten("einsum")

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        y = self.attention(x, hidden)
        return y * 2 if float(y.sum()) > 0 else y


def module(
    name: str, build: Callable[[str], nn.Module], sites: int, causal: frozenset[int], **others: Any
) -> Architecture:
    paddings = ("none", "right")  # a row that begins with padding makes NaN in these
    arguments: dict[str, Any] = {"paddings": paddings, "implementations": ("eager",), **others}
    return Architecture(name, build, sites, vectors, causal=causal, **arguments)


NO_POSITIONS = "forward takes no position_ids"
EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",  # the default, grouped_mm, takes no fp64
}
WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "init_std": 0.2,
}
PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON_ALIBI: dict[str, Any] = {**COMMON, "ffn_hidden_size": 48, "alibi": True, "multi_query": False}
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}

ARCHITECTURES: tuple[Architecture, ...] = (
    language_model("Llama", "LlamaForCausalLM", options=GROUPED),
    language_model(
        "Llama 4",
        "Llama4ForCausalLM",
        4,
        options={
            **HEADS_OF_8,
            **EXPERTS,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "moe_layers": [1],
        },
        caches="depends on the whole row",  # chunks begin at the first token that is not padding
    ),
    language_model("Qwen2", "Qwen2ForCausalLM", options=GROUPED),
    language_model("Qwen3", "Qwen3ForCausalLM", options=HEADS_OF_8),
    language_model(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        options={**HEADS_OF_8, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
    ),
    language_model("Mistral", "MistralForCausalLM", options={**HEADS_OF_8, "sliding_window": WINDOW}),
    language_model(
        "Mixtral",
        "MixtralForCausalLM",
        options={**HEADS_OF_8, **EXPERTS, "num_local_experts": 4, "sliding_window": None},
    ),
    language_model("Gemma", "GemmaForCausalLM", options=HEADS_OF_8),
    language_model(
        "Gemma2",
        "Gemma2ForCausalLM",
        options={**HEADS_OF_8, **LOCAL_AND_GLOBAL},
        implementations=("eager",),  # softcap
    ),
    language_model("Gemma3", "Gemma3ForCausalLM", options={**HEADS_OF_8, **LOCAL_AND_GLOBAL}),
    language_model("Phi-3", "Phi3ForCausalLM", options={**GROUPED, "sliding_window": None}),
    language_model("OLMo2", "Olmo2ForCausalLM", options=GROUPED),
    language_model("Granite", "GraniteForCausalLM", options={**GROUPED, "attention_multiplier": 0.3}),
    language_model("Cohere2", "Cohere2ForCausalLM", options={**GROUPED, **LOCAL_AND_GLOBAL}),
    language_model("StarCoder2", "Starcoder2ForCausalLM", options={**GROUPED, "sliding_window": WINDOW}),
    language_model("StableLM", "StableLmForCausalLM", options=GROUPED),
    language_model("GLM-4", "Glm4ForCausalLM", options=HEADS_OF_8),
    language_model("SmolLM3", "SmolLM3ForCausalLM", options={**GROUPED, "no_rope_layers": [1, 0]}),
    language_model(
        "GPT-OSS",
        "GptOssForCausalLM",
        options={**HEADS_OF_8, **EXPERTS, **LOCAL_AND_GLOBAL, "num_local_experts": 4},
        implementations=("eager",),
    ),
    language_model(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        options={**COMMON, "num_key_value_heads": 4, **EXPERTS, **LATENT},
    ),
    language_model("GPT-2", "GPT2LMHeadModel", options={**GPT2, **ENDS, "initializer_range": 0.2}),
    language_model("GPT-NeoX", "GPTNeoXForCausalLM", options=COMMON),
    language_model(
        "GPT-J",
        "GPTJForCausalLM",
        options={**GPT2, **ENDS, "rotary_dim": 4, "initializer_range": 0.2},
        implementations=("eager",),
    ),
    language_model(
        "OPT",
        "OPTForCausalLM",
        options={**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
    ),
    language_model(
        "BLOOM",
        "BloomForCausalLM",
        options={**ENDS, "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        implementations=("eager",),
        caches=NO_POSITIONS,
    ),
    language_model(
        "MPT",
        "MptForCausalLM",
        options={**ENDS, "vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        implementations=("eager",),
        paddings=("none", "right"),  # a row that begins with padding makes NaN in the original
        caches=NO_POSITIONS,
        packs=False,
    ),
    language_model("Falcon", "FalconForCausalLM", options={**COMMON, "ffn_hidden_size": 48}),
    language_model(
        "Falcon with ALiBi",
        "FalconForCausalLM",
        options=FALCON_ALIBI,
        caches="cannot go on from a cache",
    ),
    language_model("Doge", "DogeForCausalLM", options={**GROUPED, "keep_window_size": 64}),
    Architecture("BERT", transformers_model("BertForMaskedLM", **COMMON), 2, text),
    Architecture("RoBERTa", transformers_model("RobertaForMaskedLM", **COMMON), 2, text),
    Architecture(
        "ModernBERT",
        transformers_model(
            "ModernBertForMaskedLM",
            **{**COMMON, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 2 * WINDOW},
            layer_types=["full_attention", "sliding_attention"],
        ),
        2,
        text,
    ),
    Architecture("ViT", transformers_model("ViTModel", **PICTURE), 2, pictures, paddings=("none",)),
    Architecture(
        "CLIP",
        transformers_model(
            "CLIPModel",
            text_config={**COMMON, "projection_dim": 32},
            vision_config={**PICTURE, "projection_dim": 32},
            projection_dim=32,
        ),
        4,
        pictures_and_text,
        causal=frozenset((2, 3)),
    ),
    Architecture(
        "Whisper",
        transformers_model("WhisperForConditionalGeneration", **WHISPER),
        6,
        speech,
        causal=frozenset((2, 4)),
    ),
    Architecture(
        "T5",
        transformers_model(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=1,
            **{k: v for k, v in ENDS.items() if k != "bos_token_id"},
        ),
        6,
        translation,
        refused=dict.fromkeys((0, 1, 2, 4), "relative position bias"),
    ),
    module("nn.TransformerEncoder", TorchEncoder, 2, frozenset()),
    module("nn.TransformerDecoder", TorchDecoder, 4, frozenset((0, 2))),
    module("nn.MultiheadAttention", TorchAttention, 1, frozenset((0,))),
    *(
        module(f"by hand: {phrasing}", lambda attention, phrasing=phrasing: HandWritten(phrasing), 1, frozenset((0,)))
        for phrasing in ("einsum", "baddbmm", "fp32 softmax", "heads by chunk", "fused qkv")
    ),
    module("a graph break", GraphBreak, 1, frozenset(), error="cannot be captured as one graph", paddings=("none",)),
)

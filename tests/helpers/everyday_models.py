"""Small models as people load them, for the tests of everyday use."""

from __future__ import annotations

from typing import Any

from transformers import BartConfig
from transformers import BartForConditionalGeneration
from transformers import CLIPVisionConfig
from transformers import Gemma3Config
from transformers import Gemma3ForConditionalGeneration
from transformers import Gemma3TextConfig
from transformers import LlamaConfig
from transformers import LlamaForCausalLM
from transformers import LlavaConfig
from transformers import LlavaForConditionalGeneration
from transformers import PaliGemmaConfig
from transformers import PaliGemmaForConditionalGeneration
from transformers import Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration
from transformers import SiglipVisionConfig

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = 63
"""The token in whose places an image stands."""

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **TOKENS, **options})).eval()


def bart() -> BartForConditionalGeneration:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _LAYERS.items()}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **sides, **TOKENS)
    ).eval()


_LAYERS = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


def llava() -> LlavaForConditionalGeneration:
    """An image is four tokens."""
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**SIZES, **TOKENS),
            vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    ).eval()


def gemma3() -> Gemma3ForConditionalGeneration:
    """An image is four tokens, which see each other."""
    text = Gemma3TextConfig(
        **SIZES, **TOKENS, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_id=IMAGE
        )
    ).eval()


def paligemma() -> PaliGemmaForConditionalGeneration:
    """An image is four tokens; all tokens of type 0, image and prompt, see each other."""
    text = {**SIZES, **TOKENS, "model_type": "gemma", "head_dim": 8, "num_image_tokens": 4}
    vision = {**VISION, "model_type": "siglip_vision_model", "num_image_tokens": 4, "projection_dim": 32}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return PaliGemmaForConditionalGeneration(config).eval()


def qwen2_vl() -> Qwen2VLForConditionalGeneration:
    """Positions on three axes; an image of 16 patches is four tokens."""
    text = {
        **SIZES,
        **TOKENS,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, **patches}
    marks = {"video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, **marks)
    return Qwen2VLForConditionalGeneration(config).eval()

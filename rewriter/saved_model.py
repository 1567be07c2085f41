"""A saved model: what transformers writes and reads, with the policy beside it.

    config.json, model.safetensors, ...   what the model's own save_pretrained writes; plain transformers loads it
    rewriter.json                         the policy, and how the model was optimized
    policy_parameters.safetensors         the policy's own parameters, beside weights that are not a whole model (peft's adapters)

A policy's own parameters are saved among the weights of a whole model, so that a Trainer finds them when it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.wrapper import OWN_PARAMETERS

SETTINGS = "rewriter.json"
PARAMETERS = "policy_parameters.safetensors"


def write(
    folder: str | Path, model: Any, settings: Mapping[str, Any], state_dict: Mapping[str, Tensor], **options: Any
) -> None:
    """Saves a model with the settings of its optimization.

    Args:
        model: the original, with a `save_pretrained`.
        settings: plain data for `rewriter.json`.
        state_dict: of the optimized model.
        options: of the model's `save_pretrained`.

    Raises:
        RewriteError: the model has no `save_pretrained`.
    """
    if not hasattr(model, "save_pretrained"):
        raise RewriteError(
            f"{type(model).__name__} has no save_pretrained; save fast.state_dict() with torch.save or safetensors"
        )
    from transformers import PreTrainedModel

    parameters = {name: tensor for name, tensor in state_dict.items() if name.startswith(f"{OWN_PARAMETERS}.")}
    with_weights = isinstance(model, PreTrainedModel)
    weights = state_dict if with_weights else {k: v for k, v in state_dict.items() if k not in parameters}
    model.save_pretrained(folder, state_dict=weights, **options)
    if not options.get("is_main_process", True):
        return
    (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if parameters and not with_weights:
        from safetensors.torch import save_file

        save_file(
            {name: tensor.detach().contiguous() for name, tensor in parameters.items()}, Path(folder) / PARAMETERS
        )


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What `write` was given as settings.

    Raises:
        RewriteError: there are none.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise RewriteError(
            f"{folder} has no {SETTINGS}, which save_pretrained of an optimized model writes; load the model with transformers "
            "and call optimize(model, policy)"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def read_parameters(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """The policy's own parameters, by site number and name."""
    from safetensors import safe_open

    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a file, not a mapping
                if key.startswith(f"{OWN_PARAMETERS}."):
                    _, layer, name = key.split(".", 2)
                    found.setdefault(layer, {})[name] = file.get_tensor(key)
    return found


def class_of(folder: str | Path) -> Any:
    """What loads the model: the class that its configuration names, or peft's for a folder of adapters.

    Raises:
        RewriteError: the class is not there.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError:
            raise RewriteError(f"{folder} holds adapters of peft, which is not installed: pip install peft") from None
        return AutoPeftModelForCausalLM
    import transformers

    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = next(iter(config.get("architectures") or ()), "")
    found = getattr(transformers, name, None)
    if found is None:
        raise RewriteError(
            f"the configuration in {folder} names {name or 'no class'}, which transformers does not have; give model_class=..."
        )
    return found

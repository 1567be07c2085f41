"""EleutherAI's lm-evaluation-harness over an optimized model: `pip install 'rewriter[eval]'`.

In Python:

    lm_eval.simple_evaluate(model=RewrittenLM(pretrained=folder, policy=SlidingWindow(256, sinks=4)), tasks=[...])

On the command line, with the options of `lm_eval`:

    python -m rewriter.integrations.lm_eval run --model rewriter --tasks ... \\
        --model_args '{"pretrained": "folder", "policy": {"policy": "SlidingWindow", "window": 256, "sinks": 4}}'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewriter.policies.reading import read_policy
from rewriter.public import Exact
from rewriter.public import OptimizedModel
from rewriter.public import Policy
from rewriter.public import optimize

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rewriter.integrations.lm_eval needs lm-evaluation-harness ({error}): pip install 'rewriter[eval]'"
    ) from error


@register_model("rewriter")
class RewrittenLM(HFLM):
    """A model of transformers under a policy, for the tasks of lm-evaluation-harness.

    Args:
        pretrained: a folder, or a model; as `HFLM` takes it. A model that is optimized already is taken as it is.
        policy: a policy, its `to_dict()`, or this as JSON; `Exact()` when left out.
        rewriter_backend, strict: `backend` and `strict` of `optimize`; a site that is refused is an error here by default, as its
            score would be that of another policy.
        options: of `HFLM`, such as `tokenizer`, `batch_size`, `device`, `dtype`.

    Raises:
        PolicyError: the policy is none, or a model was optimized with another one.
        RewriteError: as `optimize`.
    """

    _model: Any

    def __init__(
        self,
        pretrained: Any,
        policy: Policy | Mapping[str, Any] | str | None = None,
        rewriter_backend: str = "inductor",
        strict: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(pretrained=pretrained, **options)
        if isinstance(self._model, OptimizedModel) and policy is None:
            return
        chosen = Exact() if policy is None else read_policy(policy, lambda: self.tokenizer)
        self._model = optimize(self._model, chosen, backend=rewriter_backend, strict=strict)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model, with its policy."""
        return {**super().get_model_info(), "policy": self.model.policy.to_dict()}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

"""What becomes of one architecture: found, proven or refused, and compared with the original, in fp64.

    python tests/zoo/examine.py --out bench/results/zoo.json

examines all of them (`make zoo`, which then writes the documentation's table). What is in `--out` already is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Annotated
from typing import Any
from unittest import mock

import torch
from architectures import ARCHITECTURES
from architectures import LENGTH
from architectures import VOCABULARY
from architectures import Architecture
from architectures import real_tokens
from torch import Tensor
from torch import nn

import rewriter
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.errors import CacheError

SEPARATORS, INITIAL, NEAR = (3, 4, 5, 6, 7, 8), 2, 4

TOLERANCE = 1e-5
"""Largest relative difference. Both sides run in fp64, but models cast some of it to fp32 (norms, rotations, gates), where
equal numbers may be rounded to neighbours, 6e-8 apart; a wrong mask shows as 1e-2 and more."""


RESULTS = Path(__file__).parents[2] / "bench" / "results" / "zoo.json"


@dataclass
class Examined:
    """What was found; differences are relative to the largest value compared.

    Attributes:
        masks: the proven ones, by the numbers of their sites; of the call with padding where there is one.
        refused: the reasons, by number of the site.
        exact: of outputs and gradients under `Exact()`, by padding.
        policy: the same under `SeparatorMask`, or `SlidingWindow` where a model reads no tokens; by padding.
        cache: of prefill and one step under that policy over our cache; or why it cannot.
        dynamic_cache: of prefill and one step under `Exact()` over transformers' cache; or why that is refused.
        packed: of two documents in a row; or why that is refused.
        inductor: of outputs and gradients under `Exact()` in compiled code, one padding; of one implementation.
        error: with which the whole model was refused.
    """

    name: str
    attention: str
    masks: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)
    policy: dict[str, float] = field(default_factory=dict)
    cache: float | str | None = None
    dynamic_cache: float | str | None = None
    packed: float | str | None = None
    inductor: float | None = None
    error: str = ""
    seconds: float = 0.0


class Masked:
    """Runs a model as it is, but in its own precision: transformers' eager attention takes its softmax in fp32.

    Args:
        visible: bool `[B, Q, K]`, what a policy lets a query see, besides the model's own mask; None for all.
        sites: the attentions that the policy is for, by number.
    """

    def __init__(self, visible: Tensor | None = None, sites: Collection[int] = ()) -> None:
        self.visible, self.sites, self.seen, self.inside = visible, sites, 0, False
        self.patches = ExitStack()

    def __enter__(self) -> None:
        fused = nn.functional.scaled_dot_product_attention
        self._replace(nn.functional, fused, lambda *args, **kwargs: self._fused(fused, args, kwargs))
        for owner, original in (
            (nn.functional, nn.functional.softmax),
            (torch, torch.softmax),
            (Tensor, Tensor.softmax),
        ):

            def softmax(scores: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Tensor:
                if scores.dim() < 3 or self.inside:  # a router's; the method that the function calls
                    return original(scores, *args, **kwargs)
                self.inside = True
                try:
                    return self._eager(original, (scores, *args), kwargs)
                finally:
                    self.inside = False

            self._replace(owner, original, softmax)

    def _replace(self, owner: Any, original: Any, replacement: Any) -> None:
        self.patches.enter_context(mock.patch.object(owner, original.__name__, replacement))

    def __exit__(self, *error: Any) -> None:
        self.patches.close()

    def _policy(self) -> Tensor | None:
        self.seen += 1
        return self.visible if self.seen - 1 in self.sites else None

    def _fused(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        visible = self._policy()
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key = given["query"], given["key"]
        if visible is not None:
            lowest = torch.finfo(query.dtype).min
            mask = given.get("attn_mask")
            if given.pop("is_causal", False):
                mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool).tril()
            if mask is None:
                mask = torch.zeros(query.size(-2), key.size(-2), dtype=query.dtype)
            elif mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
            given["attn_mask"] = mask.masked_fill(~_as_heads(visible, query), lowest)
        return function(**given)

    def _eager(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        visible = self._policy()
        scores = args[0]
        if visible is not None:
            extra = scores.size(-1) - visible.size(-1)  # columns of sinks
            visible = nn.functional.pad(_as_heads(visible, scores), (0, extra), value=True)
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        kwargs.pop("dtype", None)
        return function(scores, *args[1:], **kwargs)


def _as_heads(visible: Tensor, like: Tensor) -> Tensor:
    """`[B, 1, Q, K]`, or `[B * H, Q, K]` where heads are folded into the batch."""
    if like.dim() == 4:
        return visible[:, None]
    return visible.repeat_interleave(like.size(0) // visible.size(0), dim=0)


def visible_keys(policy: Policy, ids: Tensor | None, real: Tensor) -> Tensor:
    """bool `[B, S, S]`: a policy's mask, from its definition."""
    length = real.size(1)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    origin = real.int().argmax(-1)[:, None, None]
    if isinstance(policy, SlidingWindow):
        return (i - j < policy.window) | (j - origin < policy.sinks)
    assert isinstance(policy, SeparatorMask) and ids is not None
    separator = torch.isin(ids, torch.tensor(sorted(policy.separators)))
    return (i - j < policy.window) | (j - origin < policy.initial) | separator[:, None, :]


def examine(architecture: Architecture, attention: str, *, quick: bool = False, compiled: bool = True) -> Examined:
    """Runs all that applies to an architecture. Nothing is judged here but by numbers.

    Args:
        quick: only `Exact()`, with one padding, and not in compiled code.
        compiled: in compiled code, too.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    model = architecture.build(attention).double()
    found = Examined(architecture.name, attention)
    policy = _policy_for(architecture)
    padding = architecture.paddings[-1:]
    try:
        _forward(architecture, model, Exact(), found.exact, found, padding if quick else architecture.paddings)
        if compiled and not quick:
            differences: dict[str, float] = {}
            _forward(architecture, model, Exact(), differences, None, padding, backend="inductor")
            found.inductor = max(differences.values())
    except rewriter.RewriteError as error:
        found.error = str(error).split(":")[0].split(";")[0]
    if not quick and not found.error:
        if architecture.causal:
            _forward(architecture, model, policy, found.policy, None, architecture.paddings)
        if architecture.packs:
            found.packed = _or_reason(lambda: _packed(model))
        if architecture.caches is not None:
            found.cache = _or_reason(lambda: _over_our_cache(architecture, model, policy))
        if architecture.dynamic_cache:
            found.dynamic_cache = _or_reason(lambda: _over_dynamic_cache(architecture, model))
    found.seconds = time.perf_counter() - began
    return found


def _or_reason(run: Callable[[], float]) -> float | str:
    try:
        return run()
    except (rewriter.RewriteError, CacheError) as error:
        return str(error)


def _policy_for(architecture: Architecture) -> Policy:
    reads_tokens = any(name.endswith("input_ids") for name in architecture.inputs("none", torch.Generator()))
    return SeparatorMask(SEPARATORS, initial=INITIAL, window=NEAR) if reads_tokens else SlidingWindow(NEAR, sinks=1)


def _forward(
    architecture: Architecture,
    model: nn.Module,
    policy: Policy,
    differences: dict[str, float],
    found: Examined | None,
    paddings: tuple[str, ...],
    backend: str = "eager",
) -> None:
    """Outputs and all gradients, for each padding."""
    torch._dynamo.reset()
    fast = rewriter.optimize(model, policy, backend=backend)
    for padding in paddings:
        inputs = architecture.inputs(padding, torch.Generator().manual_seed(1))
        inputs = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}
        ids = next((v for k, v in inputs.items() if k.endswith("input_ids")), None)
        length = LENGTH if ids is None else ids.size(1)
        real = real_tokens(padding, length=length)
        visible = None if isinstance(policy, Exact) else visible_keys(policy, ids, real)

        def plain(inputs: dict[str, Any] = inputs, visible: Tensor | None = visible) -> Any:
            if visible is not None and architecture.name == "nn.TransformerDecoder":
                visible = visible[:, :9, :9]
            with Masked(visible, architecture.causal):
                return model(**inputs)

        expected = _results(plain, model, real)
        actual = _results(lambda inputs=inputs: fast(**inputs), model, real)
        differences[padding] = _difference(actual, expected)
        if found is not None:
            found.masks, found.refused = {}, {}
            for site in fast.report.sites:
                if site.rewritten:
                    found.masks.setdefault(site.mask, []).append(site.layer)
                else:
                    found.refused[site.layer] = site.reason


def _results(run: Callable[[], Any], model: nn.Module, real: Tensor) -> dict[str, Tensor]:
    """Outputs of tokens that are not padding, and the gradients of a weighted sum of them."""
    model.zero_grad()
    outputs = _outputs(run())
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=torch.float64)
    results = {}
    for name, output in outputs.items():
        kept = output[real.bool()] if output.shape[:2] == real.shape else output
        total = total + (kept * torch.randn(kept.shape, generator=generator, dtype=kept.dtype)).sum()
        results[name] = kept.detach()
    total.backward()
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return {**results, **{f"gradient of {name}": g.clone() for name, g in gradients.items()}}


def _outputs(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    names = ("logits", "last_hidden_state", "text_embeds", "image_embeds")
    return {name: output[name] for name in names if output.get(name) is not None}


def _difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value: of each output, and of all gradients, some of which cancel."""
    assert actual.keys() == expected.keys()
    largest = max((t.abs().max().item() for n, t in expected.items() if n.startswith("gradient")), default=1.0)
    worst = 0.0
    for name, reference in expected.items():
        size = largest if name.startswith("gradient") else reference.abs().max().item()
        difference = (actual[name] - reference).abs().max().item() / size
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


@torch.no_grad()
def _packed(model: nn.Module) -> float:
    """Two documents in a row, which begin where their positions do."""
    torch._dynamo.reset()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (2, LENGTH), generator=generator)
    first = 5
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)]).expand(2, -1).contiguous()
    call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with Masked():
        expected = model(**call).logits
    return _difference({"logits": fast(**call).logits}, {"logits": expected})


@torch.no_grad()
def _over_our_cache(architecture: Architecture, model: nn.Module, policy: Policy) -> float:
    """The prompt but its last token, then that one, over the policy's cache; or why that is refused."""
    torch._dynamo.reset()
    inputs = architecture.inputs("left", torch.Generator().manual_seed(4))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    fast = rewriter.optimize(model, policy, backend="eager")
    cache = fast.new_cache(2 * LENGTH)
    fast(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    last = fast(input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache)
    with Masked(visible_keys(policy, ids, mask), architecture.causal):
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return _difference({"logits": last.logits}, {"logits": expected[:, -1:]})


@torch.no_grad()
def _over_dynamic_cache(architecture: Architecture, model: nn.Module) -> float:
    """The same under `Exact()` over transformers' own cache."""
    from transformers import DynamicCache

    torch._dynamo.reset()
    fast = rewriter.optimize(model, Exact(), backend="eager", strict=True)
    ids = torch.randint(2, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = real_tokens("left" if "left" in architecture.paddings else "none")

    config = model.config

    def run(model: nn.Module) -> dict[str, Tensor]:
        cache = DynamicCache(config=config)
        first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
        last = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
        return {"prompt": first.logits[mask[:, :-1].bool()], "step": last.logits}

    with Masked():
        expected = run(model)
    return _difference(run(fast), expected)


if __name__ == "__main__":
    import typer

    def main(
        out: Annotated[Path, typer.Option(help="File of the results.")],
        only: Annotated[str | None, typer.Option(help="Architectures whose names begin so.")] = None,
        eager: Annotated[bool, typer.Option(help="Leave compiled code for another time.")] = False,
        backwards: Annotated[bool, typer.Option(help="The last architectures first, beside another process.")] = False,
    ) -> None:
        """Examine the zoo; `bench/tables.py` makes the documentation's table of the results."""
        torch.set_num_threads(1)
        chosen = [(a, attention) for a in ARCHITECTURES for attention in a.implementations]
        for architecture, attention in reversed(chosen) if backwards else chosen:
            key = (architecture.name, attention)
            compiled = not eager and attention == architecture.implementations[0]
            known = _read(out).get(key)
            if only is not None and not architecture.name.startswith(only):
                continue
            if known is None or (compiled and known["inductor"] is None and not known["error"]):
                row = asdict(examine(architecture, attention, compiled=compiled))
                out.write_text(json.dumps(_ordered({**_read(out), key: row}), indent=1) + "\n")
                print(f"{architecture.name}, {attention}: {row['seconds']:.0f} s", flush=True)

    def _read(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
        return {(r["name"], r["attention"]): r for r in (json.loads(out.read_text()) if out.exists() else [])}

    def _ordered(rows: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
        keys = [(a.name, attention) for a in ARCHITECTURES for attention in a.implementations]
        return [rows[key] for key in keys if key in rows]

    typer.run(main)

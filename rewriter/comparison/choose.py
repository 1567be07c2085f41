"""`choose`: a policy for each attention, by what it would lose on a text, within a budget of keys and values.

Layers differ: some attend to the whole text, others to the last few keys. What a policy hides at a layer is measured as attention
mass, the share of the original's weights that lie on keys that the policy would hide (the idea of DuoAttention, arXiv 2410.10819,
for whole layers, and measured where it is trained there). The choice is the one with the least mass hidden in all layers together
whose keys and values fit the budget: a knapsack with one item of each layer, solved exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch import nn

from rewriter.api import explain
from rewriter.comparison.texts import rows_of
from rewriter.errors import PolicyError
from rewriter.errors import RewriteError
from rewriter.passes.policy import Policy
from rewriter.policies.exact import Exact
from rewriter.policies.per_layer import PerLayer
from rewriter.policies.ranges import policy_ranges
from rewriter.policies.sliding_window import SlidingWindow
from rewriter.report.data import readable_bytes

SINKS = 4
"""First keys that the default windows keep."""

UNITS = 100_000
"""Most steps into which a budget is divided; a layer's bytes are rounded up to whole ones."""


@dataclass(frozen=True)
class ChosenLayer:
    """One attention.

    Attributes:
        module: its name.
        policy: that was chosen, as text.
        hidden: share of its attention mass that each option hides, by the option's text.
        kv_bytes: of the keys and values that live at once under each option, for a row.
    """

    module: str
    policy: str
    hidden: Mapping[str, float]
    kv_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """What `choose` found; prints as a table.

    Attributes:
        policy: for `rewriter.optimize`; `policy.to_dict()` is what `to_json` writes, and `Policy.from_dict` reads.
        layers: in the model's order.
        budget_bytes, kv_bytes, full_bytes: that were allowed for a row of `length` tokens, that live at once under the choice,
            and of all keys and values.
        length, rows: of the texts that were measured.
    """

    policy: PerLayer
    layers: tuple[ChosenLayer, ...]
    budget_bytes: int
    kv_bytes: int
    full_bytes: int
    length: int
    rows: int

    @property
    def hidden(self) -> float:
        """Mean share of the attention mass that is hidden."""
        return sum(layer.hidden[layer.policy] for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.to_dict(),
            "layers": [
                {"module": c.module, "policy": c.policy, "hidden": dict(c.hidden), "kv_bytes": dict(c.kv_bytes)}
                for c in self.layers
            ],
            **{n: getattr(self, n) for n in ("budget_bytes", "kv_bytes", "full_bytes", "length", "rows")},
        }

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __rich__(self) -> Table:
        title = (
            f"{readable_bytes(self.kv_bytes)} of keys and values of a row of {self.length:,} tokens, of "
            f"{readable_bytes(self.full_bytes)}; {self.hidden:.1%} of the attention mass is hidden, mean of the layers"
        )
        table = Table(title=title, title_justify="left")
        options = list(self.layers[0].hidden)
        for name in ("layer", "chosen", *(f"hidden by {option}" for option in options)):
            table.add_column(name, justify="left" if name in ("layer", "chosen") else "right")
        for number, layer in enumerate(self.layers):
            table.add_row(str(number), layer.policy, *(f"{layer.hidden[option]:.1%}" for option in options))
        return table


def choose(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    budget: float | None = None,
    budget_bytes: int | None = None,
    options: Sequence[Policy] | None = None,
    length: int = 2048,
    rows: int = 2,
) -> Choice:
    """Chooses a policy for each attention of a model, for a budget of keys and values; in minutes, without training.

    The same text gives the same choice. The weights are those of the model's own eager attention; nothing of the model is changed.

    Args:
        model: of transformers, with an eager attention that returns its weights.
        tokenizer: the model's.
        text: to measure on; longer than `length` tokens, like the texts that the model will read.
        budget: share of the bytes of all keys and values of a row, more than 0, at most 1; or
        budget_bytes: so many bytes for each row of `length` tokens.
        options: policies that a layer may have; when left out `Exact()` and windows of a half, a quarter, ... of `length` down to
            32 keys, with 4 sinks. Such as look at query, key and value are not among them.
        length, rows: tokens of a row that is measured, and how many.

    Raises:
        PolicyError: no choice fits the budget (it says the least that is possible), or an option needs a site's tensors.
        RewriteError: the text is too short, a site is refused, or attention weights cannot be read.
    """
    if (budget is None) == (budget_bytes is None):
        raise PolicyError("give budget, a share, or budget_bytes, and not both")
    ids = rows_of(tokenizer, text, length, rows)
    length = ids[0].size(1)
    given = _default_options(length) if options is None else list(dict.fromkeys(options))
    if not given:
        raise PolicyError("options are empty; give at least one policy, such as Exact()")
    for option in given:
        if option.reads_site or option.is_program or isinstance(option, PerLayer):
            raise PolicyError(f"{option} cannot be measured by what it hides of a text; leave it out of the options")
    modules, sizes, full = _sizes(model, given, ids[0])
    if budget is not None and not 0 < budget <= 1:
        raise PolicyError(f"budget must be more than 0 and at most 1, got {budget:g}; for bytes there is budget_bytes")
    allowed = int(budget * full) if budget is not None else int(budget_bytes or 0)
    hidden = _hidden(model, modules, given, ids)
    chosen = _least(hidden, sizes, allowed)
    names = [str(option) for option in given]
    layers = tuple(
        ChosenLayer(module, names[n], dict(zip(names, lost, strict=True)), dict(zip(names, kept, strict=True)))
        for module, n, lost, kept in zip(modules, chosen, hidden, sizes, strict=True)
    )
    numbers = [[layer for layer, n in enumerate(chosen) if n == option] for option in range(len(given))]
    return Choice(
        policy=PerLayer({key: given[n] for n, own in enumerate(numbers) for key in _keys_of(own)}),
        layers=layers,
        budget_bytes=allowed,
        kv_bytes=sum(kept[n] for kept, n in zip(sizes, chosen, strict=True)),
        full_bytes=full,
        length=length,
        rows=len(ids),
    )


def _default_options(length: int) -> list[Policy]:
    windows = [length // 2**n for n in range(1, length.bit_length()) if length // 2**n >= 32]
    return [Exact(), *(SlidingWindow(window - SINKS, sinks=SINKS) for window in windows)]


def _keys_of(numbers: Sequence[int]) -> Iterator[int | str]:
    """Layers as a `PerLayer` names them: neighbours as one range."""
    first = 0
    for n in range(1, len(numbers) + 1):
        if n == len(numbers) or numbers[n] != numbers[n - 1] + 1:
            yield numbers[first] if first == n - 1 else f"{numbers[first]}-{numbers[n - 1]}"
            first = n


def _sizes(model: nn.Module, options: Sequence[Policy], ids: Tensor) -> tuple[list[str], list[list[int]], int]:
    """Names of the attentions' modules; bytes of the keys and values that live at once, by layer and option; of all keys."""
    ids = ids.to(next(model.parameters()).device)
    reports = [explain(model, policy=p, length=ids.size(1), input_ids=ids, use_cache=False) for p in options]
    for report in reports:
        refused = next((site for site in report.sites if site.prediction is None), None)
        if refused is not None:
            raise RewriteError(
                f"{refused.module} is not rewritten under {refused.policy}, and nothing can be chosen for it: {refused.reason}"
            )
    sites = list(zip(*(report.sites for report in reports), strict=True))
    predictions = [[site.prediction for site in own if site.prediction is not None] for own in sites]
    full = sum(own[0].dense_kv_bytes for own in predictions)
    return [own[0].module for own in sites], [[p.kv_bytes for p in own] for own in predictions], full


@torch.no_grad()
def _hidden(model: Any, modules: Sequence[str], options: Sequence[Policy], rows: Sequence[Tensor]) -> list[list[float]]:
    """Share of the attention mass on keys that each option hides, by layer: mean of the rows, the heads and the queries."""
    device = next(model.parameters()).device
    found = torch.zeros(len(modules), len(options), dtype=torch.float64)
    with _eager_attention(model):
        for ids in rows:
            index = torch.arange(ids.size(1))
            shown = [
                policy_ranges(option, ids).visible(index).expand(1, 1, -1, -1)[0, 0].to(device) for option in options
            ]

            def look(layer: int, weights: Tensor, shown: list[Tensor] = shown) -> None:
                mass = weights[0].float().mean(dim=0)  # [Q, K]
                for n, visible in enumerate(shown):
                    found[layer, n] += float(mass.masked_fill(visible, 0).sum()) / (ids.size(1) * len(rows))

            _with_weights(model, modules, ids.to(device), look)
    return found.tolist()


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Inside, the model's attention is transformers' eager one, which returns its weights."""
    if not hasattr(model, "set_attn_implementation"):
        raise RewriteError(f"{type(model).__name__} is no model of transformers whose attention can be made eager")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _with_weights(model: Any, modules: Sequence[str], ids: Tensor, look: Callable[[int, Tensor], None]) -> None:
    """Calls the model, and `look` with each attention's number and its weights `[1, Hq, K, K]`, which are not kept."""
    seen: set[int] = set()

    def hook(layer: int) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.dim() != 4:
                raise RewriteError(f"{modules[layer]} returns no attention weights, and nothing can be chosen for it")
            seen.add(layer)
            look(layer, weights)

        return read

    handles = [model.get_submodule(name).register_forward_hook(hook(n)) for n, name in enumerate(modules)]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = next((name for n, name in enumerate(modules) if n not in seen), None)
    if missing is not None:
        raise RewriteError(f"{missing} was not called, and nothing can be chosen for it")


def _least(hidden: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], allowed: int) -> list[int]:
    """The option of each layer, by number, with the least mass hidden whose bytes fit; of equal ones the smaller.

    Raises:
        PolicyError: none fits.
    """
    least = sum(min(own) for own in sizes)
    if least > allowed:
        raise PolicyError(
            f"no choice of these options keeps as little as {readable_bytes(allowed)}: the least possible is "
            f"{readable_bytes(least)}; give a larger budget, or smaller options"
        )
    unit = max(1, -(-allowed // UNITS))
    steps = allowed // unit
    best = torch.full((steps + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0  # by units used exactly
    taken: list[Tensor] = []
    for lost, kept in zip(hidden, sizes, strict=True):
        tried = torch.full((len(lost), steps + 1), torch.inf, dtype=torch.float64)
        for n, (mass, size) in enumerate(zip(lost, kept, strict=True)):
            used = -(-size // unit)
            if used <= steps:
                tried[n, used:] = best[: steps + 1 - used] + mass
        best, option = tried.min(dim=0)
        taken.append(option)
    at = int(best.argmin())
    chosen = []
    for option, kept in zip(reversed(taken), reversed(sizes), strict=True):
        n = int(option[at])
        chosen.append(n)
        at -= -(-kept[n] // unit)
    return chosen[::-1]

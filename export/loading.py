"""Loading: an artifact in Python. Everything is checked before it runs: integrity, version, machine, dtypes, sizes, room."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rewriter.export.artifact import ExportReport
from rewriter.export.artifact import check_inputs
from rewriter.export.registry import TARGETS
from torch import Tensor

from rewriter.errors import ArtifactError


@dataclass
class Cache:
    """Attributes:
    tensors: in the order of the entry points' inputs.
    lost: the places of those that count keys that found no slot.
    length: tokens that it has taken.
    """

    tensors: list[Tensor]
    lost: tuple[int, ...]
    length: int = 0


class Artifact:
    """An exported model; made by `load`.

    Attributes:
        report: what it is.
        entry_points: their names: "forward"; or "prefill" and "decode"; or "chunk".
    """

    def __init__(self, report: ExportReport, calls: dict[str, Callable[..., Any]]) -> None:
        self.report, self._calls = report, calls
        self.entry_points = tuple(calls)
        self.device = torch.device(report.machine[1])

    def __call__(self, **arguments: Tensor) -> Tensor:
        """The model's own call: its logits, or its first result.

        An artifact with a cache reads the whole text into an empty one; it takes `input_ids`, and `attention_mask` and
        `position_ids` as `run` does.

        Raises:
            ArtifactError: an argument is missing, unknown, or of another dtype or size than the artifact was exported for.
        """
        if "prefill" in self._calls:
            known = ("input_ids", "attention_mask", "position_ids")
            if "input_ids" not in arguments or not arguments.keys() <= set(known):
                raise ArtifactError(f"the artifact takes {', '.join(known)}; got {', '.join(arguments) or 'nothing'}")
            ids = arguments["input_ids"]
            rows = torch.arange(ids.size(-1), device=ids.device)
            return self.run(self.new_cache(ids.size(0)), **arguments, logits_to_keep=rows)
        names = [i.name for i in self.report.inputs(self._need("forward"))]
        if set(arguments) != set(names):
            raise ArtifactError(f"the artifact takes {', '.join(names)}; got {', '.join(arguments) or 'nothing'}")
        result: Tensor = self._run("forward", [arguments[name] for name in names])[0]
        return result

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for so many rows."""
        inputs = self.report.inputs(self._need("decode"))
        state = [i for i in inputs if i.fill is not None]
        tensors = [i.example({"batch": batch_size}, self.device) for i in state]
        return Cache(tensors, tuple(place for place, i in enumerate(state) if i.name.endswith(".lost")))

    def run(
        self,
        cache: Cache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> Tensor:
        """New tokens over a cache, which takes them.

        Args:
            input_ids: int64 `[B, n]`.
            attention_mask: int64 `[B, n]`, 0 for padding; all ones when left out.
            position_ids: int64 `[B, n]`; the places in the text when left out.
            logits_to_keep: int64 `[k]`, tokens whose logits are wanted; the last one when left out.

        Returns:
            `[B, k, vocabulary]`.

        Raises:
            ArtifactError: an argument does not fit, or the cache has no room.
        """
        if input_ids.dim() != 2 or not input_ids.size(1):
            raise ArtifactError(f"input_ids must be int64 [B, n] with at least one token, got {list(input_ids.shape)}")
        num_new = input_ids.size(1)
        most = self.report.max_length
        if most is not None and cache.length + num_new > most:
            raise ArtifactError(
                f"the cache has {cache.length} of at most {most} tokens, and {num_new} more do not fit; export with a larger "
                "max_length"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(cache.length, cache.length + num_new, device=input_ids.device)
            position_ids = position_ids.expand(input_ids.size(0), -1)
        arguments = [input_ids, attention_mask, position_ids.contiguous()]
        if num_new == 1:
            results = self._run("decode", [*arguments, *cache.tensors])
        else:
            if logits_to_keep is None:
                logits_to_keep = torch.tensor([num_new - 1], device=input_ids.device)
            results = self._run("prefill", [*arguments, logits_to_keep, *cache.tensors])
        logits, *new = results
        if new:  # of a format whose programs change nothing in place
            cache.tensors = new
        if any(int(cache.tensors[place]) for place in cache.lost):
            raise ArtifactError(
                "more keys live at once than the policy promised, and some were lost; mend its pressure()"
            )
        cache.length += num_new
        return logits

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int) -> Tensor:
        """Greedy continuation: int64 `[B, n + max_new_tokens]`; shorter prompts are padded on the left."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = self.new_cache(input_ids.size(0))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.run(cache, input_ids, mask, positions)
        result, last = [input_ids], positions[:, -1:]
        for number in range(max_new_tokens):
            token = logits[:, -1].argmax(-1, keepdim=True).to(input_ids.device)
            result.append(token)
            last = last + 1
            if number + 1 < max_new_tokens:
                logits = self.run(cache, token, torch.ones_like(token), last)
        return torch.cat(result, dim=1)

    def chunk(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, num_query: int, hides: bool = True
    ) -> tuple[Tensor, ...]:
        """The first phase of a chunked eviction: the logits of the query's tokens, and each site's keys, values, scores and
        what calibration hides (nothing unless `hides`); rows are chunks with the query behind them, padded on the left."""
        self._need("chunk")
        rows = torch.arange(input_ids.size(1) - num_query, input_ids.size(1), device=input_ids.device)
        return tuple(
            self._run("chunk", [input_ids, attention_mask, position_ids, rows - 1, rows, torch.tensor([hides])])
        )

    def _need(self, name: str) -> str:
        if name not in self._calls:
            why = f" ({self.report.no_decode})" if self.report.no_decode else ""
            raise ArtifactError(f"the artifact has no {name}, it has {', '.join(self._calls)}{why}")
        return name

    def _run(self, name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        check_inputs(self.report.inputs(name), self.report.entry_points[name]["ranges"], tensors)
        with torch.no_grad():
            # Compiled code takes the strides of its examples for granted.
            result = self._calls[name](*(t.contiguous() for t in tensors))
        return [result] if isinstance(result, Tensor) else result


def load(path: str | Path, runtime: str | None = None) -> Artifact:
    """An artifact that was written by one of the exporters.

    Args:
        runtime: for ONNX files "onnxruntime" or, for those without functions, "openvino"; the first when left out.

    Raises:
        ArtifactError: it is missing, damaged or cut off, or of another format, version or machine; or it does not open in that
            runtime.
    """
    path = Path(path)
    report = ExportReport.read(path)
    if report.target not in TARGETS:
        raise ArtifactError(f"{path} is for {report.target!r}; this version opens {', '.join(TARGETS)}")
    target = TARGETS[report.target]
    if runtime is None:
        return Artifact(report, target.open_calls(path, report))
    if runtime not in target.runtimes:
        raise ArtifactError(
            f"{path} does not open in {runtime!r}; it opens in {', '.join(target.runtimes) or 'its own alone'}"
        )
    return Artifact(report, target.open_calls(path, report, runtime))

"""`Decoder`: a model that runs the new tokens of a text only, over a `LiveRangeCache`.

The model is captured once, on a few tokens without a cache. Its sites are proven as always and lowered to slots, in one graph
for prefill (several new tokens) and one for decoding (a single one). Both are compiled for themselves, and called with the
model's present parameters, the new tokens and the state of a cache.

That a model may be run so is checked and not assumed: everything in it but attention must treat each token for itself. Some
tokens are run at once and in pieces, and the logits compared."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from rewriter.code import CodeOfSizes
from rewriter.errors import CacheError
from rewriter.errors import PolicyError
from rewriter.generation.cache import LiveRangeCache
from rewriter.generation.guards import CapturedCall
from rewriter.generation.model_facts import ARGUMENTS
from rewriter.generation.model_facts import signature_of
from rewriter.generation.model_facts import takes_use_cache
from rewriter.generation.model_facts import vocabulary_of
from rewriter.generation.recorded_step import RecordedStep
from rewriter.generation.recorded_step import check_records
from rewriter.generation.trial import TRIAL_LENGTH
from rewriter.generation.trial import check_alone
from rewriter.generation.trial import check_in_pieces
from rewriter.generation.trial import takes_indices_as_positions
from rewriter.passes import Analysed
from rewriter.passes import CachedGraphs
from rewriter.passes import Policy
from rewriter.passes import rewrite_for_cache
from rewriter.passes.graph.inputs import GraphInput
from rewriter.sharding import holds_dtensors
from rewriter.tracing import many_kinds_of_calls


class Decoder:
    """The graphs of a model for prefill and decoding, compiled, with the cache that they change.

    Args:
        model: captured as it is now.
        policy, policy_parameters: by site number and name.
        backend: "inductor" or "eager".
        cuda_graphs: whether the step of one token is recorded as a CUDA graph.
        dump: folder for the graphs before and after each pass, or None.
        on_rewritten: called with what the passes did.

    Attributes:
        prefill, decode: the graphs, callable.
        own: those that the policy asked for besides, by name.
        layout: of the caches.
        inputs, fetch: what the graphs' first inputs are, and how each is found at a call.
        vocabulary: tokens that the model knows.

    Raises:
        CacheError: the model cannot go on from a cache; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        policy_parameters: nn.ModuleDict,
        *,
        backend: str,
        cuda_graphs: bool,
        dump: Path | None,
        on_rewritten: Callable[[Analysed], None],
    ) -> None:
        self.model = model
        self.policy = policy
        self.policy_parameters = policy_parameters
        self.takes_rows = "logits_to_keep" in signature_of(self.model)
        if cuda_graphs:
            check_records(self.device)
        if holds_dtensors(model) and (cuda_graphs or policy.is_program):
            what = "cuda_graphs" if cuda_graphs else str(policy)
            raise CacheError(
                f"{what} is not for weights that are spread over processes (parallelize_module), as those of "
                f"{type(model).__name__} are; leave it out, or put the model on one device"
            )
        missing = [name for name in ARGUMENTS if name not in signature_of(self.model)]
        if missing:
            raise CacheError(
                f"{type(self.model).__name__}.forward takes no {missing[0]}; a model that goes on from a cache takes "
                f"{', '.join(ARGUMENTS)}"
            )
        self._captured = CapturedCall(
            model,
            self._named_parameters,
            self._example_arguments(),
            lambda graph, inputs: rewrite_for_cache(graph, inputs, policy, dump=dump),
        )
        result = self._captured.result
        on_rewritten(result)
        self.graphs: CachedGraphs = result.cached
        self.layout = self.graphs.layout
        self.inputs = result.inputs
        self.fetch = [self._fetcher(place, given) for place, given in enumerate(result.inputs)]
        self.constants = {name: (b := self.model.get_buffer(name), b._version) for name in result.constants}
        self.vocabulary = vocabulary_of(self.model)
        self.default_positions = False
        try:
            check_in_pieces(self)
            check_alone(self.model, self.vocabulary)
            self.default_positions = takes_indices_as_positions(self.model, self.vocabulary)
        except (CacheError, PolicyError):
            raise
        except Exception as error:  # whatever the model's own operators raise on a few tokens
            raise CacheError(
                f"{type(self.model).__name__} cannot be tried on {TRIAL_LENGTH} tokens over a cache: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.prefill: Callable[..., Any] = self.graphs.prefill
        self.decode: Callable[..., Any] = self.graphs.decode
        self.own: dict[str, Callable[..., Any]] = dict(self.graphs.own)
        # Over DTensors, those of tensor parallelism, the graphs run as they are: code for them is for fixed sizes alone.
        if backend == "inductor" and not holds_dtensors(self.model):
            any_size = self._sizes_of_each_call(result.inputs)
            self.prefill = CodeOfSizes(self.graphs.prefill, any_size)
            self.decode = CodeOfSizes(self.graphs.decode, any_size, first_alone=True)
            self.own = {name: CodeOfSizes(graph, any_size) for name, graph in self.graphs.own.items()}
        if cuda_graphs:
            self.decode = RecordedStep(
                self.decode, [n for n, given in enumerate(result.inputs) if _is_of_each_call(given)]
            )

    @property
    def is_current(self) -> bool:
        """Whether the model is still as it was captured, by Dynamo's guards, and the masks that it holds are what they were."""
        return self._captured.holds() and all(
            self.model.get_buffer(name) is buffer and buffer._version == version
            for name, (buffer, version) in self.constants.items()
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def new_cache(self, max_length: int | None, *, grows: bool = False) -> LiveRangeCache:
        return LiveRangeCache(self.layout, max_length, self.device, grows=grows)

    @torch.no_grad()
    def run(
        self,
        cache: LiveRangeCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Takes new tokens, and returns their logits.

        Args:
            input_ids: integer `[B, n]`, the new tokens.
            attention_mask: integer or bool `[B, n]` or of the whole text, `[B, length + n]`; 0 for padding.
            position_ids: integer `[B|1, n]`; the places in the text, padding included, when left out, if that is what the model
                itself would take.
            rows: int64 `[m]`, the tokens whose logits are wanted; all when left out.

        Returns:
            `[B, m, vocabulary]`.

        Raises:
            CacheError: an argument does not fit; nothing has changed.
        """
        self.check_arguments(cache, input_ids, attention_mask, position_ids)
        return self.run_checked(cache, input_ids, attention_mask, position_ids, rows)

    @torch.no_grad()
    def run_checked(
        self,
        cache: LiveRangeCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        """`run`, of arguments that `check_arguments` has passed; a small model would notice a second check at each token."""
        num_batch, num_new = input_ids.shape
        cache.make_room(num_new)
        cache.allocate(num_batch)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(cache.length, cache.length + num_new, device=input_ids.device)[None]
        if cache.position_shift is not None:
            # Padding, which no one sees, may have any.
            position_ids = (position_ids + cache.position_shift).clamp(min=0)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask[:, -num_new:].to(torch.int64),
            "position_ids": position_ids.to(torch.int64).expand(num_batch, -1),
            "logits_to_keep": torch.arange(num_new, device=input_ids.device) if rows is None else rows,
        }
        arguments = {name: _in_memory_of_its_own(tensor) for name, tensor in arguments.items()}
        call = self.decode if num_new == 1 else self.prefill
        expected = cache.expected_call
        if expected is not None:
            if num_new != expected.num_tokens:
                raise CacheError(
                    f"the {expected.graph} decides which keys of the cache stay: its {expected.num_tokens} tokens must come in "
                    f"one call, got {num_new}"
                )
            call = self.own[expected.graph]
        cache.is_broken = True
        try:
            logits = self.call(call, arguments, cache)
        except BaseException:
            if not cache.length:
                cache.release()
            raise
        if any(int(table["lost"]) for table in cache.tables):
            raise RuntimeError(
                "more keys live at once than the policy's pressure() allows, and some were lost: mend pressure()"
            )
        cache.length, cache.last_ids, cache.is_broken = cache.length + num_new, input_ids[:, -1].clone(), False
        if expected is not None:
            cache.expected_call = None
            for table in cache.tables:  # what that call has hidden cannot be taken back
                table["forgotten"].fill_(cache.length)
        return logits

    def call(self, call: Callable[..., Any], arguments: Mapping[str, Tensor], cache: LiveRangeCache) -> Tensor:
        with many_kinds_of_calls():
            (logits,) = call(*(fetch(arguments) for fetch in self.fetch), *cache.state())
        return logits if self.takes_rows else logits[:, arguments["logits_to_keep"]]

    def check_ids(self, ids: Tensor) -> None:
        """Raises `CacheError` where one is no token of the model's."""
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.vocabulary:
            raise CacheError(f"input_ids must be from 0 to {self.vocabulary - 1}, got {low if low < 0 else high}")

    def check_arguments(
        self,
        cache: LiveRangeCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        chunk: int | None = None,
    ) -> None:
        if cache.layout.graphs != self.layout.graphs:
            raise CacheError(
                "the cache was made by another optimized model, policy or dtype, or before the model was changed; make one for "
                "this model with new_cache()"
            )
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise CacheError(f"input_ids must be integer [B, n], got {input_ids.dtype} {list(input_ids.shape)}")
        num_batch, num_new = input_ids.shape
        if not num_new or not num_batch:
            raise CacheError(f"input_ids is empty, {list(input_ids.shape)}; give at least one token")
        cache.check_rows(num_batch)
        most = self.graphs.most_tokens
        if most is not None and (chunk or num_new) > most:
            raise CacheError(
                f"{type(self.model).__name__} takes at most {most} tokens at once, got {num_new}; give fewer, or prefill_chunk"
            )
        self.check_ids(input_ids)
        if attention_mask is not None:
            sizes = (num_new, cache.length + num_new)
            if attention_mask.dim() != 2 or attention_mask.size(0) != num_batch or attention_mask.size(1) not in sizes:
                raise CacheError(
                    f"attention_mask must be [{num_batch}, {num_new}], or [{num_batch}, {sizes[1]}] for the whole text, got "
                    f"{list(attention_mask.shape)}"
                )
        if position_ids is not None and _falls(position_ids, attention_mask):
            raise CacheError(
                "position_ids start again within a row, as those of packed documents do; a cache holds one text in each row: "
                "give each document a row of its own, padded on the left"
            )
        if position_ids is None and not self.default_positions:
            raise CacheError(
                f"{type(self.model).__name__} does not number tokens by their place in the text; give position_ids [B, n]"
            )
        if position_ids is not None and tuple(position_ids.shape) not in ((num_batch, num_new), (1, num_new)):
            raise CacheError(f"position_ids must be [{num_batch}, {num_new}], got {list(position_ids.shape)}")

    def _example_arguments(self) -> dict[str, Any]:
        """Of the call that is captured."""
        device = self.device
        ids = torch.zeros(2, TRIAL_LENGTH, dtype=torch.int64, device=device)
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(TRIAL_LENGTH, device=device).expand(2, -1).contiguous(),
        }
        if self.takes_rows:
            arguments["logits_to_keep"] = torch.arange(3, device=device)
        if takes_use_cache(self.model):
            arguments["use_cache"] = False
        return arguments

    def _sizes_of_each_call(self, inputs: Sequence[GraphInput]) -> dict[int, set[int]]:
        """Of the graphs' inputs, the dimensions that differ from call to call: those of the tokens, and of the cache."""
        found = {n: set(range(given.value.dim())) for n, given in enumerate(inputs) if _is_of_each_call(given)}
        state = [s for table in self.layout.tables for s in table.state]
        state += [s for site in self.layout.sites for s in site.state]
        for place, tensor in enumerate(state, len(inputs)):
            found[place] = {n for n, size in enumerate(tensor.shape) if isinstance(size, str)}
        return found

    def _named_parameters(self) -> dict[str, Tensor]:
        return dict(self.policy_parameters.named_parameters(remove_duplicate=False))

    def _fetcher(self, place: int, given: GraphInput) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """How an input of the graphs is found at each call: parameters by name, as the model may have been given others."""
        if _is_of_each_call(given):
            return lambda arguments: arguments[given.name]
        if given.kind == "argument":
            path, _, name = given.name.rpartition(".")
            owner: Any = self.policy_parameters.get_submodule(path)
            return lambda _: owner[name]
        if given.kind == "constant":
            return lambda _: self._captured.present[place]
        path, _, name = given.name.rpartition(".")
        module = self.model.get_submodule(path)
        if given.kind == "buffer":
            return lambda _: module._buffers[name]  # type: ignore[return-value]
        return lambda _: module._parameters[name]  # type: ignore[return-value]


def _is_of_each_call(given: GraphInput) -> bool:
    return given.kind == "argument" and given.name in (*ARGUMENTS, "logits_to_keep")


def _in_memory_of_its_own(tensor: Tensor) -> Tensor:
    """A copy of what is a part of a longer tensor. Code is made for strides and offsets, and those of the last column of one row,
    which is contiguous as it is, are others at each token."""
    return (
        tensor
        if tensor.untyped_storage().nbytes() == tensor.nbytes
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _falls(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether the position of a token is less than that of the one before it."""
    if position_ids.dim() != 2 or position_ids.size(1) < 2:
        return False
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attention_mask is not None:
        tokens = attention_mask[:, -position_ids.size(1) :].bool()
        falls = falls & tokens[:, 1:] & tokens[:, :-1]
    return bool(falls.any())

"""`OptimizedModel`: a model with rewritten attention, compiled at its first call."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.fx import GraphModule

from rewriter.code import kept_in
from rewriter.code import recomputing
from rewriter.code_of_graphs import CodeOfGraphs
from rewriter.errors import CacheError
from rewriter.errors import PolicyError
from rewriter.errors import PolicyWarning
from rewriter.errors import RewriteError
from rewriter.errors import SpeedWarning
from rewriter.generation.model_facts import attention_implementation
from rewriter.generation.model_facts import is_checkpointing
from rewriter.generation.model_facts import named_arguments
from rewriter.generation.model_facts import returns_dict
from rewriter.generation.model_facts import signature_of
from rewriter.generation.model_facts import takes_more_than_text
from rewriter.generation.model_facts import takes_use_cache
from rewriter.kernels.context_parallel import ContextGroup
from rewriter.kernels.cpu import native
from rewriter.passes import Analysed
from rewriter.passes import Answer
from rewriter.passes import WillNotPay
from rewriter.passes import gathers_parameters
from rewriter.passes import rewrite
from rewriter.passes.policy import Policy
from rewriter.progress import Progress
from rewriter.report import Report
from rewriter.report import Subject
from rewriter.saved_model import write
from rewriter.sharding import check_call
from rewriter.sharding import gathers_layers
from rewriter.sharding import holds_dtensors
from rewriter.sharding import is_gathered_by_fully_shard
from rewriter.sharding import let_dynamo_guard
from rewriter.tracing import NotCaptured
from rewriter.tracing import TooManyKindsOfCalls
from rewriter.tracing import analyse_call
from rewriter.tracing import guarded
from rewriter.tracing import install_output_hooks
from rewriter.tracing import traced_call
from rewriter.wrapper import ModelWrapper

if TYPE_CHECKING:
    from rewriter.chunked.reading import Reading
    from rewriter.generation.cache import LiveRangeCache
    from rewriter.generation.decoder import Decoder


class OptimizedModel(ModelWrapper):
    """A model with rewritten attention; built by `optimize`. Same signature, parameters and training behaviour.

    Attributes:
        model: the original, whose parameters are shared.
        policy: the policy it was built with.
        backend, strict, kernel, cuda_graphs, cache, dump: as they were given to `optimize`.
        policy_parameters: the policy's own parameters, by site number and name; empty for most policies.
        report: every attention site, rewritten or refused, and why; filled at the first call.
    """

    # Declared, so that they are never set on the model, which may have attributes of these names.
    policy: Policy
    backend: str
    strict: bool | str
    kernel: str
    cuda_graphs: bool
    cache: Path | None
    dump: Path | None
    report: Report
    _base: OptimizedModel | None
    _call: Callable[..., Any]
    _code: CodeOfGraphs
    _compiled_model: tuple[nn.Module]
    _constants: dict[str, tuple[Tensor, int]]
    _context: ContextGroup | None
    _decoder: Decoder | None
    _has_output_hooks: bool
    _has_run: list[bool]
    _asks_whether_it_pays: list[bool]
    _parameter_sites: dict[int, str]
    _progress: Progress

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        backend: str,
        strict: bool | str,
        kernel: str = "auto",
        cuda_graphs: bool = False,
        cache: Path | None = None,
        dump: Path | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model)
        self._progress = Progress(type(model).__name__, progress)
        self.policy = policy
        self.backend = backend
        self.strict = strict
        self.kernel = kernel
        self.cuda_graphs = cuda_graphs
        self.cache = cache
        self.dump = dump
        self.report = Report(subject=Subject.of(model, policy))
        self.policy_parameters = nn.ModuleDict()
        self._parameter_sites = {}
        self._has_run = [False]  # in a list, which is shared with `base_model`; so is the next
        self._asks_whether_it_pays = [True]
        self._base = None
        self._context = None
        self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`; what was assigned to it in its place must come back to the model's own, or to its `base_model`."""
        if "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        self._has_run[0] = False
        result = super().__call__(*args, **kwargs)
        if not self._has_run[0] and not self.policy.is_lossless:
            name = getattr(self.forward, "__qualname__", type(self.forward).__name__)
            raise RewriteError(
                f"forward was replaced by {name}, which calls parts of the model itself, so {self.policy} was not applied; let "
                "it call the forward that it replaces, or base_model, which is optimized too"
            )
        return result

    @property
    def base_model(self) -> Any:
        """The model without its head, optimized alike, with the same policy's parameters and report.

        Libraries that have a head of their own call it: TRL computes losses so. It is the original's own where that is not a
        module of transformers with a head.
        """
        inner = self.model.base_model
        if inner is self.model:
            return self
        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel) or not isinstance(inner, PreTrainedModel):
            return inner
        known = self._base
        if known is None or known.model is not inner:
            known = OptimizedModel(
                inner,
                self.policy,
                backend=self.backend,
                strict=self.strict,
                kernel=self.kernel,
                cache=self.cache,
                dump=None if self.dump is None else self.dump / "base",
                progress=self._progress.enabled,
            )
            known.report, known.policy_parameters, known._has_run = self.report, self.policy_parameters, self._has_run
            known._asks_whether_it_pays = self._asks_whether_it_pays
            known._context = self._context
            prefix = re.compile(rf"(^| ){re.escape(self.model.base_model_prefix)}\.")
            known._parameter_sites = {k: prefix.sub(r"\1", name) for k, name in self._parameter_sites.items()}
            self.__dict__["_base"] = known
        return known.train(self.training) if known.training != self.training else known

    @property
    def get_decoder(self) -> Callable[[], Any]:
        """transformers' method, whose result is `base_model` where the decoder is that."""
        inner: Any = self.model.get_decoder  # for those that have none, an AttributeError

        def get_decoder() -> Any:
            decoder = inner()
            return self.base_model if decoder is getattr(self.model, "base_model", None) else decoder

        return get_decoder

    def __getattr__(self, name: str) -> Any:
        """The model's; its methods that would compute it without the policy are an error."""
        if name in ("merge_and_unload", "unload"):
            return functools.partial(self._without_adapters, super().__getattr__(name))
        value = super().__getattr__(name)
        if _COMPUTES.fullmatch(name) and callable(value) and not self.policy.is_lossless:

            def refused(*args: Any, **kwargs: Any) -> Any:
                raise RewriteError(
                    f"{name} is a method of the original, and would compute it without {self.policy}; call the optimized model "
                    f"or its generate, or, if the original is meant, fast.model.{name}(...)"
                )

            return refused
        return value

    def _without_adapters(self, take_off: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> OptimizedModel:
        """What is left when peft takes its adapters off, optimized alike."""
        inner = take_off(*args, **kwargs)
        own = OptimizedModel(
            inner,
            self.policy,
            backend=self.backend,
            strict=self.strict,
            kernel=self.kernel,
            cuda_graphs=self.cuda_graphs,
            cache=self.cache,
            dump=self.dump,
            progress=self._progress.enabled,
        )
        # Which sites these are is said by the first call: their names are others without the adapters.
        own.policy_parameters = self.policy_parameters
        own._context = self._context
        return own

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the same arguments, under the policy.

        `past_key_values` of what it returns is a cache of the policy's own, where the model would have returned one (under a
        lossless policy it is the model's). With such a cache as `past_key_values=`, `input_ids` are the new tokens of a text,
        and the cache takes them; such a call has no gradients.
        """
        if torch.compiler.is_exporting():
            raise RewriteError(
                "torch.export would write the model as it is, without the policy; rewriter.export.aot_inductor, .onnx and "
                ".tensorrt export the optimized model"
            )
        if not self._has_run[0]:
            self._prepare_kernel()
        let_dynamo_guard(self.model)
        self._has_run[0] = True
        given = named_arguments(self.model, args, kwargs)
        with self._progress.watch(given), kept_in(self.cache):
            return self._run_as_asked(args, kwargs, given)

    def _run_as_asked(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
        """Over the cache that is given, or the whole text, with a cache or without."""
        cache = given.get("past_key_values")
        if self._context is not None:
            check_call(self._context, self, given)
            return self._run((), {**given, "use_cache": False} if takes_use_cache(self.model) else given)
        if cache is not None and (_is_own(cache) or not self.policy.is_lossless):
            from rewriter.generation.generate import cached_forward

            output = cached_forward(self.decoder, cache, **_without(given, "past_key_values"))
            return output if returns_dict(self.model, given) else output.to_tuple()
        if given.get("output_attentions") and attention_implementation(self.model) not in (None, "eager"):
            raise RewriteError(
                "output_attentions=True asks for the weights of each query and key, which a fused attention does not compute; "
                "leave it out, or load the model with attn_implementation='eager', whose sites are then left as they are"
            )
        config = getattr(self.model, "config", None)
        if not self._has_output_hooks and (
            any(name.startswith("output_") and value for name, value in given.items())
            or getattr(config, "output_hidden_states", False)
            or getattr(config, "output_attentions", False)
            or takes_more_than_text(self.model, given)  # a vision tower is asked for its hidden states
        ):
            install_output_hooks(self.model)
            self._has_output_hooks = True
        if not takes_use_cache(self.model):
            return self._run(args, kwargs)
        if self.policy.is_lossless and not is_checkpointing(self.model):
            return self._run((), given)
        return self._run_keeping_cache(given)

    def _run_keeping_cache(self, given: dict[str, Any]) -> Any:
        """Where the model would return a cache of all keys: one of the policy's own, which is filled when it is first used."""
        if not returns_dict(self.model, given):
            output = self._run_keeping_cache({**given, "return_dict": True})
            return output.to_tuple() if hasattr(output, "to_tuple") else output
        from rewriter.generation.cache_of_call import CacheOfCall
        from rewriter.generation.cache_of_call import growing_cache
        from rewriter.generation.cache_of_call import may_run_over_cache
        from rewriter.generation.generate import cached_forward

        asked = given.get("use_cache")
        keeps = getattr(getattr(self.model, "config", None), "use_cache", False) if asked is None else asked
        keeps = keeps and not self.policy.is_program and not is_checkpointing(self.model)
        if asked and keeps and not torch.is_grad_enabled() and may_run_over_cache(given):
            cache = growing_cache(self.decoder, given)
            return cached_forward(self.decoder, cache, **_without(given, "past_key_values"))
        output = self._run((), {**given, "use_cache": False})
        if keeps and "past_key_values" in getattr(output, "__dataclass_fields__", {}):
            cache = CacheOfCall(lambda: self.decoder, _without(given, "past_key_values"))
            return type(output)(**{**output, "past_key_values": cache})
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The whole text at once."""
        if self.policy.is_program:
            raise PolicyError(
                f"{self.policy} is a program of two phases, and one call of the model has no query; use generate(context_ids, "
                "query_ids=...), answer(context, query, tokenizer=...) or read(context_ids, query_ids)"
            )
        if any(p.positions == "cache" for p in self.policy.parts()):
            kwargs = self._with_positions(args, kwargs)
        if self._compiled_model[0] is not self.model or any(
            # A proof has read this buffer's values; when they are others, the proof is made anew.
            not _unchanged(self.model.get_buffer(name), *known)
            for name, known in self._constants.items()
        ):
            self._compile()
        names = [name for name, _ in self.policy_parameters.named_parameters(remove_duplicate=False)]
        parameters = {
            name: attrgetter(name)(self.policy_parameters) for name in names
        }  # whole, where they are in pieces
        try:
            return guarded(self._call, parameters, args, kwargs)
        except NotCaptured:
            self._compile()  # Dynamo would never look at this call again
            raise
        except TooManyKindsOfCalls as error:
            warnings.warn(f"all graphs are dropped, and made anew as they are needed: {error}", stacklevel=4)
            self._compile()
            return guarded(self._call, parameters, args, kwargs)

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        query_ids: Tensor | Sequence[Tensor] | None = None,
        chunk_batch: int = 4,
        past_key_values: Any = None,
        prefill_chunk: int | None = None,
        **options: Any,
    ) -> Any:
        """Continues texts over the policy's own cache; transformers' `generate`, with all its modes and options.

        Under `ChunkedEviction` the inputs are contexts, which are `read` first, and the query is the prompt.

        Args:
            inputs: int64 `[B, n]`, the prompts; `input_ids=` is the same. Pad shorter ones on the left, and give
                `attention_mask`. With a cache that holds a text already: the whole text, or what follows with the
                `attention_mask` of the whole.
            query_ids, chunk_batch: of `read`, under `ChunkedEviction` only.
            past_key_values: a cache from `new_cache`, for several turns; a new one when left out.
            prefill_chunk: most tokens of a prompt to run at once.
            options: of `transformers.GenerationMixin.generate`.

        Returns:
            What the model's own `generate` returns; under `ChunkedEviction` for the query, without the context.

        Raises:
            CacheError: the model cannot go on from a cache, or the cache cannot take the prompt; it is as it was.
            PolicyError: under `ChunkedEviction`, as `read`; or `query_ids` are given under another policy.
            RewriteError: the model has no `generate`.
        """
        if not hasattr(self.model, "generate"):
            raise RewriteError(
                f"{type(self.model).__name__} has no generate; models of transformers have, and others can be called step by "
                "step with past_key_values=fast.new_cache(...)"
            )
        with self._progress.watch({"input_ids": inputs, **options}), kept_in(self.cache):
            self._prepare_kernel()
            return self._generate(inputs, query_ids, chunk_batch, past_key_values, prefill_chunk, options)

    def _generate(
        self,
        inputs: Tensor | None,
        query_ids: Tensor | Sequence[Tensor] | None,
        chunk_batch: int,
        past_key_values: Any,
        prefill_chunk: int | None,
        options: dict[str, Any],
    ) -> Any:
        from rewriter.generation.generate import generate

        is_foreign = past_key_values is not None and not _is_own(past_key_values)
        if not self.policy.is_program and (
            takes_more_than_text(self.model, options) or (is_foreign and self.policy.is_lossless)
        ):
            return self._generate_whole(inputs, past_key_values, options)
        if query_ids is not None or (self.policy.is_program and past_key_values is None):
            if past_key_values is not None:
                raise PolicyError(
                    "give query_ids with a new context, or past_key_values of one that was read; not both"
                )
            if query_ids is None:
                raise PolicyError(f"{self.policy} chooses chunks by the query; give query_ids=[m] beside the context")
            context_ids = options.pop("input_ids", inputs)
            if context_ids is None:
                raise PolicyError("give the context: generate(context_ids, query_ids=...)")
            mask = options.pop("attention_mask", None)
            reading = self.read(context_ids, query_ids, attention_mask=mask, chunk_batch=chunk_batch, **options)
            inputs, past_key_values = reading.query_ids, reading.cache
            options["attention_mask"] = reading.attention_mask
        return generate(self.decoder, inputs, past_key_values, prefill_chunk, options, self)

    def _generate_whole(self, inputs: Any, past_key_values: Any, options: dict[str, Any]) -> Any:
        """A generation with other inputs than a text, images say, which no cache of ours takes."""
        from rewriter.generation.generate import generate_whole

        if _is_own(past_key_values):
            raise CacheError("a cache of new_cache takes text alone; leave past_key_values out")
        if past_key_values is not None:
            options = {**options, "past_key_values": past_key_values}
        if not self.policy.is_lossless:
            warnings.warn(
                f"{type(self.model).__name__} is given more than a text, which a cache under {self.policy} does not take: each "
                "new token computes the whole text. Exact() generates over the model's own cache",
                PolicyWarning,
                stacklevel=3,
            )
        return generate_whole(self.model, self.run, self.policy.is_lossless, inputs, options, self)

    def read(
        self,
        context_ids: Any,
        query_ids: Tensor | Sequence[Tensor],
        *,
        attention_mask: Tensor | None = None,
        chunk_batch: int = 4,
        **options: Any,
    ) -> Reading:
        """The first phase of `ChunkedEviction`: reads contexts in chunks, and keeps the best keys of the best.

        Args:
            context_ids: int64 `[N]`; `[B, N]`, padded ones with an `attention_mask`; or a list with one entry for each context:
                `[N]`, or a list of the chunks themselves. Begin a context with the BOS that the model expects; each chunk
                gets it.
            query_ids: int64 `[m]` for all contexts, `[B, m]`, or a list of `[m]`.
            attention_mask: like `context_ids`, 0 for padding.
            chunk_batch: chunks that run at once.
            options: of `generate`, which decide how long the answer may be.

        Raises:
            PolicyError: the policy is another, a query or context is empty or no token ids, there are not as many queries as
                contexts, or chunk, query and answer are longer than the model's positions.
        """
        from rewriter.chunked.reading import read

        with kept_in(self.cache):
            self._prepare_kernel()
            return read(self.policy, lambda: self.decoder, context_ids, query_ids, attention_mask, chunk_batch, options)

    def answer(self, context: str, query: str, *, tokenizer: Any, chunk_batch: int = 4, **options: Any) -> str:
        """What the model says to a query about a context, both text, under `ChunkedEviction`.

        Args:
            tokenizer: of the model; if it puts a BOS before a text, each chunk begins with one, and the query does not.
            chunk_batch: chunks that run at once.
            options: of transformers' `generate`.

        Returns:
            The new tokens as text.

        Raises:
            PolicyError: as `read`.
        """
        from rewriter.chunked.reading import answer

        return answer(self.generate, context, query, tokenizer, chunk_batch, options)

    def new_cache(self, max_length: int | None = None) -> LiveRangeCache:
        """An empty cache for this model and policy.

        Args:
            max_length: tokens of a row in all; needed where the policy does not bound the keys that live.

        Raises:
            CacheError: the model cannot go on from a cache, or `max_length` is needed.
        """
        return self.decoder.new_cache(max_length)

    def warmup(self, *calls: Mapping[str, Any], new_tokens: int = 0) -> Report:
        """Captures and compiles now what these calls need, so that the first request does not wait for it.

        A graph serves all lengths and numbers of rows from two on; one row, a length of one, a mask that is given or left out,
        and gradients make others. What has been compiled already costs one call.

        Args:
            calls: the keyword arguments of the model, such as `{"input_ids": ids, "attention_mask": mask}`; two rows and one row
                of 32 tokens when none is given. The code of several rows often serves one, too, where they come first. The model
                runs them, under the present `torch.is_grad_enabled()`.
            new_tokens: when positive, so many tokens are also generated from each call; 2 compile all that `generate` needs.

        Returns:
            The report, with the graphs that there are now.

        Raises:
            RewriteError: no call is given, and the model takes no `input_ids`.
            CacheError, PolicyError: as the calls themselves.
        """
        if not calls:
            if "input_ids" not in signature_of(self.model):
                raise RewriteError(
                    f"{type(self.model).__name__} takes no input_ids; give warmup the arguments of a call: warmup({{...}})"
                )
            rows = [torch.zeros(n, 32, dtype=torch.int64, device=self._device) for n in (2, 1)]
            calls = tuple({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows)
        with self._not_real_calls():
            for call in calls:
                self(**call)
                if new_tokens > 0:
                    with torch.no_grad():
                        self.generate(**call, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        return self.report

    @contextmanager
    def _not_real_calls(self) -> Iterator[None]:
        """Inside, calls only prepare others, which may be longer: whether the policy pays is not asked."""
        known, self._asks_whether_it_pays[0] = self._asks_whether_it_pays[0], False
        try:
            yield
        finally:
            self._asks_whether_it_pays[0] = known

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Saves the model as its own `save_pretrained` does, with the policy and the policy's parameters.

        `rewriter.from_pretrained(folder)` gives the same optimized model back; transformers loads the model alone.

        Args:
            save_directory: a folder.
            state_dict: of the optimized model; its own when left out.
            options: of the model's `save_pretrained`.

        Raises:
            RewriteError: the model has no `save_pretrained`, or its parameters are in pieces on several processes.
        """
        if state_dict is None and gathers_layers(self.model):
            raise RewriteError(
                f"parameters of {type(self.model).__name__} are in pieces on several processes: with "
                "rewriter.whole_parameters(fast): fast.save_pretrained(...), in one of them; torch.distributed.checkpoint takes "
                "rewriter.for_checkpoint(fast) as it is"
            )
        settings = {
            "policy": self.policy.to_dict(),
            "backend": self.backend,
            "strict": self.strict,
            "kernel": self.kernel,
            "cuda_graphs": self.cuda_graphs,
            "parameter_sites": {str(layer): identity for layer, identity in self._parameter_sites.items()},
        }
        write(save_directory, self.model, settings, self.state_dict() if state_dict is None else state_dict, **options)

    @property
    def decoder(self) -> Decoder:
        """The decoder of the model as it is now; made when first asked for.

        Raises:
            CacheError: the weights or the tokens are in pieces, or the model cannot go on from a cache.
        """
        if self._context is not None:
            raise CacheError(
                f"the tokens of a text are spread over {self._context.size} processes (context parallelism), which no cache "
                "takes; generate with a model in one process: rewriter.optimize(fast.model, fast.policy)"
            )
        decoder = self._decoder
        if decoder is None or decoder.model is not self.model or not decoder.is_current:
            if gathers_layers(self.model):
                raise CacheError(
                    f"parameters of {type(self.model).__name__} are in pieces on several processes, and going on from a cache "
                    "takes whole ones: with rewriter.whole_parameters(fast): fast.generate(...)"
                )
            if is_gathered_by_fully_shard(self.model) and holds_dtensors(self.model):
                raise CacheError(
                    f"weights of {type(self.model).__name__} are in pieces on several processes (fully_shard), and going on "
                    "from a cache takes them as they are; call fast.unshard() before, and fast.reshard() after (a model of "
                    "parallelize_module goes on from a cache without fully_shard alone)"
                )
            from rewriter.generation.decoder import Decoder

            let_dynamo_guard(self.model)
            decoder = self._decoder = Decoder(
                self.model,
                self.policy,
                self.policy_parameters,
                backend=self.backend,
                cuda_graphs=self.cuda_graphs,
                dump=None if self.dump is None else self.dump / "cached",
                on_rewritten=self._take,
            )
        return decoder

    def _take(self, result: Analysed) -> None:
        self._check(result)
        self._warn_of_refusals(result)
        self._check_parameter_sites(result)
        self.report.add(result)

    def spread_context(self, group: ContextGroup) -> None:
        """Each process of the group computes a part of the tokens of a text from now on; see `rewriter.distribute`."""
        self._context = group
        self.__dict__["_base"] = None
        self._compile()

    def _with_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positions are places in the cache; the graph needs to see where the model would have read them."""
        if kwargs.get("position_ids") is not None:
            raise PolicyError(f"{self.policy} gives tokens their positions; leave position_ids out")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise PolicyError(f"{self.policy} gives tokens their positions, and needs input_ids [B, n]")
        positions = torch.arange(ids.size(1), device=ids.device).expand(ids.size(0), -1).contiguous()
        return {**kwargs, "position_ids": positions}

    def _compile(self) -> None:
        """Prepares to capture the model at the next call."""
        self._constants = {}
        self._decoder = None
        self._has_output_hooks = False
        self._compiled_model = (self.model,)  # a tuple, or it would be a second submodule
        self._code = CodeOfGraphs()
        self._call = traced_call(self.model, self._backend)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_call": None,
            "_code": None,
            "_decoder": None,
            "_base": None,
            "_compiled_model": None,
            "_constants": {},
            "_context": None,
            "report": Report(subject=self.report.subject),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, compiles its own model at its first call."""
        super().__setstate__(state)
        self._compile()

    def _set_parameters(self, parameters: Mapping[str, Mapping[str, Tensor]], sites: Mapping[str, str]) -> None:
        """The policy's parameters as they were saved, by site number and name, and the identity of each site."""
        for layer, own in parameters.items():
            self.policy_parameters[layer] = nn.ParameterDict(
                {name: nn.Parameter(tensor.to(self._device)) for name, tensor in own.items()}
            )
        self._parameter_sites = {int(layer): identity for layer, identity in sites.items()}

    @property
    def _device(self) -> torch.device | None:
        return next((p.device for p in self.model.parameters()), None)

    def _prepare_kernel(self) -> None:
        """The CPU's kernel is compiled while the model is traced."""
        device = self._device
        if self.kernel != "dense" and device is not None and device.type == "cpu":
            native.load_in_background()

    def _add_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the policy's parameters for the sites of a call, on the model's device, in fp32."""
        for result in analyse_call(self.model, self.policy, args, kwargs):
            self._check(result)
            for plan in result.sites:
                layer = str(plan.layer)
                if plan.policy.adds_parameters and plan.reason is None and layer not in self.policy_parameters:
                    device = plan.site.node.meta["val"].device
                    initial = plan.policy.initial_parameters(plan.layer, plan.num_kv_heads, plan.value_dim)
                    own = {name: nn.Parameter(tensor.to(device)) for name, tensor in initial.items()}
                    self.policy_parameters[layer] = nn.ParameterDict(own)
                    self._parameter_sites[plan.layer] = plan.identity

    def _backend(self, graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self._progress.doing("proving masks and rewriting attention")
        asks = self._asks_whether_it_pays[0] and not self.policy.is_lossless
        result = rewrite(
            graph,
            example_inputs,
            self.policy,
            kernel=self.kernel,
            asks_whether_it_pays=asks,
            context=self._context,
            dump=self.dump,
        )
        self._take(result)
        if result.will_not_pay is not None:
            self._asks_whether_it_pays[0] = False  # said once
            self._warn_of_speed(result.will_not_pay)
        for name in result.constants:
            buffer = self.model.get_buffer(name)
            self._constants[name] = (buffer, buffer._version)
        if self.backend == "eager":
            gathers = gathers_parameters(result.module.graph)
            return recomputing(result.module, example_inputs) if gathers else result.module
        self._progress.doing("generating code")
        return self._code(result.module, example_inputs)

    def _check(self, result: Analysed) -> None:
        if not result.sites:
            raise RewriteError(
                f"no attention found in {type(self.model).__name__}: neither a scaled_dot_product_attention nor a softmax "
                "of a product of activations; there is nothing to rewrite"
            )
        learns = next((p.policy for p in result.sites if p.reason is None and p.policy.adds_parameters), None)
        if learns is not None and holds_dtensors(self.model) and not gathers_layers(self.model):
            raise PolicyError(
                f"the parameters of {learns} are of all heads of a layer, and weights of {type(self.model).__name__} are spread "
                "over processes (parallelize_module); take a policy without parameters, or spread weights by fully_shard(fast)"
            )
        refused = [plan for plan in result.sites if plan.reason is not None]
        if self.strict and refused:
            reasons = "; ".join(f"site {p.layer} ({p.site.module_path or '-'}): {p.reason}" for p in refused)
            raise RewriteError(f"{len(refused)} of {len(result.sites)} attention sites are refused: {reasons}")
        if self.strict == "verified":
            unsure = [
                f"site {plan.layer} ({plan.site.module_path or '-'}, {plan.proof.name}): {validation.reason}"
                for plan, validation in zip(result.sites, result.validations, strict=True)
                if plan.proof is not None and validation is not None and validation.answer is not Answer.VERIFIED
            ]
            if unsure:
                raise RewriteError(
                    f"{len(unsure)} of {len(result.sites)} masks are not verified for all sizes, as strict='verified' asks, but "
                    f"compared with their ranges at some: {'; '.join(unsure)}; strict=True takes these, too"
                )

    def _warn_of_refusals(self, result: Analysed) -> None:
        refused = [plan for plan in result.sites if plan.reason is not None and not plan.policy.is_lossless]
        if refused:
            warnings.warn(
                f"{len(refused)} of {len(result.sites)} attention sites keep all their keys, as {self.policy} cannot be applied "
                "to "
                f"them: site {refused[0].layer} ({refused[0].site.module_path or '-'}): {refused[0].reason}. print(fast.report) "
                "lists all; optimize(..., strict=True) makes it an error",
                PolicyWarning,
                stacklevel=2,
            )

    def _warn_of_speed(self, loss: WillNotPay) -> None:
        later = (
            f"it is faster from about {loss.pays_from:,} tokens on"
            if loss.pays_from
            else "longer texts do not change it"
        )
        warnings.warn(
            f"under {self.policy} attention over {loss.tokens:,} tokens is predicted to run at {loss.speed:.2f}x of the model's "
            f"own speed: {loss.live:.0%} of what the model's masks show is left; {later}. Exact() loses no time on short texts; "
            "rewriter.explain(model, ..., policy=..., length=...) predicts other lengths",
            SpeedWarning,
            stacklevel=2,
        )

    def _check_parameter_sites(self, result: Analysed) -> None:
        """A call that runs other attentions than the one that the parameters were made for would mix them up."""
        for plan in result.sites:
            if not plan.parameters:
                continue
            known = self._parameter_sites.setdefault(plan.layer, plan.identity)
            if known != plan.identity:
                raise RewriteError(
                    f"site {plan.layer} is {plan.identity} in this call, and was {known} when the policy's "
                    "parameters were made; give optimize example_inputs that run the model as it will be used"
                )

    def _repr_html_(self) -> str:
        """For notebooks: the report."""
        return self.report._repr_html_()

    def extra_repr(self) -> str:
        context = "" if self._context is None else f", tokens over {self._context.size} processes"
        return f"policy={self.policy}, backend={self.backend!r}{context}"


_COMPUTES = re.compile("generate_batch|get_.*_features|encode_.*")
"""Names of methods of transformers' models that run them, besides `forward` and `generate`."""


def _is_own(cache: object) -> bool:
    from rewriter.generation.cache import LiveRangeCache

    return isinstance(cache, LiveRangeCache)


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


def _unchanged(buffer: Tensor, known: Tensor, version: int) -> bool:
    return buffer is known and buffer._version == version

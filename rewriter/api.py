"""`optimize` and `explain`: a model in, the same model with its attention rewritten, and a report.

The rewritten model is compiled at its first call, by `torch.compile` with the passes in front of the backend. It is
captured as one graph; a model that cannot be is an error, because a part left to run as it was would silently ignore
the policy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.utils._pytree import tree_map_only

from rewriter.errors import PolicyError
from rewriter.errors import RewriteError
from rewriter.generation.model_facts import text_config
from rewriter.optimized_model import OptimizedModel
from rewriter.passes import HAS_SOLVER
from rewriter.passes import ExampleSequence
from rewriter.passes.lower.kernel import CHOICES
from rewriter.passes.policy import Policy
from rewriter.policies.exact import Exact
from rewriter.report import Report
from rewriter.report import Subject
from rewriter.report.data import module_tree
from rewriter.saved_model import class_of
from rewriter.saved_model import read_parameters
from rewriter.saved_model import read_settings
from rewriter.tracing import explain_call

BACKENDS = ("inductor", "eager")


OPAQUE_ATTENTION = ("flex_attention", "flash_attention", "paged|")
"""How transformers' names of attention implementations begin that are neither `sdpa` nor `eager`."""


def optimize(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    backend: str = "inductor",
    strict: bool | str = False,
    kernel: str = "auto",
    cuda_graphs: bool = False,
    cache: str | Path | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dump: str | Path | None = None,
    progress: bool = True,
) -> OptimizedModel:
    """Wraps a model so that its attention runs over live ranges. The model itself is not changed.

    Args:
        model: any module whose forward can be captured as one graph.
        policy: which keys live how long; `Exact()` when left out, which loses nothing.
        backend: "inductor" generates code, "eager" runs the rewritten graph as it is.
        strict: raise when any attention site is refused; "verified" also where a solver (z3, the extra `proof`) does not show
            that the ranges of a site are its mask at all sizes and for all data, which `fast.report` says of each site.
        kernel: what computes the sites of a call without a cache. "auto" takes, on a GPU, torch's `scaled_dot_product_attention`
            where a mask is proven to be exactly causal, or to hide nothing, and the policy drops nothing, and live-range
            attention elsewhere, and on a CPU; "live_range" takes that everywhere; "dense" torch's everywhere, with a mask of
            `[Q, K]` where one is needed. The results are the same; `fast.report` names the kernel of each site.
        cuda_graphs: whether the step of one token over a cache, in `generate` say, is recorded as a CUDA graph and replayed, for
            a model on a CUDA device: its many small kernels then follow one another without the CPU. The graph is made at the
            second token of each cache, and is gone with it.
        example_inputs: keyword arguments (a mapping) or positional ones to capture the model with now; otherwise it is
            captured at its first call. A policy with parameters needs to know the sites now: what is left out is then
            the model's own `dummy_inputs`, which the models of transformers have.
        cache: folder for the code that is generated, so that another process, or another machine of the same kind, finds it there
            and starts in a fraction of the time; torch's own folder when left out, which is temporary.
        dump: folder for the graph before and after each pass.
        progress: on a terminal, say what a call is doing that compiles for more than two seconds.

    Raises:
        RewriteError: the model is optimized or compiled already or attends by a kernel such as flex_attention, the backend
            or kernel is unknown, or (when captured) no attention is found, a site is refused and `strict` is set, the model is
            not one graph, or the policy has parameters and there are no inputs to find the sites with.
        PolicyError: the policy cannot be applied to the inputs.
    """
    _check_model(model)
    if policy is not None and not isinstance(policy, Policy):
        raise PolicyError(f"policy must be a policy such as SlidingWindow(256), got {policy!r}")
    _check_choices(backend, kernel, strict)
    optimized = OptimizedModel(
        model,
        policy or Exact(),
        backend=backend,
        strict=strict,
        kernel=kernel,
        cuda_graphs=cuda_graphs,
        cache=None if cache is None else Path(cache).absolute(),
        dump=None if dump is None else Path(dump),
        progress=progress,
    )
    inputs = None if example_inputs is None else _arguments(example_inputs)
    if optimized.policy.adds_parameters:
        optimized._add_parameters(*(inputs or _dummy_inputs(model, optimized.policy)))
    if inputs is not None:
        positional, named = inputs
        with torch.no_grad(), optimized._not_real_calls():
            optimized(*positional, **named)
    return optimized


def from_pretrained(
    folder: str | Path,
    *,
    model_class: Any = None,
    backend: str | None = None,
    strict: bool | str | None = None,
    kernel: str | None = None,
    cuda_graphs: bool | None = None,
    cache: str | Path | None = None,
    **options: Any,
) -> OptimizedModel:
    """The optimized model that its `save_pretrained` wrote, with its policy and the policy's parameters.

    Args:
        folder: of `save_pretrained`, or of a Trainer's checkpoint.
        model_class: loads the model, by `model_class.from_pretrained(folder, **options)`; when left out, the class that the
            configuration names, and for a folder of adapters peft's `AutoPeftModelForCausalLM`.
        backend, strict, kernel, cuda_graphs: as for `optimize`; as they were when left out.
        cache: as for `optimize`.
        options: of the model's `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        RewriteError: the folder has no `rewriter.json`, or the model's class is not there.
        PolicyError: the policy's class is not defined (import the module that defines it), or has other fields now.
    """
    settings = read_settings(folder)
    policy = Policy.from_dict(settings["policy"])
    model = (model_class or class_of(folder)).from_pretrained(folder, **options)
    _check_model(model)
    fast = OptimizedModel(
        model,
        policy,
        backend=settings["backend"] if backend is None else backend,
        strict=settings["strict"] if strict is None else strict,
        kernel=settings.get("kernel", "auto") if kernel is None else kernel,
        cuda_graphs=settings.get("cuda_graphs", False) if cuda_graphs is None else cuda_graphs,
        cache=None if cache is None else Path(cache).absolute(),
    )
    _check_choices(fast.backend, fast.kernel, fast.strict)
    fast._set_parameters(read_parameters(folder) if policy.adds_parameters else {}, settings["parameter_sites"])
    return fast


def explain(
    model: nn.Module,
    *args: Any,
    policy: Policy | None = None,
    length: int | None = None,
    kernel: str = "auto",
    **kwargs: Any,
) -> Report:
    """What `optimize` would do to a call `model(*args, **kwargs)`; nothing is changed and no code is generated.

    The call is run as it is. The model may be on the meta device, where nothing is computed and its weights take no memory; the
    tensors of the call are moved there, and their values used for the predictions.

    Args:
        policy: as for `optimize`.
        length: tokens of the row for which pairs, keys and bytes are predicted; the call's own when left out.
        kernel: as for `optimize`.

    Returns:
        The sites with their predictions, the modules, and the graph after each pass; print it, or write it with `to_json` or
        `to_html`. Under a policy that adds parameters the graph is not lowered: `optimize` makes them.

    Raises:
        RewriteError, PolicyError: as `optimize` at its first call, but for refused sites.
    """
    _check_model(model)
    _check_choices(BACKENDS[0], kernel)
    if length is not None and length < 1:
        raise RewriteError(f"length must be at least 1 token, got {length}")
    report = Report(subject=Subject.of(model, policy or Exact()))
    given = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs
    row = ExampleSequence(length, {name: value for name, value in given.items() if isinstance(value, Tensor)})
    if any(p.is_meta for p in model.parameters()):
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    for result in explain_call(model, policy or Exact(), args, kwargs, row, kernel):
        report.add(result)
        graph = report.graphs[-1]
        graph.modules = module_tree(model, graph.sites)
    return report


def _check_choices(backend: str, kernel: str, strict: bool | str = False) -> None:
    if isinstance(strict, str) and strict != "verified":
        raise RewriteError(f"strict must be True, False or 'verified', got {strict!r}")
    if strict == "verified" and not HAS_SOLVER:
        raise RewriteError("strict='verified' asks a solver, and z3 is not installed: pip install 'rewriter[proof]'")
    for name, value, choices in (("backend", backend, BACKENDS), ("kernel", kernel, CHOICES)):
        if value not in choices:
            raise RewriteError(f"{name} {value!r} is not known; choose one of {', '.join(choices)}")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, str):
            hint = f"; load it first: AutoModelForCausalLM.from_pretrained({model!r})"
        raise RewriteError(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise RewriteError(
            "DistributedDataParallel hands its gradients on outside of any graph; optimize the model in it (.module) and wrap "
            "the result: DistributedDataParallel(rewriter.optimize(model))"
        )
    _check_rotations(model)
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "it"
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise RewriteError(
                f"torch.compile has been applied to {where}; optimize the original (._orig_mod of what torch.compile "
                "returned, or the model before .compile()): it is compiled with the passes in front"
            )
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(attention, str) and attention.startswith(OPAQUE_ATTENTION):
            raise RewriteError(
                f"{where} attends by {attention}, which no pass can look into; load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            raise RewriteError(
                f"accelerate's {type(hook).__name__} on {where} moves weights at each call, which no graph holds; load the model "
                "on one device, without offloading (device_map={'': device}), or take the hooks off: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise RewriteError(
                f"{where} is quantized by torch.ao.quantization.quantize_dynamic, which packs weights so that no graph holds "
                "them; use torchao: quantize_(model, Int8WeightOnlyConfig())"
            )
        if isinstance(module, OptimizedModel):
            raise RewriteError(
                f"{where} is optimized already; optimize the original model (.model) once, with one policy"
            )


DATA_DEPENDENT_ROTATIONS = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies change with the longest position of a call."""


def _check_rotations(model: nn.Module) -> None:
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    kinds = [parameters, *parameters.values()] if isinstance(parameters, Mapping) else []
    for kind in kinds:
        name = kind.get("rope_type") if isinstance(kind, Mapping) else None
        if name in DATA_DEPENDENT_ROTATIONS:
            raise RewriteError(
                f"{type(model).__name__} has rotary embeddings of rope_type {name!r}, which look at the positions of each call "
                "and change the model; choose another one in config.rope_parameters, such as 'yarn', 'linear' or 'default'"
            )


def _dummy_inputs(model: nn.Module, policy: Policy) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(inputs, Mapping):
        raise RewriteError(
            f"{type(policy).__name__} adds parameters to each attention, and {type(model).__name__} has no dummy_inputs to "
            "find them with; give example_inputs={...}, the arguments of one call"
        )
    device = next((p.device for p in model.parameters()), None)
    named = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    return (), {**named, "use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else named


def _arguments(example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}

"""The pipeline: capture -> canonicalize -> find attention -> analyse masks -> apply policy -> lower, or lower to slots.

One order, one place. Each pass returns what it did; `Rewritten` is their sum.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from rewriter.passes.attention.find import find_attention
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.canonicalize import Canonicalized
from rewriter.passes.graph.canonicalize import canonicalize
from rewriter.passes.graph.capture import capture
from rewriter.passes.graph.inputs import GraphInput
from rewriter.passes.lower.full import lower
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.lower.plan import apply_policy
from rewriter.passes.lower.slots import CachedGraphs
from rewriter.passes.lower.slots import lower_cached
from rewriter.passes.masks.check import check_mask
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import Unproven
from rewriter.passes.masks.prove import prove_mask
from rewriter.passes.policy import Policy
from rewriter.passes.predict import ExampleSequence
from rewriter.passes.predict import Prediction
from rewriter.passes.predict import predict
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule


@dataclass
class Rewritten:
    """A rewritten graph and what each pass did.

    Attributes:
        module: the graph, ready for a compiler or to be called.
        sites: all attention sites in order, each with its proof or its reason for refusal.
        canonicalized: what canonicalization changed.
        constants: qualified names of the buffers that proofs have read.
        seconds: time of each pass.
        inputs: what the placeholders of the graph hold, symbolic sizes left out.
        cached: the graphs that go on from a cache, where they were asked for.
        predictions: what each site would compute and keep, by its number, where that was asked for.
        graphs: the graph after each pass, as text, where that was asked for; a pass that changed nothing is left out.
    """

    module: GraphModule
    sites: list[PlannedSite] = field(default_factory=list)
    canonicalized: Canonicalized | None = None
    constants: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    inputs: tuple[GraphInput, ...] = ()
    cached: CachedGraphs | None = None
    predictions: dict[int, Prediction] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict)


def rewrite(
    dynamo_graph: GraphModule,
    example_inputs: Sequence[Any],
    policy: Policy,
    *,
    replace: bool = True,
    cached: bool = False,
    dump: Path | None = None,
    explained: ExampleSequence | None = None,
) -> Rewritten:
    """Runs all passes over a Dynamo graph.

    Args:
        example_inputs: the values of the graph's placeholders.
        replace: False to analyse only.
        cached: lower to slots, instead; the graph's arguments are then the new tokens of a text.
        dump: folder for the graph's code before and after each pass.
        explained: keep the graphs' texts, and predict what each site would compute and keep for such a row.

    Raises:
        PolicyError: the policy cannot be applied to these inputs.
        NotCacheable: `cached` is asked for, and a site cannot go on from a cache.
    """
    seconds: dict[str, float] = {}
    graphs: dict[str, str] = {}
    began = time.perf_counter()

    def done(name: str, module: GraphModule) -> None:
        nonlocal began
        seconds[name] = time.perf_counter() - began
        if explained is not None and (text := graph_text(module.graph)) not in list(graphs.values())[-1:]:
            graphs[name] = text
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{len(seconds)}-{name}.txt").write_text(module.print_readable(print_output=False) + "\n")
        began = time.perf_counter()

    captured = capture(dynamo_graph, example_inputs)
    module = captured.module
    done("capture", module)
    canonicalized = canonicalize(module)
    done("canonicalize", module)
    sites = find_attention(module, canonicalized.modified)
    done("find-attention", module)
    constants = {node: value for node, (_, value) in captured.buffers.items()}
    functions = IndexFunctions(canonicalized.modified)
    verdicts = _analyse(sites, functions, constants)
    done("analyse-masks", module)
    planned = apply_policy(module, sites, verdicts, policy)
    done("apply-policy", module)
    predictions = {}
    if explained is not None:
        predictions = predict(planned, functions, constants, captured.inputs, explained)
        done("predict", module)
    slots = None
    if cached:
        slots = lower_cached(module, planned)
        done("lower-to-slots", slots.decode)
    elif replace:
        lower(module, planned)
        done("lower", module)
    proofs = [verdict for verdict in verdicts if isinstance(verdict, MaskProof)]
    read = dict.fromkeys(captured.buffers[node][0] for proof in proofs for node in proof.constants)
    return Rewritten(module, planned, canonicalized, list(read), seconds, captured.inputs, slots, predictions, graphs)


def _analyse(sites: list[AttentionSite], functions: IndexFunctions, constants: dict[Any, Any]) -> list[MaskProof | str]:
    """Of each site its proof, or the reason why there is none. Sites with the same masks are analysed once."""
    verdicts: list[MaskProof | str] = []
    known: dict[Any, MaskProof | str] = {}
    for site in sites:
        if site.reason is not None:
            verdicts.append(site.reason)
            continue
        assert site.query is not None and site.key is not None
        sizes = tuple(str(s) for node in (site.query, site.key) for s in node.meta["val"].shape)
        same = (site.is_causal, site.masks, sizes)
        if same not in known:
            try:
                proof = prove_mask(site, functions, constants)
                known[same] = check_mask(site, proof, functions, constants) or proof
            except Unproven as reason:
                known[same] = str(reason)
        verdicts.append(known[same])
    return verdicts


def graph_text(graph: Graph) -> str:
    """One line per node: `name = operator(arguments)  # dtype [sizes], module`."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else ""
        if node.op in ("placeholder", "output"):
            text = (
                f"input {node.name}: {node.meta.get('source', '')}"
                if node.op == "placeholder"
                else f"output {node.args}"
            )
        else:
            operator_name = (
                str(node.target) if isinstance(node.target, str | torch._ops.OpOverload) else node.target.__name__
            )
            given = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
            text = f"{node.name} = {operator_name}({', '.join(given)})"
        stack = list(node.meta.get("nn_module_stack", {}).values())
        where = stack[-1][0].split("L['model'].")[-1] if stack else ""
        comment = ", ".join(part for part in (sizes, where) if part)
        lines.append(f"{text}  # {comment}" if comment else text)
    return "\n".join(lines)

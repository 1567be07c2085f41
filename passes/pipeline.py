"""The pipeline: capture -> canonicalize -> find attention -> analyse masks -> validate -> apply policy -> lower (or to slots).

One order, one place. Each pass returns what it did; what a run of them returns depends on what it is for: `Analysed`,
`Rewritten`, `CachedRewritten` or `Explained`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rewriter.kernels.context_parallel import ContextGroup
from rewriter.passes.attention.find import find_attention
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.canonicalize import Canonicalized
from rewriter.passes.graph.canonicalize import canonicalize
from rewriter.passes.graph.capture import capture
from rewriter.passes.graph.inputs import GraphInput
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.lower.context_parallel import spread_tokens
from rewriter.passes.lower.full import lower
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.lower.plan import apply_policy
from rewriter.passes.lower.sharded_parameters import gather_by_layer
from rewriter.passes.lower.sharded_parameters import gathers_parameters
from rewriter.passes.lower.slots import CachedGraphs
from rewriter.passes.lower.slots import lower_cached
from rewriter.passes.masks.check import check_mask
from rewriter.passes.masks.check import smallest_example
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import Unproven
from rewriter.passes.masks.prove import prove_mask
from rewriter.passes.policy import Policy
from rewriter.passes.predict import ExampleSequence
from rewriter.passes.predict import Prediction
from rewriter.passes.predict import WillNotPay
from rewriter.passes.predict import predict
from rewriter.passes.predict import will_not_pay
from rewriter.passes.verify.validate import Answer
from rewriter.passes.verify.validate import Validation
from rewriter.passes.verify.validate import validate
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysed:
    """A captured graph and what the passes found in it; nothing is lowered.

    Attributes:
        module: the graph.
        sites: all attention sites in order, each with its proof or its reason for refusal.
        validations: of each site, what a solver says of its proof; None where there is none.
        canonicalized: what canonicalization changed.
        constants: qualified names of the buffers that proofs have read.
        seconds: time of each pass.
        inputs: what the placeholders of the graph hold, symbolic sizes left out.
    """

    module: GraphModule
    sites: list[PlannedSite]
    validations: list[Validation | None]
    canonicalized: Canonicalized
    constants: list[str]
    seconds: dict[str, float]
    inputs: tuple[GraphInput, ...]


@dataclass(frozen=True)
class Rewritten(Analysed):
    """`module` has live-range attention, or torch's own, in the places of its sites, ready for a compiler or to be called.

    Attributes:
        will_not_pay: what the policy loses in time at the lengths of the call, where that was asked for and it does.
    """

    will_not_pay: WillNotPay | None = None


@dataclass(frozen=True)
class CachedRewritten(Analysed):
    """Attributes:
    cached: the graphs that go on from a cache; `module` stays as it was.
    """

    cached: CachedGraphs


@dataclass(frozen=True)
class Explained(Analysed):
    """Attributes:
    predictions: what each site would compute and keep, by its number.
    graphs: the graph after each pass, as text; a pass that changed nothing is left out.
    examples: of refused sites, by number, the smallest example of a key that more than one run of queries sees.
    """

    predictions: dict[int, Prediction]
    graphs: dict[str, str]
    examples: dict[int, str]


def analyse(dynamo_graph: GraphModule, example_inputs: Sequence[Any], policy: Policy) -> Analysed:
    """Runs all passes but the last over a Dynamo graph.

    Args:
        example_inputs: the values of the graph's placeholders.

    Raises:
        PolicyError: the policy cannot be applied to these inputs.
    """
    return Analysed(**_Run(dynamo_graph, example_inputs, policy).found())


def rewrite(
    dynamo_graph: GraphModule,
    example_inputs: Sequence[Any],
    policy: Policy,
    *,
    kernel: str = "auto",
    asks_whether_it_pays: bool = False,
    context: ContextGroup | None = None,
    dump: Path | None = None,
) -> Rewritten:
    """Runs all passes over a Dynamo graph.

    Args:
        kernel: which kernels may compute its sites, one of `passes.lower.kernel.CHOICES`.
        asks_whether_it_pays: fill `will_not_pay`.
        context: the processes that share the tokens of a text; each is given all of it, and has a part of them. Sites are
            computed over live ranges then.
        dump: folder for the graph's code after each pass.

    Raises:
        PolicyError: the policy cannot be applied to these inputs.
        RewriteError: a site cannot be computed by the kernel that is asked for.
    """
    run = _Run(dynamo_graph, example_inputs, policy, kernel=kernel if context is None else "live_range", dump=dump)
    loss = None
    if asks_whether_it_pays:
        try:
            loss = will_not_pay(run.planned, run.functions, run.constants, run.captured.inputs)
        except Exception as error:  # a prediction looks at other lengths and data than the call has, and never fails it
            log.info("whether %s pays is not predicted: %s: %s", policy, type(error).__name__, error)
        run.done("predict", run.module)
    lower(run.module, run.planned)
    run.done("lower", run.module)
    if context is not None:
        run.module = spread_tokens(run.module, run.planned, context)
        run.done("spread-tokens", run.module)
    if gathers_parameters(run.module.graph):
        gather_by_layer(run.module)
        run.done("gather-by-layer", run.module)
    return Rewritten(**run.found(), will_not_pay=loss)


def rewrite_for_cache(
    dynamo_graph: GraphModule, example_inputs: Sequence[Any], policy: Policy, *, dump: Path | None = None
) -> CachedRewritten:
    """As `rewrite`, lowered to the slots of a cache; the graph's arguments are then the new tokens of a text.

    Raises:
        PolicyError: the policy cannot be applied to these inputs.
        NotCacheable: a site cannot go on from a cache.
    """
    run = _Run(dynamo_graph, example_inputs, policy, dump=dump)
    cached = lower_cached(run.module, run.planned)
    run.done("lower-to-slots", cached.decode)
    return CachedRewritten(**run.found(), cached=cached)


def explain(
    dynamo_graph: GraphModule,
    example_inputs: Sequence[Any],
    policy: Policy,
    example: ExampleSequence,
    *,
    kernel: str = "auto",
    lowers: bool = True,
) -> Explained:
    """As `rewrite`, with the graph's text after each pass, and a prediction of what each site would compute and keep.

    Args:
        example: what is predicted for.
        kernel: as for `rewrite`.
        lowers: False to leave the last pass out.

    Raises:
        PolicyError: the policy cannot be applied to these inputs.
    """
    run = _Run(dynamo_graph, example_inputs, policy, kernel=kernel, keeps_texts=True)
    examples = {
        plan.layer: found
        for plan in run.planned
        if plan.proof is None and (found := smallest_example(plan.site, run.functions, run.constants)) is not None
    }
    predictions = predict(run.planned, run.functions, run.constants, run.captured.inputs, example)
    run.done("predict", run.module)
    if lowers:
        lower(run.module, run.planned)
        run.done("lower", run.module)
    return Explained(**run.found(), predictions=predictions, graphs=run.texts, examples=examples)


class _Run:
    """All passes but lowering, in their order, and the time that each took."""

    def __init__(
        self,
        dynamo_graph: GraphModule,
        example_inputs: Sequence[Any],
        policy: Policy,
        *,
        kernel: str = "live_range",
        dump: Path | None = None,
        keeps_texts: bool = False,
    ) -> None:
        self.dump, self.keeps_texts = dump, keeps_texts
        self.seconds: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self._began = time.perf_counter()
        self.captured = capture(dynamo_graph, example_inputs)
        self.module = self.captured.module
        self.done("capture", self.module)
        self.canonicalized = canonicalize(self.module)
        self.done("canonicalize", self.module)
        sites = find_attention(self.module, self.canonicalized.modified)
        self.done("find-attention", self.module)
        self.constants = {node: value for node, (_, value) in self.captured.buffers.items()}
        self.functions = IndexFunctions(self.canonicalized.modified)
        self.verdicts = _analyse(sites, self.functions, self.constants)
        self.done("analyse-masks", self.module)
        self.validations = _validated(sites, self.verdicts, self.functions, self.constants)
        self.done("validate-masks", self.module)
        self.planned = apply_policy(self.module, sites, self.verdicts, policy, kernel)
        self.done("apply-policy", self.module)

    def done(self, name: str, module: GraphModule) -> None:
        """Ends a pass."""
        self.seconds[name] = time.perf_counter() - self._began
        if self.keeps_texts and (text := graph_text(module.graph)) not in list(self.texts.values())[-1:]:
            self.texts[name] = text
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            path = self.dump / f"{len(self.seconds)}-{name}.txt"
            path.write_text(module.print_readable(print_output=False) + "\n")
        self._began = time.perf_counter()

    def found(self) -> dict[str, Any]:
        """The fields of `Analysed`."""
        proofs = [verdict for verdict in self.verdicts if isinstance(verdict, MaskProof)]
        read = dict.fromkeys(self.captured.buffers[node][0] for proof in proofs for node in proof.constants)
        return {
            "module": self.module,
            "sites": self.planned,
            "validations": self.validations,
            "canonicalized": self.canonicalized,
            "constants": list(read),
            "seconds": self.seconds,
            "inputs": self.captured.inputs,
        }


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


def _validated(
    sites: list[AttentionSite],
    verdicts: list[MaskProof | str],
    functions: IndexFunctions,
    constants: dict[Any, Any],
) -> list[Validation | None]:
    """Of each proven site what the solver says. Where that is no, with an example that was tried, the site is refused: its
    verdict becomes the reason."""
    validations: list[Validation | None] = []
    known: dict[Any, Validation] = {}
    for number, (site, verdict) in enumerate(zip(sites, verdicts, strict=True)):
        if isinstance(verdict, str):
            validations.append(None)
            continue
        same = (id(verdict), site.is_causal, site.masks)  # one proof is shared by the sites that have the same masks
        if same not in known:
            known[same] = validate(site, verdict, functions, constants)
        validations.append(known[same])
        if known[same].answer is Answer.REFUTED:
            verdicts[number] = known[same].reason
    return validations


def graph_text(graph: Graph) -> str:
    """One line per node: `name = operator(arguments)  # dtype [sizes], module`."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else ""
        if node.op in ("placeholder", "output"):
            text = f"input {node.name}: {source_of(node).name}" if node.op == "placeholder" else f"output {node.args}"
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

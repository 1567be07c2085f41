"""The command line: `rewriter demo`, `rewriter explain`, `rewriter compare`, `rewriter export` and `rewriter verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from typing import Any

import typer
from rich.console import Console

_POLICY_HELP = (
    'As JSON: {"policy": "SlidingWindow", "window": 256, "sinks": 4}; '
    '{"policy": "SeparatorMask", "separators": "from tokenizer"} takes the separators from the model\'s tokenizer.'
)
_FROM_TOKENIZER = '"from tokenizer"'

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Attention keys have live ranges.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")] = Path("demo-output"),
    model: Annotated[
        str,
        typer.Option(
            help="bundled, a small trained model; or smollm2, SmolLM2-135M-Instruct, which takes ten minutes."
        ),
    ] = "bundled",
) -> None:
    """Optimize a model with each policy, read a real file, and print one table."""
    from rewriter.demo.models import MODELS
    from rewriter.demo.run import run

    if model not in MODELS:
        raise typer.BadParameter(f"--model {model}: choose one of {', '.join(MODELS)}")
    try:
        run(out, _console(), model)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def explain(
    model: Annotated[
        Path, typer.Argument(help="Folder of a transformers model (config.json; weights are not needed).")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"{_POLICY_HELP} Give several to compare them.", show_default='{"policy": "Exact"}'),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the row that costs are predicted for.", min=2)] = 4096,
    text: Annotated[
        Path | None, typer.Option(help="File of the tokens of that row, for policies that read them.")
    ] = None,
    attention: Annotated[str, typer.Option(help="Attention implementation: sdpa or eager.")] = "sdpa",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write the report as a page; of several policies the first, and a table of all."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write it as JSON.")] = None,
) -> None:
    """Show every attention of a model, the mask that is proven, or why it is refused, and what a policy would save.

    The model is built on the meta device: its weights are neither needed nor made.
    """
    import inspect
    import json as json_format

    import torch
    from transformers import AutoConfig
    from transformers import AutoModel
    from transformers import AutoModelForCausalLM

    from rewriter.api import explain as explain_model
    from rewriter.errors import PolicyError
    from rewriter.errors import RewriteError

    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} has no config.json; give the folder of a transformers model")
    ids = torch.zeros(3, 16, dtype=torch.int64)
    try:
        policies = [
            _policy(each, lambda: _tokenizer(model, _FROM_TOKENIZER)) for each in policy or ['{"policy": "Exact"}']
        ]
        for chosen in policies:
            if any(part.needs_input_ids for part in chosen.parts()) and text is None:
                raise typer.BadParameter(
                    f"{chosen} reads tokens; give --text FILE, to be read with the model's tokenizer"
                )
        if text is not None:
            if not text.is_file():
                raise typer.BadParameter(f"--text {text}: there is no such file")
            tokens = _tokenizer(model, "--text")(text.read_text(encoding="utf-8")).input_ids
            ids = torch.tensor(tokens[:length])[None].expand(3, -1)
        config = AutoConfig.from_pretrained(model)
        kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        with torch.device("meta"):
            instance = kind.from_config(config, attn_implementation=attention).eval()
        takes = inspect.signature(instance.forward).parameters
        if "input_ids" not in takes:
            raise typer.BadParameter(
                f"{type(instance).__name__} reads no text; call rewriter.explain(model, ...) with its own inputs instead"
            )
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "use_cache" in takes:
            call["use_cache"] = False
        reports = [explain_model(instance, policy=chosen, length=length, **call) for chosen in policies]
    except (PolicyError, RewriteError) as error:
        raise typer.BadParameter(str(error)) from None
    for chosen, report in zip(policies, reports, strict=True):
        if len(reports) > 1:
            _console().print(f"\n{chosen}", markup=False)
        _console().print(report)
    if html is not None:
        reports[0].to_html(html, beside=reports[1:])
    if json is not None:
        content = [report.to_dict() for report in reports]
        json.write_text(
            json_format.dumps(content[0] if len(content) == 1 else content, indent=1) + "\n", encoding="utf-8"
        )


@app.command()
def compare(
    model: Annotated[
        str, typer.Argument(help="Folder of a transformers model; or bundled, or smollm2, the models of the demo.")
    ],
    text: Annotated[Path, typer.Option(help="File to read.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_POLICY_HELP} Give several. Where a budget is given, its size can be left out. A window with sinks, and "
            "separators, when left out.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the pairs that each policy keeps; several are tried one by one.", show_default=False
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 2048,
    rows: Annotated[int, typer.Option(help="Most rows that are read.", min=1)] = 2,
    questions: Annotated[int, typer.Option(help="Notes in the text that are asked for.", min=0)] = 8,
    html: Annotated[Path | None, typer.Option(help="Also write the table as a page.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Also write it as JSON.", show_default=False)] = None,
) -> None:
    """Read a text with a model under several policies: perplexity, recall, pairs, time and memory in one table."""
    from rich.progress import BarColumn
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeElapsedColumn

    from rewriter.comparison import compare as run
    from rewriter.errors import PolicyError
    from rewriter.errors import RewriteError

    if not text.is_file():
        raise typer.BadParameter(f"--text {text}: there is no such file")
    if not policy and not budget:
        raise typer.BadParameter("give --policy with its size, or --budget")
    instance, tokenizer = _model_and_tokenizer(model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        chosen = [_policy(_with_size(each) if budget else each, lambda: tokenizer) for each in policy or _COMPARED]
        with Progress(*columns, console=_console(), transient=True) as progress:
            task = progress.add_task("")
            found = run(
                instance,
                tokenizer,
                chosen,
                text.read_text(encoding="utf-8"),
                length=length,
                rows=rows,
                budgets=budget or (),
                num_questions=questions,
                on_step=lambda step, done, of: progress.update(task, description=step, completed=done, total=of),
            )
    except (PolicyError, RewriteError) as error:
        raise typer.BadParameter(str(error)) from None
    _console().print(found)
    if html is not None:
        found.to_html(html)
    if json is not None:
        found.to_json(json)


_COMPARED = (
    '{"policy": "SlidingWindow", "sinks": 4}',
    '{"policy": "SeparatorMask", "separators": "from tokenizer"}',
)


def _with_size(policy: str) -> str:
    """A policy as JSON, with a size that a budget will set where it has none."""
    import dataclasses
    import json

    from rewriter.public import Policy

    try:
        data = json.loads(policy)
    except json.JSONDecodeError:
        return policy  # what reads it says what is wrong
    kind = Policy.known.get(str(data.get("policy"))) if isinstance(data, dict) else None
    if kind is not None and dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            if field.name in ("window", "keep") and field.default is dataclasses.MISSING:
                data.setdefault(field.name, 1)
    return json.dumps(data)


def _model_and_tokenizer(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from rewriter.demo.models import MODELS

    if name in MODELS:
        try:
            return MODELS[name]()
        except ModuleNotFoundError as error:
            raise typer.BadParameter(str(error)) from None
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise typer.BadParameter(
            f"{name} has no config.json; give the folder of a transformers model, or one of {', '.join(MODELS)}"
        )
    return AutoModelForCausalLM.from_pretrained(folder).eval(), _tokenizer(folder, "compare")


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="Folder of a transformers model.")],
    to: Annotated[str, typer.Option(help="aot, onnx or tensorrt.")],
    out: Annotated[Path, typer.Option(help="File to write; a report is written beside it.")],
    policy: Annotated[str, typer.Option(help=_POLICY_HELP)] = '{"policy": "Exact"}',
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row over the cache, where the policy bounds nothing.")
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            help="Write prefill and decode for generation, or the model's own call alone. Default: with aot, where the model "
            "can.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write an optimized model as an artifact, reload it in a fresh process, and compare it with the model."""
    import torch
    from transformers import AutoModelForCausalLM

    from rewriter import export as exporting
    from rewriter.api import optimize
    from rewriter.errors import Error

    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} has no config.json; give the folder of a transformers model")
    if to not in ("aot", "onnx", "tensorrt"):
        raise typer.BadParameter(f"--to must be aot, onnx or tensorrt, got {to}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, got {dtype}")
    try:
        chosen = _policy(policy, lambda: _tokenizer(model, _FROM_TOKENIZER))
        instance = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        fast = optimize(instance, chosen, backend="eager")
        ids = torch.ones(2, 16, dtype=torch.int64)
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        write: Any = {"aot": exporting.aot_inductor, "onnx": exporting.onnx, "tensorrt": exporting.tensorrt}[to]
        options = {} if cache is None else {"cache": cache}
        report = write(fast, kwargs=kwargs, path=out, max_length=max_length, **options)
    except Error as error:
        raise typer.BadParameter(str(error)) from None
    if report.no_decode:
        _console().print(f"{out} does not generate: {report.no_decode}")
    _print_comparison(out, report.compared, report.tolerance)


def _print_comparison(path: Path, compared: list[dict[str, Any]], tolerance: float) -> None:
    from rich.table import Table

    table = Table(title=f"{path} against the model, in a fresh process", title_justify="left")
    for column in ("sizes", "largest difference", "relative difference", f"within {tolerance:g}"):
        table.add_column(column, justify="right")
    for row in compared:
        within = "yes" if row["relative"] <= tolerance else "NO"
        table.add_row(" x ".join(map(str, row["sizes"])), f"{row['largest']:.1e}", f"{row['relative']:.1e}", within)
    _console().print(table)


@app.command()
def verify(
    artifact: Annotated[
        Path | None, typer.Argument(help="An exported model to compare again, instead of kernels.", show_default=False)
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="Of an ONNX file: onnxruntime, or openvino where it has no functions.", show_default=False),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="package.module:function, instead of the built-in kernels.", show_default=False)
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda. TRITON_INTERPRET=1 runs Triton kernels on the CPU.")
    ] = "cpu",
    examples: Annotated[
        int | None,
        typer.Option(help="Random cases for each dtype; 100, in the interpreter 10.", min=1, show_default=False),
    ] = None,
    dtypes: Annotated[str, typer.Option(help="What the kernel takes.")] = "float32,bfloat16,float16",
    gradients: Annotated[bool, typer.Option(help="Whether the kernel has a backward.")] = True,
    only: Annotated[
        str | None, typer.Option(help="Checks whose names match, as pytest's -k.", show_default=False)
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="File for the outcomes, JUnit's XML.", show_default=False)] = None,
    compile_only: Annotated[
        bool,
        typer.Option("--compile-only", help="Compile the Triton kernels at every entry of the launch table instead."),
    ] = False,
    architectures: Annotated[
        str, typer.Option(help="With --compile-only: for which GPUs.")
    ] = "sm80,sm90,sm100,sm120,gfx942",
) -> None:
    """Test a kernel against the dense reference: outputs and gradients, random and adversarial cases. Or an artifact."""
    if artifact is not None:
        from rewriter.export import ArtifactError
        from rewriter.export import ExportReport
        from rewriter.export import compare

        try:
            compared = compare(artifact, runtime)
            report = ExportReport.read(artifact)
        except ArtifactError as error:
            raise typer.BadParameter(str(error)) from None
        _print_comparison(artifact, compared, report.tolerance)
        if any(row["relative"] > report.tolerance for row in compared):
            raise typer.Exit(1)
        return
    if runtime is not None:
        raise typer.BadParameter(f"--runtime {runtime} is for an artifact; give its file")
    from rewriter.testing import launch_counts
    from rewriter.testing import verify as verification

    console = _console()
    try:
        if compile_only:
            names = tuple(architectures.split(","))
            unknown = [name for name in names if name not in verification.TARGETS]
            if unknown:
                raise verification.VerifyError(
                    f"--architectures {architectures}: no such GPU as {unknown[0]}; "
                    f"there are {', '.join(verification.TARGETS)}"
                )
            entries = list(verification.compile_table(names))
            console.print(verification.compiled_table(entries))
            console.print(launch_counts.launch_table())
            failures = [
                f"{e.architecture}, {e.bits} bits, head_dim {e.head_dim}: {e.failure}" for e in entries if e.failure
            ]
        else:
            asked = tuple(dtypes.split(","))
            unknown = [name for name in asked if name not in ("float32", "bfloat16", "float16")]
            if unknown:
                raise verification.VerifyError(
                    f"--dtypes {dtypes}: {unknown[0]} is not one of float32, bfloat16, float16"
                )
            chosen = verification.live_range_attention if kernel is None else verification.load_kernel(kernel)
            outcomes = verification.run_suite(
                chosen, device=device, examples=examples, dtypes=asked, gradients=gradients, junit=junit, only=only
            )
            console.print(verification.outcome_table(outcomes))
            failures = [f"{outcome.name}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    except verification.VerifyError as error:
        raise typer.BadParameter(str(error)) from None
    for failure in failures:
        console.print(failure, markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _policy(text: str, tokenizer: Callable[[], Any]) -> Any:
    """The policy that `--policy` says."""
    import rewriter.public  # noqa: F401  (all policies are known then)
    from rewriter.policies.reading import read_policy

    return read_policy(text, tokenizer)


def _tokenizer(model: Path, wanted_by: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"{wanted_by} needs a tokenizer, and {model} has none that loads: {reason}") from None


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 150)

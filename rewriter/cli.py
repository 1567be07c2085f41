"""The command line: `rewriter demo` and `rewriter explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Attention keys have live ranges.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")] = Path("demo-output"),
) -> None:
    """Optimize the bundled small model with each policy, read a real file, and print one table."""
    from rewriter.demo.run import run

    run(out, _console())


@app.command()
def explain(
    model: Annotated[
        Path, typer.Argument(help="Folder of a transformers model (config.json; weights are not needed).")
    ],
    attention: Annotated[str, typer.Option(help="Attention implementation: sdpa or eager.")] = "sdpa",
    tokens: Annotated[int, typer.Option(help="Length of the row of tokens to trace with.", min=2)] = 16,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a page.")] = None,
) -> None:
    """Show every attention of a model, the mask that is proven, or why it is refused."""
    import torch
    from transformers import AutoConfig
    from transformers import AutoModel

    from rewriter.optimize import explain as explain_model

    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model} has no config.json; give the folder of a transformers model")
    config = AutoConfig.from_pretrained(model)
    instance = AutoModel.from_config(config, attn_implementation=attention).eval()
    ids = torch.zeros(3, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    report = explain_model(instance, input_ids=ids, attention_mask=mask)
    _console().print(report)
    if html is not None:
        report.to_html(html)


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 150)


if __name__ == "__main__":
    app()

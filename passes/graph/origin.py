"""Where a node comes from, for reports and reasons."""

from __future__ import annotations

from rewriter.passes.graph.inputs import source_of
from torch.fx import Node


def describe(node: Node) -> str:
    if node.op == "placeholder":
        return f"input {source_of(node).name or node.name}"
    line = source_line(node)
    return f"{node.name}{' at ' + line if line else ''}"


def source_line(node: Node) -> str:
    """`file:line` of the innermost frame that made a node, without its folder."""
    return line_of(node.meta.get("stack_trace") or "")


def line_of(trace: str) -> str:
    """`file:line` of the innermost frame of a stack trace that is a file's, without its folder; "" where there is none."""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "') and "<" not in line]
    if not frames:
        return ""
    path, line = frames[-1].split('"')[1], frames[-1].split("line ")[1].split(",")[0]
    return f"{path.rsplit('/', 1)[-1]}:{line}"

"""What a target has written, for the report and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from rewriter.export.entry_points import EntryPoint

if TYPE_CHECKING:
    from rewriter.generation.decoder import Decoder


@dataclass(frozen=True)
class Written:
    """Attributes:
    points: the entry points of the artifact.
    decoder: whose graphs they are; None for the model's own call.
    no_decode: why there is no decode step; "" where there is one.
    bound: tokens of a row over the artifact's cache; None where there is no bound.
    versions: of packages besides torch.
    kernels, functions: the operators of this package in it, by name, as kernels and as standard operators.
    notes: for the report.
    engines: what TensorRT built, by entry point.
    beside: further files of the artifact.
    device: type of the one that it runs on; that of the model when left out.
    also: another artifact that was made of this one: its target, its file, and what it is.
    """

    points: Sequence[EntryPoint]
    decoder: Decoder | None = None
    no_decode: str = ""
    bound: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: Sequence[Path] = ()
    device: str = ""
    also: tuple[str, Path, Written] | None = None

    def moved_to(self, folder: Path) -> Written:
        """The same, of files in another folder."""
        also = None
        if self.also is not None:
            target, file, second = self.also
            also = (target, folder / file.name, second.moved_to(folder))
        return replace(self, beside=[folder / file.name for file in self.beside], also=also)

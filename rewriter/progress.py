"""What a model's first calls are doing, said on a terminal once it takes long: they capture the model and generate code."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from torch import Tensor

AFTER_SECONDS = 2.0
"""Compilations that take less are not mentioned."""


def _terminal() -> Console | None:
    """stderr, where it is a terminal. Asked at each call, so that most calls make no console."""
    return Console(stderr=True) if sys.stderr is not None and sys.stderr.isatty() else None


class Progress:
    """A line on the terminal (stderr) while a model is compiled, gone when it is done; nothing where there is no terminal.

    Args:
        name: of the model.
        enabled: whether anything is ever shown.
    """

    def __init__(self, name: str, enabled: bool) -> None:
        self._name, self.enabled = name, enabled
        self._watching = False
        self._call = self._doing = ""
        self._status: Status | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def watch(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Inside, what Dynamo compiles is told. `arguments` of the call by name: their shapes are what makes it another kind."""
        console = None if self._watching or not self.enabled else _terminal()
        if console is None:
            yield
            return
        shapes = [f"{name} {list(value.shape)}" for name, value in arguments.items() if isinstance(value, Tensor)]
        self._call = ", ".join(shapes) + (", with gradients" if torch.is_grad_enabled() else "")
        handler = torch._dynamo.callback.callback_handler
        begin = handler.register_start_callback(lambda _: self._begin(console))
        end = handler.register_end_callback(lambda _: self._end())
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            handler.remove_start_callback(begin)
            handler.remove_end_callback(end)
            self._end()

    def doing(self, what: str) -> None:
        """What is done now."""
        self._doing = what
        if self._status is not None:
            self._status.update(self._text)

    @property
    def _text(self) -> str:
        return f"{self._name}: first call of this kind ({self._call}): {self._doing}"

    def _begin(self, console: Console) -> None:
        self._doing = "capturing the model"

        def show() -> None:
            self._status = console.status(self._text)
            self._status.start()

        self._timer = threading.Timer(AFTER_SECONDS, show)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self._status is not None:
            self._status.stop()
        self._timer = self._status = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self._name, "enabled": self.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

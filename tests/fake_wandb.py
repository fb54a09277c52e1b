"""A stand-in for the package wandb that keeps what it is told: `monkeypatch.setitem(sys.modules, "wandb", Wandb())`."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


class Run:
    """A W&B run. `fails(name)` is called before each method, and may raise."""

    def __init__(self, settings: dict[str, Any], fails: Callable[[str], None]):
        self.settings, self._fails = settings, fails
        self.logged: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.exit_code: int | None = None
        self.results: dict[str, Any] = {}
        self.summary = types.SimpleNamespace(update=self._summarize)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        self._fails("log")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self._fails("finish")
        self.exit_code = exit_code

    def _summarize(self, values: dict[str, Any]) -> None:
        self._fails("summary")
        self.results |= values


class Wandb(types.ModuleType):
    """The module. `runs` are those that were begun."""

    def __init__(self, fails: Callable[[str], None] = lambda name: None):
        super().__init__("wandb")
        self._fails = fails
        self.runs: list[Run] = []

    def init(self, **settings: Any) -> Run:
        self._fails("init")
        self.runs.append(Run(settings, self._fails))
        return self.runs[-1]

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Table(self, columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]

"""The sink Weights & Biases (W&B): curves, config, samples and results on its page, or in files for it.

Only a run with `metrics.wandb` imports the package wandb, which the extra llmjax[wandb] brings.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.errors import UserError, reason_of
from llmjax.escapes import escape_surrogates
from llmjax.files import write_atomically
from llmjax.workdir.samples import Sample
from llmjax.workdir.sinks.contract import WANDB_MODES, MetricsConfig, Opening, Sink
from llmjax.workdir.sinks.guarded import Guarded

NAME = "W&B"
# The file in a workdir that has the id of its W&B run, so that a resumed run goes on in the same one.
FILE = "wandb.json"


def check(metrics: MetricsConfig) -> None:
    """UserError where `metrics.wandb` asks for W&B and its package is not installed."""
    if metrics.wandb and not _is_installed():
        raise UserError(
            f"metrics.wandb={metrics.wandb!r} needs the package wandb, which is not installed; pip install "
            "'llmjax[wandb]', or leave the key empty"
        )


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("wandb") is not None
    # A module without a spec, as tests and notebooks may put in its place, is there.
    except ValueError:
        return True


def open_wandb(opening: Opening) -> Sink | None:
    """The sink, if `metrics.wandb` asks for it.

    Raises UserError where W&B does not begin. A run that goes on, perhaps with nobody there, does so without W&B.
    """
    mode = WANDB_MODES[opening.metrics.wandb]
    if mode is None:
        return None
    try:
        return Guarded(WeightsAndBiases(opening, mode), NAME, opening.say)
    except Exception as error:
        if opening.update:
            opening.say(f"{NAME} did not begin and is told nothing ({reason_of(error)}); the run goes on")
            return None
        raise UserError(
            f"metrics.wandb={opening.metrics.wandb!r}, but {NAME} did not begin ({reason_of(error)}); run `wandb "
            "login`, or set metrics.wandb=offline"
        ) from None


class WeightsAndBiases:
    """Tells a W&B run, see `contract.Sink`. Its id is in wandb.json, its own files are in `wandb/` of the workdir."""

    def __init__(self, opening: Opening, mode: str):
        # Imported late: the package is an extra, and takes a second.
        import wandb

        self._wandb: Any = wandb
        self._run = wandb.init(
            project=opening.metrics.wandb_project,
            name=opening.workdir.absolute().name,
            id=run_id(opening.workdir),
            # Offline there is nobody to ask whether the run is there; its files carry the id.
            resume="allow" if mode == "online" else None,
            dir=str(opening.workdir),
            config=dict(opening.config),
            # A run may go on with another mesh, or for longer.
            allow_val_change=True,
            mode=mode,
            # A program around this one may have a W&B run of its own, which is not to be ended.
            reinit="create_new",
            # W&B would put itself between the terminal and the progress bar.
            settings=wandb.Settings(console="off"),
        )
        # W&B drops what is told of a step before its newest, as a run does that went back. So its own steps only
        # count, and the curves are drawn over the updates. Updates that were made again have the same numbers twice.
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def numbers(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        if values:
            self._run.log({"update": update} | {f"{kind}/{name}": value for name, value in values.items()})

    def samples(self, update: int, samples: Sequence[Sample]) -> None:
        rows = [
            [update, escape_surrogates(sample.prompt), escape_surrogates(sample.text)] for sample in samples
        ]
        table = self._wandb.Table(columns=["update", "prompt", "text"], data=rows)
        self._run.log({"update": update, "samples": table})

    def rewind(self, update: int) -> None:
        """The curves go on from `update` beside what was told of later updates."""

    def flush(self) -> None:
        """W&B sends what it is told by itself."""

    def summarize(self, results: Mapping[str, float]) -> None:
        self._run.summary.update(dict(results))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def run_id(workdir: Path) -> str:
    """The id of the W&B run of `workdir`: that in wandb.json, or a new one, which is written there."""
    path = workdir / FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(known, str) and known:
            return known
    # A damaged file is as good as none: what is lost is that the curves go on in the same place.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    new = secrets.token_hex(4)
    write_atomically(path, json.dumps({"id": new}) + "\n")
    return new

"""The sinks there are: one line each."""

from __future__ import annotations

from llmjax.workdir.sinks import weights_and_biases
from llmjax.workdir.sinks.contract import MetricsConfig, SinkKind
from llmjax.workdir.sinks.tensorboard import TensorBoard

SINKS: dict[str, SinkKind] = {
    "tensorboard": SinkKind(TensorBoard),
    "wandb": SinkKind(weights_and_biases.open_wandb, weights_and_biases.check),
}


def check_sinks(metrics: MetricsConfig) -> None:
    """UserError for a sink that the config asks for and that cannot be had."""
    for kind in SINKS.values():
        kind.check(metrics)

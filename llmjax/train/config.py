"""The `train` section of the config."""

from __future__ import annotations

import dataclasses

from llmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, and in which portions.

    num_updates         optimizer updates of the whole run
    tokens_per_update   sequences x seq_len x micro-steps, padding included
    micro_batch_size    sequences per micro-step over all devices; 0 = follows from accumulation_steps
    accumulation_steps  micro-steps per update; 0 = follows from micro_batch_size
    z_loss              weight of log(Z)^2 in the loss (de Brebisson and Vincent 2016; PaLM)
    """

    num_updates: int
    tokens_per_update: int
    micro_batch_size: int
    accumulation_steps: int
    z_loss: float

    def __post_init__(self):
        if self.num_updates < 0:
            raise UserError(
                f"train.num_updates={self.num_updates} is negative; use 0 to evaluate only, or more to train"
            )
        if self.z_loss < 0:
            raise UserError(f"train.z_loss={self.z_loss} is negative; use 0 to turn it off")

"""The engines of gradient accumulation by their names in the config (`train.accumulation`).

in_place    a compiled call for each micro-step, which adds to sums in place; the optimizer runs once an update
multisteps  a compiled call for each micro-step, which `optax.MultiSteps` accumulates: the plain reference
fused       one compiled call for each update, in which every device sums its own gradients and they are reduced once
"""

from __future__ import annotations

from llmjax.train.update.accumulate import Accumulator
from llmjax.train.update.in_place import InPlace
from llmjax.train.update.multisteps import MultiSteps

# Each engine's state. That of `fused`, whose sums live within one call, is the optimizer's own.
ENGINES: dict[str, type[Accumulator]] = {"in_place": InPlace, "multisteps": MultiSteps, "fused": Accumulator}

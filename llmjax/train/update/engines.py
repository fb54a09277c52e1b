"""The engines of gradient accumulation by their names in the config (`compute.engine`).

in_place    a compiled call for each micro-step, which adds to sums in place; the optimizer runs once an update
multisteps  a compiled call for each micro-step, which `optax.MultiSteps` accumulates: the plain reference
fused       one compiled call for each update, in which every device sums its own gradients and they are reduced once
"""

from __future__ import annotations

from llmjax.train.update.engine import Engine
from llmjax.train.update.fused import Fused
from llmjax.train.update.in_place import InPlace
from llmjax.train.update.multisteps import MultiSteps

ENGINES: dict[str, type[Engine]] = {"in_place": InPlace, "multisteps": MultiSteps, "fused": Fused}

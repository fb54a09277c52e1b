"""The model families there are, by their names in the config (`model.family`).

A new family is one file in this folder and one line here. Keys that only the new family reads belong in a section of
its own, as each optimizer has one (`train/optim/optimizers/table.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from llmjax.models.contract import Model
from llmjax.models.gpt import GPT

# A family is called with the fields of `GPT`, in their order and by their names.
FAMILIES: dict[str, Callable[..., Model]] = {"gpt": GPT}

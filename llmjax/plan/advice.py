"""Points out settings that will not have the expected effect, one sentence each, without refusing them.

They may be right: the run may be the beginning of a longer one, or a trial of a few updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmjax.build.model import has_reference
from llmjax.build.program import Program
from llmjax.config.reading import read_optimizer
from llmjax.train.optim.schedules import describe_jump, schedule_length, schedule_remarks
from llmjax.train.trees import flatten


def remarks(program: Program, saved: Mapping[str, Any] | None = None, tokens: int = 0) -> list[str]:
    """The sentences for a run of `program`.

    saved   the config of the run so far, if it continues
    tokens  the number of tokens that this run has already seen
    """
    config, steering = program.config, program.steering
    found = schedule_remarks(config.optimizer, config.train.num_updates)
    found += _unreached("train.batch_points", steering.schedule.points, steering.num_tokens)
    found += _unreached("data.length_points", steering.lengths.points, steering.num_tokens)
    if config.lora.rank and not config.checkpoint.init_from:
        found.append(
            f"lora.rank={config.lora.rank} freezes parameters that nobody has trained, since checkpoint.init_from is "
            "empty; give it the model to adapt"
        )
    if has_reference(config) and not config.checkpoint.init_from:
        found.append(
            f"task.name={config.task.name!r} compares answers with parameters that nobody has trained, since "
            "checkpoint.init_from is empty; give it a model that answers already"
        )
    found += _wide_adapters(program)
    train, every = config.train, config.evaluate.every
    # The first evaluation is the one that the next ones are compared with.
    never = (train.patience + 1) * every >= train.num_updates
    if train.patience and never and train.batch_schedule == "constant":
        found.append(
            f"train.patience={train.patience} evaluations, one every {every} updates, are not over before the "
            f"train.num_updates={train.num_updates} of the run; lower train.patience or evaluate.every"
        )
    if saved is not None and tokens:
        old_length = schedule_length(
            read_optimizer(saved, "the run")["optimizer"], saved["train"]["num_updates"]
        )
        done = tokens / steering.tokens_per_update
        jump = describe_jump(config.optimizer, config.train.num_updates, old_length, done)
        found += [jump] if jump else []
    return found


def _wide_adapters(program: Program) -> list[str]:
    """A sentence where adapters are wider than a matrix, which no matrix A B of its size needs."""
    rank = program.config.lora.rank
    if not rank:
        return []
    shapes = flatten(program.params_shape)
    narrow: dict[str, int] = {}
    for path, adapter in program.tuning.adapters.items():
        sides = (adapter.role.inputs, adapter.role.outputs)
        side = min(math.prod(shapes[path].shape[i] for i in dims) for dims in sides)
        if side < rank:
            narrow["/".join(path)] = side
    if not narrow:
        return []
    name = min(narrow, key=lambda path: narrow[path])
    return [
        f"lora.rank={rank} is larger than the smaller side of {name}, {narrow[name]}, so that an adapter has more "
        f"numbers than the matrix; a rank of {narrow[name]} can change it just as much"
    ]


def _unreached(key: str, points: tuple[tuple[int, int], ...], num_tokens: int) -> list[str]:
    """A sentence about the first point of a schedule that begins after the end of the run."""
    beyond = [(seen, value) for seen, value in points if seen > num_tokens > 0]
    if not beyond:
        return []
    seen, value = beyond[0]
    return [
        f"{key} has {seen}:{value}, but the run ends after {num_tokens} tokens, before that; raise train.num_updates "
        "or lower the tokens of the point"
    ]

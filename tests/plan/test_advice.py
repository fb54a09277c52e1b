"""What cannot happen as the config says is remarked upon when a run starts, and nothing else is."""

import dataclasses
import types

import pytest

from configs.base import get_config
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.plan.advice import remarks


def program(**changes):
    """As much of a program as remarks read: that of the base config, 400 updates of 4096 tokens."""
    config = read_config(get_config().to_dict())
    for key, value in changes.items():
        section, name = key.split("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    config, derived = resolve_config(config, 1)
    steering = types.SimpleNamespace(
        schedule=derived.batch_schedule,
        lengths=derived.length_schedule,
        tokens_per_update=derived.batch.tokens_per_update,
        num_tokens=config.train.num_updates * derived.batch.tokens_per_update,
    )
    return types.SimpleNamespace(config=config, steering=steering)


def test_the_base_config_needs_no_remark_nor_does_its_resume():
    base = program()
    assert remarks(base) == remarks(base, base.config.to_dict(), 100 * 4096) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train__num_updates": 30}, "optimizer.warmup_updates=40"),
        ({"train__batch_schedule": "piecewise", "train__batch_points": ("0:4096", "2000000:8192")}, "2000000:8192"),
        ({"train__batch_schedule": "linear", "train__batch_points": ("0:4096", "2000000:8192")}, "2000000:8192"),
        ({"data__length_points": ("0:128", "1700000:512")}, "1700000:512"),
    ],
)  # fmt: skip
def test_what_the_run_never_comes_to_is_said(changes, key):
    (remark,) = remarks(program(**changes))
    assert key in remark and "train.num_updates" in remark


def test_a_longer_run_says_that_its_rate_jumps_unless_the_schedule_keeps_its_length():
    saved, tokens = program().config.to_dict(), 400 * 4096
    (remark,) = remarks(program(train__num_updates=800), saved, tokens)
    assert "from 400 updates" in remark and "optimizer.schedule_updates=400" in remark
    kept = program(train__num_updates=800, optimizer__schedule_updates=400)
    assert remarks(kept, saved, tokens) == []
    assert remarks(program(train__num_updates=800), saved, 0) == []  # nothing was trained yet
    older = {**saved, "optimizer": {k: v for k, v in saved["optimizer"].items() if k != "schedule_updates"}}
    assert remarks(program(train__num_updates=800), older, tokens) == [remark]

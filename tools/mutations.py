"""Configs with one wrong value: whatever a key is set to, what follows is a run or one sentence, never a traceback.

`mutations` yields odd configs in an order that the seed decides, `outcome` says what becomes of one: it is read,
checked and made into a program of abstract shapes, so that nothing large is ever allocated.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax

from configs.base import get_config
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import Derived, resolve_config
from llmjax.config.schema import Config
from llmjax.errors import UserError
from llmjax.flags import set_key
from llmjax.modes.plan import planned_vocab_size
from llmjax.ranges import ranges

ACCEPTED = "accepted"
NUMBERS = (
    0, 1, -1, 2, 3, 7, -2, 31, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64,
    10**20, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-8, 1e-38, 1e-45, 5e-324, 1e20, 1e38, 1e308, -1e308,
    math.nan, math.inf, -math.inf, True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "--5", "5-", "1e5", "nan", "inf", "none", "None", "auto", "x" * 5000, "9" * 400, "9" * 5000,
    "\0", "a\0b", "\n", "\x1b[2J", "\u202e", "\udcff", "模型", "../..", "/", "~", "*", "[", "{", "(", "('a', 'b'", ",",
    ",,,", "1,2", "1,-2", "1,1e20", "0:4096", "0:0", "0:-4096", "a:b", "0:1:2", ":", "0:" + "9" * 400, "²", "٣",
    "1_000", "0x10", "1.", "+1", "latest", "best", "v5p:0x0x0", "%s%n", "{seed}", "--config.seed=1",
)  # fmt: skip
OTHERS = (
    None, (), [], {}, [None], [[1]], (1, 2), ("a", 1), (0, -1), (2**70,), (1.5,), ("1", "--5"), {"a": 1}, b"bytes",
    1j, object, [math.nan], ["0:4096", "1:1"], ["\0"],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A config with one key changed: `make()` gives it raw or raises UserError, `name` says what was changed."""

    name: str
    make: Callable[[], dict[str, Any]]


def keys_of(raw: dict[str, Any]) -> list[str]:
    """The whole name of every key, and of every section."""
    keys = list(raw)
    for section, values in raw.items():
        keys += [f"{section}.{name}" for name in values] if isinstance(values, dict) else []
    return keys


def mutations(raw: dict[str, Any], *, seed: int, count: int | None = None) -> Iterator[Mutation]:
    """`count` changes of the config `raw`, all there are without a count: each key set to each odd value, as from a
    config file, and to each odd text, as on the command line; of numbers also the bounds of their ranges."""
    cases = [
        (key, value, False) for key in keys_of(raw) for value in (*NUMBERS, *TEXTS, *OTHERS, *_bounds(key))
    ]
    cases += [(key, text, True) for key in keys_of(raw) for text in TEXTS]
    random.Random(seed).shuffle(cases)
    for key, value, typed in cases[:count]:
        yield _typed(raw, key, value) if typed else _set(raw, key, value)


def outcome(mutation: Mutation, num_devices: int = 1) -> str:
    """ACCEPTED, or the sentence of the UserError; any other exception is a fault and goes through."""
    try:
        config, derived = resolve_config(read_config(mutation.make()), num_devices)
        if config.tokenizer.path:  # would be read, which is another thing
            return ACCEPTED
        _shapes(_what_compiles(config), derived, planned_vocab_size(config.tokenizer), num_devices)
    except UserError as error:
        return str(error)
    return ACCEPTED


def _what_compiles(config: Config) -> Config:
    """`config` with fixed values in the sections that make nothing of a program: many configs share what is left."""
    plain = read_config(get_config().to_dict())
    data = dataclasses.replace(
        plain.data, seq_len=config.data.seq_len, length_points=config.data.length_points
    )
    return dataclasses.replace(
        config,
        seed=0,
        data=data,
        tokenizer=plain.tokenizer,
        generate=plain.generate,
        checkpoint=plain.checkpoint,
        plan=plain.plan,
    )


@functools.lru_cache(maxsize=256)
def _shapes(config: Config, derived: Derived, vocab_size: int, num_devices: int) -> None:
    program = make_program(config, derived, vocab_size, jax.devices()[:num_devices])
    jax.tree.map(lambda x: math.prod(x.shape), (program.abstract_state(), program.placement.abstract_batch()))


@functools.cache
def _bounds(key: str) -> tuple[float, ...]:
    """The least and the most of a number key, and what lies just outside."""
    section, _, name = key.rpartition(".")
    cls = typing.get_type_hints(Config).get(section) if section else Config
    bounds = ranges(cls).get(name)
    if bounds is None:
        return ()
    return bounds.least, bounds.most, bounds.least - 1, bounds.most + 1


def _set(raw: dict[str, Any], key: str, value: Any) -> Mutation:
    def make() -> dict[str, Any]:
        changed = copy.deepcopy(raw)
        section, _, name = key.rpartition(".")
        (changed[section] if section else changed)[name] = value
        return changed

    return Mutation(f"{key} = {ascii(value)[:80] if not isinstance(value, int) else hex(value)[:80]}", make)


def _typed(raw: dict[str, Any], key: str, text: str) -> Mutation:
    def make() -> dict[str, Any]:
        changed = copy.deepcopy(raw)
        set_key(changed, key, [text])
        return changed

    return Mutation(f"--config.{key}={ascii(text)[1:-1][:80]}", make)

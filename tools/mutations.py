"""Makes configs with one odd value, and finds out what happens with them.

Whatever value a key is set to, llmjax must either run or say in one sentence what is wrong, and never show a traceback.
`mutations` yields configs with one key changed, in an order that follows from a seed. `outcome` reads and checks such a
config and makes a program of abstract shapes from it, so that nothing large is ever allocated.
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
from llmjax.data.tokenizer.vocabulary import words_without_text
from llmjax.errors import UserError
from llmjax.flags import set_key
from llmjax.modes.plan import planned_vocab_size
from llmjax.ranges import ranges

# The outcome of a config that is not refused.
ACCEPTED = "accepted"
# The most characters of a value in the name of a mutation.
SHOWN = 80
# Numbers at the limits of integers and floats, and those on which arithmetic often fails. A choice.
NUMBERS = (
    0, 1, -1, 2, 3, 7, -2, 31, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64,
    10**20, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-8, 1e-38, 1e-45, 5e-324, 1e20, 1e38, 1e308, -1e308,
    math.nan, math.inf, -math.inf, True, False,
)  # fmt: skip
# Texts that are nearly numbers, lists or paths, that are very long, or that hold control characters. A choice.
TEXTS = (
    "", " ", "0", "-1", "--5", "5-", "1e5", "nan", "inf", "none", "None", "auto", "x" * 5000, "9" * 400, "9" * 5000,
    "\0", "a\0b", "\n", "\x1b[2J", "\u202e", "\udcff", "模型", "../..", "/", "~", "*", "[", "{", "(", "('a', 'b'", ",",
    ",,,", "1,2", "1,-2", "1,1e20", "0:4096", "0:0", "0:-4096", "a:b", "0:1:2", ":", "0:" + "9" * 400, "²", "٣",
    "1_000", "0x10", "1.", "+1", "latest", "best", "v5p:0x0x0", "%s%n", "{seed}", "--config.seed=1",
)  # fmt: skip
# Values of types that only a config file can set.
OTHERS = (
    None, (), [], {}, [None], [[1]], (1, 2), ("a", 1), (0, -1), (2**70,), (1.5,), ("1", "--5"), {"a": 1}, b"bytes",
    1j, object, [math.nan], ["0:4096", "1:1"], ["\0"],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A config with one key changed.

    name  what was changed, as in `data.seq_len = 0x0`
    make  returns the config as nested dicts, or raises `UserError` if the value is refused already when it is set
    """

    name: str
    make: Callable[[], dict[str, Any]]


def keys_of(raw: dict[str, Any]) -> list[str]:
    """The names of all sections and of all keys, the latter with their sections: `data`, `data.seq_len`."""
    keys = list(raw)
    for section, values in raw.items():
        keys += [f"{section}.{name}" for name in values] if isinstance(values, dict) else []
    return keys


def mutations(raw: dict[str, Any], *, seed: int, count: int | None = None) -> Iterator[Mutation]:
    """Yields configs that are `raw` with one key changed, in an order that follows from `seed`.

    Each key is set to each odd value, as a config file would, and to each odd text, as the command line would. Keys
    that are numbers are also set to the ends of their ranges and to values just outside. `count` is the most configs
    to yield, or None for all.
    """
    cases = [
        (key, value, False) for key in keys_of(raw) for value in (*NUMBERS, *TEXTS, *OTHERS, *_bounds(key))
    ]
    cases += [(key, text, True) for key in keys_of(raw) for text in TEXTS]
    random.Random(seed).shuffle(cases)
    for key, value, typed in cases[:count]:
        yield _typed(raw, key, value) if typed else _set(raw, key, value)


def outcome(mutation: Mutation, num_devices: int = 1) -> str:
    """ACCEPTED, or the sentence of the `UserError`. Any other exception is a fault of llmjax and is passed on."""
    try:
        config, derived = resolve_config(read_config(mutation.make()), num_devices)
        # The path would be read now. Whether a file can be read is a question about the file, not about the config.
        if config.tokenizer.path:
            return ACCEPTED
        _shapes(_what_compiles(config), derived, planned_vocab_size(config.tokenizer), num_devices)
    except UserError as error:
        return str(error)
    return ACCEPTED


def _what_compiles(config: Config) -> Config:
    """`config` with fixed values in all sections that do not change the program.

    Many mutations then have the same config, and `_shapes` finds the result in its cache.
    """
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
    """Makes the program and the shapes of its state and batch, and raises what they raise."""
    program = make_program(
        config,
        derived,
        vocab_size,
        jax.devices()[:num_devices],
        vocabulary=lambda: words_without_text(vocab_size),
    )
    jax.tree.map(lambda x: math.prod(x.shape), (program.abstract_state(), program.placement.abstract_batch()))


@functools.cache
def _bounds(key: str) -> tuple[float, ...]:
    """The least and the most value of a number key, and the values just outside. None for other keys."""
    section, _, name = key.rpartition(".")
    cls = typing.get_type_hints(Config).get(section) if section else Config
    bounds = ranges(cls).get(name)
    if bounds is None:
        return ()
    return bounds.least, bounds.most, bounds.least - 1, bounds.most + 1


def _set(raw: dict[str, Any], key: str, value: Any) -> Mutation:
    """The key set to a value as a config file does it."""

    def make() -> dict[str, Any]:
        changed = copy.deepcopy(raw)
        section, _, name = key.rpartition(".")
        (changed[section] if section else changed)[name] = value
        return changed

    # Python refuses to write an integer of more than 4300 digits in decimal.
    text = hex(value) if isinstance(value, int) else ascii(value)
    return Mutation(f"{key} = {text[:SHOWN]}", make)


def _typed(raw: dict[str, Any], key: str, text: str) -> Mutation:
    """The key set to a text as the command line does it."""

    def make() -> dict[str, Any]:
        changed = copy.deepcopy(raw)
        set_key(changed, key, [text])
        return changed

    return Mutation(f"--config.{key}={ascii(text)[1:-1][:SHOWN]}", make)

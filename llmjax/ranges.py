"""What is written beside a key of the config: `top_k: Annotated[int, Range(1, 2**24, "off"), Unset(0)]`.

Every number key of a section has a `Range`, and `check_ranges`, which each section calls when it is made, enforces them
all. So what is not a number that means something (infinite, NaN, negative, too large for the arithmetic behind the key)
is one sentence before anything else looks at it. `Unset` is the value of a key in a run that never set it.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from llmjax.errors import UserError

# The most characters of a value that a sentence shows.
LONGEST = 60
# The largest int32: the counters of updates, sequences and positions on the devices.
COUNT = 2**31 - 1
# The largest int64: seeds, and tokens seen.
FOLD = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most` that a key allows.

    zero   what a 0 stands for, as in "0 for none". If this is not empty, 0 is allowed even if it is less than `least`
    all    whether -1 is allowed too, and stands for all that is left
    above  whether only numbers above `least` are allowed, without `least` itself
    below  whether only numbers below `most` are allowed, without `most` itself
    """

    least: float
    most: float
    zero: str = ""
    all: bool = False
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is one of them; NaN is in no range."""
        if (self.zero and value == 0) or (self.all and value == -1):
            return True
        enough = value > self.least if self.above else value >= self.least
        return enough and (value < self.most if self.below else value <= self.most)

    def rule(self, value: float) -> str:
        """The end of a sentence about a `value` outside of the range: the rule that it breaks, and what to do."""
        least, most = _shortest(self.least), _shortest(self.most)
        if (self.least, self.most) == (0, 1):
            interval = f"{'(' if self.above else '['}{least}, {most}{')' if self.below else ']'}"
            return f"must lie in {interval}; use a value of this interval"
        if value < 0 and (self.zero or self.least == 0):
            broken = "must not be negative"
        elif value < self.least or (self.above and value == self.least):
            broken = f"must be {'greater than' if self.above else 'at least'} {least}"
        elif value > self.most or (self.below and value == self.most):
            broken = f"must be {'less than' if self.below else 'at most'} {most}"
        else:
            broken = "must be a number"
        others = [f"0 for {self.zero}"] if self.zero else []
        others += ["-1 for all that is left"] if self.all else []
        allowed = f"a value from {least} to {most}"
        if self.above or self.below:
            allowed += f", {' and '.join([least] * self.above + [most] * self.below)} excluded"
        return f"{broken}; use {' or '.join([*others, allowed])}"


@dataclasses.dataclass(frozen=True)
class Unset:
    """The value that a key has in a run that does not set it. configs/base.py may give new runs another value.

    It belongs to a run whose config.json is older than the key, and it stands for what such runs did. Where the run
    uses something that does not read the key, the key must keep this value. A key without an `Unset` is in every
    config.json that was ever written, so that a file that lacks it is damaged. So is a key that is `always` there.
    """

    value: Any
    always: bool = False


def check_ranges(section: str, config: Any, cls: type | None = None) -> None:
    """UserError for the first number of the dataclass `config` that is outside of the range in its annotation.

    section  the name of the config's section, "" for keys outside of all sections
    cls      the dataclass whose fields are checked, if `config` also has the fields of others
    """
    prefix = f"{section}." if section else ""
    cls = cls or type(config)
    for key, bounds in ranges(cls).items():
        value = getattr(config, key)
        if isinstance(value, tuple):
            for each in value:
                if not bounds.holds(each):
                    raise UserError(
                        f"{prefix}{key}={shown(value)} has {shown(each)}, which {bounds.rule(each)}"
                    )
        elif not bounds.holds(value):
            raise UserError(f"{prefix}{key}={shown(value)} {bounds.rule(value)}")


@functools.cache
def ranges(cls: type) -> dict[str, Range]:
    """The range of each field of a dataclass that has one."""
    return {key: note for key, note in _notes(cls) if isinstance(note, Range)}


@functools.cache
def unset(cls: type) -> dict[str, Any]:
    """The value of each field of a dataclass that has an `Unset`."""
    return {key: note.value for key, note in _notes(cls) if isinstance(note, Unset)}


@functools.cache
def older(cls: type) -> dict[str, Any]:
    """The value of each field of a dataclass that a config.json may lack, because it is older than the key."""
    return {key: note.value for key, note in _notes(cls) if isinstance(note, Unset) and not note.always}


def check_unread(section: str, keys: Any, chosen: str, reader: str) -> None:
    """UserError for the first key of a section whose value is not that of its `Unset`, because the run reads none.

    section  the name of the section, of which `keys` is the dataclass
    chosen   the setting by which the run does not read the section, as `key='value'`
    reader   the settings by which a run does
    """
    cls: type = type(keys)
    for key, value in unset(cls).items():
        if getattr(keys, key) != value:
            raise UserError(
                f"{section}.{key}={shown(getattr(keys, key))} is without effect for {chosen}; "
                f"set {reader}, or leave {section}.{key} at {value!r}"
            )


def _notes(cls: type) -> list[tuple[str, Any]]:
    """What is written beside the types of the fields of a dataclass, as pairs of a field and a note."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [(key, note) for key, hint in hints.items() for note in getattr(hint, "__metadata__", ())]


def shown(value: Any) -> str:
    """`value` as a sentence shows it: as in Python, control characters escaped, and cut to `LONGEST` characters."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to write out a whole number of more than 4300 digits.
        return f"a {type(value).__name__} of more digits than can be shown"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _shortest(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)

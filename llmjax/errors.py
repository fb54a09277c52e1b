"""The error that users see, and the table lookup that raises it.

This file is separate from `types` so that worker processes need not import jax for it.
"""

from collections.abc import Mapping
from typing import TypeVar

# The type of the entries of a table.
Entry = TypeVar("Entry")


class UserError(ValueError):
    """A mistake in the request. Its message is one sentence: key, value, the rule it breaks, and what to do."""


def choose(table: Mapping[str, Entry], key: str, name: str) -> Entry:
    """The entry of `table` for `name`, the value of the config key `key`. Raises UserError if there is none."""
    if name not in table:
        raise UserError(f"{key}={name!r} is not known; use one of {', '.join(table)}")
    return table[name]


def reason_of(error: BaseException) -> str:
    """What an error says, on one line; the name of its class if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

"""The one error that users see, and the lookup that raises it; apart from `types` so that worker processes need not
load jax for it."""

from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


class UserError(ValueError):
    """A mistake in what the user asked for: one sentence with the key, its value, the rule it breaks and what to do."""


def choose(table: Mapping[str, Entry], key: str, name: str) -> Entry:
    """What `table` has under `name`, the value of the config key `key`; UserError where it has nothing."""
    if name not in table:
        raise UserError(f"{key}={name!r} is not known; use one of {', '.join(table)}")
    return table[name]

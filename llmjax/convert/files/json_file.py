"""Reads the JSON files beside weights. They come from elsewhere, so that anything may be in them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from llmjax.errors import UserError
from llmjax.ranges import shown

# The longest JSON file that is read, in bytes. A choice: the index of a model of a thousand layers has a few MB.
MOST_BYTES = 100_000_000
# The largest whole number that a key may have. A larger one is damage, and would only fail later.
MOST = 2**31 - 1


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`. Raises ValueError, which says what is wrong, also where an object has a name twice."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except _Double:
        raise
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, in one sentence, where there is none."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a whole model")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES:,} bytes; give the file that belongs to the model")
    try:
        return parse_object(path.read_bytes())
    except ValueError as why:
        raise UserError(f"{path} is damaged ({why}); fetch or write it again") from None


def typed(name: str, value: Any, example: Any) -> Any:
    """`value`, which config.json has for the key `name`, of the type of `example`.

    Raises UserError if it is of another type, or a whole number that no model can have.
    """
    if isinstance(example, float) and type(value) is int and abs(value) <= MOST:
        value = float(value)
    if type(value) is not type(example) or (type(value) is int and not 0 <= value <= MOST):
        raise UserError(
            f"config.json has {name}={shown(value)}, which is no {type(example).__name__} that a model can have; fetch "
            "or write it again"
        )
    return value


class _Double(ValueError):
    """An object has a name twice, so that readers may disagree on its value."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Double(f"the name {shown(name)} is in it twice")
        found[name] = value
    return found

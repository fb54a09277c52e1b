"""Reads the fields of a request, which may hold anything: what is wrong with one is a sentence with status 400."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from llmjax.serve.errors import ApiError

# The most characters of a value that a sentence shows.
SHOWN = 60


class Fields:
    """The fields of a JSON object. A field that is null counts as absent, as in OpenAI's API."""

    def __init__(self, values: dict[str, Any]):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def any(self, name: str, default: Any = None) -> Any:
        """The value of a field, whatever it is."""
        self._read.add(name)
        return self._values.get(name, default)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A field that is a text."""
        value = self.any(name, default)
        return value if value is default else check_text(value, name)

    def flag(self, name: str) -> bool:
        """A field that is true or false; false if it is absent."""
        value = self.any(name, False)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """A field that is a whole number from `least` to `most`."""
        value = self.any(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A field that is a number from `least` to `most`."""
        value = self.any(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not fits or not math.isfinite(value):
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def inner(self, name: str) -> Fields:
        """A field that is an object; an empty one if it is absent."""
        value = self.any(name, {})
        if not isinstance(value, dict):
            raise wrong(name, value, "an object")
        return Fields(value)

    def texts(self, name: str, most: int) -> list[str]:
        """A field that is a text or a list of texts; no text if it is absent."""
        value = self.any(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most:
            raise wrong(name, value, f"a text or a list of at most {most} texts")
        return [check_text(text, name) for text in values]

    def ignore(self, names: Collection[str]) -> None:
        """Fields that may hold anything, because they change nothing of a text."""
        self._read.update(names)

    def refuse(self, neutral: dict[str, Any]) -> None:
        """Fields that this server does not heed: only their neutral value is allowed."""
        for name, value in neutral.items():
            if name in self._values and self.any(name) != value:
                raise ApiError(
                    400,
                    f"{name}={short(self.any(name))} is not supported by this server; leave it out",
                    param=name,
                )
            self._read.add(name)

    def finish(self) -> None:
        """Raises for a field that nobody has read."""
        for name in self._values:
            if name not in self._read:
                raise ApiError(400, f"the field {short(name)} is not known; leave it out", param=name[:SHOWN])


def read_object(body: bytes) -> Fields:
    """The fields of the JSON object in the body of a request."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; send a JSON object of fields") from None
    except ValueError as error:
        raise ApiError(
            400, f"the body is no JSON ({short(str(error))}); send a JSON object of fields"
        ) from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body is {short(values)}; send a JSON object of fields")
    return Fields(values)


def check_text(value: Any, name: str) -> str:
    """`value`, which must be a text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, f"{name} has half of a surrogate pair, which is no character; correct it", param=name
        ) from None
    return value


def wrong(name: str, value: Any, rule: str) -> ApiError:
    """The error for a field that breaks a rule."""
    return ApiError(400, f"{name}={short(value)} must be {rule}; correct it", param=name)


def short(value: Any) -> str:
    """`value` as a sentence shows it, on one line, cut where it is long, and at once even where it is huge."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str):
        value = value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
    return ascii(value) if not isinstance(value, int) or abs(value) < 10**SHOWN else "a huge number"

"""The ranges of numbers in a config: each has one, each bound is kept, and what is outside gets one sentence."""

import dataclasses
import math
import typing

import pytest

from llmjax.config.reading import read_config
from llmjax.config.schema import Config
from llmjax.errors import UserError
from llmjax.ranges import LONGEST, Range, check_ranges, ranges, shown

NUMBERS = (int, float, tuple[int, ...])
SECTIONS = {
    name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)
}


def number_keys():
    for section, cls in {"": Config, **SECTIONS}.items():
        for key, hint in typing.get_type_hints(cls).items():
            if hint in NUMBERS:
                yield section, cls, key, hint


@pytest.mark.parametrize("section, cls, key, hint", list(number_keys()))
def test_every_number_of_a_config_has_a_range_that_is_enforced(section, cls, key, hint, base):
    bounds = ranges(cls)[key]
    assert -math.inf < bounds.least < bounds.most < math.inf
    name = f"{section}.{key}" if section else key
    outside = [-(2**63), 2**63, 10**400, bounds.most * 2 + 1]
    outside += [bounds.least - 1] * (not (bounds.all and bounds.least - 1 == 0))
    if hint is float:
        outside += [math.nan, math.inf, -math.inf, -1e-300 if bounds.least >= 0 else -1e300]
    for value in outside:
        if bounds.holds(value):
            continue
        raw = base()
        (raw[section] if section else raw)[key] = (16, value) if hint not in (int, float) else value
        with pytest.raises(UserError, match=f"^{name}=.* (must|has) .*; use ") as error:
            read_config(raw)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.fixture(scope="module")
def base():
    from configs.base import get_config

    return lambda: get_config().to_dict()


def test_a_range_holds_what_it_says():
    plain, half = Range(1, 10), Range(0, 1, below=True)
    assert [plain.holds(n) for n in (0, 1, 10, 11, math.nan, math.inf)] == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    assert [half.holds(n) for n in (0, 0.5, 1, -0.1)] == [True, True, False, False]
    assert Range(2, 3, "off").holds(0) and not Range(2, 3, "off").holds(1)
    assert Range(1, 3, all=True).holds(-1) and not Range(1, 3, all=True).holds(0)
    assert not Range(1, 3, above=True).holds(1)


@pytest.mark.parametrize("bounds, value, sentence", [
    (Range(1, 10), 0, "must be at least 1; use a value from 1 to 10"),
    (Range(1, 10), 11, "must be at most 10; use a value from 1 to 10"),
    (Range(1, 10, "none"), -1, "must not be negative; use 0 for none or a value from 1 to 10"),
    (Range(1, 10, all=True), 0, "must be at least 1; use -1 for all that is left or a value from 1 to 10"),
    (Range(0, 1, above=True), 0, "must lie in (0, 1]; use a value of this interval"),
    (Range(1, 5.5, above=True), 1, "must be greater than 1; use a value from 1 to 5.5, 1 excluded"),
    (Range(1, 10), math.nan, "must be a number; use a value from 1 to 10"),
    (Range(1, 10), math.inf, "must be at most 10; use a value from 1 to 10"),
])  # fmt: skip
def test_a_number_outside_is_told_what_it_breaks_and_what_to_do(bounds, value, sentence):
    assert bounds.rule(value) == sentence


def test_a_value_is_shown_short_and_without_control_characters():
    assert shown(10**5000) == "a int of more digits than can be shown"
    assert len(shown("a" * 10**6)) == LONGEST and shown("a" * 10**6).endswith("...")
    assert shown("\x1b[2J\u202e") == r"'\x1b[2J\u202e'"


def test_a_field_without_a_range_is_left_alone():
    @dataclasses.dataclass
    class Free:
        name: str = "x"
        size: int = -5

    check_ranges("free", Free())

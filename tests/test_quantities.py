"""How a person reads a number."""

import math
import re

import pytest
from test_architecture import FILES, PACKAGE
from tiny_run import DURATION

from llmjax.quantities import format_bytes, format_duration, format_number, format_quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (3.14159, "3.14"), (1234, "1.23k"), (1200, "1.2k"), (3_400_000, "3.4M"),
     (1e9, "1B"), (1.5e13, "15T"), (999.96, "1k"), (999_999, "1M"), (3e-4, "3×10⁻⁴"), (9.999e-4, "0.001"),
     (-2.5, "−2.5"), (100, "100"), (1e20, "1×10²⁰"), (math.nan, "nan"), (-math.inf, "−inf")],
)  # fmt: skip
def test_numbers_are_short_and_keep_three_digits(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (3e-4, "3×10⁻⁴ s"), (0.84, "0.84 s"), (9.63, "9.6 s"), (48, "48 s"), (59.7, "1 min 00 s"),
     (228, "3 min 48 s"), (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_durations_show_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text
    assert re.fullmatch(DURATION, text)


@pytest.mark.parametrize("number, text", [
    (0, "0 "), (7, "7 "), (999, "999 "), (1000, "1 k"), (1234, "1.23 k"), (999_499, "999 k"), (999_600, "1 M"),
    (1_380_000, "1.38 M"), (5e9, "5 G"), (3.21e13, "32.1 T"),
])  # fmt: skip
def test_quantities_have_three_digits_and_a_unit(number, text):
    assert format_quantity(number, "FLOP") == f"{text}FLOP"
    assert format_bytes(number) == f"{text}B"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_file_alone_names_the_powers_of_a_thousand(path):
    """Two owners of a format drift apart: one called a billion tokens B, the other G."""
    tables = re.findall(r"""["']k["'],|["']M["'],|["']B["'],|1e9, ["']""", path.read_text(encoding="utf-8"))
    assert not tables or path.name == "quantities.py"

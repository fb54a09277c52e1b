"""How a person reads a number: counts, physical quantities with a unit, and durations. No other file formats them.

A count (tokens, parameters, FLOP) has the suffixes of English: k, M, B for a billion, T. A quantity with a unit has
the prefixes of the SI: 1.2 GB, 3.4 GFLOP, where G is a billion. Progress lines, the plan and the report use the same.
"""

from __future__ import annotations

import math

# The suffix of each power of a thousand: of a bare count, and as the prefix of a unit.
COUNT_SUFFIXES = ("", "k", "M", "B", "T")
SI_PREFIXES = ("", "k", "M", "G", "T")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float, digits: int = 3) -> str:
    """A number to `digits` significant digits: 0.912, 1.2k, 3.4M, 7B, 3×10⁻⁴, −2, nan."""
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    # Rounding comes first, so that 999.96 becomes 1k and not 1000.
    size = abs(float(f"{value:.{digits}g}"))
    sign = "−" if value < 0 and size else ""
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        return f"{sign}{_trim(mantissa)}×10{str(int(exponent)).translate(SUPERSCRIPT)}"
    scaled, power = _scale(size)
    return f"{sign}{_round(scaled, digits)}{COUNT_SUFFIXES[power]}"


def format_quantity(value: float, unit: str) -> str:
    """A quantity from 0 to three significant digits, with its unit: 1.23 GB, 4.5 TFLOP, 12 B."""
    scaled, power = _scale(float(f"{value:.3g}"))
    return f"{_round(scaled, 3)} {SI_PREFIXES[power]}{unit}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units: 1.23 GB."""
    return format_quantity(count, "B")


def format_duration(seconds: float) -> str:
    """A time span in its two largest units: 0.84 s, 48 s, 3 min 48 s, 2 h 05 min, 3 d 4 h."""
    if not math.isfinite(seconds) or seconds < 10:
        return f"{format_number(seconds, 2)} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{minutes} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{days} d {hours % 24} h"


def _scale(size: float) -> tuple[float, int]:
    """`size` divided by the largest power of a thousand that leaves at least 1, up to a trillion, and that power."""
    # A logarithm may come out a hair below the whole number that it should be.
    power = min(math.floor(math.log10(size) + 1e-9) // 3, 4) if size >= 1000 else 0
    return size / 1000**power, power


def _round(scaled: float, digits: int) -> str:
    whole_digits = math.floor(math.log10(scaled) + 1e-9) + 1 if scaled else 1
    return _trim(f"{scaled:.{max(digits - whole_digits, 0)}f}")


def _trim(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits

"""Parameters of which a few are tried in every run of the tests, and the others in the slow suite."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], in_default: Callable[[Any], bool]) -> list[Any]:
    """The cases as parameters; those for which `in_default` is false are marked slow. A tuple is several arguments."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if in_default(case) else pytest.mark.slow,
        )
        for case in cases
    ]

"""A description of what a compiled step sends between devices."""

from __future__ import annotations

from llmjax.plan.hlo.parse import parse
from llmjax.plan.hlo.traffic import Collective, collectives
from llmjax.quantities import format_bytes


def describe_communication(text: str) -> str:
    """What each device sends per call of the program `text` (from `compiled.as_text()`), by kind of collective.

    A collective in a loop counts as many times as the loop runs, or once if the number of iterations depends on the
    data.
    """
    try:
        found = collectives(parse(text))
    # Another compiler version may write its programs differently; the plan is still useful without this line.
    except (ValueError, KeyError, IndexError) as error:
        return f"cannot be read from the program that this compiler writes ({error!r})"
    if not found:
        return "each device sends nothing"
    kinds = dict.fromkeys(collective.kind for collective in found)
    parts = [_describe(kind, [c for c in found if c.kind == kind]) for kind in kinds]
    overlapped = sum(c.times(1.0) for c in found if c.between)
    count = sum(c.times(1.0) for c in found)
    total = sum(c.sent_bytes * c.times(1.0) for c in found)
    decided = "; a loop whose length depends on the data counts once" if any(c.within for c in found) else ""
    return (
        f"each device sends {format_bytes(total)} a call of the step: {', '.join(parts)}; other work runs during "
        f"{overlapped:,.0f} of {count:,.0f}{decided}"
    )


def _describe(kind: str, found: list[Collective]) -> str:
    sent = sum(c.sent_bytes * c.times(1.0) for c in found)
    return f"{kind} {format_bytes(sent)} in {sum(c.times(1.0) for c in found):,.0f}"

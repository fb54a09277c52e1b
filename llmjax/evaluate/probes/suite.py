"""The probes of long context by name, and their results as text.

position  held-out loss by position in the document
context   loss of the same targets with shortened context
passkey   retrieval of a random number from a long text
needle    retrieval of a fact from a long text
copy      prediction of random tokens when they are repeated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmjax.errors import choose
from llmjax.evaluate.probes.context import make_context
from llmjax.evaluate.probes.copying import make_copy
from llmjax.evaluate.probes.position import make_position
from llmjax.evaluate.probes.retrieval import make_needle, make_passkey
from llmjax.evaluate.scoring import Probe, Shape, Text, TokenLosses, score_pieces
from llmjax.types import Params

PROBES: dict[str, Callable[[Text, Sequence[int]], Probe]] = {
    "position": make_position,
    "context": make_context,
    "passkey": make_passkey,
    "needle": make_needle,
    "copy": make_copy,
}


def default_lengths(seq_len: int) -> tuple[int, ...]:
    """1, 16, 32, 64, ... and `seq_len` as the last one."""
    return (*(n for n in (1, *(2**i for i in range(4, seq_len.bit_length()))) if n < seq_len), seq_len)


def make_probes(names: Sequence[str], lengths: Sequence[int], text: Text) -> dict[str, Probe]:
    """The probes with these names, in the order of `PROBES`. Raises UserError if a probe does not work with these
    lengths."""
    lengths = sorted(set(lengths)) or default_lengths(text.seq_len)
    return {name: make(text, lengths) for name, make in PROBES.items() if name in names}


def run_probes(
    probes: Mapping[str, Probe], losses: TokenLosses, params: Params, shape: Shape
) -> dict[str, Any]:
    """The results of each probe, in a form that JSON can hold."""
    return {
        name: probe.summarize(score_pieces(losses, params, probe.pieces(), probe.num_labels, shape))
        for name, probe in probes.items()
    }


def describe(results: Mapping[str, Any]) -> dict[str, str]:
    """One line of text per curve or grid; none for a probe without results."""
    rows: dict[str, str] = {}
    for name, of in results.items():
        rows |= choose(WORDS, "probe", name)(name, of) if of else {}
    return rows


def _position_words(name: str, of: Any) -> dict[str, str]:
    return {"loss by position": _series(of["from"], of["loss"], "{:.3f}")}


def _context_words(name: str, of: Any) -> dict[str, str]:
    return {"loss by context": _series(of["length"], of["loss"], "{:.3f}")}


def _retrieval_words(name: str, grids: Any) -> dict[str, str]:
    rows = {}
    for of in grids:
        means = [sum(column) / len(column) for column in zip(*of["choice"])]
        exact = [sum(column) / len(column) for column in zip(*of["exact"])]
        chance = f"chance {of['chance']:.0%}"
        rows[f"{name}, {of['language']}"] = f"{_series(of['length'], means, '{:.0%}')} chosen ({chance})"
        rows[f"{name}, {of['language']}, exact"] = _series(of["length"], exact, "{:.0%}")
    return rows


def _copy_words(name: str, of: Any) -> dict[str, str]:
    return {"copy at distance": f"{_series(of['distance'], of['accuracy'], '{:.1%}')} right"}


def _series(x: Sequence[int], values: Sequence[float | None], form: str) -> str:
    """`x: value` for each value; a dash for a missing one."""
    return "  ".join(f"{a:,}: {'–' if v is None else form.format(v)}" for a, v in zip(x, values, strict=True))


# The results of a probe as text: (name of the probe, results) -> {label: line}.
WORDS: dict[str, Callable[[str, Any], dict[str, str]]] = {
    "position": _position_words,
    "context": _context_words,
    "passkey": _retrieval_words,
    "needle": _retrieval_words,
    "copy": _copy_words,
}

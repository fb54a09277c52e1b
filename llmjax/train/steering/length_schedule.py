"""Sequences whose length follows the tokens seen, at constant tokens per update.

Short sequences cost less attention and make early training steadier (sequence length warmup: Li et al. 2022, "The
Stability-Efficiency Dilemma"); long ones may come last, or again and again (dataset decomposition: Pouransari et al.
2024). Here the packed rows of T tokens are cut into T / length rows each: an update keeps its tokens, the data cursor
its meaning, and the length follows from the tokens seen, so that there is nothing to save. The step compiles once for
each length.
"""

from __future__ import annotations

import dataclasses

from llmjax.errors import UserError
from llmjax.train.steering.batch_schedule import parse_points


@dataclasses.dataclass(frozen=True)
class LengthSchedule:
    """Points (tokens seen, length), the first at 0: each holds until the next, for the updates that begin there."""

    points: tuple[tuple[int, int], ...]

    def length(self, tokens_seen: int) -> int:
        """The length of the rows in the update that begins after `tokens_seen` tokens."""
        return [length for start, length in self.points if start <= tokens_seen][-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """All there are, ascending."""
        return tuple(sorted({length for _, length in self.points}))

    def describe(self) -> str:
        """For example `128 tokens, 256 from 1,000,000 tokens seen on`."""
        (_, first), *others = self.points
        return ", ".join(
            [f"{first:,} tokens", *(f"{length:,} from {start:,} tokens seen on" for start, length in others)]
        )


def make_length_schedule(points: tuple[str, ...], seq_len: int, seq_shards: int = 1) -> LengthSchedule:
    """The schedule of data.length_points, `TOKENS_SEEN:LENGTH` each; without any, whole rows of `seq_len`.

    Lengths may come in any order. `seq_shards` is mesh.seq, over which each row is split. UserError for points that
    cannot be read, go backwards in tokens seen, or do not cut a row into equal ones.
    """
    if not points:
        return LengthSchedule(((0, seq_len),))
    parsed = parse_points("data.length_points", "LENGTH", points)
    fitting = [n for n in range(seq_shards, seq_len + 1, seq_shards) if seq_len % n == 0]
    for seen, length in parsed:
        if length in fitting:
            continue
        near = min(fitting, key=lambda n: (abs(n - length), n))
        if length < 1 or seq_len % length:
            raise UserError(
                f"data.length_points has {seen}:{length}, but rows of data.seq_len={seq_len} cannot be cut into rows "
                f"of {length}; use a divisor, for example {near}"
            )
        raise UserError(
            f"data.length_points has {seen}:{length}, but {length} is not divisible by mesh.seq={seq_shards}; "
            f"use for example {near}"
        )
    return LengthSchedule(parsed)

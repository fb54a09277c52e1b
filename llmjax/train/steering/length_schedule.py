"""Sequences whose length changes with the tokens seen, while the tokens per update stay the same.

Short sequences cost less attention and make early training steadier (sequence length warmup: Li et al. 2022, "The
Stability-Efficiency Dilemma"). Long ones may come last, or short and long ones in turn (dataset decomposition:
Pouransari et al. 2024).

Each packed row of T tokens is cut into T / length shorter rows. An update therefore keeps its number of tokens, and the
data cursor keeps its meaning. The length follows from the tokens seen alone, so a checkpoint needs nothing more to
resume it. The step is compiled once for each length.
"""

from __future__ import annotations

import dataclasses

from llmjax.errors import UserError
from llmjax.train.steering.batch_schedule import parse_points


@dataclasses.dataclass(frozen=True)
class LengthSchedule:
    """The length of rows as a function of the tokens seen.

    points  (tokens seen, length), the first at 0 tokens seen. The length of a point holds for every update that begins
            at or after it, until the next point is reached
    """

    points: tuple[tuple[int, int], ...]

    def length(self, tokens_seen: int) -> int:
        """The length, in tokens, of the rows in the update that begins after `tokens_seen` tokens."""
        return [length for start, length in self.points if start <= tokens_seen][-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """All lengths that the run uses, ascending and each once."""
        return tuple(sorted({length for _, length in self.points}))

    def describe(self) -> str:
        """The schedule in words: `128 tokens, 256 from 1,000,000 tokens seen on`."""
        (_, first), *others = self.points
        return ", ".join(
            [f"{first:,} tokens", *(f"{length:,} from {start:,} tokens seen on" for start, length in others)]
        )


def make_length_schedule(points: tuple[str, ...], seq_len: int, seq_shards: int = 1) -> LengthSchedule:
    """Makes the schedule that the config asks for.

    Args:
      points: data.length_points, each `TOKENS_SEEN:LENGTH`. Lengths may grow or shrink. If there are none, rows always
        have their whole length.
      seq_len: T, the tokens of a packed row.
      seq_shards: mesh.seq, the number of devices over which each row is split.

    Raises `UserError` if a point cannot be read, if tokens seen do not grow, or if a length does not cut a row of T
    tokens into equal rows that the devices can share equally.
    """
    if not points:
        return LengthSchedule(((0, seq_len),))
    parsed = parse_points("data.length_points", "LENGTH", points)
    fitting = [n for n in range(seq_shards, seq_len + 1, seq_shards) if seq_len % n == 0]
    for seen, length in parsed:
        if length in fitting:
            continue
        # The remedy that the error names: the closest length that works, the shorter one of two equally close.
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

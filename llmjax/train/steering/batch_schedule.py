"""How updates are cut into micro-steps: the arithmetic of a batch, and batches that grow with the tokens seen.

The micro-batch has the same size in the whole run. Only k, the number of micro-steps in an update, varies. The shapes
of the compiled step therefore never change, and it is compiled once.
"""

from __future__ import annotations

import dataclasses
import itertools

from llmjax.errors import UserError, choose
from llmjax.ranges import FOLD, Range, shown

# The numbers that a point of a schedule may hold. Negative ones pass here, because the schedules have clearer errors
# for them.
TOKENS = Range(-FOLD, FOLD)
# The points of a schedule, each (tokens seen, value), for example (tokens seen, tokens per update).
Points = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class BatchArithmetic:
    """How one update is cut into micro-batches.

    seq_len             tokens in a sequence
    micro_batch_size    sequences in a micro-batch, over all devices
    accumulation_steps  micro-steps in an update
    """

    seq_len: int
    micro_batch_size: int
    accumulation_steps: int

    @property
    def sequences_per_update(self) -> int:
        """The sequences of all micro-batches of an update."""
        return self.micro_batch_size * self.accumulation_steps

    @property
    def tokens_per_update(self) -> int:
        """The positions of all micro-batches of an update, padding included."""
        return self.sequences_per_update * self.seq_len

    def describe(self) -> str:
        """The arithmetic in words: `8 sequences x 512 tokens x 2 micro-steps = 8,192 tokens per update`."""
        steps = f"{self.accumulation_steps} micro-step{'s' if self.accumulation_steps > 1 else ''}"
        sequences = f"{self.micro_batch_size} sequence{'s' if self.micro_batch_size > 1 else ''}"
        return (
            f"{sequences} x {self.seq_len:,} tokens x {steps} = {self.tokens_per_update:,} tokens per update"
        )


def resolve_batch(
    tokens_per_update: int, seq_len: int, micro_batch_size: int, accumulation_steps: int, data_shards: int = 1
) -> BatchArithmetic:
    """Fills in what the config leaves open about the cut of an update.

    Args:
      tokens_per_update: the tokens that an update must have.
      seq_len: tokens in a sequence.
      micro_batch_size: sequences in a micro-batch; 0 to let it follow from `accumulation_steps`.
      accumulation_steps: micro-steps in an update; 0 to let it follow from `micro_batch_size`. If both are 0, an
        update is one micro-step.
      data_shards: the product mesh.data x mesh.fsdp, over which the sequences of a micro-batch are split.

    Raises `UserError` if the numbers do not multiply to `tokens_per_update`, or if the shards get unequal parts.
    """
    given = {
        "train.tokens_per_update": (tokens_per_update, 1),
        "data.seq_len": (seq_len, 1),
        "compute.micro_batch_size": (micro_batch_size, 0),
        "compute.accumulation_steps": (accumulation_steps, 0),
    }
    for key, (value, least) in given.items():
        if value < least:
            raise UserError(f"{key}={value} is not {least} or more; give it a larger value")
    # An update consists of whole sequences.
    sequences, rest = divmod(tokens_per_update, seq_len)
    if rest:
        near = max(sequences, 1) * seq_len
        raise UserError(
            f"train.tokens_per_update={tokens_per_update} is not a multiple of data.seq_len={seq_len}; "
            f"use for example {near}"
        )
    cut = f"train.tokens_per_update={tokens_per_update} / data.seq_len={seq_len}"
    if micro_batch_size and accumulation_steps and micro_batch_size * accumulation_steps != sequences:
        product = micro_batch_size * accumulation_steps
        raise UserError(
            f"compute.micro_batch_size={micro_batch_size} x compute.accumulation_steps={accumulation_steps} "
            f"makes {product} sequences, but {cut} makes {sequences}; "
            f"set one of the two to 0 or train.tokens_per_update={product * seq_len}"
        )
    # If only one of the two is given, the other is a quotient and must come out whole.
    for key, value in (("micro_batch_size", micro_batch_size), ("accumulation_steps", accumulation_steps)):
        if value and sequences % value:
            # The remedy that the error names: the largest divisor up to the value that was asked for.
            near = next(size for size in range(min(value, sequences), 0, -1) if sequences % size == 0)
            raise UserError(
                f"compute.{key}={value} does not divide the {sequences} sequences of an update ({cut}); "
                f"use a divisor such as {near}, or train.tokens_per_update={-(-sequences // value) * value * seq_len}"
            )
    steps = accumulation_steps or (sequences // micro_batch_size if micro_batch_size else 1)
    size = sequences // steps
    # Every device computes the same number of sequences of a micro-batch.
    if size % data_shards:
        raise UserError(
            f"compute.micro_batch_size={size} is not divisible by the {data_shards} shards of the batch "
            f"(mesh.data x mesh.fsdp); change it, train.tokens_per_update={tokens_per_update}, "
            f"compute.accumulation_steps={steps} or the mesh"
        )
    return BatchArithmetic(seq_len, size, steps)


def _hold(points: Points, tokens_seen: int) -> float:
    """The value of the last point that was reached."""
    return float(points[0][1])


def _interpolate(points: Points, tokens_seen: int) -> float:
    """The value on the straight line between the two points. After the last point its value holds."""
    if len(points) == 1:
        return _hold(points, tokens_seen)
    (x0, y0), (x1, y1) = points
    return y0 + (y1 - y0) * (tokens_seen - x0) / (x1 - x0)


# train.batch_schedule -> a function (points, tokens seen) that returns the tokens per update. It gets the last point
# that was reached and, if there is one, the point after it.
SCHEDULES = {"constant": _hold, "piecewise": _hold, "linear": _interpolate}


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The tokens per update as a function of the tokens seen, rounded to whole micro-batches.

    kind          a key of `SCHEDULES`. constant: one point holds for the whole run. piecewise: a point holds until
                  the next one is reached (Llama 3, Grattafiori et al. 2024). linear: the size follows straight lines
                  through the points and holds after the last one (GPT-3, Brown et al. 2020)
    points        (tokens seen, tokens per update), the first at 0 tokens seen
    micro_tokens  the tokens of a micro-batch
    """

    kind: str
    points: Points
    micro_tokens: int

    def accumulation_steps(self, tokens_seen: int) -> int:
        """The number of micro-steps of the update that begins after `tokens_seen` tokens. It is at least 1."""
        seen = [start for start, _ in self.points]
        last = max(i for i, start in enumerate(seen) if start <= tokens_seen)
        size = SCHEDULES[self.kind](self.points[last : last + 2], tokens_seen)
        return max(round(size / self.micro_tokens), 1)

    @property
    def max_steps(self) -> int:
        """The largest number of micro-steps that an update of the run has."""
        return max(max(round(size / self.micro_tokens), 1) for _, size in self.points)


def make_batch_schedule(kind: str, points: tuple[str, ...], batch: BatchArithmetic) -> BatchSchedule:
    """Makes the schedule that the config asks for.

    Args:
      kind: train.batch_schedule, a key of `SCHEDULES`.
      points: train.batch_points, each `TOKENS_SEEN:TOKENS_PER_UPDATE`; empty for a constant batch.
      batch: the cut of an update as the config gives it. A constant schedule uses its tokens per update, the others
        only its micro-batch.

    Raises `UserError` if a point cannot be read, if tokens seen or sizes decrease from one point to the next, or if a
    size is not a whole number of micro-batches.
    """
    micro_tokens = batch.micro_batch_size * batch.seq_len
    choose(SCHEDULES, "train.batch_schedule", kind)
    if kind == "constant":
        if points:
            raise UserError(
                f"train.batch_points={points} has no meaning with train.batch_schedule='constant'; "
                "set it to piecewise or linear, or leave the points out"
            )
        return BatchSchedule(kind, ((0, batch.tokens_per_update),), micro_tokens)
    parsed = parse_points("train.batch_points", "TOKENS_PER_UPDATE", points)
    for (seen, size), (next_seen, next_size) in itertools.pairwise(parsed):
        if next_size < size:
            raise UserError(
                f"train.batch_points goes backwards from {seen}:{size} to {next_seen}:{next_size}; "
                "order the points so that both tokens seen and tokens per update grow"
            )
    for seen, size in parsed:
        if size % micro_tokens or size < 1:
            raise UserError(
                f"train.batch_points has {seen}:{size}, but {size} is no multiple of the {micro_tokens} tokens of a "
                f"micro-batch ({batch.micro_batch_size} x {batch.seq_len}); use for example "
                f"{max(round(size / micro_tokens), 1) * micro_tokens}, or another compute.micro_batch_size"
            )
    return BatchSchedule(kind, parsed, micro_tokens)


def parse_points(key: str, value_name: str, points: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Reads the points of a schedule, each written `TOKENS_SEEN:VALUE`, as pairs (tokens seen, value).

    Args:
      key: the config key that holds the points, for errors.
      value_name: what the values are, for errors, such as `TOKENS_PER_UPDATE`.
      points: the points as they are written in the config.

    Raises `UserError` if a point cannot be read, if the first is not at 0 tokens seen, or if tokens seen do not grow
    from each point to the next.
    """
    parsed = tuple(_parse_point(key, value_name, point) for point in points)
    if not parsed or parsed[0][0] != 0:
        raise UserError(f"{key}={points} does not say how the run begins; let the first be 0:{value_name}")
    for (seen, value), (next_seen, next_value) in itertools.pairwise(parsed):
        if next_seen <= seen:
            raise UserError(
                f"{key} goes backwards from {seen}:{value} to {next_seen}:{next_value}; "
                "order the points so that tokens seen grow"
            )
    return parsed


def _parse_point(key: str, value_name: str, point: str) -> tuple[int, int]:
    """One point, see `parse_points`."""
    seen, _, value = point.partition(":")
    try:
        parsed = int(seen), int(value)
    except ValueError:
        raise UserError(
            f"{key} has {shown(point)}, which is not TOKENS_SEEN:{value_name}; write for example 0:4096"
        ) from None
    for number in parsed:
        if not TOKENS.holds(number):
            raise UserError(f"{key} has {shown(point)}, of which {shown(number)} {TOKENS.rule(number)}")
    return parsed

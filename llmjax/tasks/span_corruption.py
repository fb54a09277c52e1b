"""Span corruption (T5: Raffel et al. 2020): the model reads a text with gaps and writes what belongs into them.

Where the gaps are is a function of the seed, the packed sequence number and the column, as dropout is. It does not
depend on how the batch was cut, and a sequence that comes again in another epoch has another number and other gaps.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data.examples.span_corruption import corruption_of, stream_lengths
from llmjax.models.contract import Model
from llmjax.ops.dropout import token_keys
from llmjax.ops.seeds import make_key
from llmjax.parallel.rules import Layout
from llmjax.ranges import Range, Unset, check_ranges
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, token_loss, token_scores
from llmjax.types import Batch

# What the seed of the gaps is folded with, for each of the two streams.
KEPT, TAKEN = 0x6B657074, 0x74616B65


@dataclasses.dataclass(frozen=True)
class SpanCorruptionConfig:
    """The keys of the section `span_corruption`, explained in `configs/base.py`."""

    rate: Annotated[float, Range(0, 0.5, above=True), Unset(0.15)]
    span_len: Annotated[float, Range(1, 1000), Unset(3.0)]
    sentinels: Annotated[int, Range(1, 2**16), Unset(16)]

    def __post_init__(self) -> None:
        check_ranges("span_corruption", self)


class SpanCorruption:
    """The loss is the cross-entropy of what was taken out, of the sentinels before each span, and of the end."""

    section = SpanCorruptionConfig
    sees_both_sides = False
    use = "fill_spans"
    compresses_text = False

    scores = (
        Score("loss", "held-out loss", "nats per target", digits=4),
        Score("perplexity", "perplexity", digits=2),
        Score("accuracy", "targets foreseen", higher_is_better=True, digits=4),
    )

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        def prepare(batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
            drawn = draw_spans(batch, setting.keys, setting.seed, model.layout)
            return drawn, drawn.targets, batch.weights

        return token_loss(model, setting, prepare)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """`loss` is in nats per target, and `perplexity` its exponential. `accuracy` is the share of the targets that
        are the model's most likely token after the right ones before them."""
        return token_scores(totals)


class Stream(NamedTuple):
    """One stream of a row, in its order: ids, documents and positions, int32 [X] each."""

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array


def draw_spans(batch: Batch, keys: SpanCorruptionConfig, seed: int, layout: Layout) -> Batch:
    """The batch with gaps at places that are drawn, whose examples have all of their gaps at the end
    (`data/examples/span_corruption.py`). All lengths stay as they are."""
    columns_BT = batch.columns
    if columns_BT is None:
        columns_BT = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, 1)
    columns_BT = layout.constrain(columns_BT, "batch", None)
    order_BT = jnp.argsort(columns_BT, axis=1)

    def in_order(x_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(layout.constrain(x_BT, "batch", None), order_BT, axis=1)

    sources = (batch.source_tokens, batch.source_segments, batch.source_positions)
    source = Stream(*(layout.constrain(x, "batch", None) for x in sources))
    target = Stream(*(in_order(x) for x in (batch.targets, batch.segments, batch.positions)))
    draws = [
        _draws(make_key(seed), salt, batch.index, stream.tokens.shape[1])
        for salt, stream in ((KEPT, source), (TAKEN, target))
    ]
    sizes = np.array([stream_lengths(n, keys.rate, keys.span_len) for n in range(sum(_lengths(batch)))])
    spans = np.array([corruption_of(n, keys.rate, keys.span_len).spans for n in range(len(sizes))])
    # The number of spans by the length of both streams, which grows with that of the text.
    spans_of = np.zeros(sum(_lengths(batch)) + 1, np.int32)
    within = sizes.sum(axis=1) < len(spans_of)
    spans_of[sizes.sum(axis=1)[within]] = spans[within]
    source_BS, targets_BT = jax.vmap(lambda *row: _draw_row(jnp.asarray(spans_of), *row))(
        source, target, *draws
    )
    first_BT = target.positions == 0
    read_BT = jnp.where(first_BT, in_order(batch.tokens), jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0))))
    # Back to where each token lies. Padding is left as it is.
    real_BT = batch.segments > 0
    back = [jnp.take_along_axis(x, columns_BT, axis=1) for x in (read_BT, targets_BT)]
    tokens_BT, targets_BT = (
        layout.constrain(jnp.where(real_BT, x, old), "batch", "length")
        for x, old in zip(back, (batch.tokens, batch.targets), strict=True)
    )
    source_BS = layout.constrain(source_BS, "batch", "source_length")
    return dataclasses.replace(batch, tokens=tokens_BT, targets=targets_BT, source_tokens=source_BS)


def _lengths(batch: Batch) -> tuple[int, int]:
    """The positions of a row in both streams."""
    return batch.source_tokens.shape[1], batch.tokens.shape[1]


def _draws(rng: jax.Array, salt: int, index_B: jax.Array, length: int) -> jax.Array:
    """A number in [0, 1) for each column of each row."""
    columns_BX = jax.lax.broadcasted_iota(jnp.int32, (len(index_B), length), 1)
    keys_BX = token_keys(jax.random.fold_in(rng, salt), index_B, columns_BX)
    return jax.vmap(jax.vmap(jax.random.uniform))(keys_BX)


def _draw_row(
    spans_of: jax.Array, source: Stream, target: Stream, draws_S: jax.Array, draws_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The source and the targets of a row with drawn gaps, int32 [S] and [T].

    A text is stored as k kept tokens in the source and t taken ones in the targets, with m sentinels behind the former
    and before the latter. Both are cut into m parts at random, and the text is read as kept part, taken part, kept
    part, and so on.
    """
    S, T = len(source.tokens), len(target.tokens)
    # By the number of a document, which is T at most: where it begins in each stream, and its lengths.
    sizes_s, sizes_t = (jnp.zeros(T + 1, jnp.int32).at[x.segments].add(1) for x in (source, target))
    spans = spans_of[sizes_s + sizes_t]
    kept, taken = sizes_s - spans - 1, sizes_t - spans - 1
    begins_s, begins_t = (
        jnp.zeros(T + 1, jnp.int32)
        .at[jnp.where(x.positions == 0, x.segments, T + 1)]
        .set(jnp.arange(n), mode="drop")
        for x, n in ((source, S), (target, T))
    )

    # Kept token i of a document lies at position i, and taken token i at position m + i.
    def cut(stream: Stream, draws: jax.Array, skipped: jax.Array, number: jax.Array) -> tuple[jax.Array, ...]:
        """The document, the number among its tokens, the part, and whether a part begins or ends, for each position."""
        d = stream.segments
        i = stream.positions - skipped[d]
        own = (i >= 0) & (i < number[d]) & (d > 0)
        begins = own & ((i == 0) | (_rank(draws, d, own & (i > 0), stream.positions) < spans[d] - 1))
        counted = jnp.cumsum(begins)
        part = counted - counted[jnp.arange(len(d)) - jnp.minimum(i, jnp.arange(len(d)))]
        ends = own & ((i == number[d] - 1) | jnp.roll(begins, -1))
        return d, i, part, own & (spans[d] > 0), begins, ends

    d, i, part, own, _, ends = cut(source, draws_S, jnp.zeros_like(spans), kept)
    e, q, gap, away, starts, _ = cut(target, draws_T, spans, taken)
    # Where each part of a document ends among the kept tokens, and begins among the taken ones.
    ends_at = jnp.zeros(S, jnp.int32).at[jnp.where(own & ends, begins_s[d] + part, S)].set(i + 1, mode="drop")
    starts_at = jnp.zeros(T, jnp.int32).at[jnp.where(away & starts, begins_t[e] + gap, T)].set(q, mode="drop")

    def text(document: jax.Array, x: jax.Array) -> jax.Array:
        """Token x of the text of a document."""
        behind = x - kept[document]
        stays = source.tokens[jnp.minimum(begins_s[document] + x, S - 1)]
        goes = target.tokens[jnp.clip(begins_t[document] + spans[document] + behind, 0, T - 1)]
        return jnp.where(behind < 0, stays, goes)

    def sentinel(document: jax.Array, number: jax.Array) -> jax.Array:
        return target.tokens[jnp.clip(begins_t[document] + number, 0, T - 1)]

    # A kept token has the taken ones of earlier gaps before it, and a sentinel for each gap.
    at_S = jnp.where(own, begins_s[d] + i + part, S)
    before = starts_at[jnp.clip(begins_t[d] + part, 0, T - 1)]
    drawn_S = source.tokens.at[at_S].set(text(d, i + before), mode="drop")
    drawn_S = drawn_S.at[jnp.where(own & ends, at_S + 1, S)].set(sentinel(d, part), mode="drop")
    # A taken token has the kept ones up to its gap before it.
    at_T = jnp.where(away, begins_t[e] + q + gap + 1, T)
    up_to = ends_at[jnp.clip(begins_s[e] + gap, 0, S - 1)]
    drawn_T = target.tokens.at[at_T].set(text(e, q + up_to), mode="drop")
    drawn_T = drawn_T.at[jnp.where(away & starts, at_T - 1, T)].set(sentinel(e, gap), mode="drop")
    return drawn_S, drawn_T


def _rank(draws: jax.Array, segments: jax.Array, chosen: jax.Array, positions: jax.Array) -> jax.Array:
    """The rank of each draw among the chosen ones of its document, from 0; those that are not chosen come last."""
    # Padding lies behind all documents, which lie in the order of their numbers.
    documents = jnp.where(segments > 0, segments, len(segments) + 1)
    order = jnp.lexsort((jnp.where(chosen, draws, 2.0), documents))
    places = jnp.zeros(len(order), jnp.int32).at[order].set(jnp.arange(len(order)))
    return jnp.where(chosen, places - (jnp.arange(len(order)) - positions), len(order))

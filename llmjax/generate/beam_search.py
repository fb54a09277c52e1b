"""Beam search: of the continuations of a prompt that are looked at, those that are likeliest as a whole.

Several continuations, the beams, go on side by side. After each token, the likeliest extensions of all of them take
their places. An extension that ends the text is finished, if it is among the best ones. Its score is its
log-probability divided by its number of tokens to the power of `generate.length_penalty`. The search for a prompt ends
when the best beam, as long as it is, scores below the worst of the finished ones. All this is as in the library
`transformers` (with `early_stopping=False`), whose results it equals.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.generate.generate import (
    GenerateConfig,
    Rows,
    make_rows,
    read_prompts,
    room,
    round_up,
    without_ids,
)
from llmjax.models.contract import Cache, Model
from llmjax.types import Params

# The score of what may not be chosen. It is finite, so that differences of such scores are no NaN.
NEVER = -1.0e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The state of the search for B prompts, with W beams and room for L tokens each.

    cache           of B x W rows
    tokens_BWL      int32, what the beams wrote so far
    log_BW          float32, their log-probabilities, the largest first
    done_BWL        int32, the best finished texts
    done_score_BW   float32, their scores
    is_done_BW      bool, false where there is no finished text yet
    open_B          bool, whether a beam may still overtake
    """

    cache: Cache
    tokens_BWL: jax.Array
    log_BW: jax.Array
    done_BWL: jax.Array
    done_score_BW: jax.Array
    is_done_BW: jax.Array
    open_B: jax.Array


class Search(Protocol):
    """What `make_beam_search` returns."""

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None = None,
        watch: Callable[[Any], Any] = iter,
    ) -> list[list[list[int]]]:
        """The best continuations of each prompt, `generate.num_samples` of them, the best first, without their ends.

        sources  the second text of each prompt, for a model that reads one
        watch    sees each token go by, and may end the search early
        """


def make_beam_search(
    model: Model,
    config: GenerateConfig,
    *,
    eos_id: int,
    banned_ids: Sequence[int] = (),
    width_of: Callable[[int], int] = round_up,
) -> Search:
    """Returns the search. The arguments are those of `make_generator`."""
    W, L = config.num_beams, config.max_tokens

    def step_on(beams: Beams, logits_RV: jax.Array, step: jax.Array, limits_B: jax.Array) -> Beams:
        logits_RV = without_ids(logits_RV, banned_ids)
        beams, rows_R = advance(beams, logits_RV, step, limits_B, eos_id, config.length_penalty)
        return dataclasses.replace(beams, cache=model.select_rows(beams.cache, rows_R))

    @jax.jit
    def begin(params: Params, prompts: Rows, sources: Rows | None, limits_B: jax.Array) -> Beams:
        logits_BV, cache = read_prompts(model, params, prompts, sources, round_up(L))
        B = logits_BV.shape[0]
        each_R = jnp.repeat(jnp.arange(B), W)
        # All beams begin alike, so that only the first one counts.
        log_BW = jnp.where(jnp.arange(W)[None] == 0, jnp.zeros((B, W)), NEVER)
        nothing_BWL, never_BW = jnp.zeros((B, W, L), jnp.int32), jnp.full((B, W), NEVER)
        none_BW, open_B = jnp.zeros((B, W), bool), jnp.ones(B, bool)
        cache = model.select_rows(cache, each_R)
        beams = Beams(cache, nothing_BWL, log_BW, nothing_BWL, never_BW, none_BW, open_B)
        return step_on(beams, logits_BV[each_R], jnp.zeros((), jnp.int32), limits_B)

    @functools.partial(jax.jit, donate_argnums=1)
    def extend(params: Params, beams: Beams, step: jax.Array, limits_B: jax.Array) -> Beams:
        last_BW = jax.lax.dynamic_index_in_dim(beams.tokens_BWL, step - 1, 2, keepdims=False)
        logits_RTV, cache = model.decode(params, last_BW.reshape(-1, 1), beams.cache)
        return step_on(dataclasses.replace(beams, cache=cache), logits_RTV[:, 0], step, limits_B)

    def search(
        params: Params,
        prompts: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None = None,
        watch: Callable[[Any], Any] = iter,
    ) -> list[list[list[int]]]:
        if not prompts:
            return []
        rows = make_rows(prompts, width_of)
        read = None if sources is None else make_rows(sources, width_of)
        limits_B = room(rows, read, L, model.position_limit).astype(np.int32)
        beams = begin(params, rows, read, limits_B)
        for step in watch(range(1, L)):
            if not np.asarray(beams.open_B).any():
                break
            beams = extend(params, beams, np.int32(step), limits_B)
        return _texts(beams, config.num_samples, eos_id)

    return search


def advance(
    beams: Beams,
    logits_RV: jax.Array,
    step: jax.Array,
    limits_B: jax.Array,
    eos_id: int,
    length_penalty: float,
) -> tuple[Beams, jax.Array]:
    """The beams with one more token each, and rows_R, the row of the cache that each of them goes on from.

    logits_RV  of the next token of each beam, R = B x W
    step       the number of this token, from 0
    limits_B   how many tokens each text has at most
    """
    (B, W), V = beams.log_BW.shape, logits_RV.shape[1]
    log_BWV = jax.nn.log_softmax(logits_RV.astype(jnp.float32)).reshape(B, W, V)
    # Twice as many as beams, of which at most W end the text, so that W go on.
    log_BX, flat_BX = jax.lax.top_k((beams.log_BW[..., None] + log_BWV).reshape(B, W * V), 2 * W)
    beam_BX, token_BX = flat_BX // V, flat_BX % V
    tokens_BXL = jnp.take_along_axis(beams.tokens_BWL, beam_BX[..., None], axis=1)
    tokens_BXL = jax.lax.dynamic_update_index_in_dim(tokens_BXL, token_BX, step, 2)
    ends_BX = (token_BX == eos_id) | (step + 1 >= limits_B)[:, None]
    # Those that go on.
    log_BW, kept_BW = jax.lax.top_k(jnp.where(ends_BX, NEVER, log_BX), W)
    rows_BW = jnp.take_along_axis(beam_BX, kept_BW, axis=1) + W * jnp.arange(B)[:, None]
    # Those that are finished: of the W best extensions only.
    length = (step + 1).astype(jnp.float32)
    finished_BX = ends_BX & (jnp.arange(2 * W) < W)[None] & beams.open_B[:, None]
    score_BX = jnp.where(finished_BX, log_BX / length**length_penalty, NEVER)
    scores_BX = jnp.concatenate([beams.done_score_BW, score_BX], axis=1)
    done_score_BW, best_BW = jax.lax.top_k(scores_BX, W)

    def best(before: jax.Array, new: jax.Array) -> jax.Array:
        at = best_BW.reshape(*best_BW.shape, *(1,) * (new.ndim - 2))
        return jnp.take_along_axis(jnp.concatenate([before, new], axis=1), at, axis=1)

    is_done_BW = best(beams.is_done_BW, finished_BX)
    worst_B = jnp.where(is_done_BW.all(axis=1), done_score_BW.min(axis=1), NEVER)
    overtakes_B = log_BW[:, 0] / length**length_penalty > worst_B
    after = Beams(
        beams.cache,
        jnp.take_along_axis(tokens_BXL, kept_BW[..., None], axis=1),
        log_BW,
        best(beams.done_BWL, tokens_BXL),
        done_score_BW,
        is_done_BW,
        beams.open_B & overtakes_B & (step + 1 < limits_B),
    )
    return after, rows_BW.reshape(-1)


def _texts(beams: Beams, number: int, eos_id: int) -> list[list[list[int]]]:
    """The best texts of each prompt, up to their ends: finished ones, and beams where there are too few of these."""
    texts = []
    for done, is_done, running in zip(*map(np.asarray, (beams.done_BWL, beams.is_done_BW, beams.tokens_BWL))):
        found = [*done[is_done], *running][:number]
        texts.append([_until(text.tolist(), eos_id) for text in found])
    return texts


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids

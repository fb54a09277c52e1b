"""Slots: texts that are written side by side, each in a cache of its own that begins and ends by itself.

The caches of all slots are one tree of arrays with a leading dimension, over which `jax.vmap` maps the family's own
`decode`. So one compiled program writes a token in every slot, whatever the family keeps in its cache. A prompt is read
into a cache outside of the slots, in pieces whose lengths are few, and then put into a slot.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.generate.generate import round_up, without_ids
from llmjax.models.contract import Cache, Model
from llmjax.ops.logits import Settings, sample_rows
from llmjax.types import Params

# Prompts are padded to a multiple of SHORTEST tokens, and read in pieces of SHORTEST x 2^i tokens up to LONGEST: this
# is the number of programs that are compiled for them. Choices.
SHORTEST, LONGEST = 16, 512
# The most log-probabilities of other tokens that are told beside that of a token, as in OpenAI's API.
MOST_TOP = 20


def cut(length: int) -> list[int]:
    """The lengths of the pieces in which a prompt of `length` tokens is read, longest first. Together they are the
    smallest multiple of SHORTEST that holds it, so that the last piece has at least one token."""
    left, pieces = round_up(length, SHORTEST), []
    while left:
        pieces.append(min(LONGEST, 1 << (left.bit_length() - 1)))
        left -= pieces[-1]
    return pieces


class Slots:
    """The caches of `count` slots for texts of at most `context` tokens, and the compiled programs for them.

    banned_ids  ids that are never written
    """

    def __init__(self, model: Model, count: int, context: int, banned_ids: Sequence[int]):
        # The padding of a prompt takes room as well.
        room = round_up(context + SHORTEST - 1, SHORTEST)
        top = min(MOST_TOP, model.vocab_size)

        def decode_one(params: Params, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            logits_BTV, cache = model.decode(params, token[None, None], cache)
            return logits_BTV[0, 0], cache

        def choose(
            logits_SV: jax.Array, seen_SV: jax.Array, keys_S: jax.Array, numbers_S: jax.Array, settings: Any
        ):
            """Ids [S], and their log-probabilities before any setting."""
            keys_S = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys_S), numbers_S)
            ids_S = sample_rows(keys_S, without_ids(logits_SV, banned_ids), seen_SV, settings)
            return ids_S, _log_probabilities(logits_SV, ids_S)

        @functools.partial(jax.jit, donate_argnums=(2, 3))
        def step(
            params: Params,
            tokens_S: jax.Array,
            cache: Cache,
            seen_SV: jax.Array,
            keys_S: jax.Array,
            numbers_S: jax.Array,
            settings: Settings,
        ):
            seen_SV = seen_SV.at[jnp.arange(count), tokens_S].set(True)
            logits_SV, cache = jax.vmap(decode_one, in_axes=(None, 0, 0))(params, tokens_S, cache)
            return *choose(logits_SV, seen_SV, keys_S, numbers_S, settings), logits_SV, cache, seen_SV

        @functools.partial(jax.jit, donate_argnums=3)
        def read(params: Params, tokens_T: jax.Array, valid_T: jax.Array, cache: Cache):
            logits_BTV, cache = model.decode(params, tokens_T[None], cache, valid_T[None])
            last_1V = jax.lax.dynamic_slice_in_dim(logits_BTV[0], jnp.sum(valid_T) - 1, 1)
            return last_1V, logits_BTV[0], cache

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def put(cache: Cache, seen_SV: jax.Array, one: Cache, seen_V: jax.Array, slot: jax.Array):
            whole = jax.tree.map(lambda all_slots, x: all_slots.at[slot].set(x), cache, one)
            return whole, seen_SV.at[slot].set(seen_V)

        self.count, self.context, self.vocab_size = count, context, model.vocab_size
        self._step, self._read, self._put = step, read, put
        self._choose = jax.jit(choose)
        self._empty = jax.jit(lambda: model.make_cache(1, room))
        self._score = jax.jit(_log_probabilities)
        self._top = jax.jit(lambda logits_TV: jax.lax.top_k(jax.nn.log_softmax(logits_TV, axis=-1), top))
        make = jax.jit(lambda: jax.vmap(lambda _: model.make_cache(1, room))(jnp.arange(count)))
        self._cache, self._seen_SV = make(), jnp.zeros((count, model.vocab_size), bool)
        self._logits_SV: Any = None

    def empty(self) -> Cache:
        """A cache of one text, before anything is read."""
        return self._empty()

    def read(
        self, params: Params, tokens: Sequence[int], length: int, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads a piece of `length` tokens, which are `tokens` and padding, into a cache, which is used up.

        Returns the logits after the last of `tokens`, float32 [1, V], those after each token of the piece, [T, V], and
        the cache with the piece.
        """
        padded_T = np.zeros(length, np.int32)
        padded_T[: len(tokens)] = tokens
        last_1V, logits_TV, cache = self._read(params, padded_T, np.arange(length) < len(tokens), cache)
        return last_1V, logits_TV, cache

    def score(self, logits_TV: jax.Array, ids: Sequence[int]) -> np.ndarray:
        """The log-probabilities of `ids` as the tokens that follow, float32 [ids]."""
        padded_T = np.zeros(len(logits_TV), np.int32)
        padded_T[: len(ids)] = ids
        return np.asarray(self._score(logits_TV, padded_T))[: len(ids)]

    def top(self, logits_TV: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """The largest log-probabilities of each row and their ids, [T, MOST_TOP], the largest first."""
        values_TK, ids_TK = self._top(logits_TV)
        return np.asarray(values_TK), np.asarray(ids_TK)

    def first(
        self, logits_1V: jax.Array, seen_V: np.ndarray, key: np.ndarray, settings: Settings
    ) -> tuple[int, float]:
        """The first token after a prompt and its log-probability.

        key       the data of its key, uint32
        settings  those of one row
        """
        ids_1, logprobs_1 = self._choose(logits_1V, seen_V[None], key[None], np.zeros(1, np.uint32), settings)
        return int(ids_1[0]), float(logprobs_1[0])

    def put(self, slot: int, cache: Cache, seen_V: np.ndarray) -> None:
        """Begins a text in `slot`: the cache of its prompt, and the ids that are in it."""
        self._cache, self._seen_SV = self._put(self._cache, self._seen_SV, cache, seen_V, np.int32(slot))

    def step(
        self,
        params: Params,
        tokens_S: np.ndarray,
        keys_S: np.ndarray,
        numbers_S: np.ndarray,
        settings: Settings,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads a token in each slot and returns the next one of each with its log-probability.

        keys_S     the data of the key of each text, uint32
        numbers_S  the number of the next token in each text, uint32, from which its draw follows
        """
        ids_S, logprobs_S, self._logits_SV, self._cache, self._seen_SV = self._step(
            params, tokens_S, self._cache, self._seen_SV, keys_S, numbers_S, settings
        )
        return np.asarray(ids_S), np.asarray(logprobs_S)

    def newest_top(self) -> tuple[np.ndarray, np.ndarray]:
        """`top` of the logits of the newest step, a row for each slot."""
        return self.top(self._logits_SV)


def _log_probabilities(logits_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    """The log-probability of one id of each row, float32."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BV, axis=-1), ids_B[:, None], axis=-1)[:, 0]

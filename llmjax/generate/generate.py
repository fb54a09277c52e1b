"""Text generation: one prefill of the prompts, then one token at a time from a key/value cache, as a stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.models.contract import Cache, Model
from llmjax.ops.logits import sample
from llmjax.ops.seeds import make_key
from llmjax.ranges import FOLD, Range, Unset, check_ranges
from llmjax.types import Params

# Prompt lengths and cache sizes are rounded up to a multiple of this, so that few shapes are compiled. A choice.
SLOTS = 64
# A number that is no step of sampling (`max_tokens` bounds these), from which on the further samples are numbered.
FURTHER = 2**31


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The `generate` section of the config.

    max_tokens   the most new tokens per prompt; generation also stops at the end of the document
    temperature  0 is greedy decoding
    top_k        sample only from the k most likely tokens; 0 is off
    top_p        sample only from the most likely tokens that together reach this probability; 1 is off
    seed         the seed of sampling
    num_samples  how many texts are sampled for each prompt
    """

    max_tokens: Annotated[int, Range(1, 2**20)]
    temperature: Annotated[float, Range(0, 1e4, "greedy decoding")]
    top_k: Annotated[int, Range(1, 2**24, "off")]
    top_p: Annotated[float, Range(0, 1, above=True)]
    seed: Annotated[int, Range(0, FOLD)]
    num_samples: Annotated[int, Range(1, 1024), Unset(1)]

    def __post_init__(self):
        check_ranges("generate", self)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that all samples of a prompt are alike."""
        return self.temperature == 0 or self.top_k == 1


def round_up(n: int, multiple: int = SLOTS) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The smallest SLOTS x 2^i that is at least n: few shapes, where the lengths of prompts to come are not known."""
    return max(SLOTS, 1 << (n - 1).bit_length())


class Generate(Protocol):
    """What `make_generator` returns."""

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], first: int = 0
    ) -> Iterator[list[int | None]]:
        """Yields a token id per sample at a time, and None for a sample that ended. `first` is the index of the first
        prompt, on which the samples depend."""


def make_generator(
    model: Model,
    config: GenerateConfig,
    *,
    eos_id: int,
    banned_ids: Sequence[int] = (),
    width_of: Callable[[int], int] = round_up,
) -> Generate:
    """Returns `generate(params, prompts)`, an iterator that yields one new token id per sample at a time, None once
    it ended. The `num_samples` samples of the first prompt come first, then those of the second, and so on.

    A sample depends on the seed, on the index of the prompt and on its own number, not on the other prompts and not on
    `num_samples`. `banned_ids` (pad, mask, reserved) are never sampled. If the model has a `position_limit`, a prompt
    is continued up to this number of tokens, plus one more, which is predicted from the last of them.
    It compiles once for each number of samples and each `width_of(tokens of the longest prompt)`.
    """
    pick = functools.partial(sample, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)

    def choose(logits_BV: jax.Array, rngs_B: jax.Array, step: jax.Array) -> jax.Array:
        if banned_ids:
            logits_BV = logits_BV.at[:, np.asarray(banned_ids)].set(-jnp.inf)
        # Each row draws from its own key and step number, so that it does not depend on the batch.
        return jax.vmap(lambda rng, logits_V: pick(jax.random.fold_in(rng, step), logits_V[None])[0])(
            rngs_B, logits_BV
        )

    # Keys and cache are made within this program: made outside of it, each operation would be a program of its own.
    @jax.jit
    def prefill(
        params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, index_B: jax.Array, number_B: jax.Array
    ):
        rngs_B = jax.vmap(functools.partial(_key, config.seed))(index_B, number_B)
        B, T = tokens_BT.shape
        cache = model.make_cache(B, T + round_up(config.max_tokens))
        valid_BT = jnp.arange(T)[None, :] < lengths_B[:, None]
        logits_BTV, cache = model.decode(params, tokens_BT, cache, valid_BT)
        # Prompts are padded at the right, so the next token follows from the logits at the last valid position.
        last_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return choose(last_BV, rngs_B, jnp.zeros((), jnp.int32)), cache, rngs_B

    @functools.partial(jax.jit, donate_argnums=2)
    def extend(params: Params, tokens_B: jax.Array, cache: Cache, rngs_B: jax.Array, step: jax.Array):
        logits_BTV, cache = model.decode(params, tokens_B[:, None], cache)
        return choose(logits_BTV[:, 0], rngs_B, step), cache

    def generate(
        params: Params, prompts: Sequence[Sequence[int]], first: int = 0
    ) -> Iterator[list[int | None]]:
        if not prompts:
            return
        index, number = np.divmod(np.arange(len(prompts) * config.num_samples), config.num_samples)
        prompts = [prompts[i] for i in index]
        lengths = np.array([len(p) for p in prompts], np.int32)
        limits = _room(lengths, config.max_tokens, model.position_limit)
        tokens = _padded(prompts, width_of(int(lengths.max())))
        next_B, cache, rngs_B = prefill(
            params, tokens, lengths, (first + index).astype(np.int32), number.astype(np.uint32)
        )
        ended = np.zeros(len(prompts), bool)
        for step in range(1, limits.max() + 1):
            # This waits for the device. The next step is dispatched only if some prompt goes on.
            ids = np.asarray(next_B)
            ended |= ids == eos_id
            yield [None if done else int(i) for done, i in zip(ended, ids, strict=True)]
            ended |= step >= limits
            if ended.all():
                return
            next_B, cache = extend(params, next_B, cache, rngs_B, np.int32(step))

    return generate


def _padded(prompts: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """tokens_BT, int32: the prompts in rows of `width` tokens, padded at the right."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens


def _room(lengths: np.ndarray, max_tokens: int, position_limit: int) -> np.ndarray:
    """How many tokens each prompt, of `lengths` tokens, is continued by at most: int [prompts].

    Raises UserError for an empty prompt, and for one that has more tokens than the model has positions.
    """
    if not lengths.all():
        raise UserError("an empty prompt has nothing to continue; begin it with the bos token")
    limits = np.full(len(lengths), max_tokens)
    if position_limit:
        limits = np.minimum(limits, position_limit - lengths + 1)
        if limits.min() < 1:
            raise UserError(
                f"the longest prompt has {lengths.max()} tokens but the model holds {position_limit} positions; "
                "shorten it"
            )
    return limits


def _key(seed: int, index: jax.Array, number: jax.Array) -> jax.Array:
    """The key of sample `number`, from 0, of the prompt `index`. The first sample has the key of the prompt."""
    key = jax.random.fold_in(make_key(seed), index)
    # The key of a sample is folded with the numbers of its steps as well, which FURTHER keeps apart.
    further = jax.random.fold_in(key, np.uint32(FURTHER) + number)
    return jnp.where(number == 0, key, further)

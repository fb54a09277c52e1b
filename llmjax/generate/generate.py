"""Text generation: one prefill of the prompts, then one token at a time from a key/value cache, as a stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.models.contract import Cache, Model, ReadsSource
from llmjax.ops.logits import Settings, sample, sample_rows
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
    num_beams    W, the continuations of a prompt that beam search keeps side by side; 1 samples instead
    length_penalty  the power of the length by which beam search divides a log-probability
    min_p        sample only ids with at least this share of the largest probability; 0 is off
    repetition_penalty  divides positive logits of ids that are there already, and multiplies negative ones; 1 is off
    stop         a text ends before the first of these strings
    slots        the texts of mode generate that are written side by side, if there are more; 0 writes all at once
    """

    max_tokens: Annotated[int, Range(1, 2**20)]
    temperature: Annotated[float, Range(0, 1e4, "greedy decoding")]
    top_k: Annotated[int, Range(1, 2**24, "off")]
    top_p: Annotated[float, Range(0, 1, above=True)]
    seed: Annotated[int, Range(0, FOLD)]
    num_samples: Annotated[int, Range(1, 1024), Unset(1)]
    num_beams: Annotated[int, Range(1, 1024), Unset(1)]
    length_penalty: Annotated[float, Range(-1e3, 1e3), Unset(1.0)]
    min_p: Annotated[float, Range(0, 1), Unset(0.0)]
    repetition_penalty: Annotated[float, Range(0, 1e4, above=True), Unset(1.0)]
    stop: Annotated[tuple[str, ...], Unset(())]
    slots: Annotated[int, Range(1, 4096, "all at once"), Unset(0)]

    def __post_init__(self):
        check_ranges("generate", self)
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise UserError(
                f"generate.length_penalty={self.length_penalty} is without effect for generate.num_beams=1; set "
                "generate.num_beams, or leave it at 1.0"
            )
        sampling = {"min_p": 0.0, "repetition_penalty": 1.0, "stop": (), "slots": 0}
        for key, off in sampling.items():
            if self.num_beams > 1 and getattr(self, key) != off:
                raise UserError(
                    f"generate.{key}={getattr(self, key)!r} is without effect for generate.num_beams={self.num_beams}, "
                    f"which searches and samples nothing; leave it at {off!r}, or set generate.num_beams=1"
                )
        if "" in self.stop:
            raise UserError("generate.stop has an empty string, which ends every text; leave it out")
        if self.num_samples > self.num_beams > 1:
            raise UserError(
                f"generate.num_samples={self.num_samples} is more than generate.num_beams={self.num_beams}, the texts "
                "that beam search finds; lower it, or raise generate.num_beams"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that all samples of a prompt are alike."""
        return self.num_beams == 1 and (self.temperature == 0 or self.top_k == 1)


def round_up(n: int, multiple: int = SLOTS) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The smallest SLOTS x 2^i that is at least n: few shapes, where the lengths of prompts to come are not known."""
    return max(SLOTS, 1 << (n - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts of different lengths as the rows of an array.

    tokens_BT  int32, padded at the right
    lengths_B  int32, the tokens of each text
    """

    tokens_BT: Any
    lengths_B: Any

    def valid_BT(self) -> jax.Array:
        """bool, false for padding."""
        return jnp.arange(self.tokens_BT.shape[1])[None, :] < self.lengths_B[:, None]


class Generate(Protocol):
    """What `make_generator` returns."""

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        first: int = 0,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[list[int | None]]:
        """Yields a token id per sample at a time, and None for a sample that ended.

        first    the index of the first prompt, on which the samples depend
        sources  the second text of each prompt, for a model that reads one
        """


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
    punishes = config.repetition_penalty != 1

    def choose(logits_BV: jax.Array, rngs_B: jax.Array, step: jax.Array, seen_BV: jax.Array) -> jax.Array:
        logits_BV = without_ids(logits_BV, banned_ids)
        # Each row draws from its own key and step number, so that it does not depend on the batch.
        rngs_B = jax.vmap(lambda rng: jax.random.fold_in(rng, step))(rngs_B)
        return _draw(config, rngs_B, logits_BV, seen_BV)

    # Keys and cache are made within this program: made outside of it, each operation would be a program of its own.
    @jax.jit
    def prefill(params: Params, prompts: Rows, sources: Rows | None, index_B: jax.Array, number_B: jax.Array):
        rngs_B = jax.vmap(functools.partial(sample_key, config.seed))(index_B, number_B)
        last_BV, cache = read_prompts(model, params, prompts, sources, round_up(config.max_tokens))
        # Without a penalty nobody looks at it.
        seen_BV = jnp.zeros(last_BV.shape if punishes else (len(last_BV), 1), bool)
        if punishes:
            rows_B1 = jnp.arange(len(last_BV))[:, None]
            seen_BV = seen_BV.at[rows_B1, prompts.tokens_BT].max(prompts.valid_BT())
        return choose(last_BV, rngs_B, jnp.zeros((), jnp.int32), seen_BV), cache, rngs_B, seen_BV

    @functools.partial(jax.jit, donate_argnums=(2, 5))
    def extend(
        params: Params,
        tokens_B: jax.Array,
        cache: Cache,
        rngs_B: jax.Array,
        step: jax.Array,
        seen_BV: jax.Array,
    ):
        logits_BTV, cache = model.decode(params, tokens_B[:, None], cache)
        if punishes:
            seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
        return choose(logits_BTV[:, 0], rngs_B, step, seen_BV), cache, seen_BV

    def generate(
        params: Params,
        prompts: Sequence[Sequence[int]],
        first: int = 0,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[list[int | None]]:
        if not prompts:
            return
        index, number = np.divmod(np.arange(len(prompts) * config.num_samples), config.num_samples)
        rows = make_rows([prompts[i] for i in index], width_of)
        read = None if sources is None else make_rows([sources[i] for i in index], width_of)
        limits = room(rows, read, config.max_tokens, model.position_limit)
        next_B, cache, rngs_B, seen_BV = prefill(
            params, rows, read, (first + index).astype(np.int32), number.astype(np.uint32)
        )
        ended = np.zeros(len(index), bool)
        for step in range(1, limits.max() + 1):
            # This waits for the device. The next step is dispatched only if some prompt goes on.
            ids = np.asarray(next_B)
            ended |= ids == eos_id
            yield [None if done else int(i) for done, i in zip(ended, ids, strict=True)]
            ended |= step >= limits
            if ended.all():
                return
            next_B, cache, seen_BV = extend(params, next_B, cache, rngs_B, np.int32(step), seen_BV)

    return generate


def _draw(config: GenerateConfig, rngs_B: jax.Array, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """An id for each row, int32 [B]. `seen_BV` are the ids that its text has, where there is a penalty for them."""
    if config.min_p or config.repetition_penalty != 1:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        columns = [jnp.full(len(logits_BV), getattr(config, name)) for name in names]
        return sample_rows(rngs_B, logits_BV, seen_BV, Settings(*columns))
    pick = functools.partial(sample, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return jax.vmap(lambda rng, logits_V: pick(rng, logits_V[None])[0])(rngs_B, logits_BV)


def without_ids(logits_BV: jax.Array, ids: Sequence[int]) -> jax.Array:
    """The logits with -inf for `ids`, which are never written."""
    return logits_BV.at[:, np.asarray(ids)].set(-jnp.inf) if ids else logits_BV


def make_rows(texts: Sequence[Sequence[int]], width_of: Callable[[int], int]) -> Rows:
    """The texts as rows, padded at the right to `width_of(tokens of the longest)`."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), width_of(int(lengths.max()))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return Rows(tokens, lengths)


def read_prompts(
    model: Model, params: Params, prompts: Rows, sources: Rows | None, slots: int
) -> tuple[jax.Array, Cache]:
    """logits_BV of the token after each prompt, and a cache with the prompts and room for `slots` more tokens."""
    B, T = prompts.tokens_BT.shape
    cache = model.make_cache(B, T + slots)
    if sources is not None:
        assert isinstance(model, ReadsSource)  # only the prompts of such a model have sources
        cache = model.read_source(params, jnp.asarray(sources.tokens_BT), sources.valid_BT(), cache)
    logits_BTV, cache = model.decode(params, jnp.asarray(prompts.tokens_BT), cache, prompts.valid_BT())
    # Prompts are padded at the right, so the next token follows from the logits at the last valid position.
    last_BV = jnp.take_along_axis(logits_BTV, (prompts.lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return last_BV, cache


def room(prompts: Rows, sources: Rows | None, max_tokens: int, position_limit: int) -> np.ndarray:
    """How many tokens each prompt is continued by at most: int [prompts].

    Raises UserError for an empty prompt, and for a prompt or source that has more tokens than the model has positions.
    """
    lengths = np.asarray(prompts.lengths_B)
    if not lengths.all():
        raise UserError("an empty prompt has nothing to continue; begin it with the bos token")
    limits = np.full(len(lengths), max_tokens)
    if not position_limit:
        return limits
    limits = np.minimum(limits, position_limit - lengths + 1)
    # All positions that a source needs are those of its own tokens.
    longest = max(
        int(lengths.max()) - 1, 0 if sources is None else int(np.asarray(sources.lengths_B).max()) - 1
    )
    if longest >= position_limit:
        raise UserError(
            f"the longest prompt has {longest + 1} tokens but the model holds {position_limit} positions; shorten it"
        )
    return limits


def sample_key(seed: int, index: jax.Array, number: jax.Array) -> jax.Array:
    """The key of sample `number`, from 0, of the prompt `index`. The first sample has the key of the prompt."""
    key = jax.random.fold_in(make_key(seed), index)
    # The key of a sample is folded with the numbers of its steps as well, which FURTHER keeps apart.
    further = jax.random.fold_in(key, np.uint32(FURTHER) + number)
    return jnp.where(number == 0, key, further)

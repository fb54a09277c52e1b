"""Continuous batching: texts begin and end at any time in a fixed number of slots, which share each step.

An `Engine` is plain host code around compiled functions. It has no thread and knows no text, only tokens: `submit` puts
an order in the queue, each call of `step` reads prompts and writes one token in every slot in use, and `cancel` frees
the slot of an order at once. What is written for an order depends on the order alone, not on those beside it: all slots
go through the same program at each step, and draws depend on the order's seed and on the number of the token.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.generate.generate import sample_key
from llmjax.generate.slots import LONGEST, MOST_TOP, Slots, cut
from llmjax.models.contract import Cache, Model
from llmjax.ops.logits import Settings
from llmjax.ranges import FOLD, Range, check_ranges
from llmjax.types import Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of an order are drawn; see `ops/logits.py`.

    seed    `--mode=generate` draws the same with the same one
    index   the number of the prompt, on which draws depend in a file of prompts
    number  which of several samples this is, from 0: they differ, and do not depend on how many there are
    """

    temperature: Annotated[float, Range(0, 1e4, "greedy decoding")] = 1.0
    top_k: Annotated[int, Range(1, 2**24, "off")] = 0
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    min_p: Annotated[float, Range(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Range(0, 1e4, above=True)] = 1.0
    seed: Annotated[int, Range(0, FOLD)] = 0
    number: Annotated[int, Range(0, 1023)] = 0
    index: Annotated[int, Range(0, 2**31 - 1)] = 0

    def __post_init__(self) -> None:
        check_ranges("", self)


@dataclasses.dataclass(frozen=True)
class Order:
    """A text that is asked for.

    prompt      the ids to go on from
    max_tokens  the most new tokens; with 0 the prompt is only read
    top         how many of the likeliest tokens are told beside each token; None tells none
    echo        whether the log-probabilities of the prompt are told as well
    ends        the ids that end the text
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    top: int | None = None
    echo: bool = False
    ends: tuple[int, ...] = ()


class Score(NamedTuple):
    """The log-probability that the model gave a token, in nats, before any setting of sampling; and its likeliest ones,
    as (id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptRead(NamedTuple):
    """The prompt of `order` has been read. `scores` has one of each token but the first, where `echo` asks for them."""

    order: int
    scores: tuple[Score, ...] = ()


class Written(NamedTuple):
    """What a step wrote for `order`.

    token  the new id; None at the end of the text
    score  of the id
    end    "" if the text goes on; "stop" at its end; "length" with its last token
    """

    order: int
    token: int | None
    score: Score | None
    end: str


Event = PromptRead | Written


@dataclasses.dataclass
class _Reading:
    """An order whose prompt is being read."""

    number: int
    order: Order
    cache: Cache
    pieces: list[int]
    done: int = 0
    scores: list[Score] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Text:
    """An order that has a slot. `left` are the tokens that may still be written."""

    number: int
    order: Order
    left: int


class Engine:
    """Writes texts side by side. All methods are called from one thread.

    num_slots   S, the texts that are written at the same time
    context     the most tokens of a text that are read; a text ends with the token that follows from the last of them
    banned_ids  ids that are never written
    """

    def __init__(
        self, model: Model, params: Params, num_slots: int, context: int, banned_ids: Sequence[int] = ()
    ):
        if model.position_limit:
            context = min(context, model.position_limit)
        self.context = context
        self._params, self._slots = params, Slots(model, num_slots, context, banned_ids)
        self._numbers = 0
        self._queue: collections.OrderedDict[int, Order] = collections.OrderedDict()
        self._reading: _Reading | None = None
        self._texts: list[_Text | None] = [None] * num_slots
        # What goes into the next step, for each slot.
        self._tokens_S, self._counts_S = np.zeros(num_slots, np.int32), np.zeros(num_slots, np.uint32)
        self._keys_S = _key_data(Sampling())[None].repeat(num_slots, axis=0)
        self._settings = settings_of([Sampling(temperature=0.0)] * num_slots)

    @property
    def num_used(self) -> int:
        """The slots in use."""
        return sum(text is not None for text in self._texts)

    @property
    def num_waiting(self) -> int:
        """The orders that wait for a slot, or whose prompt is being read."""
        return len(self._queue) + (self._reading is not None)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.num_waiting and not self.num_used

    def check(self, order: Order) -> None:
        """Raises UserError for an order that cannot be carried out."""
        length, V = len(order.prompt), self._slots.vocab_size
        if not length:
            raise UserError("an empty prompt has nothing to continue; begin it with the bos token")
        if length > self.context:
            raise UserError(
                f"the prompt has {length:,} tokens, and the model holds {self.context:,} with the answer; shorten it"
            )
        if not all(0 <= i < V for i in order.prompt):
            raise UserError(
                f"a prompt has an id outside of the {V:,} of the vocabulary; use ids from 0 to {V - 1}"
            )
        if order.max_tokens < 0:
            raise UserError(f"max_tokens={order.max_tokens} must not be negative; use 0 or more")
        if not 0 <= (order.top or 0) <= MOST_TOP:
            raise UserError(f"{order.top} log-probabilities are asked for each token; use at most {MOST_TOP}")

    def submit(self, order: Order) -> int:
        """Puts an order in the queue and returns the number that its events have. See `check` for what raises."""
        self.check(order)
        self._numbers += 1
        self._queue[self._numbers] = order
        return self._numbers

    def cancel(self, number: int) -> None:
        """Forgets an order, whether it waits or is written. One that has ended is no mistake."""
        self._queue.pop(number, None)
        if self._reading is not None and self._reading.number == number:
            self._reading = None
        self._texts = [None if text and text.number == number else text for text in self._texts]

    def step(self) -> list[Event]:
        """Reads at most `LONGEST` tokens of prompts, writes a token in every slot in use, and says what happened.

        So a long prompt holds up the other texts by one piece at each of their tokens.
        """
        events, budget = [], LONGEST
        while budget > 0 and self._next_to_read():
            assert self._reading is not None
            if self._reading.pieces[0] > budget:
                break
            budget -= self._reading.pieces[0]
            events += self._read_piece(self._reading)
        return events + self._write() if self.num_used else events

    def _next_to_read(self) -> bool:
        """Whether there is a prompt to read: one that is begun, or the first in the queue if it can have a slot."""
        if self._reading is not None:
            return True
        if not self._queue:
            return False
        number, order = next(iter(self._queue.items()))
        if order.max_tokens and None not in self._texts:
            return False
        del self._queue[number]
        self._reading = _Reading(number, order, self._slots.empty(), cut(len(order.prompt)))
        return True

    def _read_piece(self, reading: _Reading) -> list[Event]:
        """Reads a piece of a prompt. After the last one, the order has its first token and a slot."""
        order, start, length = reading.order, reading.done, reading.pieces.pop(0)
        tokens = order.prompt[start : start + length]
        last_1V, logits_TV, reading.cache = self._slots.read(self._params, tokens, length, reading.cache)
        reading.done += len(tokens)
        if order.echo:
            following = order.prompt[start + 1 : start + length + 1]
            reading.scores += self._scores(logits_TV, following, order.top)
        if reading.pieces:
            return []
        self._reading = None
        read = PromptRead(reading.number, tuple(reading.scores))
        if not order.max_tokens:
            return [read, Written(reading.number, None, None, "length")]
        return [read, self._begin(reading, last_1V)]

    def _scores(self, logits_TV: jax.Array, ids: Sequence[int], top: int | None) -> list[Score]:
        """The scores of `ids` as the tokens that follow."""
        logprobs = self._slots.score(logits_TV, ids).tolist()
        if not top:
            return [Score(logprob) for logprob in logprobs]
        values, likeliest = self._slots.top(logits_TV)
        return [Score(logprob, _pairs(values[i], likeliest[i], top)) for i, logprob in enumerate(logprobs)]

    def _begin(self, reading: _Reading, logits_1V: jax.Array) -> Written:
        """Draws the first token of an order, and gives it a slot if it goes on."""
        order = reading.order
        seen_V = np.zeros(self._slots.vocab_size, bool)
        seen_V[list(order.prompt)] = True
        settings, key = settings_of([order.sampling]), _key_data(order.sampling)
        token, logprob = self._slots.first(logits_1V, seen_V, key, settings)
        top: tuple[tuple[int, float], ...] = ()
        if order.top:
            values, ids = self._slots.top(logits_1V)
            top = _pairs(values[0], ids[0], order.top)
        left = min(order.max_tokens, self.context - len(order.prompt) + 1)
        text = _Text(reading.number, order, left)
        event = _count(text, token, Score(logprob, top))
        if not event.end:
            slot = self._texts.index(None)
            self._slots.put(slot, reading.cache, seen_V)
            self._texts[slot] = text
            self._tokens_S[slot], self._counts_S[slot], self._keys_S[slot] = token, 1, key
            for name, value in vars(settings).items():
                getattr(self._settings, name)[slot] = value[0]
        return event

    def _write(self) -> list[Event]:
        """A token in every slot in use."""
        ids_S, logprobs_S = self._slots.step(
            self._params, self._tokens_S, self._keys_S, self._counts_S, self._settings
        )
        texts = [(slot, text) for slot, text in enumerate(self._texts) if text is not None]
        if any(text.order.top for _, text in texts):
            values_SK, likeliest_SK = self._slots.newest_top()
        events: list[Event] = []
        for slot, text in texts:
            top = _pairs(values_SK[slot], likeliest_SK[slot], text.order.top) if text.order.top else ()
            event = _count(text, int(ids_S[slot]), Score(float(logprobs_S[slot]), top))
            events.append(event)
            self._tokens_S[slot] = ids_S[slot]
            self._counts_S[slot] += 1
            if event.end:
                self._texts[slot] = None
        return events


def write_all(
    engine: Engine, orders: Sequence[Order], has_ended: Callable[[int], bool]
) -> Iterator[tuple[int, int]]:
    """Yields (place of the order, id of its next token) until all orders are carried out.

    has_ended  of a place, whether nothing more is wanted of it, which is asked after each of its tokens
    """
    places = {engine.submit(order): place for place, order in enumerate(orders)}
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Written) and event.token is not None:
                yield places[event.order], event.token
                if has_ended(places[event.order]):
                    engine.cancel(event.order)


def _count(text: _Text, token: int, score: Score) -> Written:
    """The event of a new token of `text`, which has one less to write."""
    text.left -= 1
    if token in text.order.ends:
        return Written(text.number, None, score, "stop")
    return Written(text.number, token, score, "" if text.left else "length")


def _pairs(values: np.ndarray, ids: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))


def _key_data(sampling: Sampling) -> np.ndarray:
    """The key of a sample, as numbers. It is that of `make_generator`."""
    key = sample_key(sampling.seed, jnp.int32(sampling.index), jnp.uint32(sampling.number))
    return np.asarray(jax.random.key_data(key))


def settings_of(samplings: Sequence[Sampling]) -> Settings:
    """The settings of rows, as arrays of the host."""

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return Settings(
        temperature_B=column("temperature", np.float32),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        penalty_B=column("repetition_penalty", np.float32),
    )

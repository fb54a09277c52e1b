"""Continuous batching: a text is the same beside others as alone, whenever they come, and as by `make_generator`."""

import dataclasses
import functools
import random

import families
import jax
import numpy as np
import pytest
from sections import section
from some_slow import often

from llmjax.errors import UserError
from llmjax.generate import engine as engine_room
from llmjax.generate import slots
from llmjax.generate.engine import Engine, Order, PromptRead, Sampling, settings_of
from llmjax.generate.generate import make_generator
from llmjax.generate.slots import LONGEST, SHORTEST, Slots, cut
from llmjax.ops.logits import head_logits, sample, sample_rows
from llmjax.types import Batch

WRITING = [name for name in families.VARIANTS if families.family_of(name) in ("gpt", "lstm")]
CONTEXT = 48
PROMPTS = [(1, 5, 9, 3), (2,), (7,) * 37, tuple(range(1, 25)), (6, 5) * 8, (11,), (12, 3, 9) * 5, (8,)]


@functools.cache
def model_of(variant):
    model = families.make(variant, data__seq_len=CONTEXT, train__tokens_per_update=2 * CONTEXT)
    return model, jax.jit(model.init)(jax.random.key(1))


@functools.cache
def shared_engine(variant):
    """An engine that several tests use one after the other, because compiling takes long."""
    return Engine(*model_of(variant), num_slots=3, context=CONTEXT, banned_ids=(0,))


def orders(prompts=PROMPTS):
    """Greedy and sampled ones, each of a length of its own."""
    settings = [
        Sampling(temperature=0.0), Sampling(seed=3, top_p=0.9), Sampling(seed=4, top_k=5, number=2),
        Sampling(seed=5, min_p=0.05, repetition_penalty=1.7, index=6),
    ]  # fmt: skip
    return [Order(prompt, 2 + i, settings[i % 4], ends=(63,)) for i, prompt in enumerate(prompts)]


def run_all(engine, wanted, arrive=lambda step: 10**9):
    """The tokens of each order, by its place in `wanted`; `arrive(step)` orders have come by each step."""
    waiting, numbers, written, ends, step = list(enumerate(wanted)), {}, [[] for _ in wanted], {}, 0
    while waiting or not engine.is_idle:
        while waiting and len(numbers) < arrive(step):
            place, order = waiting.pop(0)
            numbers[engine.submit(order)] = place
        for event in engine.step():
            if not isinstance(event, PromptRead):
                written[numbers[event.order]] += [] if event.token is None else [event.token]
                if event.end:
                    assert numbers[event.order] not in ends
                    ends[numbers[event.order]] = event.end
        step += 1
    assert len(ends) == len(wanted)
    return written


@functools.cache
def by_generator(variant, order):
    """What `make_generator` writes for an order, alone."""
    s = order.sampling
    config = section(
        "generate", max_tokens=order.max_tokens, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed,
        num_samples=s.number + 1, min_p=s.min_p, repetition_penalty=s.repetition_penalty,
    )  # fmt: skip
    model, params = model_of(variant)
    generate = make_generator(model, config, eos_id=(*order.ends, 64)[0], banned_ids=(0,))
    return [ids[-1] for ids in generate(params, [list(order.prompt)], first=s.index) if ids[-1] is not None]


OFTEN = ("gpt", "gpt experts", "lstm")


@pytest.mark.parametrize("variant", often(WRITING, lambda variant: variant in ("gpt", "lstm")))
def test_texts_written_side_by_side_are_those_of_the_generator(variant):
    # The generator compiles a program for each of them.
    wanted = orders()[:4]
    found = run_all(shared_engine(variant), wanted)
    assert found == [by_generator(variant, order) for order in wanted]


@pytest.mark.parametrize("variant", OFTEN)
def test_texts_do_not_depend_on_order_neighbours_or_time_of_arrival(variant):
    engine, wanted = shared_engine(variant), orders()
    alone = [run_all(engine, [order])[0] for order in wanted]
    assert any(text != alone[0][: len(text)] for text in alone)
    for seed in range(3):
        rng = random.Random(seed)
        shuffled = rng.sample(range(len(wanted)), len(wanted))
        found = run_all(engine, [wanted[i] for i in shuffled], lambda step: step // 2 if seed else 10**9)  # noqa: B023
        assert found == [alone[i] for i in shuffled]


@pytest.mark.parametrize("variant", ["gpt", "lstm"])
def test_texts_do_not_depend_on_the_pieces_in_which_prompts_are_read(variant, monkeypatch):
    engine, wanted = shared_engine(variant), orders()
    whole = run_all(engine, wanted)
    for room in (slots, engine_room):
        monkeypatch.setattr(room, "LONGEST", 16)
    assert max(len(cut(len(order.prompt))) for order in wanted) == 3
    assert run_all(engine, wanted) == whole


def test_a_slot_gives_the_same_bits_as_every_other_slot():
    engine = shared_engine("gpt")
    order = Order((3, 1, 4, 1, 5), 8, Sampling(seed=9), top=3)
    scores = []
    for others in range(3):
        for _ in range(others):
            engine.submit(Order((2, 7), 40, Sampling(seed=others)))
        number = engine.submit(order)
        events = [event for _ in range(60) for event in engine.step() if event.order == number]
        scores.append([event.score for event in events if not isinstance(event, PromptRead)])
    assert len(scores[0]) == 8 and scores[0] == scores[1] == scores[2]


@functools.cache
def full_pass(variant):
    """log_softmax of the logits after each token of a text, without a cache: a function of the text."""
    model, params = model_of(variant)

    @jax.jit
    def logprobs(tokens, segments):
        index = np.arange(64, dtype=np.int32)[None]
        batch = Batch(tokens, tokens, segments.astype(np.float32), segments, index, np.zeros(1, np.int32))
        hidden = model.apply(params, batch).hidden_BTD
        return jax.nn.log_softmax(head_logits(hidden, model.head(params)), axis=-1)[0]

    def of(ids):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(logprobs(tokens, (np.arange(64)[None] < len(ids)).astype(np.int32)))[: len(ids)]

    return of


def test_log_probabilities_are_those_of_the_full_pass_also_of_the_prompt():
    engine, prompt = shared_engine("gpt"), tuple(range(1, 30))
    number = engine.submit(Order(prompt, 6, Sampling(temperature=0.7, seed=1), top=4, echo=True))
    engine.submit(Order((5,), 9))
    events = [event for _ in range(10) for event in engine.step() if event.order == number]
    read, *written = events
    tokens = [event.token for event in written]
    scores = [*read.scores, *(event.score for event in written)]
    expected = full_pass("gpt")([*prompt, *tokens])
    for i, (token, score) in enumerate(zip([*prompt[1:], *tokens], scores, strict=True)):
        assert score.logprob == pytest.approx(expected[i, token], abs=1e-4)
        order = np.argsort(-expected[i])[:4]
        assert [j for j, _ in score.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in score.top], expected[i, order], atol=1e-4)


def test_a_prompt_that_is_only_read_needs_no_slot():
    engine = Engine(*model_of("gpt"), num_slots=1, context=CONTEXT)
    engine.submit(Order((1, 2), 40))
    engine.step()
    number = engine.submit(Order((3, 4, 5), 0, echo=True))
    read, end = (event for event in engine.step() if event.order == number)
    assert len(read.scores) == 2 and (end.token, end.end) == (None, "length") and engine.num_used == 1


def test_a_text_that_is_cancelled_frees_its_slot_before_the_next_token():
    engine = Engine(*model_of("gpt"), num_slots=1, context=CONTEXT, banned_ids=(0,))
    first, second = (engine.submit(Order(prompt, 5, Sampling(temperature=0.0))) for prompt in [(1, 2), (3,)])
    third = engine.submit(Order((4,), 3))
    assert {event.order for event in engine.step()} == {first}
    engine.cancel(first)
    engine.cancel(third)
    assert (engine.num_used, engine.num_waiting) == (0, 1)
    events = [event for _ in range(8) for event in engine.step()]
    assert {event.order for event in events} == {second} and engine.is_idle
    tokens = [event.token for event in events if not isinstance(event, PromptRead)]
    assert tokens == by_generator("gpt", Order((3,), 5, Sampling(temperature=0.0)))


def test_a_text_ends_where_the_model_has_no_more_positions():
    engine = shared_engine("gpt learned")
    prompts = [(1,) * 40, (2,) * CONTEXT]
    texts = run_all(engine, [Order(prompt, 60, Sampling(temperature=0.0)) for prompt in prompts])
    assert [len(text) for text in texts] == [CONTEXT - 40 + 1, 1]
    with pytest.raises(UserError, match="prompt has 49 tokens, and the model holds 48"):
        engine.submit(Order((1,) * 49, 1))


@pytest.mark.parametrize("changes, message", [
    ({"prompt": ()}, "an empty prompt has nothing to continue"),
    ({"prompt": (64,)}, "an id outside of the 64 of the vocabulary"),
    ({"prompt": (-1,)}, "an id outside of the 64 of the vocabulary"),
    ({"max_tokens": -1}, "max_tokens=-1 must not be negative"),
    ({"top": 21}, "21 log-probabilities are asked for each token; use at most 20"),
])  # fmt: skip
def test_an_order_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        shared_engine("gpt").submit(dataclasses.replace(Order((1,), 4), **changes))


@pytest.mark.parametrize("key, value", [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0),
                                        ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1)])  # fmt: skip
def test_a_setting_outside_of_its_range_is_refused(key, value):
    with pytest.raises(UserError, match=key):
        Sampling(**{key: value})


def test_pieces_of_a_prompt_are_few_lengths_and_the_last_has_a_token():
    for length in range(1, 2000):
        pieces = cut(length)
        assert length <= sum(pieces) < length + SHORTEST and sum(pieces[:-1]) < length
        assert pieces == sorted(pieces, reverse=True) and set(pieces) <= {16, 32, 64, 128, 256, LONGEST}


def test_a_long_prompt_lets_the_others_go_on(monkeypatch):
    for room in (slots, engine_room):
        monkeypatch.setattr(room, "LONGEST", 16)
    engine = shared_engine("gpt")
    short = engine.submit(Order((1, 2), 20))
    engine.step()
    long = engine.submit(Order((3,) * 40, 2))
    heard = [{event.order for event in engine.step()} for _ in range(4)]
    # It has three pieces of 16 tokens. After the last one, both of its tokens come in the same step.
    assert heard == [{short}, {short}, {short, long}, {short}]
    engine.cancel(short)
    assert engine.is_idle


def test_what_is_drawn_follows_the_settings_and_the_exact_probabilities():
    """Pearson's chi-square of 3000 first tokens: 0.999 of right samplers are below the bound (Wilson and Hilferty)."""
    model, params = model_of("gpt")
    one, prompt = Slots(model, 1, CONTEXT, ()), (9, 2, 30)
    last_1V, _, _ = one.read(params, prompt, 16, one.empty())
    logits = np.asarray(last_1V, np.float64)[0]
    seen = np.zeros(64, bool)
    seen[list(prompt)] = True
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(np.arange(3000))
    draw = jax.jit(sample_rows)
    for sampling in (
        Sampling(), Sampling(temperature=0.5), Sampling(top_k=6), Sampling(top_p=0.8), Sampling(min_p=0.2),
        Sampling(repetition_penalty=3.0), Sampling(0.7, 20, 0.95, 0.05, 1.5),
    ):  # fmt: skip
        rows = np.broadcast_to(np.asarray(last_1V), (3000, 64))
        ids = draw(keys, rows, np.broadcast_to(seen, (3000, 64)), settings_of([sampling] * 3000))
        counts, expected = np.bincount(np.asarray(ids), minlength=64), 3000 * exact(logits, seen, sampling)
        assert not counts[expected == 0].any()
        # Rare ids are counted together.
        often, rest = expected >= 5, (expected > 0) & (expected < 5)
        pairs = [(counts[often], expected[often])]
        if expected[rest].sum() >= 5:
            pairs.append((counts[rest].sum(keepdims=True), expected[rest].sum(keepdims=True)))
        chi = sum(float(((c - e) ** 2 / e).sum()) for c, e in pairs)
        free = sum(len(c) for c, _ in pairs) - 1
        bound = free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
        assert free >= 2 and chi < bound, (sampling, chi, bound)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.5}, {"temperature": 0.0}]
)
def test_rows_are_drawn_as_with_settings_that_are_compiled_in(settings):
    rng, settings = np.random.default_rng(0), {"temperature": 0.8, "top_k": 0, "top_p": 1.0} | settings
    logits = np.round(rng.normal(size=(500, 12)), 1).astype(np.float32)
    logits[:, 3], logits[::3, 5] = np.nan, -np.inf
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(np.arange(500))
    alone = jax.jit(jax.vmap(lambda key, row: sample(key, row[None], **settings)[0]))(keys, logits)
    # The other rows have other settings, and the rows themselves a penalty that finds nothing to punish.
    others = [Sampling(0.3, 2, 0.3, 0.5, 4.0)] * 500
    rows = settings_of([Sampling(**settings, repetition_penalty=2.0)] * 500 + others)
    seen = np.repeat([False, True], 500)[:, None] & np.ones((1, 12), bool)
    found = jax.jit(sample_rows)(jax.numpy.tile(keys, 2), np.tile(logits, (2, 1)), seen, rows)[:500]
    np.testing.assert_array_equal(found, alone)


def exact(logits, seen, s):
    """The probabilities of all ids, by the definitions of the settings, in float64."""
    logits = np.where(
        seen, np.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty), logits
    )
    p = np.exp((logits - logits.max()) / s.temperature)
    order = np.argsort(-p)
    kept = order[: s.top_k or None]
    before = np.cumsum(p[kept]) - p[kept]
    kept = kept[before < s.top_p * p[kept].sum()] if s.top_p < 1 else kept
    kept = kept[p[kept] >= s.min_p * p.max()]
    found = np.zeros_like(p)
    found[kept] = p[kept] / p[kept].sum()
    return found

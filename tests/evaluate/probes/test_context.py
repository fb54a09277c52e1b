"""Loss with the context cut: every target once per cut, from as many tokens as are claimed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_position import T, program_for

from llmjax.evaluate.probes import context
from llmjax.evaluate.probes.context import make_context, visible, windows
from llmjax.evaluate.scoring import make_token_losses, score_pieces
from llmjax.types import Batch
from tests.evaluate.fake_models import Copier, Unigram
from tests.evaluate.probe_text import V, spelled, text_of, words


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 16, 33, 100])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 33, 99, 100, 101])
def test_every_target_counts_once_and_sees_what_is_claimed(n, cut):
    seen, stride = {}, max(1, cut // 2)
    for start, stop, counted in windows(n, cut):
        assert 0 <= start < stop <= n and stop - start <= cut
        for target in range(counted, stop):
            assert target not in seen
            seen[target] = target - start + 1
    assert sorted(seen) == list(range(n))
    for target, count in seen.items():
        assert min(target + 1, cut - stride + 1) <= count <= cut
    assert visible(n, cut) == sum(seen.values())


def scored(text, lengths, step, params, shape=(4, T)):
    probe = make_context(text, lengths)
    sums = score_pieces(
        lambda p, arrays: step(p, Batch(**arrays)), params, probe.pieces(), probe.num_labels, lambda n: shape
    )
    return sums, probe.summarize(sums)


def test_each_cut_is_the_plain_loss_of_texts_that_begin_there():
    program = program_for(jax.devices()[:1])
    params, text = program.init().params, text_of(spelled(words(12), words(3)), T)
    sums, _ = scored(text, (1, 5, 16, 32), program.token_losses, params, shape=(8, T))

    def alone(tokens):
        row = np.zeros((1, T + 1), np.int32)
        row[0, : len(tokens)] = tokens
        real = np.arange(T)[None] < len(tokens) - 1
        at = np.where(real, np.arange(T)[None], 0)
        batch = Batch(row[:, :-1], row[:, 1:], real * 1.0, real * 1, at, np.zeros(1, np.int32))
        return np.asarray(program.token_losses(params, batch)[0], np.float64)[0]

    for label, cut in enumerate((1, 5, 16, 32)):
        expected, count = 0.0, 0
        for document in text.sequences.store.documents:
            n = min(len(document) - 1, 2 * 32)
            for start, stop, counted in windows(n, cut):
                losses = alone(document[start : stop + 1])[counted - start : stop - start]
                expected, count = expected + losses.sum(), count + len(losses)
        assert sums.loss[label] == pytest.approx(expected, rel=1e-6) and sums.count[label] == count


def test_a_cut_as_long_as_the_documents_is_no_cut():
    program = program_for(jax.devices()[:1])
    params, text = program.init().params, text_of(spelled(*(words(n, n) for n in (3, 4, 5, 2))), T)
    assert text.lengths().max() - 1 <= T
    ((arrays, _),) = [(text.sequences.read(np.arange(8)), None)]
    plain_BT = np.asarray(program.token_losses(params, Batch(**arrays))[0], np.float64)
    sums, results = scored(text, (1, T), program.token_losses, params, shape=(8, T))
    assert sums.loss[1] == pytest.approx((plain_BT * arrays["weights"]).sum(), rel=1e-6)
    assert sums.count[0] == sums.count[1] == text.sequences.plan.num_tokens == results["targets"]
    assert results["visible"][0] == 1.0 and results["documents"] == 4


def test_what_copies_gains_from_context_and_what_does_not_look_gains_nothing():
    text = text_of(spelled("abcdefghijklmnopqrst" * 8), 128)  # comes again after 20 tokens
    lengths = (1, 16, 64, 128)
    copier = jax.jit(make_token_losses(Copier(V)))
    loss = scored(text, lengths, copier, None, shape=(2, 128))[1]["loss"]
    assert loss[0] == pytest.approx(np.log(V), rel=1e-6) == loss[1] > 1 > loss[2] >= loss[3]
    unigram = jax.jit(make_token_losses(Unigram(V)))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=V), jnp.float32)
    flat = scored(text, lengths, unigram, logits, shape=(2, 128))[1]["loss"]
    np.testing.assert_allclose(flat, flat[0], rtol=1e-6)


def test_the_sample_is_bounded_and_takes_the_longest_documents_first(monkeypatch):
    text = text_of(spelled(*(words(n, n) for n in (6, 100, 2, 50, 30, 40))), T)
    order = [1, 3, 5, 4, 0, 2]
    assert context.sample(text, 10**6) == [(i, text.lengths()[i] - 1) for i in order]
    assert context.sample(text, 10)[:2] == [(1, 20), (3, 20)]  # two cuts of each
    monkeypatch.setattr(context, "TARGETS", 45)
    assert context.sample(text, 5) == [(1, 10), (3, 10), (5, 10), (4, 10), (0, 5)]
    assert context.sample(text, 10) == [(1, 20), (3, 20), (5, 20), (4, 20)]  # eight cuts are more than 45


def test_documents_without_predictions_are_left_out():
    text = text_of([[1], *spelled("ab")], T)
    assert context.sample(text, 8) == [(1, 3)]

"""Copying: the second copy can be known, the first cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.evaluate.probes.copying import draw, make_copy
from llmjax.evaluate.scoring import make_token_losses, score_pieces
from llmjax.types import Batch
from tests.evaluate.fake_models import Copier, Unigram
from tests.evaluate.probe_text import V, spelled, text_of, words

T = 128
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,;"


def results_of(model, params, lengths, text):
    probe = make_copy(text, lengths)
    step = jax.jit(make_token_losses(model))
    sums = score_pieces(
        lambda p, arrays: step(p, Batch(**arrays)), params, probe.pieces(), probe.num_labels, lambda n: (4, T)
    )
    return probe.summarize(sums)


def test_what_copies_knows_all_of_it_and_what_does_not_look_guesses():
    text, lengths = text_of(spelled(LETTERS * 3), T), (16, 64, 100)
    copied = results_of(Copier(V), None, lengths, text)
    assert copied["distance"] == [8, 32, 50] and copied["accuracy"] == [1.0] * 3
    assert max(copied["loss"]) < 1e-3 < 1 < min(copied["first_loss"])
    guessed = results_of(Unigram(V), jnp.zeros(V).at[TOKEN].set(1e-3), lengths, text)
    assert guessed["chance"] == 1 / len(LETTERS)
    np.testing.assert_allclose(guessed["loss"], np.log(V), rtol=1e-4)
    assert max(guessed["accuracy"]) < 3 * guessed["chance"]


TOKEN = spelled("k")[0][1]


def test_each_piece_is_bos_and_twice_the_same_tokens_of_the_text_none_of_them_twice():
    text = text_of(spelled(LETTERS), T)
    pieces = list(make_copy(text, (16, 100)).pieces())
    assert sorted({len(piece.labels) for piece in pieces}) == [16, 100]
    for piece in pieces:
        D = len(piece.labels) // 2
        bos, first, second = piece.tokens[0], piece.tokens[1 : D + 1], piece.tokens[D + 1 :]
        assert bos == text.tokenizer.bos_id and (first == second).all() and len(set(first)) == D
        assert set(first) <= set(spelled(LETTERS)[0][1:-1])
        (counted,) = np.nonzero(piece.labels >= 0)
        np.testing.assert_array_equal(
            counted, [*range(1, D), *range(D + 1, 2 * D)]
        )  # never the copy's first token
    assert len({tuple(piece.tokens) for piece in pieces}) == len(pieces)


def test_more_tokens_than_there_are_come_round_again_in_another_order():
    drawn = draw(np.arange(10), 25, key=3)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:20]) and len(drawn) == 25
    np.testing.assert_array_equal(draw(np.arange(10), 25, key=3), drawn)


def test_lengths_without_room_for_two_copies_are_left_out_or_named():
    text = text_of(spelled(words(5)), T)
    assert len({len(p.labels) for p in make_copy(text, (1, 3, 9)).pieces()}) == 1
    with pytest.raises(UserError, match="evaluate.probe_lengths=.1, 3. has no length of 4"):
        make_copy(text, (1, 3))

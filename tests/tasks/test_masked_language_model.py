"""Masked language modelling: the right share of the right tokens, whatever the batch; whole words together."""

import dataclasses

import jax
import numpy as np
import pytest
from sections import section

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.vocabulary import begins_word, vocabulary_of
from llmjax.errors import UserError
from llmjax.tasks.masked_language_model import mask_tokens
from llmjax.types import Batch

TOKENIZER = ByteTokenizer()
VOCABULARY = vocabulary_of(TOKENIZER)
TEXT = "The quick brown fox, 春江潮水连海平 jumps over 13 lazy dogs. "


def keys(**changes):
    return section("masked_language_model", **changes)


def batch_of(ids, rows, first=0):
    """`rows` rows of the same document with padding of three tokens behind it."""
    tokens = np.pad(np.tile(np.asarray(ids, np.int32), (rows, 1)), ((0, 0), (0, 3)))
    segments = (np.arange(tokens.shape[1]) < len(ids)).astype(np.int32) + np.zeros_like(tokens)
    positions = np.arange(tokens.shape[1], dtype=np.int32) * segments
    index = np.arange(first, first + rows, dtype=np.int32)
    return Batch(tokens, tokens, segments.astype(np.float32), segments, positions, index)


@pytest.fixture(scope="module")
def document():
    return [TOKENIZER.bos_id, *TOKENIZER.encode(TEXT * 4), TOKENIZER.eos_id]


mask = jax.jit(lambda batch, **changes: mask_tokens(batch, keys(**changes), VOCABULARY, 0),
               static_argnames=("rate", "mask_share", "random_share", "whole_words"))  # fmt: skip


@pytest.mark.parametrize("rate, whole_words", [(0.15, False), (0.4, True), (1.0, False)])
def test_the_share_of_chosen_tokens_and_of_what_becomes_of_them(document, rate, whole_words):
    batch = batch_of(document, 200)
    masked, chosen = mask(batch, rate=rate, whole_words=whole_words)
    is_text = VOCABULARY.is_text_V[batch.tokens] & (batch.segments > 0)
    assert not np.any(chosen & ~is_text) and is_text.sum() == 200 * (len(document) - 2)
    np.testing.assert_allclose(chosen.sum() / is_text.sum(), rate, atol=0.02)
    is_mask, same = masked.tokens == TOKENIZER.mask_id, masked.tokens == batch.tokens
    np.testing.assert_array_equal(np.asarray(masked.tokens)[~chosen], batch.tokens[~chosen])
    np.testing.assert_allclose((is_mask & chosen).sum() / chosen.sum(), 0.8, atol=0.02)
    # One of 256 random bytes is the token itself.
    np.testing.assert_allclose((same & chosen).sum() / chosen.sum(), 0.1 + 0.1 / 256, atol=0.02)
    replaced = np.asarray(masked.tokens)[chosen & ~is_mask & ~same]
    assert VOCABULARY.is_text_V[replaced].all() and len(np.unique(replaced)) > 200


def test_masks_follow_the_sequence_number_and_the_column_and_nothing_else(document):
    whole, chosen = mask(batch_of(document, 8))
    half, chosen_half = mask(batch_of(document, 4, first=4))
    np.testing.assert_array_equal(whole.tokens[4:], half.tokens)
    np.testing.assert_array_equal(chosen[4:], chosen_half)
    assert len({row.tobytes() for row in np.asarray(chosen)}) == 8  # other numbers have other masks
    _, other = mask_tokens(batch_of(document, 8), keys(), VOCABULARY, 1)
    assert not np.array_equal(other, chosen)


@pytest.mark.parametrize("whole_words", [False, True])
def test_tokens_in_another_order_have_the_same_masks(document, whole_words):
    batch = batch_of(document, 3)
    order = np.random.default_rng(0).permutation(batch.tokens.shape[1])
    moved = dataclasses.replace(
        batch,
        **{
            name: getattr(batch, name)[:, order]
            for name in ("tokens", "targets", "weights", "segments", "positions")
        },
        columns=np.tile(order.astype(np.int32), (3, 1)),
    )
    (expected, chosen), (got, chosen_moved) = (
        mask(b, rate=0.3, whole_words=whole_words) for b in (batch, moved)
    )
    np.testing.assert_array_equal(got.tokens, expected.tokens[:, order])
    np.testing.assert_array_equal(chosen_moved, chosen[:, order])


def test_all_tokens_of_a_word_are_chosen_together(document):
    batch = batch_of(document, 50)
    _, chosen = mask(batch, rate=0.5, whole_words=True)
    pieces = [TOKENIZER.id_to_bytes(i) for i in document]
    # A space goes with the word after it, a Chinese character is a word, and so is a mark of punctuation.
    words, column = [], 1
    for character in TEXT * 4:
        size = len(character.encode())
        new = not character.isascii() or not character.isalnum() or not words
        if new:
            words.append([])
        words[-1] += range(column, column + size)
        column += size
    assert b"".join(pieces) == (TEXT * 4).encode()
    chosen = np.asarray(chosen)
    for word in words:
        assert (chosen[:, word] == chosen[:, word[:1]]).all()
    # Words are chosen independently of each other.
    firsts = chosen[:, [word[0] for word in words]]
    np.testing.assert_allclose(firsts.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose((firsts[:, 1:] & firsts[:, :-1]).mean(), 0.25, atol=0.03)


def test_shares_that_are_more_than_all_are_refused():
    with pytest.raises(
        UserError, match=r"mask_share=0.8 and .*random_share=0.3 are more than 1 together; lower one"
    ):
        keys(random_share=0.3)
    assert keys(mask_share=0.7, random_share=0.3).random_share == 0.3


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = ByteTokenizer()
    tokenizer.mask_id = tokenizer.unk_id
    with pytest.raises(UserError, match="the tokenizer has no piece <mask>"):
        vocabulary_of(tokenizer)


@pytest.mark.parametrize("piece, begins", [
    (" the", True), ("ing", False), ("13", False), (",", True), ("春江", True), ("の", True), ("é", False),
    ("\n", True),
])  # fmt: skip
def test_where_a_word_begins(piece, begins):
    assert begins_word(piece.encode()) == begins


def test_bytes_within_a_character_go_on_with_it_and_special_ids_are_alone():
    assert [begins_word(bytes([b])) for b in "春".encode()] == [True, False, False]
    assert begins_word(b"")

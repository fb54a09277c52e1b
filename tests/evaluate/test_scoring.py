"""The compiled step under all probes, and that packing is of no consequence for what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_models import Unigram
from sections import block_section

from llmjax.evaluate.scoring import Piece, make_token_losses, pack, score_pieces
from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.ops.logits import head_logits
from llmjax.ops.losses.cross_entropy import softmax_cross_entropy
from llmjax.types import Batch
from tests.ops.losses.test_cross_entropy import walk

V, T = 48, 24


def gpt(**changes):
    config = block_section(num_layers=2, model_dim=16, num_heads=2, mlp_dim=32, init_std=0.3)
    return GPT(resolve(dataclasses.replace(config, **changes)), V, T)


def random_pieces(count, rng, longest=T):
    """Pieces of 1 to `longest` predictions under labels -1 to 3."""
    for _ in range(count):
        n = rng.integers(1, longest + 1)
        yield Piece(rng.integers(1, V, n + 1), rng.integers(-1, 4, n))


def batch_of(rows, rng):
    ((arrays, _),) = pack(
        (Piece(rng.integers(1, V, T + 1), np.zeros(T, int)) for _ in range(rows)), lambda n: (rows, T)
    )
    return Batch(**arrays)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize(
    "chunk, shards", [(512, (1, 1)), (1, (1, 1)), (7, (2, 1)), (16, (1, 4)), (5, (3, 5))]
)
def test_token_losses_are_those_of_all_logits_at_once(cap, chunk, shards):
    model, batch = gpt(logit_softcap=cap), batch_of(4, np.random.default_rng(0))
    params = model.init(jax.random.key(0))
    logits_BTV = head_logits(model.apply(params, batch).hidden_BTD, model.head(params))
    expected_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch.targets[..., None], axis=2)[
        ..., 0
    ]
    step = jax.jit(make_token_losses(model, chunking=walk(chunk, V), shards=shards))
    loss_BT, correct_BT = step(params, batch)
    np.testing.assert_allclose(loss_BT, expected_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct_BT, logits_BTV.argmax(2) == batch.targets)


def test_token_losses_add_up_to_the_loss_of_evaluation():
    model, batch = gpt(), batch_of(4, np.random.default_rng(1))
    params = model.init(jax.random.key(0))
    loss_BT, correct_BT = make_token_losses(model)(params, batch)
    sums = softmax_cross_entropy(
        model.apply(params, batch).hidden_BTD, model.head(params), batch.targets, batch.weights
    )
    np.testing.assert_allclose(loss_BT.sum(), sums.loss, rtol=1e-6)
    assert correct_BT.sum() == sums.metrics["accuracy"]


def test_no_more_logits_exist_than_those_of_a_chunk():
    model, batch = gpt(), batch_of(4, np.random.default_rng(1))
    step = jax.jit(make_token_losses(model, chunking=walk(8, V)))
    text = step.lower(jax.eval_shape(model.init, jax.random.key(0)), batch).as_text()
    assert f"8x1x{V}xf32" in text and f"{T}x{V}xf32" not in text


def test_of_equal_logits_greedy_decoding_takes_the_first():
    batch = batch_of(2, np.random.default_rng(2))
    batch = dataclasses.replace(batch, targets=batch.targets % 3)
    loss_BT, correct_BT = make_token_losses(Unigram(V))(jnp.zeros(V), batch)
    np.testing.assert_array_equal(correct_BT, batch.targets == 0)
    np.testing.assert_allclose(loss_BT, np.log(V), rtol=1e-6)


def test_packing_keeps_every_piece_whole_in_a_segment_of_its_own():
    pieces = list(random_pieces(40, np.random.default_rng(3)))
    found = []
    for arrays, labels_BT in pack(pieces, lambda n: (3, T)):
        assert all(array.shape[0] == 3 for array in arrays.values()) and labels_BT.shape == (3, T)
        for row in range(3):
            for segment in range(1, arrays["segments"][row].max() + 1):
                (at,) = np.nonzero(arrays["segments"][row] == segment)
                np.testing.assert_array_equal(arrays["positions"][row, at], np.arange(len(at)))
                np.testing.assert_array_equal(np.diff(at), 1)
                tokens, targets = arrays["tokens"][row, at], arrays["targets"][row, at]
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                found.append((tokens[0], *targets, *labels_BT[row, at]))
        assert (labels_BT[arrays["segments"] == 0] == -1).all()
        np.testing.assert_array_equal(arrays["weights"], labels_BT >= 0)
    assert found == [(*piece.tokens, *piece.labels) for piece in pieces]


def test_a_piece_that_is_longer_than_a_row_gets_longer_rows():
    pieces = [Piece(np.arange(n + 1), np.zeros(n, int)) for n in (3, T, T + 1, 2 * T, 5)]
    shapes = [labels_BT.shape for _, labels_BT in pack(pieces, lambda n: (4, T) if n <= T else (2, 2 * T))]
    assert shapes == [(4, T), (2, 2 * T), (4, T)]


def test_pieces_without_predictions_are_nothing():
    assert not list(pack([Piece(np.array([1]), np.array([], int))], lambda n: (1, T)))


@pytest.mark.parametrize("attention", ["full", "blockwise"])
def test_scores_do_not_depend_on_how_pieces_are_packed(attention):
    from llmjax.ops.attention.sequence_attention import make_attend

    model = dataclasses.replace(gpt(), attend=make_attend(attention))
    params = model.init(jax.random.key(1))
    step = jax.jit(make_token_losses(model))
    pieces = list(random_pieces(30, np.random.default_rng(4)))

    def score(shape):
        return score_pieces(lambda p, arrays: step(p, Batch(**arrays)), params, pieces, 4, lambda n: shape)

    alone, packed = score((1, T)), [score(shape) for shape in ((5, T), (2, 3 * T))]
    for sums in packed:
        np.testing.assert_allclose(sums.loss, alone.loss, rtol=1e-6)
        np.testing.assert_array_equal(sums.count, alone.count)
        np.testing.assert_array_equal(sums.correct, alone.correct)
    assert alone.count.sum() == sum((piece.labels >= 0).sum() for piece in pieces)


def test_sums_are_those_of_each_label():
    pieces = list(random_pieces(30, np.random.default_rng(5)))

    def losses(params, arrays):
        return arrays["targets"].astype(np.float32) ** 2, arrays["targets"] % 2 == 0

    sums = score_pieces(losses, None, pieces, 4, lambda n: (2, T))
    for label in range(4):
        targets = np.concatenate([piece.tokens[1:][piece.labels == label] for piece in pieces])
        assert sums.loss[label] == (targets**2).sum() and sums.count[label] == len(targets)
        assert sums.correct[label] == (targets % 2 == 0).sum()
        assert sums.losses()[label] == (targets**2).mean()


def test_what_is_no_number_is_none():
    pieces = [Piece(np.array([1, 2]), np.array([0])), Piece(np.array([1, 3]), np.array([2]))]
    losses = lambda params, arrays: (np.where(arrays["targets"] == 3, np.nan, 1.0), arrays["targets"] == 2)  # noqa: E731
    sums = score_pieces(losses, None, pieces, 3, lambda n: (1, 4))
    assert sums.losses() == [1.0, None, None] and sums.accuracies() == [1.0, None, 0.0]

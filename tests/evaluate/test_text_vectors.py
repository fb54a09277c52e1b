"""Vectors of texts: each text of a packed row has the vector that it has by itself, in every family."""

import families
import jax
import numpy as np
import pytest
from families import V

from llmjax.errors import UserError
from llmjax.evaluate.text_vectors import EmbedConfig, make_pooled, nearest, text_vectors
from llmjax.models.classifier import Classifier
from llmjax.models.table import FAMILIES
from llmjax.types import Batch

LENGTHS = (7, 1, 11, 4, 24, 3)
VARIANTS = ["gpt", "bert original", "encoder_decoder original", "lstm projected"]


def config(pool="mean", normalize=False):
    return EmbedConfig(pool, normalize, read_end=False, neighbours=10)


def texts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, length).tolist() for length in LENGTHS]


def embedder(model, params, keys, sees=True):
    pooled = jax.jit(make_pooled(model, keys, sees))
    return lambda of, shape=(2, 24): text_vectors(lambda arrays: pooled(params, Batch(**arrays)), of, shape)


@pytest.fixture(scope="module", params=VARIANTS)
def made(request):
    model = families.make(request.param)
    return request.param, model, jax.jit(model.init)(jax.random.key(0))


def states_alone(variant, model, params, texts):
    """The hidden states of each text in a row of its own, without what makes vectors of them."""
    shape = len(texts), 24
    ids, own = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)], own[row, : len(text)] = text, 1
    places = np.arange(24, dtype=np.int32)[None] * own
    batch = Batch(ids, ids, own.astype(np.float32), own, places, np.arange(len(texts), dtype=np.int32))

    def states(params):
        if FAMILIES[families.family_of(variant)].reads_source:
            return model.encode_source(params, ids, own, places)
        output = model.apply(params, batch)
        return output.hidden_BTD if output.states_BTD is None else output.states_BTD

    return [row[: len(text)] for row, text in zip(np.asarray(jax.jit(states)(params)), texts, strict=True)]


def test_a_text_in_a_packed_row_has_the_mean_the_last_or_the_first_of_its_own_states(made):
    variant, model, params = made
    alone = states_alone(variant, model, params, texts())
    expected = {
        "mean": [states.mean(axis=0) for states in alone],
        "last": [states[-1] for states in alone],
        "first": [states[0] for states in alone],
    }
    for pool, vectors in expected.items():
        found = embedder(model, params, config(pool))(texts())
        np.testing.assert_allclose(found, vectors, rtol=2e-5, atol=2e-5)
    found = embedder(model, params, config(normalize=True))(texts())
    lengths = np.linalg.norm(expected["mean"], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected["mean"] / lengths, rtol=2e-5, atol=2e-5)


def test_the_states_of_bert_are_those_before_the_layer_that_serves_its_head():
    model = families.make("bert original")
    params = jax.jit(model.init)(jax.random.key(0))
    found = embedder(model, params, config())(texts())
    for entry in ("transform", "output"):
        params = params | {entry: jax.tree.map(lambda x: x + np.float32(5), params[entry])}
    np.testing.assert_array_equal(embedder(model, params, config())(texts()), found)


def test_a_classifier_has_the_vectors_of_the_model_below_its_head():
    model = families.make("gpt")
    params = jax.jit(model.init)(jax.random.key(0))
    with_head = Classifier(model, 3)
    found = embedder(with_head, jax.jit(with_head.init)(jax.random.key(0)), config("last"))(texts())
    np.testing.assert_array_equal(found, embedder(model, params, config("last"))(texts()))


def test_the_first_token_is_refused_where_it_sees_no_other():
    model = families.make("gpt")
    with pytest.raises(UserError, match="embed.pool='first' reads the first token, which sees no other"):
        make_pooled(model, config("first"), sees_both_sides=False)
    with pytest.raises(UserError, match="embed.pool='max' is not known"):
        config("max")


def test_neighbours_point_the_same_way_whatever_their_length():
    vectors_ND = np.array([[0, 1], [5, 5], [-1, 0], [0.1, 0.0], [0, 0]], np.float32)
    found = nearest(np.array([3, 0], np.float32), vectors_ND, 4)
    assert [i for i, _ in found] == [3, 1, 0, 4]
    np.testing.assert_allclose([cosine for _, cosine in found], [1, 2**-0.5, 0, 0], atol=1e-6)

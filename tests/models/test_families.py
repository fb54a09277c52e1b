"""Every family keeps the contract: documents do not leak, packing changes nothing, the cache equals the full pass."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import T, V
from test_gpt import every_bias, packed_batch

from llmjax.batch import along
from llmjax.errors import UserError
from llmjax.models.contract import Model
from llmjax.models.table import FAMILIES
from llmjax.ops.logits import head_logits
from llmjax.parallel.rules import is_axes
from llmjax.train.optim.param_roles import Roles
from llmjax.types import Batch

LENGTHS = (7, 11, 4)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@dataclasses.dataclass(frozen=True)
class Made:
    """A model with parameters, and its jitted functions."""

    model: Model
    params: object
    variant: str

    def logits(self, batch, rng=None):
        return self._logits(self.params, batch, rng)

    def __post_init__(self):
        model = self.model

        def logits(params, batch, rng):
            return head_logits(model.apply(params, batch, rng=rng).hidden_BTD, model.head(params))

        object.__setattr__(self, "_logits", jax.jit(logits))


def made(variant, **changes):
    model = families.make(variant, **changes)
    return Made(model, jax.jit(lambda rng: every_bias(model.init(rng)))(jax.random.key(0)), variant)


@pytest.fixture(scope="module", params=families.VARIANTS)
def family(request):
    return made(request.param)


def test_every_family_has_a_variant():
    assert {families.family_of(variant) for variant in families.VARIANTS} == FAMILIES.keys()


def test_axes_name_every_dimension_and_give_every_parameter_a_role(family):
    params, axes = family.params, family.model.axes()
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=is_axes)
    jax.tree.map(lambda x, names: (x.ndim == len(names)) or pytest.fail(f"{x.shape} {names}"), params, axes)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    # Every matrix has two sides, by which optimizers know it.
    Roles(axes).map(lambda role, x: role.sides, params)
    assert any(jax.tree.leaves(Roles(axes).map(lambda role, x: role.is_hidden_matrix, params)))


def batch_for(family, lengths):
    """Packed documents of these lengths in each row, with sources if the family reads them."""
    batch = packed_batch(lengths)
    if not reads_source(family):
        return batch
    return dataclasses.replace(batch, **families.source_of(batch.segments, 18, np.random.default_rng(5)))


def reads_source(family):
    return FAMILIES[family.model.config.family].reads_source


def alone(batch, row, start, n):
    """The document of `n` tokens from column `start` of a row, alone in a row of its own."""
    tokens = np.zeros((1, T), np.int32)
    tokens[0, :n] = batch.tokens[row, start : start + n]
    segments = (np.arange(T)[None] < n).astype(np.int32)
    positions = np.arange(T, dtype=np.int32)[None] * segments
    source = {}
    if batch.source_tokens is not None:
        own = batch.source_segments[row] == batch.segments[row, start]
        source = {name: np.zeros((1, 18), np.int32) for name in along("source_length")}
        for name in ("source_tokens", "source_positions"):
            source[name][0, : own.sum()] = getattr(batch, name)[row, own]
        source["source_segments"][0, : own.sum()] = 1
    return Batch(
        tokens, tokens, segments.astype(np.float32), segments, positions, np.zeros(1, np.int32), **source
    )


def test_packed_logits_equal_each_document_alone(family):
    batch = batch_for(family, [LENGTHS, [24]])
    packed, start = family.logits(batch), 0
    for n in LENGTHS:
        logits = family.logits(alone(batch, 0, start, n))
        np.testing.assert_allclose(logits[0, :n], packed[0, start : start + n], **CLOSE)
        start += n


def test_cached_decode_equals_the_full_pass_with_prompts_of_different_lengths(family):
    if FAMILIES[family.model.config.family].sees_both_sides:
        with pytest.raises(UserError, match="continues no text"):
            family.model.decode(family.params, np.zeros((1, 1), np.int32), family.model.make_cache(1, 1))
        return
    model, decode = family.model, jax.jit(family.model.decode)
    batch = batch_for(family, [[20], [13]])
    expected = family.logits(batch)
    prompt = np.array([5, 3])
    valid = np.arange(5)[None] < prompt[:, None]
    cache = model.make_cache(2, 5 + 10)
    if reads_source(family):
        cache = jax.jit(model.read_source)(
            family.params, batch.source_tokens, batch.source_segments > 0, cache
        )
    logits, cache = decode(family.params, jnp.where(valid, batch.tokens[:, :5], 0), cache, valid)
    for b, n in enumerate(prompt):
        np.testing.assert_allclose(logits[b, :n], expected[b, :n], **CLOSE)
    for step in range(10):
        at = prompt + step
        logits, cache = decode(family.params, batch.tokens[np.arange(2), at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(2), at], **CLOSE)


def test_no_gradient_and_nothing_that_is_not_finite_crosses_documents(family):
    batch, model = batch_for(family, [LENGTHS]), family.model
    table = family.params["embedding"]["embedding_VD"]

    def second_document(noise_TD):
        # Each position looks up a row of its own, so that its gradient is separate.
        rows = jnp.concatenate([table, table[batch.tokens[0]] + noise_TD])
        moved = dataclasses.replace(batch, tokens=V + jnp.arange(T, dtype=jnp.int32)[None])
        params = family.params | {"embedding": {**family.params["embedding"], "embedding_VD": rows}}
        return jnp.sum(jnp.sin(model.apply(params, moved).hidden_BTD[0, 7:18]))

    function = jax.jit(jax.value_and_grad(second_document))
    value, gradient = function(jnp.zeros((T, 16)))
    by_token = np.abs(gradient).sum(axis=1)
    # A truncated layer may send no gradient back to some of the document's tokens.
    assert by_token[7:18].any() and (np.delete(by_token, slice(7, 18)) == 0).all()
    spoiled_value, spoiled_gradient = function(jnp.zeros((T, 16)).at[3].set(jnp.nan).at[20].set(jnp.inf))
    np.testing.assert_array_equal(spoiled_value, value)
    np.testing.assert_array_equal(spoiled_gradient[7:18], gradient[7:18])


@pytest.mark.parametrize("variant", [v for v in families.VARIANTS if v.startswith("encoder_decoder")])
def test_a_document_reads_its_own_source_alone(variant):
    family = made(variant)
    batch, model, params = batch_for(family, [LENGTHS]), family.model, family.params
    table = params["embedding"]["embedding_VD"]

    def second_document(noise_SD):
        rows = jnp.concatenate([table, table[batch.source_tokens[0]] + noise_SD])
        moved = dataclasses.replace(batch, source_tokens=V + jnp.arange(18, dtype=jnp.int32)[None])
        tables = params | {"embedding": {**params["embedding"], "embedding_VD": rows}}
        return jnp.sum(jnp.sin(model.apply(tables, moved).hidden_BTD[0, 7:18]))

    function = jax.jit(jax.value_and_grad(second_document))
    value, gradient = function(jnp.zeros((18, 16)))
    own = batch.source_segments[0] == 2
    by_token = np.abs(gradient).sum(axis=1)
    assert (by_token[own] > 0).all() and (by_token[~own] == 0).all()
    spoiled_value, spoiled_gradient = function(jnp.where(own[:, None], jnp.zeros((18, 16)), jnp.nan))
    np.testing.assert_array_equal(spoiled_value, value)
    np.testing.assert_array_equal(spoiled_gradient[own], gradient[own])


def test_dropout_follows_the_sequence_not_its_place_in_the_batch(family):
    dropping = Made(families.make(family.variant, model__dropout=0.3), family.params, family.variant)
    batch, rng = batch_for(family, [LENGTHS, [24]]), jax.random.key(5)
    drawn = dropping.logits(batch, rng)
    swapped = dropping.logits(jax.tree.map(lambda x: x[::-1], batch), rng)
    np.testing.assert_allclose(drawn[::-1], swapped, rtol=1e-5, atol=1e-5)
    assert not np.allclose(drawn, family.logits(batch))
    assert not np.allclose(drawn, dropping.logits(batch, jax.random.key(6)))


def test_statistics_have_a_number_for_each_layer_and_ignore_padding(family):
    batch = batch_for(family, [LENGTHS])
    activations = jax.jit(family.model.activations)
    measured = activations(family.params, batch)
    assert measured and all(x.shape == (2,) and (x > 0).all() for x in measured.values())
    padding = dataclasses.replace(batch, tokens=np.where(batch.segments > 0, batch.tokens, 9))
    again = activations(family.params, padding)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), measured, again)


def test_operations_are_counted_by_the_weights_of_matrix_products(family):
    params, roles = family.params, Roles(family.model.axes())
    config = family.model.config

    def size(role, x):
        # Of the experts, a token goes through some.
        share = config.experts_per_token / config.num_experts if "experts" in role.axes else 1
        return x.size * role.is_hidden_matrix * share

    sizes = roles.map(size, params)
    head = family.model.head(params).w_VD.size
    cost = family.model.cost(0.0, 10.0, T)
    assert cost.flops_per_token == 6 * (sum(jax.tree.leaves(sizes)) + head)
    assert cost.activation_bytes > 0


@pytest.mark.parametrize("variant", ["gpt olmo2", "bert"])
def test_relative_positions_tell_the_order_of_tokens_also_in_tiles(variant):
    changes = {"transformer__position": "relative", "transformer__relative_distance": 20}
    family = made(variant, **changes)
    batch = batch_for(family, [[24]])
    logits = family.logits(batch)
    swapped = batch.tokens[:, ::-1]
    # Without positions, a token would see the same set of tokens in any order, if it sees both sides.
    assert not np.allclose(
        family.logits(dataclasses.replace(batch, tokens=swapped))[:, ::-1], logits, atol=1e-3
    )
    if family.model.compute.tile:
        untiled = Made(families.make(variant, **changes, compute__tile=0), family.params, variant)
        np.testing.assert_allclose(untiled.logits(batch), logits, **CLOSE)

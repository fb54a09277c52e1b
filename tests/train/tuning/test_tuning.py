"""Which parameters train: adapters, frozen names and frozen layers, in every family, against explicit arithmetic."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sections import section

from llmjax.errors import UserError
from llmjax.train.optim.param_roles import Role
from llmjax.train.trees import flatten, nest
from llmjax.train.tuning.lora import A, B
from llmjax.train.tuning.names import choose_paths
from llmjax.train.tuning.tuning import WHOLE, make_tuning

KEY = jax.random.key(0)


def tuning_of(variant, frozen=(), added=(), **lora):
    model = families.make(variant)
    shapes = jax.eval_shape(model.init, KEY)
    return make_tuning(model.axes(), section("lora", **lora), frozen, shapes, added), shapes


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


@pytest.mark.parametrize("variant", families.VARIANTS)
def test_new_adapters_leave_every_family_as_it_was(variant):
    tuning, shapes = tuning_of(variant, rank=2)
    params = random_like(shapes)
    trained, frozen = tuning.split(params, KEY)
    jax.tree.map(np.testing.assert_array_equal, tuning.join(trained, frozen), params)
    assert jax.tree.structure(tuning.join(trained, frozen)) == jax.tree.structure(params)
    # Nothing but adapters trains, each with the axes of its matrix, and B alone is zero.
    for path, x in flatten(trained).items():
        assert path[-1] in (A, B) and x.ndim == len(flatten(tuning.trained_axes)[path])
        assert np.any(np.asarray(x)) == (path[-1] == A)
    assert flatten(frozen).keys() == flatten(params).keys()


@pytest.mark.parametrize("variant", ["gpt", "gpt experts", "encoder_decoder", "lstm projected"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_a_scaled_product_and_its_gradients_follow_the_chain_rule(variant, rslora):
    tuning, shapes = tuning_of(variant, rank=4, alpha=6.0, rslora=rslora)
    params, scale = random_like(shapes), 6.0 / (2.0 if rslora else 4.0)
    trained, frozen = tuning.split(params, KEY)
    trained = random_like(trained, 1)
    output_gradients = random_like(shapes, 2)
    joined, backward = jax.vjp(lambda trained: tuning.join(trained, frozen), trained)
    (grads,) = backward(output_gradients)
    for path in tuning.adapters:
        # The matrices of a stack one by one, each as [inputs, outputs].
        role = Role.of(flatten(tuning.axes)[path])
        W, dW, new = (_as_matrices(flatten(tree)[path], role) for tree in (params, output_gradients, joined))
        a, b, da, db = (
            np.asarray(flatten(tree)[*path, name], np.float64) for tree in (trained, grads) for name in (A, B)
        )
        a, da = (x.reshape(len(W), W.shape[1], 4) for x in (a, da))
        b, db = (x.reshape(len(W), 4, W.shape[2]) for x in (b, db))
        np.testing.assert_allclose(new, W + scale * a @ b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(da, scale * dW @ b.swapaxes(1, 2), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(db, scale * a.swapaxes(1, 2) @ dW, rtol=1e-4, atol=1e-4)


def _as_matrices(x, role):
    """[number of matrices, inputs, outputs], float64."""
    x = np.asarray(x, np.float64).transpose(*role.stack, *role.inputs, *role.outputs)
    stack, inputs = len(role.stack), len(role.inputs)
    sizes = (x.shape[:stack], x.shape[stack : stack + inputs], x.shape[stack + inputs :])
    return x.reshape([int(np.prod(size)) for size in sizes])


def test_targets_choose_matrices_by_name():
    tuning, _ = tuning_of("gpt", rank=2, targets=("wq", "layers.mlp.w_d*"))
    assert set(tuning.adapters) == {("layers", "attention", "wq_DNH"), ("layers", "mlp", "w_down_DF")}
    assert {path[1] for path in tuning_of("gpt", rank=2, targets=("attention",))[0].adapters} == {"attention"}


def test_what_the_task_adds_trains_whole():
    tuning, shapes = tuning_of("bert", rank=2, added=("transform",))
    trained, frozen = tuning.split(random_like(shapes), KEY)
    assert trained["transform"].keys() == shapes["transform"].keys() and "transform" not in frozen


@pytest.mark.parametrize("variant", ["gpt learned", "encoder_decoder original", "lstm projected"])
def test_frozen_names_neither_train_nor_change(variant):
    tuning, shapes = tuning_of(variant, frozen=("embedding",))
    params = random_like(shapes)
    trained, frozen = tuning.split(params, KEY)
    assert set(frozen) == {"embedding"} and "embedding" not in trained
    jax.tree.map(np.testing.assert_array_equal, tuning.join(trained, frozen), params)


def test_the_first_layers_of_a_stack_are_frozen():
    tuning, shapes = tuning_of(
        "encoder_decoder original", frozen=("encoder:2", "layers/attention:1", "layers:1")
    )
    params = random_like(shapes)
    trained, frozen = tuning.split(params, KEY)
    assert {x.shape[0] for x in jax.tree.leaves(trained["encoder"])} == {1}
    assert {x.shape[0] for x in jax.tree.leaves(frozen["layers"])} == {1}
    np.testing.assert_array_equal(
        trained["encoder"]["mlp"]["w_up_DF"], params["encoder"]["mlp"]["w_up_DF"][2:]
    )
    jax.tree.map(np.testing.assert_array_equal, tuning.join(trained, frozen), params)
    whole, _ = tuning_of("gpt", frozen=("layers:2",))
    assert not whole.cuts and {path[0] for path in whole.frozen} == {"layers"}


def test_without_adapters_and_frozen_names_nothing_changes():
    tuning, shapes = tuning_of("gpt")
    params = random_like(shapes)
    assert not tuning.is_partial and tuning.split(params, KEY) == (params, {})
    assert tuning.join(params, {}) is params and WHOLE.join(params, {}) is params


@pytest.mark.parametrize("lora, frozen, message", [
    ({"rank": 2, "targets": ("wz",)}, (), "lora.targets has 'wz', which names no parameter that it can have; use some "
     "of layers, attention, wk, wo, wq, wv, mlp, w_down, w_gate, w_up, or all"),
    ({"rank": 2, "targets": ("embedding",)}, (), "lora.targets has 'embedding'"),
    ({"rank": 2, "targets": ()}, (), r"lora.targets=\(\) leaves lora.rank=2 nothing to adapt"),
    ({"rank": 2}, ("mlp",), r"train.frozen=\('mlp',\) has no meaning with lora.rank=2"),
    ({}, ("encoder",), "train.frozen has 'encoder', which names no parameter .* embedding, final_norm, scale, layers"),
    ({}, ("layers:3",), "train.frozen has 'layers:3', but a number .* use layers:1"),
    ({}, ("embedding:1",), "train.frozen has 'embedding:1', but a number"),
    ({}, ("layers:x",), "train.frozen has 'layers:x', but a number"),
    ({}, ("all",), r"train.frozen=\('all',\) leaves no parameter to train"),
    ({"targets": ("mlp",)}, (), r"lora.targets=\('mlp',\) is without effect for lora.rank=0; set lora.rank to 8"),
    ({"alpha": -1.0, "rank": 2}, (), "lora.alpha=-1.0 must not be negative"),
])  # fmt: skip
def test_mistakes_are_one_sentence(lora, frozen, message):
    with pytest.raises(UserError, match=message) as error:
        tuning_of("gpt", frozen, **lora)
    assert "\n" not in str(error.value)


def test_parts_of_paths_with_and_without_letters_are_names():
    paths = [
        ("layers", "attention", "wq_DNH"),
        ("layers", "attention_norm", "scale"),
        ("embedding", "embedding_VD"),
    ]
    for pattern, count in (
        ("layers", 2),
        ("wq_DNH", 1),
        ("attention/wq", 1),
        ("*norm", 1),
        ("all", 3),
        ("s*", 1),
    ):
        assert len(choose_paths("key", pattern, paths)) == count, pattern
    assert flatten(nest({path: 1 for path in paths})).keys() == set(paths)

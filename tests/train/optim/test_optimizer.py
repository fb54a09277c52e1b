"""Schedules, the decay mask, and what each optimizer does to a small nested dict of parameters."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from param_axes import BY_NAME
from quick import AS_FOR_USERS
from sections import optimizer_of, optimizer_section, section

from llmjax.errors import UserError
from llmjax.train.optim.optimizer import SCHEDULES, Optimizer, make_optimizer
from llmjax.train.optim.optimizers.table import OPTIMIZERS, check_all_read

NAMES = OPTIMIZERS
SHAPES = {
    "wq_DNH": (16, 2, 4),
    "wk_DKH": (16, 1, 4),
    "wv_DKH": (16, 1, 4),
    "wo_NHD": (2, 4, 16),
    "w_gate_DF": (16, 24),
    "w_up_DF": (16, 24),
    "w_down_FD": (24, 16),
    "scale": (16,),
    "q_bias": (2, 4),
}
MATRICES = [name for name in SHAPES if name not in ("scale", "q_bias")]


def config(name="adamw", **changes):
    plain = {
        "schedule": "constant",
        "warmup_updates": 0,
        "learning_rate": 0.01,
        "clip_norm": 0.0,
        "weight_decay": 0.0,
    }
    return optimizer_section(name, **plain | changes)


def normal(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def stacked(seed, layers=3):
    return {"layers": normal(seed, {name: (layers, *shape) for name, shape in SHAPES.items()})}


def run(optimizer, params, grads_of, updates):
    """Parameters and optimizer state after some updates."""

    @jax.jit
    def one(params, state, hyper):
        changes, state = optimizer.update(grads_of(params), state, params, hyper)
        return optax.apply_updates(params, changes), state

    state = jax.jit(optimizer.init)(params)
    for update in range(updates):
        params, state = one(params, state, optimizer.hyperparameters(update, 1.0))
    return params, state


def apply(transformation, params, grads_of, updates):
    """The same of an optax transformation."""
    plain = Optimizer(
        transformation.init,
        lambda grads, state, params, hyper: transformation.update(grads, state, params),
        None,
        lambda done, size: 0.0,
    )
    return run(plain, params, grads_of, updates)


def test_the_optimizer_follows_the_schedule_it_reports():
    optimizer = optimizer_of(config("lion", schedule="linear", warmup_updates=3), 8, BY_NAME)
    params, state = {"w_DF": jnp.zeros((2, 2))}, None
    state = optimizer.init(params)
    for update in range(8):
        hyper = optimizer.hyperparameters(update, 1.0)
        changes, state = optimizer.update({"w_DF": jnp.ones((2, 2))}, state, params, hyper)
        np.testing.assert_allclose(-changes["w_DF"][0, 0], hyper.learning_rate, rtol=1e-6)


def test_one_large_update_has_the_mean_learning_rate_of_the_small_ones_in_its_place():
    optimizer = optimizer_of(config(schedule="linear", warmup_updates=10), 100, BY_NAME)
    for done, size in ((0, 1), (2, 4), (10, 8), (50, 16), (84, 16)):
        small = [optimizer.hyperparameters(done + i, 1.0).learning_rate for i in range(size)]
        large = optimizer.hyperparameters(done, float(size)).learning_rate
        np.testing.assert_allclose(large, np.mean(small), rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_update_is_at_the_peak_however_small_its_batch(schedule):
    optimizer = optimizer_of(config(schedule=schedule), 100, BY_NAME)
    for size in (1 / 64, 0.25, 1.0):
        assert optimizer.hyperparameters(0.0, size).learning_rate == 0.01, size


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate_grows_with_the_batch_as_asked(scaling, factor):
    hyper = optimizer_of(config(batch_scaling=scaling), 100, BY_NAME).hyperparameters(50.0, 4.0)
    np.testing.assert_allclose(hyper.learning_rate, 0.01 * factor, rtol=1e-12)
    assert hyper.decays == {"beta1": 0.9, "beta2": 0.95}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaling", ["none", "sqrt", "linear"])
def test_what_is_constant_in_tokens_forgets_as_much_in_one_large_update_as_in_many_small(scaling, name):
    optimizer = optimizer_of(
        config(name, weight_decay=0.1, batch_scaling=scaling, constant_in="tokens"), 100, BY_NAME
    )
    small, large = optimizer.hyperparameters(50.0, 0.5), optimizer.hyperparameters(50.0, 4.0)
    assert small.decays
    for key in small.decays:
        np.testing.assert_allclose(small.decays[key] ** 8, large.decays[key], rtol=1e-12)
    decays = [hyper.learning_rate * hyper.weight_decay for hyper in (small, large)]
    np.testing.assert_allclose(8 * decays[0], decays[1], rtol=1e-12)
    unit = optimizer.hyperparameters(50.0, 1.0)
    np.testing.assert_allclose(unit.weight_decay, 0.1, rtol=1e-12)
    sections = {section_name: section(section_name) for section_name in OPTIMIZERS}
    assert unit.decays == OPTIMIZERS[name].decays(sections)


GROWING = (0.25, 4.0, 1.0, 16.0, 1e4, 1.0)  # sizes of updates, of which betas are powers


def hadamard(letters):
    """A gradient of -3 and 3 whose singular values are all the same: its sign and its direction are one matrix."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    return {f"w_{letters}": jnp.asarray(-3.0 * np.kron(two, two), jnp.float32)}


def whole_step(hypers):
    return 1.0


def momentum_so_far(hypers):
    """Adafactor's momentum begins at zero, and as Zhai et al. (2022) use it nothing corrects that."""
    return 1.0 - math.prod(hyper.decays["momentum"] for hyper in hypers)


def between_iterate_and_mean(hypers):
    """Schedule-free's iterate z moves by whole steps; y, which is returned, is 0.9 of the mean of all z and 0.1 z."""
    z = np.arange(1, len(hypers) + 1)
    means = np.cumsum(z) / z
    return 0.9 * np.diff(means, prepend=0.0)[-1] + 0.1


STEPS_OF_THEORY = {  # of a constant gradient, in learning rates and in the direction of its sign
    "adamw": whole_step,
    "lion": whole_step,
    "adafactor": momentum_so_far,
    "muon": whole_step,
    "schedule_free_adamw": between_iterate_and_mean,
}


@pytest.mark.parametrize("letters", ["DF", "VD"])  # a matrix of the inside, and an embedding
@pytest.mark.parametrize("name", STEPS_OF_THEORY)
def test_a_constant_gradient_gives_the_step_of_theory_also_where_betas_change(name, letters):
    optimizer, grads = optimizer_of(config(name, constant_in="tokens"), 100, BY_NAME), hadamard(letters)
    params, hypers = jax.tree.map(jnp.zeros_like, grads), []
    state, update = optimizer.init(params), jax.jit(optimizer.update, compiler_options=AS_FOR_USERS)
    scale = 1.0
    for size in GROWING:
        hypers.append(optimizer.hyperparameters(50.0, size))
        changes, state = update(grads, state, params, hypers[-1])
        params = optax.apply_updates(params, changes)
        expected = -0.01 * STEPS_OF_THEORY[name](hypers) * np.sign(grads[f"w_{letters}"])
        if name == "muon" and letters == "DF":
            # Newton and Schulz's iteration brings equal singular values near 1, and all to the same number.
            if len(hypers) == 1:
                scale = float(jnp.abs(changes["w_DF"]).mean()) / 0.01
                assert (
                    0.2 * 0.6 < scale < 0.2 * 1.3
                )  # an orthogonal matrix here has elements of 1/2, times 0.2 sqrt(4)
            expected = scale * expected
        np.testing.assert_allclose(changes[f"w_{letters}"], expected, rtol=1e-5, err_msg=f"size {size}")


@pytest.mark.parametrize("constant_in", ["updates", "tokens"])
def test_muons_direction_weighs_gradients_as_its_betas_say(constant_in):
    """Nesterov's momentum with the bias corrected (Dozat 2016), the next beta taken to be that of this update."""
    optimizer = optimizer_of(config("muon", constant_in=constant_in), 100, BY_NAME)
    rng, shape = np.random.default_rng(3), (8, 8)
    params = {"w_DF": jnp.zeros(shape)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    mu, weight = np.zeros(shape), 0.0
    for size in GROWING:
        grad, hyper = rng.normal(size=shape), optimizer.hyperparameters(50.0, size)
        beta = hyper.decays["momentum"]
        mu, weight = beta * mu + (1 - beta) * grad, beta * weight + (1 - beta)
        direction = beta * mu / (beta * weight + 1 - beta) + (1 - beta) * grad / weight
        changes, state = update({"w_DF": jnp.asarray(grad, jnp.float32)}, state, params, hyper)
        x = direction / np.linalg.norm(direction)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
        expected = -0.01 * 0.2 * math.sqrt(8) * x
        angle = (
            np.sum(changes["w_DF"] * expected) / np.linalg.norm(changes["w_DF"]) / np.linalg.norm(expected)
        )
        assert angle > math.cos(math.radians(0.05)), (size, math.degrees(math.acos(angle)))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends_a_quadratic(name):
    target, start = stacked(0), jax.tree.map(jnp.zeros_like, stacked(0))

    def loss(params):
        return sum(jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(target)))

    optimizer = optimizer_of(config(name, learning_rate=0.1, clip_norm=10.0, warmup_updates=2), 60, BY_NAME)
    params, state = run(optimizer, start, jax.grad(loss), 60)
    assert loss(optimizer.eval_params(state, params)) < 0.1 * loss(start)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_shrinks_matrices_and_embeddings_but_not_norms_and_biases(name):
    params = {
        **stacked(1),
        "embedding_VD": jnp.ones((5, 16)),
        "norm": {"scale": jnp.ones(16), "bias": jnp.ones(16)},
    }
    optimizer = optimizer_of(config(name, learning_rate=0.5, weight_decay=0.1), 10, BY_NAME)
    after, state = run(optimizer, params, functools.partial(jax.tree.map, jnp.zeros_like), 1)
    after = optimizer.eval_params(state, after)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after)):
        factor = 1.0 if path[-1].key in ("scale", "bias", "q_bias") else 1.0 - 0.5 * 0.1
        np.testing.assert_allclose(y, factor * x, rtol=1e-5, err_msg=str(path))
    decays = BY_NAME.matrices_and_tables(params)
    assert decays["embedding_VD"] and not decays["norm"]["scale"]


@pytest.mark.parametrize("name", NAMES)
def test_the_global_norm_is_clipped_before_anything_else(name):
    params = normal(2, SHAPES)
    grads = jax.tree.map(lambda x: 100.0 * x, normal(3, SHAPES))
    norm = optax.tree.norm(grads)
    clipped = jax.tree.map(lambda g: g * 0.5 / norm, grads)
    a, _ = run(optimizer_of(config(name, clip_norm=0.5), 4, BY_NAME), params, lambda _: grads, 1)
    b, _ = run(optimizer_of(config(name, clip_norm=0.0), 4, BY_NAME), params, lambda _: clipped, 1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), a, b)


def test_adamw_is_that_of_optax():
    params, grads = normal(2, SHAPES), normal(3, SHAPES)
    reference = optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=BY_NAME.matrices_and_tables)
    a, _ = run(optimizer_of(config(weight_decay=0.1), 9, BY_NAME), params, lambda _: grads, 3)
    b, _ = apply(reference, params, lambda _: grads, 3)
    millionth = functools.partial(
        np.testing.assert_allclose, rtol=1e-6, atol=1e-6 * 0.01
    )  # of the learning rate
    jax.tree.map(millionth, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_are_updated_like_single_layers(name):
    wide = {"w_up_DF": (128, 130)}  # large enough for Adafactor to factor
    params = {"layers": {**stacked(4)["layers"], **normal(4, {k: (3, *s) for k, s in wide.items()})}}
    grads = {"layers": {**stacked(5)["layers"], **normal(5, {k: (3, *s) for k, s in wide.items()})}}
    optimizer = optimizer_of(config(name, weight_decay=0.1), 9, BY_NAME)
    together, _ = run(optimizer, params, lambda _: grads, 2)

    def apart(tree):
        return {f"layer{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(3)}

    expected, _ = run(optimizer, apart(params), lambda _: apart(grads), 2)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, apart(together), expected)


def as_matrix(name, x):
    """One layer's weight as rows x columns, written out here by hand."""
    rows = {"wo_NHD": 8, "w_down_FD": 24}.get(name, 16)
    return x.reshape(rows, -1)


def test_muon_orthogonalizes_every_matrix_of_every_layer_with_the_rms_of_adamw():
    params, grads = stacked(6), stacked(7)
    after, _ = run(optimizer_of(config("muon"), 4, BY_NAME), params, lambda _: grads, 1)
    for name in MATRICES:
        for x, y in zip(params["layers"][name], after["layers"][name]):
            step = as_matrix(name, x - y) / 0.01
            singular = np.linalg.svd(step, compute_uv=False) / (0.2 * math.sqrt(max(step.shape)))
            assert singular.min() > 0.6 and singular.max() < 1.3, (name, singular)
            np.testing.assert_allclose(np.sqrt((step**2).mean()), 0.2, rtol=0.25)


def test_muon_on_stacked_weights_is_that_of_optax_on_each_matrix():
    def apart(tree):
        return {f"{name}{i}": as_matrix(name, tree["layers"][name][i]) for name in MATRICES for i in range(3)}

    params, pull = stacked(8), stacked(9)
    optimizer = optimizer_of(config("muon", learning_rate=0.5, weight_decay=0.1), 4, BY_NAME)
    reference = optax.contrib.muon(0.5, weight_decay=0.1, consistent_rms=0.2)
    add = functools.partial(jax.tree.map, jnp.add)  # gradients that turn as the parameters move
    after, _ = run(optimizer, params, functools.partial(add, pull), 3)
    expected, _ = apply(reference, apart(params), functools.partial(add, apart(pull)), 3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), apart(after), expected)


def test_muon_leaves_embeddings_norms_and_biases_to_adamw():
    shapes = {
        "embedding_VD": (20, 16),
        "positions_TD": (8, 16),
        "unembedding_VD": (20, 16),
        "scale": (16,),
        "q_bias": (2, 4),
    }
    params, grads = normal(10, shapes), normal(11, shapes)
    a, _ = run(optimizer_of(config("muon", weight_decay=0.1), 4, BY_NAME), params, lambda _: grads, 2)
    b, _ = run(optimizer_of(config("adamw", weight_decay=0.1), 4, BY_NAME), params, lambda _: grads, 2)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_schedule_free_evaluates_the_average_of_its_iterates_by_squared_learning_rate():
    params, rng, iterates = normal(12, SHAPES), np.random.default_rng(0), []
    optimizer = optimizer_of(config("schedule_free_adamw", warmup_updates=3), 9, BY_NAME)
    state, one = optimizer.init(params), jax.jit(optimizer.update)
    for update in range(4):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        changes, state = one(grads, state, params, optimizer.hyperparameters(update, 1.0))
        params = optax.apply_updates(params, changes)
        iterates.append(state[-1].z)
    weights = np.square([1 / 3, 2 / 3, 1.0, 1.0])
    mean = jax.tree.map(lambda *zs: sum(w * z for w, z in zip(weights, zs)) / weights.sum(), *iterates)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, optimizer.eval_params(state, params), mean)
    assert not np.allclose(params["w_up_DF"], mean["w_up_DF"], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "adam"}, "optimizer.name='adam' .* adamw, lion"),
        ({"clip": "norm"}, "optimizer.clip='norm' .* global, block, adaptive"),
        ({"batch_scaling": "root"}, "optimizer.batch_scaling='root' .* none, sqrt, linear"),
        ({"constant_in": "epochs"}, "optimizer.constant_in='epochs' .* updates, tokens"),
        ({"schedule": "cos"}, "optimizer.schedule='cos' .* cosine"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
        ({"learning_rate": math.nan}, "optimizer.learning_rate=nan"),
        ({"warmup_updates": -1}, "optimizer.warmup_updates=-1"),
        ({"schedule_updates": -1}, "optimizer.schedule_updates=-1"),
        (
            {"schedule_updates": 40},
            "optimizer.schedule_updates=40 leaves nothing after optimizer.warmup_updates=40",
        ),
        ({"schedule_updates": 90, "schedule": "constant"}, "optimizer.schedule_updates=90 .*='constant'"),
        ({"decay_fraction": 1.5}, "optimizer.decay_fraction=1.5"),
        ({"name": "schedule_free_adamw"}, "optimizer.schedule='cosine' .*=constant"),
    ],
)
def test_a_config_out_of_range_is_one_sentence_that_names_the_key(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        optimizer_section(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("adamw", {"beta2": 1.0}, "adamw.beta2=1.0"),
        ("lion", {"beta1": -0.1}, "lion.beta1=-0.1"),
        ("adafactor", {"decay_cap": 1.0}, "adafactor.decay_cap=1.0"),
        ("muon", {"momentum": 1.0}, "muon.momentum=1.0"),
        ("muon", {"form": "jordan"}, "muon.form='jordan' is not known.* debiased, reference"),
        ("schedule_free_adamw", {"beta1": 0.0}, "schedule_free_adamw.beta1=0"),
    ],
)
def test_a_key_of_an_optimizer_out_of_range_is_one_sentence_that_names_it(name, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        section(name, **changes)


OTHER_VALUES = {"eps": 1e-3, "form": "reference"}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_an_optimizer_changes_its_steps(name):
    """And no other key does. The loss is |x|^2 / 2, so that gradients change their sign."""
    params = jax.tree.map(lambda x: 0.02 * x, normal(13, {"w_DF": (8, 8), "scale": (8,)}))

    def steps(**changed):
        sections = {other: section(other, **changed.get(other, {})) for other in OPTIMIZERS}
        return run(make_optimizer(config(name), sections, 9, BY_NAME), params, lambda x: x, 6)

    plain, _ = steps()
    for other, kind in OPTIMIZERS.items():
        for key in (field.name for field in dataclasses.fields(kind.section)):
            changed, _ = steps(**{other: {key: OTHER_VALUES.get(key, 0.5)}})
            same = all(map(np.array_equal, jax.tree.leaves(plain), jax.tree.leaves(changed)))
            assert same == (other not in NAMES[name].reads), f"{other}.{key}"


def test_a_key_that_the_optimizer_does_not_read_may_not_be_set():
    sections = {name: section(name) for name in OPTIMIZERS}
    for name in OPTIMIZERS:
        check_all_read(name, sections)
    for name in ("adamw", "muon"):
        check_all_read(name, sections | {"adamw": section("adamw", beta2=0.99)})
    with pytest.raises(
        UserError, match="^lion.beta2=0.99 is without effect for optimizer.name='muon'; set optimi"
    ):
        check_all_read("muon", sections | {"lion": section("lion", beta2=0.99)})
    with pytest.raises(
        UserError, match="adamw.eps=0.1 .* set optimizer.name=adamw or muon, or leave adamw.eps at 1e"
    ):
        check_all_read("lion", sections | {"adamw": section("adamw", eps=0.1)})

"""Checkpoints: what is kept, what comes back, onto which mesh, and what is refused."""

import collections
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sections import mesh_section

from llmjax.errors import UserError
from llmjax.parallel.mesh import make_mesh
from llmjax.train.checkpoint.checkpoint import Checkpoints
from llmjax.train.checkpoint.config import CheckpointConfig

Moments = collections.namedtuple("Moments", ["count", "mu"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: dict
    opt_state: tuple
    update: jax.Array
    rng: jax.Array


def make_state(update=0, dtype=jnp.float32, mesh_axes=(2, 4, 1, 1)):
    mesh = make_mesh(mesh_section(*mesh_axes))
    table = jnp.arange(64, dtype=dtype).reshape(16, 4) + update
    sharded = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    params = {"embed": {"table": table}, "norm.scale": jnp.ones(4)}
    opt_state = (Moments(jnp.int32(update), jax.tree.map(lambda x: x * 2, params)), ())
    state = State(params, opt_state, jnp.int32(update), jax.random.key(7))
    return jax.tree.map(
        lambda x: jax.device_put(x, sharded if x.ndim == 2 else NamedSharding(mesh, PartitionSpec())), state
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_state_comes_back_bit_for_bit_with_its_meta_in_another_process_life(tmp_path, capfd):
    state = make_state(3)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        assert checkpoints.save(3, state, {"cursor": 12, "config": {"a": [1, 2]}})
        assert not checkpoints.save(3, state, {"cursor": 12})  # there is one already
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, meta = checkpoints.restore(abstract(state))
        assert_same(restored, state)
        assert meta == {"cursor": 12, "config": {"a": [1, 2]}, "rank": None}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["run[2]", "*", "a ?b", "{x}", "%41#?", "a:b", "诗"])
def test_a_state_comes_back_from_folders_of_any_name(name, tmp_path):
    """Also where a pattern made of one folder's name would match its neighbour."""
    neighbour = tmp_path / "run2" / name
    for directory, update in ((neighbour, 5), (tmp_path / name / name, 3)):
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(update, make_state(update), {})
    with Checkpoints(tmp_path / name / name) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state(3)))[0], make_state(3))


def test_parts_that_were_not_put_together_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda self, directory: None)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(OSError, match="not put together"):
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("mesh_axes", [(1, 8, 1, 1), (8, 1, 1, 1), (1, 2, 1, 4)])
def test_a_state_comes_back_on_another_mesh(tmp_path, mesh_axes):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        elsewhere = make_state(1, mesh_axes=mesh_axes)
        restored, _ = checkpoints.restore(abstract(elsewhere))
        assert_same(restored, elsewhere)


def test_parameters_come_back_without_the_optimizer(tmp_path):
    state = make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"cursor": 5})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params, meta = checkpoints.restore_params(abstract(state.params))
        assert_same(params, state.params)
        assert meta["cursor"] == 5


def test_the_newest_and_the_best_are_kept_also_after_a_restart(tmp_path):
    config = CheckpointConfig(keep=2)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 1.0}
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
    for update, loss in losses.items():
        with Checkpoints(tmp_path, config) as checkpoints:
            checkpoints.save(update, make_state(update), {}, rank=loss)
            checkpoints.wait()
            assert checkpoints.updates() == kept[update]
    with Checkpoints(tmp_path, config) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (6, 2)
        assert checkpoints.would_be_best(0.5) and not checkpoints.would_be_best(1.0)
        assert not checkpoints.would_be_best(float("nan"))
        checkpoints.save(7, make_state(7), {}, rank=0.5)  # a new best lets go of the old one
        checkpoints.save(8, make_state(8), {})
        checkpoints.save(9, make_state(9), {})
        checkpoints.save(10, make_state(10), {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [7, 9, 10]


def test_without_keep_best_only_the_newest_stay(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=False)) as checkpoints:
        for update, loss in ((1, 1.0), (2, 2.0)):
            checkpoints.save(update, make_state(update), {}, rank=loss)
        assert checkpoints.updates() == [2] and not checkpoints.would_be_best(0.0)


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    advance = jax.jit(lambda x: jax.tree.map(lambda a: a * 3 + 1, x), donate_argnums=0)
    state = {"params": {"w": jnp.arange(1_000_000.0)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(10):
            state = advance(state)
        params, _ = checkpoints.restore_params(abstract(state["params"]))
        np.testing.assert_array_equal(np.asarray(params["w"]), np.arange(1_000_000.0, dtype=np.float32))


def test_what_differs_is_refused_by_name(tmp_path):
    state = make_state(2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, {})
        with pytest.raises(UserError, match=r"params/embed/table with dtype float32, .* asks for bfloat16"):
            checkpoints.restore(abstract(make_state(2, dtype=jnp.bfloat16)))
        wide = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype, sharding=None), state.params
        )
        with pytest.raises(UserError, match=r"params/embed/table with shape \(16, 4\), .* \(16, 4, 2\)"):
            checkpoints.restore_params(wide)
        with pytest.raises(UserError, match=r"has no params/head;"):
            checkpoints.restore_params(abstract({**state.params, "head": state.update}))
        with pytest.raises(UserError, match=r"has params/norm\.scale, which this config does not"):
            checkpoints.restore_params(abstract({"embed": state.params["embed"]}))
        with pytest.raises(UserError, match=r"no checkpoint of update 9 .* choose among 2"):
            checkpoints.restore(abstract(state), update=9)
        with pytest.raises(ValueError, match=r"update 1 is older than checkpoint 2"):
            checkpoints.save(1, state, {})


def test_a_count_of_whole_updates_comes_back_as_the_number_it_was(tmp_path):
    """Older versions counted the updates of moments in int32, and nothing else is converted."""
    state = make_state(3)
    newer = dataclasses.replace(state, opt_state=(state.opt_state[0]._replace(count=jnp.float32(3.0)), ()))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        restored, _ = checkpoints.restore(abstract(newer))
        assert restored.opt_state[0].count.dtype == jnp.float32 and restored.opt_state[0].count == 3.0
        checkpoints.save(4, newer, {})
        with pytest.raises(UserError, match="opt_state/0/count with dtype float32"):
            checkpoints.restore(abstract(state))


def test_nothing_to_restore_is_said(tmp_path):
    with (
        Checkpoints(tmp_path / "none", read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"there is no checkpoint in .*none; train there first"),
    ):
        checkpoints.read_meta()
    assert not (tmp_path / "none").exists()


def test_a_torn_save_is_cleaned_up_and_the_older_checkpoint_stands(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {"cursor": 1})
    torn = pathlib.Path(tmp_path / "2.orbax-checkpoint-tmp")
    torn.mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.updates() == [1] and torn.exists()  # a reader touches nothing
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.read_meta()["cursor"] == 1
        checkpoints.save(2, make_state(2), {"cursor": 2})
    assert not torn.exists()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.updates() == [1, 2]


def test_a_death_while_an_old_checkpoint_is_deleted_leaves_only_whole_ones(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dies = lambda *args, **kwargs: None  # noqa: E731 - before it deletes anything
        patch.setattr("llmjax.train.checkpoint.checkpoint.shutil.rmtree", dies)
        with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
            for update in (1, 2, 3):
                checkpoints.save(update, make_state(update), {})
    whole = {path.name for path in (tmp_path / "3").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"3", "deleted"}
    assert all(whole == {item.name for item in step.iterdir()} for step in (tmp_path / "deleted").iterdir())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.updates() == [3]
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(3))
    assert {path.name for path in tmp_path.iterdir()} == {"3"}


def test_a_policy_that_deletes_everything_is_refused():
    with pytest.raises(UserError, match=r"checkpoint.keep=0 must be at least 1"):
        CheckpointConfig(keep=0)
    with pytest.raises(
        UserError, match=r"checkpoint.every=-1 must not be negative; use 0 for only at the end"
    ):
        CheckpointConfig(every=-1)

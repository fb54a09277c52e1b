"""What the TPU compiler makes of a window: one reduction of the gradients, whatever the number of micro-steps."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from param_axes import BY_NAME
from sections import block_section, mesh_section

from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ops.attention import blockwise
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout, partition_spec
from llmjax.plan.hlo.parse import parse
from llmjax.plan.hlo.traffic import collectives
from llmjax.plan.topology import topology_devices
from llmjax.tasks.contract import Setting
from llmjax.tasks.language_model import LanguageModel
from llmjax.train.update.fused import MANUAL, make_update_sums
from llmjax.types import Batch

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]
SHAPE = {"num_layers": 2, "model_dim": 128, "num_heads": 2, "mlp_dim": 256, "dtype": "bfloat16"}
VOCAB, LENGTH, ROWS = 512, 128, 16
TABLE = 512 * 128  # parameters that are looked up
NORMS = (
    5 * 128 + 2 * 2 * 64
)  # that are whole on every device: of both layers and the last, and of queries and keys
QUICK = {"exec_time_optimization_effort": -1.0}


def compiled(capacity, gather="update", **sizes):
    """A decoder's window of `capacity` micro-steps for 8 chips: its collectives, its parameters, how many sums."""
    mesh = make_mesh(mesh_section(**{"data": 1, **sizes}), topology_devices("v5e:2x4"))
    layout = Layout(mesh, MANUAL[gather])
    config = resolve(block_section(**SHAPE))
    model = GPT(
        config, VOCAB, LENGTH, layout, blockwise.attend, compute=LayerCompute(scan_layers=True, remat="full")
    )
    loss = LanguageModel().make_loss(model, Setting(shards=(layout.axis_size("fsdp"), 1)))
    specs = jax.tree.map(partition_spec, model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    window = jax.jit(make_update_sums(loss, mesh, specs, BY_NAME, gather=gather, compute_dtype=config.dtype))

    def abstract(shape, dtype, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def field(name):
        shape = (capacity, ROWS) if name == "index" else (capacity, ROWS, LENGTH)
        return abstract(shape, jnp.float32 if name == "weights" else jnp.int32, None, ("data", "fsdp"))

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x, spec: abstract(x.shape, x.dtype, *spec), shapes, specs)
    batch = Batch(**{f.name: field(f.name) for f in dataclasses.fields(Batch)})
    arguments = (params, batch, abstract((), jnp.int32), None)
    num_sums = len(jax.eval_shape(window, *arguments)[1])
    program = window.lower(*arguments).compile(compiler_options=QUICK)
    size = sum(x.size for x in jax.tree.leaves(params))
    return collectives(parse(program.as_text())), size, num_sums


def test_gradients_are_reduced_once_in_float32_however_many_micro_steps_there_are():
    for capacity in (2, 32):
        found, size, num_sums = compiled(capacity, data=8)
        assert {(c.kind, c.dtype, c.group_size, c.runs, c.within) for c in found} == {
            ("all-reduce", "f32", 8, 1, ())
        }
        scalars = 1 + capacity * num_sums  # the total weight, and the sums of each micro-step
        assert sum(c.operand_bytes for c in found) == 4 * (size + scalars)


def test_weights_are_gathered_once_and_gradients_scattered_once():
    found, size, num_sums = compiled(8, fsdp=8)
    assert all((c.runs, c.within) == (1, ()) for c in found)
    reductions = [
        c for c in found if c.kind in ("reduce-scatter", "all-reduce")
    ]  # of small ones it makes the latter
    assert {c.dtype for c in reductions} == {"f32"} and "reduce-scatter" in {c.kind for c in reductions}
    assert sum(c.operand_bytes for c in reductions) == 4 * (size + 1 + 8 * num_sums)
    gathers = [c for c in found if c.kind == "all-gather"]
    gathered = {dtype: sum(c.result_bytes for c in gathers if c.dtype == dtype) for dtype in ("bf16", "f32")}
    assert gathered == {"bf16": 2 * (size - TABLE - NORMS), "f32": 4 * TABLE}


def test_gathered_in_each_micro_step_only_shards_of_gradients_are_reduced_after_it():
    found, size, _ = compiled(8, "micro_step", data=2, fsdp=4)
    after = [
        c for c in found if not c.within and c.kind != "all-gather"
    ]  # the table's is moved out of the loop
    assert {(c.kind, c.dtype, c.group_size) for c in after} == {("all-reduce", "f32", 2)}
    shards = (size - NORMS) / 4 + NORMS
    assert 4 * shards < sum(c.operand_bytes for c in after) < 4 * shards + 1024  # and some scalars
    assert {"all-gather", "reduce-scatter"} <= {c.kind for c in found if c.within}

"""Layout invariance: the loss curve does not depend on how the work was cut. And a config becomes a working program."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from families import source_of
from some_slow import often

from configs import base
from llmjax.build.model import make_task_loss
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.layout.layout import LAYOUTS, RowLayout
from llmjax.ops.attention import sequence_attention
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.fused import MANUAL
from llmjax.types import Batch
from tests.data.test_pipeline import make_source

V, T, UPDATES = 64, 32, 5
SIZES = {
    "model.num_layers": 2, "model.model_dim": 32, "transformer.num_heads": 8, "transformer.num_kv_heads": 8,
    "transformer.mlp_dim": 64,
    "model.init_std": 0.1, "compute.scan_layers": True,  # one layer to compile
    "data.seq_len": T, "train.num_updates": UPDATES, "train.tokens_per_update": 16 * T,
    "compute.accumulation_steps": 2, "optimizer.warmup_updates": 2,
}  # fmt: skip


def program_for(devices, **changes):
    raw = base.get_config()
    raw.update_from_flattened_dict(SIZES | {key.replace("__", "."): value for key, value in changes.items()})
    config, derived = resolve_config(read_config(raw.to_dict()), len(devices))
    return make_program(config, derived, V, devices)


def ragged_batch(rng, size):
    """Rows of 1 to 4 documents with padding behind, and skewed weights."""
    arrays = {name: np.zeros((size, T), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    for b in range(size):
        ends = np.sort(rng.choice(np.arange(2, T), rng.integers(1, 4), replace=False))
        for segment, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            arrays["segments"][b, start:stop] = segment
            arrays["positions"][b, start:stop] = np.arange(stop - start)
            arrays["tokens"][b, start:stop] = rng.integers(1, V, stop - start)
            arrays["targets"][b, start:stop] = (3 * arrays["tokens"][b, start:stop] + 1) % V
    weights = (arrays["segments"] > 0) * rng.choice([0.0, 0.5, 1.0], (size, T))
    return arrays | {"weights": weights.astype(np.float32)}


def lay_out(batch, layout):
    """The batch with the columns of each row in the order of `layout`."""
    out = {name: array.copy() for name, array in batch.items()}
    for b, segments in enumerate(batch["segments"]):
        order, segment_of = layout.order(np.bincount(segments)[1:], T)
        for name in ("tokens", "targets", "weights", "positions"):
            out[name][b] = batch[name][b, order]
        out["segments"][b] = segment_of[segments[order]]
        if "source_segments" in batch:
            out["source_segments"][b] = segment_of[batch["source_segments"][b]]
        if layout.moves:
            out.setdefault("columns", np.empty_like(out["segments"]))[b] = order
    return out


def trace(program, seed=0, layout=RowLayout()):  # noqa: B008
    """Loss per target of each update, on the same 16 sequences an update however they are cut."""
    rng, state, losses, steering = np.random.default_rng(seed), program.init(), [], program.steering
    size = program.batch.micro_batch_size
    for update in range(UPDATES):
        whole = ragged_batch(rng, 16) | {"index": np.arange(16, dtype=np.int32) + 16 * update}
        if program.derived.source_len:
            whole |= source_of(whole["segments"], program.derived.source_len, rng)
        whole = lay_out(whole, layout)
        order, sums = steering.decide(steering.start(), update * 16 * T).inputs, []
        parts = [{k: v[start : start + size] for k, v in whole.items()} for start in range(0, 16, size)]
        lead = ()
        if not program.engine.stops_within:
            parts, lead = [{k: np.stack([part[k] for part in parts]) for k in whole}], (None,)
        for part in parts:
            batch = Batch(
                **{k: jax.device_put(v, program.placement.sharding(k, *lead)) for k, v in part.items()}
            )
            state, metrics = program.train_step(state, batch, order)
            sums.append(jax.tree.map(lambda x: float(np.sum(x)), jax.device_get(metrics)))
        losses.append(sum(m["loss"] for m in sums) / sum(m["weight"] for m in sums))
    return np.array(losses)


@pytest.fixture(scope="module")
def one_device():
    return trace(program_for(jax.devices()[:1]))


def test_the_loss_falls(one_device):
    assert one_device[-1] < one_device[0] - 0.1


@pytest.mark.parametrize(
    "data, fsdp, seq, tensor",
    often(
        [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 1, 1, 8), (2, 1, 2, 2)],
        lambda shape: 8 not in shape,
    ),
)
def test_every_mesh_gives_the_same_losses(data, fsdp, seq, tensor, one_device):
    program = program_for(jax.devices(), mesh__data=data, mesh__fsdp=fsdp, mesh__seq=seq, mesh__tensor=tensor)
    np.testing.assert_allclose(trace(program), one_device, rtol=1e-5)


@pytest.mark.parametrize(
    "algorithm, engine",
    often(
        itertools.product(sequence_attention.ALGORITHMS, ENGINES),
        lambda case: case[1] == "in_place" or case == ("ring", "fused"),
    ),
)
def test_every_way_to_share_sequences_gives_the_same_losses(algorithm, engine, one_device):
    mesh = {"mesh__data": 2, "mesh__seq": 4, "mesh__seq_attention": algorithm}
    program = program_for(jax.devices(), compute__engine=engine, **mesh)
    np.testing.assert_allclose(trace(program), one_device, rtol=1e-5)


@pytest.mark.parametrize("engine", often(ENGINES, lambda engine: engine != "multisteps"))
def test_tiles_and_remat_of_split_sequences_give_the_same_losses(engine, one_device):
    mesh = {"mesh__data": 2, "mesh__seq": 2, "mesh__tensor": 2, "mesh__seq_attention": "ring"}
    saving = {"compute__tile": 4, "compute__remat": "attention", "compute__offload": ("residual",)}
    program = program_for(jax.devices(), compute__engine=engine, **mesh, **saving)
    np.testing.assert_allclose(trace(program), one_device, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_the_sequences_gives_the_same_losses(name, one_device):
    mesh = {"mesh__data": 2, "mesh__seq": 4, "mesh__seq_attention": "ring", "mesh__layout": name}
    program = program_for(jax.devices(), **mesh)
    np.testing.assert_allclose(trace(program, layout=RowLayout(name, 4)), one_device, rtol=1e-5)


@pytest.mark.parametrize("name", ["auto", *LAYOUTS])
def test_batches_come_in_the_layout_of_the_mesh(name):
    mesh = {"mesh__data": 2, "mesh__seq": 4, "mesh__seq_attention": "ring", "mesh__layout": name}
    program = program_for(jax.devices(), **mesh)
    source = make_source()  # rows of T
    with program.placement.batches(source, start=3) as batches:
        batch = next(batches)
    layout = RowLayout("documents" if name == "auto" else name, 4)
    expected = lay_out(source.read(np.arange(3, 3 + program.batch.micro_batch_size)), layout)
    for field, array in expected.items():
        np.testing.assert_array_equal(getattr(batch, field), array)


FUSED_MESHES = [(1, 1, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 2, 2)]


@pytest.mark.parametrize(
    "gather, data, fsdp, seq, tensor",
    often(
        # Without fsdp there is nothing to gather.
        [
            (gather, *mesh)
            for gather in MANUAL
            for mesh in FUSED_MESHES
            if gather == "micro_step" or mesh[1] > 1
        ],
        lambda case: case[1:] in [(2, 2, 2, 1), (1, 1, 1, 1)],
    ),
)
def test_fused_updates_give_the_same_losses_on_every_mesh(gather, data, fsdp, seq, tensor, one_device):
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__seq": seq, "mesh__tensor": tensor}
    devices = jax.devices()[: data * fsdp * seq * tensor]
    program = program_for(devices, compute__engine="fused", compute__gather=gather, **mesh)
    np.testing.assert_allclose(trace(program), one_device, rtol=1e-5)


@pytest.mark.parametrize("changes", [
    {"compute__accumulation_steps": 1},
    {"compute__accumulation_steps": 8},
    {"compute__scan_layers": False},
    {"compute__remat": "full"},
    {"compute__remat": "attention"},
    {"compute__remat": "attention", "compute__offload": ("residual", "attention")},
    {"compute__tile": 8},
    {"compute__tile": 40, "compute__remat": "full", "transformer__num_kv_heads": 8},
    {"compute__offload_optimizer": True},
    {"compute__offload_optimizer": True, "compute__accumulation_steps": 1, "optimizer__name": "muon"},
    {"compute__offload_optimizer": True, "compute__engine": "fused"},
    {"compute__kernel": "full"},
], ids=str)  # fmt: skip
def test_every_cut_of_the_work_gives_the_same_losses(changes, one_device):
    np.testing.assert_allclose(trace(program_for(jax.devices()[:1], **changes)), one_device, rtol=1e-5)


def test_dropout_does_not_depend_on_the_cut():
    losses = [
        trace(program_for(devices, model__dropout=0.2, compute__accumulation_steps=k, mesh__data=data))
        for devices, k, data in ((jax.devices()[:1], 1, 1), (jax.devices()[:1], 4, 1), (jax.devices(), 2, 8))
    ]
    ring = {"mesh__data": 2, "mesh__seq": 4, "mesh__seq_attention": "ring", "mesh__layout": "zigzag"}
    moved = program_for(jax.devices(), model__dropout=0.2, **ring)
    losses.append(trace(moved, layout=RowLayout("zigzag", 4)))
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)


def test_parameters_are_split_over_the_mesh_and_activations_are_constrained():
    program = program_for(jax.devices(), mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    state = program.init()
    for name, spec in (
        ("wq_DNH", (None, ("fsdp", "seq"), "tensor")),
        ("wo_DNH", (None, ("fsdp", "seq"), "tensor")),
    ):
        array = state.params["layers"]["attention"][name]
        assert array.sharding.spec[: len(spec)] == spec
        assert array.addressable_shards[0].data.size * 8 == array.size
    text = program.lower().as_text()
    assert text.count("sdy.sharding_constraint") >= 4 * program.config.model.num_layers


def test_bfloat16_computes_low_and_keeps_parameters_high():
    program = program_for(jax.devices()[:1], model__dtype="bfloat16")
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(program.abstract_state().params))
    losses = trace(program)
    np.testing.assert_allclose(losses, trace(program_for(jax.devices()[:1])), rtol=2e-2)


@pytest.mark.parametrize(
    "engine, gather",
    often(
        [("in_place", "micro_step"), *(("fused", gather) for gather in MANUAL)],
        lambda case: case != ("fused", "micro_step"),
    ),
)
def test_bfloat16_in_tiles_of_split_sequences_has_its_sums_over_devices_in_float32(engine, gather):
    """In bfloat16 they had also ended the process: XLA cannot promote such an all-reduce on the CPU."""
    mesh = {"mesh__fsdp": 2, "mesh__seq": 4, "mesh__seq_attention": "gather"}
    how = {"compute__engine": engine, "compute__gather": gather, "compute__tile": 8}
    program = program_for(jax.devices(), model__dtype="bfloat16", **mesh, **how)
    reduction = r'"stablehlo\.(?:all_reduce|reduce_scatter)".*?-> tensor<([^>]*)>'
    reduced = re.findall(reduction, program.lower().as_text(), re.S)
    weights = [shape for shape in reduced if shape.count("x") <= 3]  # keys and values have five dimensions
    assert weights and not [shape for shape in weights if shape.endswith("bf16")]
    np.testing.assert_allclose(trace(program), trace(program_for(jax.devices()[:1])), rtol=2e-2)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "schedule_free_adamw"])
def test_every_optimizer_trains_sharded(name):
    schedule = "constant" if name == "schedule_free_adamw" else "cosine"
    program = program_for(
        jax.devices(),
        mesh__data=2,
        mesh__fsdp=2,
        mesh__tensor=2,
        optimizer__name=name,
        optimizer__schedule=schedule,
        optimizer__learning_rate=3e-4 if name == "lion" else 3e-3,
    )
    losses = trace(program)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_evaluation_is_deterministic_and_leaves_z_loss_out():
    program = program_for(
        jax.devices()[:1], train__z_loss=1.0, model__dropout=0.5, compute__accumulation_steps=1
    )
    plain = program_for(jax.devices()[:1], compute__accumulation_steps=1)
    batch = Batch(**ragged_batch(np.random.default_rng(0), 16), index=np.arange(16, dtype=np.int32))
    params = plain.init().params
    sums = program.eval_step(params, batch)
    np.testing.assert_allclose(sums.loss, plain.eval_step(params, batch).loss, rtol=1e-6)
    np.testing.assert_allclose(sums.weight, batch.weights.sum(), rtol=1e-6)
    assert dataclasses.replace(sums).metrics["accuracy"] >= 0


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_of_training_is_that_of_evaluation_and_further_terms_have_their_own_names(engine):
    """What is charted together, and what spikes are measured by, is the cross-entropy alone."""
    fields = ragged_batch(np.random.default_rng(0), 16) | {"index": np.arange(16, dtype=np.int32)}
    steps, norms = {}, {}
    for z_loss in (0.0, 1.0):
        changes = {"train__z_loss": z_loss, "compute__accumulation_steps": 1, "compute__engine": engine}
        program = program_for(jax.devices()[:1], **changes)
        state, order = program.init(), program.steering.decide(program.steering.start(), 0).inputs
        held_out = program.eval_step(state.params, Batch(**fields))
        batch = {name: x[None] for name, x in fields.items()} if not program.engine.stops_within else fields
        metrics = jax.tree.map(
            lambda x: float(np.sum(x)), program.train_step(state, Batch(**batch), order)[1]
        )
        np.testing.assert_allclose(metrics["loss"], held_out.loss, rtol=1e-6)
        np.testing.assert_allclose(metrics["mean_loss"], held_out.loss / held_out.weight, rtol=1e-6)
        assert "z_loss" not in held_out.metrics
        steps[z_loss], norms[z_loss] = metrics, metrics["grad_norm"]
    assert "z_loss" not in steps[0.0] and steps[1.0]["z_loss"] > steps[1.0]["weight"]
    assert norms[1.0] > 1.5 * norms[0.0]


def test_without_dropout_training_keeps_its_terms():
    program = program_for(jax.devices()[:1], train__z_loss=1.0)
    loss = make_task_loss(program.config, program.model, program.layout, training=True)
    batch = Batch(**ragged_batch(np.random.default_rng(0), 16), index=np.arange(16, dtype=np.int32))
    sums = jax.eval_shape(lambda params: loss(params, batch, None), program.init().params)
    assert sums.objective is not None and "z_loss" in sums.metrics


def test_one_compile_serves_the_run_and_the_state_keeps_its_place():
    program = program_for(jax.devices(), mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    state = program.init()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled, counter, order = [], [], program.steering.decide(program.steering.start(), 0).inputs
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: counter.append(event))
    for update in range(3):
        batch = ragged_batch(np.random.default_rng(update), 8) | {"index": np.arange(8, dtype=np.int32)}
        batch = Batch(
            **{name: jax.device_put(x, program.placement.sharding(name)) for name, x in batch.items()}
        )
        state, _ = program.train_step(state, batch, order)
        compiled.append(counter.count("/jax/core/compile/backend_compile_duration"))
    assert compiled[0] == compiled[1] == compiled[2] > 0
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding} {s}"),
        state,
        shardings,
    )

"""Bytes that a compiled program sends and touches, against programs small enough to count by hand."""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.plan.hlo.parse import NO_TRIPS, loops, parse
from llmjax.plan.hlo.traffic import bytes_touched, collectives
from llmjax.plan.topology import topology_devices

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]
X = (128, 256)  # what each of 8 devices holds of x, float32
B = 4 * 128 * 256
RING = [(i, (i + 1) % 4) for i in range(4)]


def mesh_of(devices):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def compiled(function, devices, **options):
    """The parsed program of `function(x [128, 256] on each device, a traced integer)` under shard_map."""
    mesh = mesh_of(devices)
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(P(("x", "y")), P()), out_specs=P(("x", "y")), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * X[0], X[1]), jnp.float32, sharding=NamedSharding(mesh, P(("x", "y"))))
    n = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return parse(jax.jit(sharded).lower(x, n).compile(**options).as_text())


def reduced(x, axis):
    return jax.lax.psum(x, axis) * 0.5


KINDS = [  # (program, kind, operand bytes, result bytes, devices of a group, bytes sent)
    (lambda x, n: reduced(x, ("x", "y")), "all-reduce", B, B, 8, 2 * 7 * B // 8),
    (lambda x, n: reduced(x, "x"), "all-reduce", B, B, 4, 2 * 3 * B // 4),
    (lambda x, n: reduced(x, "y"), "all-reduce", B, B, 2, B),
    (lambda x, n: jax.lax.all_gather(x, "x", tiled=True), "all-gather", B, 4 * B, 4, 3 * B),
    (lambda x, n: jax.lax.psum_scatter(x, "y", tiled=True), "reduce-scatter", B, B // 2, 2, B // 2),
    (lambda x, n: jax.lax.ppermute(x, "x", RING), "collective-permute", B, B, 8, B),
    (lambda x, n: jax.lax.all_to_all(x, "x", 1, 0, tiled=True), "all-to-all", B, B, 4, 3 * B // 4),
]


def check_kind(devices, program, kind, operand, result, group, sent):
    (found,) = collectives(compiled(program, devices))
    assert (found.kind, found.dtype, found.group_size) == (kind, "f32", group)
    assert (found.operand_bytes, found.result_bytes, found.sent_bytes) == (operand, result, sent)
    assert (found.runs, found.within) == (1, ())


@pytest.mark.parametrize("program, kind, operand, result, group, sent", KINDS)
def test_a_collective_sends_what_its_algorithm_sends(program, kind, operand, result, group, sent):
    check_kind(jax.devices(), program, kind, operand, result, group, sent)


def in_loops(x, n):
    """Reduced over all 5 times; 3 times 4 gathers and 3 permutations; reduced over y n times."""

    def gather(x, _):
        return jnp.tanh(jax.lax.all_gather(x, "x")).sum(0), None

    def permute(x, _):
        return jax.lax.ppermute(jax.lax.scan(gather, x, None, length=4)[0], "x", RING), None

    x = jax.lax.fori_loop(0, 5, lambda i, x: reduced(x, ("x", "y")), x)
    x = jax.lax.scan(permute, x, None, length=3)[0]
    return jax.lax.fori_loop(0, n, lambda i, x: reduced(x, "y"), x)


def check_loops(module):
    counted = {(c.kind, c.group_size): (c.runs, len(c.within)) for c in collectives(module)}
    assert counted == {
        ("all-reduce", 8): (5, 0),
        ("all-gather", 4): (12, 0),
        ("collective-permute", 8): (3, 0),
        ("all-reduce", 2): (1, 1),
    }
    reduce = next(c for c in collectives(module) if c.within)
    assert reduce.times({reduce.within[0]: 7}) * reduce.sent_bytes == 7 * B
    assert reduce.within == tuple(loop.instruction.name for loop in loops(module) if loop.trips is None)


def test_collectives_in_loops_are_counted_as_often_as_they_run():
    check_loops(compiled(in_loops, jax.devices()))


def test_permuting_to_oneself_sends_nothing():
    stay = [(i, i) for i in range(4)]
    found = collectives(compiled(lambda x, n: jax.lax.ppermute(x, "x", stay), jax.devices()))
    assert sum(c.sent_bytes for c in found) == 0


GPU = """HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=8

%fused (p: f32[128,256]) -> f32[128,256] {
  %p = f32[128,256]{1,0} parameter(0)
  ROOT %sine.1 = f32[128,256]{1,0} sine(%p)
}

ENTRY %main (x: f32[128,256]) -> (f32[512,256], f32[16,256], f32[128,256]) {
  %x = f32[128,256]{1,0} parameter(0)
  %all-gather-start = (f32[128,256]{1,0}, f32[512,256]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false}}
  %loop_sine_fusion = f32[128,256]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %all-gather-done = f32[512,256]{1,0} all-gather-done(%all-gather-start)
  %after = f32[128,256]{1,0} fusion(%loop_sine_fusion), kind=kLoop, calls=%fused
  %reduce-scatter-start = ((f32[128,256]{1,0}), f32[16,256]{1,0}) reduce-scatter-start(%x), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, use_global_device_ids=true, dimensions={0}, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":true}}
  %reduce-scatter-done = f32[16,256]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = f32[128,256]{1,0} all-reduce-start(%after), channel_id=3, replica_groups={}, to_apply=%sum, backend_config={"collective_backend_config":{"is_sync":false}}
  %all-reduce-done = f32[128,256]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %tuple = (f32[512,256]{1,0}, f32[16,256]{1,0}, f32[128,256]{1,0}) tuple(%all-gather-done, %reduce-scatter-done, %all-reduce-done)
}
"""  # noqa: E501


def test_work_beside_a_collective_of_a_gpu_is_seen():
    gather, scatter, reduce = collectives(parse(GPU))
    assert (gather.asynchronous, scatter.asynchronous, reduce.asynchronous) == (True, False, True)
    assert [[ins.name for ins in c.between] for c in (gather, scatter, reduce)] == [
        ["loop_sine_fusion"],
        [],
        [],
    ]
    assert [c.group_size for c in (gather, scatter, reduce)] == [4, 8, 16]
    assert [c.sent_bytes for c in (gather, scatter, reduce)] == [3 * B, 7 * B // 8, 2 * 15 * B // 16]


def test_a_start_and_its_end_touch_memory_once():
    assert bytes_touched(parse(GPU)) == (B + 4 * B) + 2 * (B + B) + (B + B // 8) + (B + B)


NESTED = """HloModule jit_f, is_scheduled=true

%view (p: f32[128,256]) -> f32[256,128] {
  %p = f32[128,256]{1,0:T(8,128)} parameter(0)
  ROOT %bitcast = f32[256,128]{0,1:T(8,128)} bitcast(%p)
}

%fused (q: f32[128,256], r: f32[128,128]) -> f32[256,128] {
  %q = f32[128,256]{1,0:T(8,128)} parameter(0)
  %r = f32[128,128]{1,0:T(8,128)} parameter(1)
  %inner = f32[256,128]{0,1:T(8,128)} fusion(%q), kind=kLoop, calls=%view
  ROOT %convolution = f32[256,128]{1,0:T(8,128)} convolution(%inner, %r), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[128,256], y: f32[128,128]) -> f32[256,128] {
  %x = f32[128,256]{1,0:T(8,128)} parameter(0)
  %y = f32[128,128]{1,0:T(8,128)} parameter(1)
  ROOT %product = f32[256,128]{1,0:T(8,128)} fusion(%x, %y), kind=kOutput, calls=%fused
}
"""


def test_an_operand_is_read_through_a_view_that_a_fusion_makes_of_it_within():
    assert bytes_touched(parse(NESTED)) == B + B // 2 + B


def touched(function, *args, donate=(), trips=NO_TRIPS):
    text = jax.jit(function, donate_argnums=donate).lower(*args).compile().as_text()
    return bytes_touched(parse(text), trips)


N = 1 << 16
VECTOR = jax.ShapeDtypeStruct((N,), jnp.float32)
TABLE = jax.ShapeDtypeStruct((32, N), jnp.float32)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)
SCALARS = 100  # bytes of indices and the like
MEMORY = [  # (program, arguments, donated ones, bytes per element of a vector)
    (lambda a, b: a + b, (VECTOR, VECTOR), (), 12),
    (lambda a, b: jnp.sin(a + b) * a, (VECTOR, VECTOR), (), 12),
    (lambda t, i: t[i] * 2, (TABLE, INDEX), (), 8),
    (lambda t, v, i: jax.lax.dynamic_update_index_in_dim(t, v, i, 0), (TABLE, VECTOR, INDEX), (0,), 8),
    (lambda t, i: t.at[i].multiply(2), (TABLE, INDEX), (0,), 8),
    (lambda t: t * 2, (TABLE,), (), 32 * 8),
]


@pytest.mark.parametrize("function, args, donate, size", MEMORY)
def test_operands_are_read_and_results_written(function, args, donate, size):
    assert 0 <= touched(function, *args, donate=donate) - size * N < SCALARS


def test_a_loop_touches_memory_in_each_turn():
    def turn(i, t):
        return t.at[i % 32].multiply(2)

    def turns(t, n):
        return jax.lax.fori_loop(0, n, turn, t)

    none, ten = (touched(turns, TABLE, INDEX, donate=(0,), trips=trips) for trips in (0, 10))
    fixed = touched(lambda t: jax.lax.fori_loop(0, 10, turn, t), TABLE, donate=(0,))
    for touches in (ten, fixed):
        assert 0 <= touches - none - 10 * 8 * N < 10 * SCALARS


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize("program, kind, operand, result, group, sent", KINDS)
    def test_a_collective_of_a_tpu_sends_what_its_algorithm_sends(
        self, program, kind, operand, result, group, sent
    ):
        check_kind(topology_devices("v5e:2x4"), program, kind, operand, result, group, sent)

    def test_collectives_in_loops_of_a_tpu_are_counted_as_often_as_they_run(self):
        check_loops(compiled(in_loops, topology_devices("v5e:2x4")))

    def test_a_ring_of_a_tpu_runs_beside_its_matrix_products(self):
        def ring(x, n):
            def turn(carry, _):
                x, total = carry
                return (jax.lax.ppermute(x, "x", RING), total + x @ x.T @ x), None

            return jax.lax.scan(turn, (x, x), None, length=4)[0][1]

        (found,) = collectives(compiled(ring, topology_devices("v5e:2x4")))
        assert (found.kind, found.runs, found.asynchronous) == ("collective-permute", 4, True)
        assert any("dot_general" in ins.op_name for ins in found.between)

    def test_an_optimizer_of_a_tpu_touches_what_it_changes(self):
        """AdamW reads gradient, parameter and two moments and writes the last three."""
        (device, *_), optimizer = topology_devices("v5e:2x4"), optax.adamw(1e-3)
        sharding = jax.sharding.SingleDeviceSharding(device)

        def update(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = {"w": jax.ShapeDtypeStruct((8192, 8192), jnp.float32)}
        args = params, jax.eval_shape(optimizer.init, params), params
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
        assert 0 <= touched(update, *args, donate=(0, 1)) - 28 * 8192**2 < 1000

    def test_gathers_and_reductions_of_sharded_weights_are_counted_once_each(self):
        """A TPU spreads an asynchronous gather over several fusions and fuses a reduction with a slice of it."""
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=topology_devices("v5e:2x4"))
        layers, width, rows = 6, 2048, 8 * 512

        def loss(weights, x):
            def layer(x, both):
                for w in both:
                    x = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())))
                return x, None

            return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

        def shape(dims, *spec):
            return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

        weights = (shape((layers, width, width), None, None, "x"),) * 2
        step = jax.jit(jax.grad(loss), out_shardings=(weights[0].sharding,) * 2)
        found = collectives(parse(step.lower(weights, shape((rows, width), "x")).compile().as_text()))
        shard = 2 * width * width // 8
        assert sorted((c.kind, c.operand_bytes, c.sent_bytes, c.runs) for c in found) == [
            ("all-gather", shard, 7 * shard, layers),
            ("all-gather", shard, 7 * shard, layers),
            ("reduce-scatter", 8 * shard, 7 * shard, layers),
            ("reduce-scatter", 8 * shard, 7 * shard, layers),
        ]
        (beside,) = (c for c in found if c.asynchronous)
        assert any("dot_general" in ins.op_name for ins in beside.between)

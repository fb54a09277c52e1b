"""What is read from a compiled program's text is what was written in the program."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.plan.hlo.parse import Array, loops, parse, walk
from llmjax.plan.topology import topology_devices

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]


def step(i, x):
    with jax.named_scope("work"):
        return jnp.sin(x) + i


def constant_bound(x, n):
    return jax.lax.fori_loop(0, 5, step, x)


def constant_stride(x, n):
    """1, 4, ... 40: 14 turns, the bound included."""
    return jax.lax.while_loop(lambda s: s[0] <= 40, lambda s: (s[0] + 3, step(s[0], s[1])), (1, x))[1]


def downwards(x, n):
    return jax.lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 2, step(s[0], s[1])), (9, x))[1]


def traced_bound(x, n):
    return jax.lax.fori_loop(0, n, step, x)


def traced_start(x, n):
    return jax.lax.fori_loop(n, 5, step, x)


def until_small(x, n):
    return jax.lax.while_loop(lambda x: jnp.max(x) > 1e-3, lambda x: step(0.5, x), x)


def nested(x, n):
    def outer(x, row):
        return jax.lax.scan(lambda x, y: (step(y, x), None), x, row)[0], None

    return jax.lax.scan(outer, x, jnp.arange(12.0).reshape(3, 4) + n)[0]


def traced_around_constant(x, n):
    return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.fori_loop(0, 7, step, x), x)


LOOPS = [  # (program, trips of its loops from the outermost in, runs of the innermost, data-dependent loops around it)
    (constant_bound, [5], 5, 0),
    (constant_stride, [14], 14, 0),
    (downwards, [5], 5, 0),
    (traced_bound, [None], 1, 1),
    (traced_start, [None], 1, 1),
    (until_small, [None], 1, 1),
    (nested, [3, 4], 12, 0),
    (traced_around_constant, [None, 7], 7, 1),
]


def compiled(function, devices):
    """The parsed program of `function(x [16, 128] split over the devices, a traced integer)`."""
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    x = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    n = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return parse(jax.jit(function).lower(x, n).compile().as_text())


def check_loops(module, trips, runs, unknown):
    assert [loop.trips for loop in loops(module)] == trips
    sites = [site for site in walk(module) if "/work/" in site.instruction.op_name]
    assert sites, "the loop's work is not to be seen"
    for site in sites:
        assert (site.runs, len(site.within)) == (runs, unknown)
        assert site.times(10) == runs * 10**unknown
        assert site.times(dict.fromkeys(site.within, 2.5)) == runs * 2.5**unknown


@pytest.mark.parametrize("function, trips, runs, unknown", LOOPS, ids=lambda f: getattr(f, "__name__", ""))
def test_loops_run_as_often_as_they_say(function, trips, runs, unknown):
    check_loops(compiled(function, jax.devices()), trips, runs, unknown)


def test_the_callers_number_is_asked_for():
    module = compiled(traced_bound, jax.devices())
    site = next(site for site in walk(module) if site.within)
    with pytest.raises(KeyError, match=site.within[0]):
        site.times()
    assert site.within == (loops(module)[0].instruction.name,)


def test_each_branch_of_a_conditional_is_told_apart():
    def either(x, n):
        return jax.lax.switch(n, [jnp.sin, jnp.cos, lambda x: jax.lax.fori_loop(0, 6, step, x)], x)

    sites = list(walk(compiled(either, jax.devices())))
    places = {
        name: next(site for site in sites if name in site.instruction.op_name)
        for name in ("/sin", "/cos", "/work/")
    }
    assert [place.within[0][-3:] for place in places.values()] == ["[0]", "[1]", "[2]"]
    work = places["/work/"]
    assert (work.runs, work.times({work.within[0]: 0.25})) == (6, 1.5)


@pytest.mark.parametrize("shape, arrays, sizes", [
    ("f32[2,3]{1,0}", [Array("f32", (2, 3), 0)], [24]),
    ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", [Array("bf16", (8, 128), 1)], [2048]),
    ("(s4[3]{0:T(1024)(8,1)E(4)}, /*index=1*/(pred[5]{0}, u32[]), f8e4m3fn[2,2])",
     [Array("s4", (3,), 0), Array("pred", (5,), 0), Array("u32", (), 0), Array("f8e4m3fn", (2, 2), 0)], [2, 5, 4, 4]),
    ("(c64[<=4]{0}, token[])", [Array("c64", (4,), 0), Array("token", (), 0)], [32, 0]),
])  # fmt: skip
def test_shapes_are_read_with_their_layout(shape, arrays, sizes):
    text = f"HloModule m\n\nENTRY %main () -> x {{\n  ROOT %a.1 = {shape} iota(), iota_dimension=0\n}}\n"
    found = parse(text).computations["main"].instructions["a.1"].arrays
    assert (found, [array.bytes for array in found]) == (arrays, sizes)


def test_line_breaks_inside_an_instruction_do_not_end_it():
    text = """HloModule m, entry_computation_layout={(f32[8]{0:T(256)})->f32[8]{0:T(256)}}, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(256)} parameter(0)
  %kernel.1 = f32[8]{0:T(256)} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"block": "(128"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %add.1 = f32[8]{0:T(256)} add(%kernel.1, %p)
}
"""
    module = parse(text)
    kernel, root = list(module.computations["main"].instructions.values())[1:]
    assert (kernel.opcode, kernel.operands, kernel.op_name) == ("custom-call", ("p",), "jit(f)/kernel")
    assert (root.name, root.operands) == (module.computations["main"].root, ("kernel.1", "p"))
    assert (module.num_devices, module.main_spaces) == (4, (0,))


def test_constants_reach_a_loop_through_the_loop_around_it():
    """A TPU program carries constants through its loops; a bound that stays the same in each turn is one."""
    text = """HloModule m

%inner_body (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

%inner_condition (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer_body (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %zero = s32[] constant(0)
  %start = (s32[], s32[]) tuple(%zero, %n)
  %inner = (s32[], s32[]) while(%start), condition=%inner_condition, body=%inner_body
  %m = s32[] get-tuple-element(%inner), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], s32[]) tuple(%next, BOUND)
}

%outer_condition (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %ten), direction=LT
}

ENTRY %main () -> (s32[], s32[]) {
  %zero = s32[] constant(0)
  %n = s32[] constant(3)
  %start = (s32[], s32[]) tuple(%zero, %n)
  ROOT %outer = (s32[], s32[]) while(%start), condition=%outer_condition, body=%outer_body
}
"""
    assert [loop.trips for loop in loops(parse(text.replace("BOUND", "%n")))] == [5, 3]
    assert [loop.trips for loop in loops(parse(text.replace("BOUND", "%next")))] == [5, None]


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize(
        "function, trips, runs, unknown", LOOPS, ids=lambda f: getattr(f, "__name__", "")
    )
    def test_loops_of_a_tpu_program_run_as_often_as_they_say(self, function, trips, runs, unknown):
        module = compiled(function, topology_devices("v5e:2x4"))
        assert (module.num_devices, module.main_spaces) == (8, (0,))
        check_loops(module, trips, runs, unknown)

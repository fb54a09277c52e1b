"""No sum over tokens is kept in less than float32: shown on the jaxpr of the whole train step of every preset.

A bfloat16 number has 8 bits: 256 + 1 is 256, and a sum of 65,536 ones, one after the other, is 256. What is allowed is
a matrix product of bfloat16 numbers over the tokens whose result is rounded once: the units that multiply bfloat16
numbers add up in float32, and so does XLA on the CPU.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.models.table import FAMILIES
from llmjax.nn.layers import add_bias

PRESETS = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem != "__init__")
# Only tokens have sizes that 7 or 13 divide, the whole batch as well as the part of a device.
ROWS, LENGTH = 7 * 8, 13 * 8
SIZES = {
    "model.num_layers": 3, "model.model_dim": 32, "transformer.num_heads": 8, "transformer.num_kv_heads": 8,
    "transformer.head_dim": 8,
    "transformer.mlp_dim": 48, "model.dtype": "bfloat16", "data.seq_len": LENGTH, "compute.micro_batch_size": ROWS,
    "train.tokens_per_update": 2 * ROWS * LENGTH, "compute.accumulation_steps": 0, "plan.topology": "",
}  # fmt: skip
MESHES = {
    "extend_llama_8b": {"mesh.fsdp": 4, "mesh.tensor": 2},
    "llama3_8b_long": {"mesh.fsdp": 4, "mesh.seq": 2, "compute.tile": 26},
}
V = 96
VOCABULARY = Vocabulary(V - 1, np.arange(V) % (V - 1) > 0, np.arange(V) % 3 > 0)
BIAS = {
    "transformer.use_bias": True,
    "transformer.norm": "layernorm",
    "transformer.attention_sinks": True,
    "model.dropout": 0.1,
}
LEARNED = {
    "transformer.position": "learned", "transformer.use_bias": True, "model.logit_softcap": 5.0,
    "transformer.attention_softcap": 3.0,
    "model.tie_embeddings": False, "train.z_loss": 1e-3,
}  # fmt: skip
FUSED = {
    "compute.engine": "fused",
    "transformer.use_bias": True,
    "transformer.activation": "gelu",
    "transformer.qk_norm": True,
}


def step_jaxpr(preset, changes):
    raw = importlib.import_module(f"configs.{preset}").get_config()
    family = FAMILIES[raw.model.family]
    # Changes of sections that the family does not read would be refused.
    changes = {
        key: value
        for key, value in (SIZES | MESHES.get(preset, {}) | changes).items()
        if "transformer" in family.sections or not key.startswith("transformer.")
    }
    raw.update_from_flattened_dict(changes)
    config, derived = resolve_config(read_config(raw.to_dict()), 8)
    program = make_program(config, derived, V, jax.devices(), vocabulary=lambda: VOCABULARY)
    arguments = program.abstract_state(), program.placement.abstract_batch(), program.abstract_inputs()
    return jax.make_jaxpr(program.train_step)(*arguments).jaxpr


def equations(jaxpr):
    """Those of a jaxpr and of all jaxprs in it: of loops, branches, checkpoints, derivatives, parts of a mesh."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from equations(value)


def is_low(variable):
    dtype = variable.aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def tokens(sizes):
    return [size for size in sizes if size % 7 == 0 or size % 13 == 0]


def sums_over_tokens(jaxpr):
    """The equations that add up over tokens, with whether they do it in less than float32."""
    for equation in equations(jaxpr):
        name, inputs = equation.primitive.name, equation.invars
        if name in ("reduce_sum", "cumsum", "cumlogsumexp", "reduce_prod", "argmax"):
            axes = equation.params.get("axes", (equation.params.get("axis"),))
            if tokens(inputs[0].aval.shape[axis] for axis in axes):
                yield equation, is_low(inputs[0])
        elif name in ("scatter-add", "scatter_add"):
            if tokens(inputs[2].aval.shape) and not tokens(inputs[0].aval.shape):
                yield equation, is_low(inputs[0])
        elif name in ("reduce_window_sum", "reduce", "reduce_window"):
            yield equation, is_low(inputs[0])
        elif name in ("psum", "psum_invariant", "reduce_scatter"):
            yield equation, any(is_low(x) for x in inputs)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            if tokens(inputs[0].aval.shape[axis] for axis in contracted):
                yield equation, False
        elif name in ("scan", "while"):
            yield equation, any(low_totals(equation))


def scan_counts(params):
    """How many constants and how many carried values the body of a scan takes."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # jax 0.12: a tree of None for the constants, one for what is carried, and one for what is scanned over.
    trees = [params["ft_in"][i] for i in range(2)]
    return tuple(len(jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)) for tree in trees)


def low_totals(equation):
    """Of a loop, whether each value handed from turn to turn is a sum without tokens in less than float32."""
    body = equation.params["jaxpr" if equation.primitive.name == "scan" else "body_jaxpr"].jaxpr
    if equation.primitive.name == "scan":
        first, count = scan_counts(equation.params)
    else:
        first = equation.params["body_nconsts"]
        count = len(body.outvars)
    for before, after in zip(body.invars[first : first + count], body.outvars[:count], strict=True):
        yield before is not after and is_low(before) and not tokens(before.aval.shape)


def check(jaxpr):
    found = list(sums_over_tokens(jaxpr))
    assert len(found) > 20  # the walk finds the sums there are
    low = [
        f"{e.primitive.name} of {[str(v.aval) for v in e.invars]}\n{e.source_info.traceback}"
        for e, low in found
        if low
    ]
    assert not low, "\n".join(low)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_sums_over_tokens_below_float32(preset):
    check(step_jaxpr(preset, BIAS))


@pytest.mark.parametrize(
    "changes",
    [BIAS, pytest.param(LEARNED, marks=pytest.mark.slow), pytest.param(FUSED, marks=pytest.mark.slow)],
)
def test_no_parameter_there_is_gets_a_gradient_that_was_summed_below_float32(changes):
    check(step_jaxpr("gpt2_124m", changes))


@pytest.mark.parametrize("low", [True, False])
def test_the_walk_finds_sums_wherever_they_are(low):
    """In loops, checkpoints and derivatives; of lookups, of broadcasts, and of totals that a loop carries."""
    dtype = jnp.bfloat16 if low else jnp.float32
    x, table, bias = (jnp.ones(shape, dtype) for shape in ((7, 13, 2), (5, 2), (2,)))
    rows = jnp.zeros((7, 13), jnp.int32)

    def layer(x, bias):
        return jax.checkpoint(lambda x, bias: jnp.sin(x + bias[None, None]))(x, bias)

    def lookup(table):
        return table[rows]

    functions = {
        "reduce_sum": jax.grad(
            lambda bias: jnp.float32(jax.lax.fori_loop(0, 2, lambda i, x: layer(x, bias), x)[0, 0, 0])
        ),
        "scatter-add": lambda table: jax.vjp(lookup, table)[1](x)[0],
        "scan": lambda bias: jax.lax.scan(lambda total, x: (total + x, None), bias, x.reshape(91, 2))[0],
        "while": lambda bias: jax.lax.fori_loop(
            0, bias[0].astype(jnp.int32), lambda i, total: total + x.reshape(91, 2)[i], bias
        ),
    }
    for name, function in functions.items():
        jaxpr = jax.make_jaxpr(function)(table if name == "scatter-add" else bias).jaxpr
        found = {e.primitive.name: is_low for e, is_low in sums_over_tokens(jaxpr) if is_low or not low}
        assert found.get(name) is low, name


@pytest.mark.parametrize("value", [1.0, 1 / 3])
def test_the_gradient_of_a_bias_is_the_float32_sum(value):
    T = 65_536
    x, bias = jnp.zeros((1, T, 1), jnp.bfloat16), jnp.zeros((1,))
    pull = jax.jit(lambda bias, ct: jax.vjp(lambda b: add_bias(x, b), bias)[1](ct)[0])
    ct = jnp.full(x.shape, value, jnp.bfloat16)
    np.testing.assert_allclose(pull(bias, ct), T * float(ct[0, 0, 0]), rtol=1e-6)

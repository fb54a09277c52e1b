"""What the TPU compiler makes of the loss of a large vocabulary: little memory, and no product more than needed."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sections import block_section, mesh_section

from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.ops.attention import blockwise
from llmjax.ops.losses.cross_entropy import softmax_cross_entropy
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout, partition_spec
from llmjax.plan.hlo.flops import product_flops
from llmjax.plan.hlo.parse import parse
from llmjax.plan.hlo.traffic import collectives
from llmjax.plan.topology import topology_devices
from llmjax.tasks.contract import Setting
from llmjax.tasks.language_model import LanguageModel
from llmjax.types import Batch, Head

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]
TOKENS, V, D = 16384, 128256, 4096  # of each device; Llama 3's vocabulary and width
PRODUCT = 2 * TOKENS * V * D
MIB = 2**20


def compiled(rows=1, softcap=0.0, z_loss=0.0, **sizes):
    """Loss and gradients of TOKENS tokens a device, in `rows` rows."""
    mesh = make_mesh(
        mesh_section(**{"data": 1, **sizes}), topology_devices("v5p:2x2x1")[: max(sizes.values(), default=1)]
    )
    batch, seq, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["seq"], mesh.shape["tensor"]
    B, T = rows * batch, TOKENS // rows * seq

    def abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def loss(hidden_BTD, w_VD, targets_BT, weights_BT):
        shards = {"shards": (batch, seq), "vocab_shards": tensor}
        head = Head(w_VD, softcap=softcap)
        return softmax_cross_entropy(hidden_BTD, head, targets_BT, weights_BT, z_loss=z_loss, **shards).loss

    data = ("data", "fsdp")
    arguments = (
        abstract((B, T, D), jnp.bfloat16, data, "seq", None),
        abstract((V, D), jnp.float32, "tensor", None),
        abstract((B, T), jnp.int32, data, "seq"),
        abstract((B, T), jnp.float32, data, "seq"),
    )
    shardings = None, tuple(x.sharding for x in arguments[:2])
    return jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=shardings).lower(*arguments).compile()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("settings", [{}, {"softcap": 30.0, "z_loss": 1e-4}], ids=["plain", "capped"])
def test_a_large_vocabulary_needs_300_mib_and_the_three_products_of_all_logits_at_once(rows, settings):
    program = compiled(rows, **settings)
    assert program.memory_analysis().temp_size_in_bytes <= 300 * MIB
    assert product_flops(parse(program.as_text())) <= 1.01 * 3 * PRODUCT


@pytest.mark.parametrize("axis", ["data", "seq"])
def test_split_tokens_need_no_more_and_reduce_the_gradient_once(axis):
    program = compiled(4, **{axis: 4})
    assert program.memory_analysis().temp_size_in_bytes <= 300 * MIB
    large = [c for c in collectives(parse(program.as_text())) if c.operand_bytes > MIB]
    assert [(c.kind, c.dtype, c.operand_bytes, c.runs) for c in large] == [
        ("all-reduce", "f32", 4 * V * D, 1)
    ]


def test_a_split_vocabulary_needs_less_and_sums_the_gradient_of_hidden_states_only():
    program = compiled(tensor=4)
    assert program.memory_analysis().temp_size_in_bytes <= 150 * MIB
    module = parse(program.as_text())
    assert product_flops(module) <= 1.01 * 3 * PRODUCT / 4
    large = [c for c in collectives(module) if c.operand_bytes > MIB]
    assert sum(c.operand_bytes * c.runs for c in large) == 2 * TOKENS * D


def test_an_unembedding_split_over_fsdp_is_brought_together_once_for_all_chunks():
    vocab, width, rows, length = 2048, 256, 8, 4096
    mesh = make_mesh(mesh_section(data=1, fsdp=8), topology_devices("v5e:2x4"))
    sizes = {"num_layers": 1, "model_dim": width, "num_heads": 2, "mlp_dim": 512, "tie_embeddings": False}
    config = resolve(block_section(**sizes, dtype="bfloat16"))
    model = GPT(config, vocab, length, Layout(mesh), blockwise.attend)
    loss = LanguageModel().make_loss(model, Setting(shards=(8, 1)))

    def abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    def field(name):
        shape = (rows,) if name == "index" else (rows, length)
        return abstract(shape, jnp.float32 if name == "weights" else jnp.int32, ("data", "fsdp"))

    specs = jax.tree.map(partition_spec, model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x, spec: abstract(x.shape, x.dtype, *spec), shapes, specs)
    batch = Batch(**{f.name: field(f.name) for f in dataclasses.fields(Batch) if f.name != "columns"})
    program = jax.jit(jax.grad(lambda p, b: loss(p, b, None).loss)).lower(params, batch).compile()
    gathers = [c for c in collectives(parse(program.as_text())) if c.kind == "all-gather"]
    of_tables = [(c.dtype, c.runs) for c in gathers if c.result_bytes == 2 * vocab * width]
    assert of_tables == 2 * [("bf16", 1)]  # the embedding's too

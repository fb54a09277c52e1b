"""The encoder-decoder of "Attention Is All You Need" equals the layers of that paper in PyTorch, gradients included."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.logits import head_logits
from llmjax.ops.rope import sinusoid
from llmjax.types import Batch

pytestmark = pytest.mark.interop

ORIGINAL = {"transformer__activation": "relu", "model__init_std": 0.2}
D, SOURCE, TARGET = 16, (18, 11), (13, 24)


def batch_of(rng):
    """Two documents in rows of their own, of which each has padding on one side."""

    def padded(lengths, width):
        real = np.arange(width)[None] < np.array(lengths)[:, None]
        return np.where(real, rng.integers(1, families.V, real.shape), 0).astype(np.int32), real.astype(
            np.int32
        )

    (tokens, segments), (source, source_segments) = padded(TARGET, 24), padded(SOURCE, 18)
    places = [np.arange(n, dtype=np.int32)[None] for n in (24, 18)]
    return Batch(
        tokens, tokens, segments.astype(np.float32), segments, places[0] * segments, np.arange(2, dtype=np.int32),
        source_tokens=source, source_segments=source_segments, source_positions=places[1] * source_segments,
    )  # fmt: skip


def load(torch, layer, params, i, attentions, norms):
    """Gives a layer of PyTorch the parameters of layer `i`."""

    def put(parameter, value):
        parameter.data = torch.tensor(np.array(value), requires_grad=True)

    for theirs, ours in attentions.items():
        own, attention = params[ours], getattr(layer, theirs)
        matrices = [own[f"w{x}"][i].reshape(D, -1).T for x in ("q_DNH", "k_DKH", "v_DKH")]
        put(attention.in_proj_weight, np.concatenate(matrices))
        put(attention.in_proj_bias, np.concatenate([own[f"{x}_bias"][i].reshape(-1) for x in "qkv"]))
        put(attention.out_proj.weight, own["wo_DNH"][i].reshape(D, -1))
        put(attention.out_proj.bias, own["out_bias"][i])
    put(layer.linear1.weight, params["mlp"]["w_up_DF"][i].T)
    put(layer.linear1.bias, params["mlp"]["up_bias"][i])
    put(layer.linear2.weight, params["mlp"]["w_down_DF"][i])
    put(layer.linear2.bias, params["mlp"]["down_bias"][i])
    for theirs, ours in norms.items():
        put(getattr(layer, theirs).weight, params[ours]["scale"][i])
        put(getattr(layer, theirs).bias, params[ours]["bias"][i])
    return layer


def test_the_original_form_equals_pytorch_with_gradients():
    torch = pytest.importorskip("torch")
    model = families.make("encoder_decoder original", **ORIGINAL)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten([x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    batch = batch_of(rng)
    seed = rng.normal(size=(2, 24, families.V)).astype(np.float32) * batch.weights[..., None]

    def score(params):
        logits = head_logits(model.apply(params, batch).hidden_BTD, model.head(params))
        return jnp.sum(logits * seed), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(score, has_aux=True))(params)

    options = {"nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "layer_norm_eps": 1e-6}
    p = jax.tree.map(np.asarray, params)
    encoder = [
        load(torch, torch.nn.TransformerEncoderLayer(D, **options), p["encoder"], i, {"self_attn": "attention"},
             {"norm1": "attention_sum_norm", "norm2": "mlp_sum_norm"})
        for i in range(3)
    ]  # fmt: skip
    decoder = [
        load(torch, torch.nn.TransformerDecoderLayer(D, **options), p["layers"], i,
             {"self_attn": "attention", "multihead_attn": "source_attention"},
             {"norm1": "attention_sum_norm", "norm2": "source_sum_norm", "norm3": "mlp_sum_norm"})
        for i in range(2)
    ]  # fmt: skip
    table = torch.tensor(p["embedding"]["embedding_VD"], requires_grad=True)

    def embed(tokens, positions):
        waves = torch.tensor(np.asarray(sinusoid(jnp.asarray(positions), D)))
        return table[torch.tensor(tokens).long()] * D**0.5 + waves

    hidden = torch.tensor(batch.source_segments == 0)
    read, written = (
        embed(batch.source_tokens, batch.source_positions), embed(batch.tokens, batch.positions)
    )  # fmt: skip
    for layer in encoder:
        read = layer.train()(read, src_key_padding_mask=hidden)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(24)
    for layer in decoder:
        written = layer.train()(written, read, tgt_mask=causal, memory_key_padding_mask=hidden)
    expected = written @ table.T
    (expected * torch.tensor(seed)).sum().backward()

    real = batch.weights[..., None] > 0
    np.testing.assert_allclose(
        np.where(real, logits, 0), np.where(real, expected.detach().numpy(), 0), rtol=1e-4, atol=1e-4
    )
    close = {"rtol": 1e-3, "atol": 2e-3}
    np.testing.assert_allclose(gradients["embedding"]["embedding_VD"], table.grad.numpy(), **close)
    for i, layer in enumerate(encoder):
        theirs = layer.self_attn.in_proj_weight.grad.numpy()[:D].T
        np.testing.assert_allclose(
            gradients["encoder"]["attention"]["wq_DNH"][i].reshape(D, D), theirs, **close
        )
    for i, layer in enumerate(decoder):
        theirs = layer.multihead_attn.in_proj_weight.grad.numpy()[D : 2 * D].T
        ours = gradients["layers"]["source_attention"]["wk_DKH"][i].reshape(D, D)
        np.testing.assert_allclose(ours, theirs, **close)

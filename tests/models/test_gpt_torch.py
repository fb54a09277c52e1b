"""The GPT-2 shape against the same model written in PyTorch: one set of weights, equal logits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gpt import VARIANTS, init, make_gpt

from llmjax.ops.logits import head_logits
from llmjax.types import Batch

pytestmark = pytest.mark.interop


def test_gpt2_equals_pytorch_with_gradients():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    config = dataclasses.replace(VARIANTS["gpt2"], num_kv_heads=0)
    gpt = make_gpt(config)
    params = init(gpt)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, gpt.vocab_size, (2, 24)).astype(np.int32)
    seed = rng.normal(size=(2, 24, gpt.vocab_size)).astype(np.float32)

    def score(params):
        ones, index = np.ones((2, 24), np.int32), np.tile(np.arange(24, dtype=np.int32), (2, 1))
        batch = Batch(tokens, tokens, ones.astype(np.float32), ones, index, np.arange(2, dtype=np.int32))
        logits = head_logits(gpt.apply(params, batch).hidden_BTD, gpt.head(params))
        return jnp.sum(logits * seed), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(score, has_aux=True))(params)

    p = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), params)

    def norm(x, weights, i=...):
        return F.layer_norm(x, x.shape[-1:], weights["scale"][i], weights["bias"][i], config.norm_eps)

    x = p["embedding"]["embedding_VD"][tokens.astype(np.int64)] + p["embedding"]["positions_TD"][:24]
    for i in range(config.num_layers):
        a, m = p["layers"]["attention"], p["layers"]["mlp"]
        y = norm(x, p["layers"]["attention_norm"], i)
        q, k, v = (
            torch.einsum("btd,dnh->bnth", y, a[w][i]) + a[b][i][:, None]
            for w, b in (("wq_DNH", "q_bias"), ("wk_DKH", "k_bias"), ("wv_DKH", "v_bias"))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + torch.einsum("bnth,dnh->btd", y, a["wo_DNH"][i]) + a["out_bias"][i]
        y = F.gelu(
            norm(x, p["layers"]["mlp_norm"], i) @ m["w_up_DF"][i] + m["up_bias"][i], approximate="tanh"
        )
        x = x + y @ m["w_down_DF"][i].T + m["down_bias"][i]
    expected = norm(x, p["final_norm"]) @ p["embedding"]["embedding_VD"].T
    (expected * torch.tensor(seed)).sum().backward()

    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-4),
        gradients,
        p,
    )

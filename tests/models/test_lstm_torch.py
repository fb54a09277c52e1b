"""The recurrent family against torch.nn.LSTM: one set of weights, equal logits and gradients."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import T, V

from llmjax.ops.logits import head_logits
from llmjax.types import Batch

pytestmark = pytest.mark.interop


def test_it_equals_pytorch_with_gradients():
    torch = pytest.importorskip("torch")
    model = families.make("lstm projected", lstm__truncation=0, model__logit_softcap=0.0)
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (2, T)).astype(np.int32)
    seed = rng.normal(size=(2, T, V)).astype(np.float32)
    ones, index = np.ones((2, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (2, 1))
    batch = Batch(tokens, tokens, ones.astype(np.float32), ones, index, np.arange(2, dtype=np.int32))

    def score(params):
        logits = head_logits(model.apply(params, batch).hidden_BTD, model.head(params))
        return jnp.sum(logits * seed), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(score, has_aux=True))(params)

    D, M = model.config.model_dim, model.config.hidden_dim
    network = torch.nn.LSTM(D, M, model.config.num_layers, batch_first=True)

    def torch_of(x):
        return torch.tensor(np.asarray(x))

    def rows(w_4IM):
        """[4, I, M] as PyTorch has it: [4 M, I], in the same order of the gates."""
        return np.asarray(w_4IM).swapaxes(1, 2).reshape(4 * M, -1)

    layers = [params[f"layer_{n:03d}"] for n in range(model.config.num_layers)]
    with torch.no_grad():
        for n, layer in enumerate(layers):
            getattr(network, f"weight_ih_l{n}").copy_(torch_of(rows(layer["w_input_4IM"])))
            getattr(network, f"weight_hh_l{n}").copy_(torch_of(rows(layer["w_recurrent_4RM"])))
            # PyTorch has two biases, of which the sum is added.
            getattr(network, f"bias_ih_l{n}").copy_(torch_of(layer["bias_4M"].reshape(-1)))
            getattr(network, f"bias_hh_l{n}").zero_()
    table = torch_of(params["embedding"]["embedding_VD"]).requires_grad_()
    projection = torch_of(params["projection"]["w_MD"]).requires_grad_()
    hidden, _ = network(table[torch.tensor(tokens, dtype=torch.long)])
    theirs = hidden @ projection @ table.T
    (theirs * torch_of(seed)).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(logits, theirs.detach().numpy(), **close)
    np.testing.assert_allclose(gradients["embedding"]["embedding_VD"], table.grad.numpy(), **close)
    np.testing.assert_allclose(gradients["projection"]["w_MD"], projection.grad.numpy(), **close)
    for n in range(model.config.num_layers):
        ours = gradients[f"layer_{n:03d}"]
        for name, its in (("w_input_4IM", "ih"), ("w_recurrent_4RM", "hh")):
            np.testing.assert_allclose(
                rows(ours[name]), getattr(network, f"weight_{its}_l{n}").grad.numpy(), **close
            )
        np.testing.assert_allclose(
            ours["bias_4M"].reshape(-1), getattr(network, f"bias_hh_l{n}").grad.numpy(), **close
        )

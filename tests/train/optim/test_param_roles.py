"""Blocks: which leaves belong together, by name, and the norms of each."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.train.optim.param_roles import block_norms, dimension_letters, layer_dims


@pytest.mark.parametrize(
    ("name", "letters"), [("wq_DNH", "DNH"), ("w_down_DF", "DF"), ("scale", ""), ("q_bias", ""), ("W", "W")]
)
def test_letters_are_the_capitals_at_the_end(name, letters):
    assert dimension_letters(name) == letters


def test_a_vector_follows_the_matrices_beside_it():
    def bias(*shape):
        return {"q_bias": jnp.ones(shape)}

    assert layer_dims("layers", {"wq_DNH": jnp.ones((3, 4, 2, 5)), **bias(3, 2, 5)}) == 1
    assert layer_dims("layer", {"wq_DNH": jnp.ones((4, 2, 5)), **bias(2, 5)}) == 0
    assert layer_dims("final_norm", {"scale": jnp.ones(4), "bias": jnp.ones(4)}) == 0


def test_norms_are_over_all_leaves_of_a_layer():
    rng = np.random.default_rng(0)
    tree = {
        "embedding": {"embedding_VD": rng.normal(size=(7, 4))},
        "layers": {
            "mlp": {"w_up_DF": rng.normal(size=(3, 4, 6))},
            "norm": {"scale": rng.normal(size=(3, 4))},
        },
    }
    norms = block_norms(tree)
    expected = [
        np.sqrt(
            np.sum(tree["layers"]["mlp"]["w_up_DF"][i] ** 2) + np.sum(tree["layers"]["norm"]["scale"][i] ** 2)
        )
        for i in range(3)
    ]
    np.testing.assert_allclose(norms["layers"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        norms["embedding"], np.linalg.norm(tree["embedding"]["embedding_VD"]), rtol=1e-6
    )


def test_names_that_disagree_about_layers_are_refused():
    with pytest.raises(ValueError, match="layers"):
        layer_dims("layers", {"w_up_DF": jnp.ones((2, 3, 4)), "w_down_DF": jnp.ones((3, 4))})

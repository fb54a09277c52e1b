"""What a parameter is follows from its axes: sides of a matrix, tables, vectors, layers, and the norms of blocks."""

import jax
import numpy as np
import pytest
from sections import block_section

from llmjax.errors import UserError
from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.parallel.rules import RULES
from llmjax.train.optim.param_roles import Role, Roles


def test_a_matrix_has_two_sides_whatever_the_width_of_its_heads_and_the_number_of_its_copies():
    assert Role.of(("embed", "heads", "head_dim")).sides == ((0,), (1, 2))
    assert Role.of(("layers", "embed", "kv_heads", "head_dim")).sides == ((1,), (2, 3))
    assert Role.of(("layers", "residual", "heads_in", "head_dim_in")).sides == ((1,), (2, 3))
    assert Role.of(("layers", "residual", "heads_in", "head_dim_in")).inputs == (2, 3)
    assert Role.of(("mlp_in", "residual")).sides == ((0,), (1,))
    with pytest.raises(ValueError, match="two sides"):
        _ = Role.of(("heads", "embed", "head_dim")).sides
    with pytest.raises(ValueError, match="layers must come first"):
        Role.of(("embed", "layers"))


def test_tables_and_the_output_head_are_no_matrices_of_the_inside_and_vectors_are_no_matrices():
    for axes in (("vocab", "embed"), ("positions", "embed"), ("classes", "embed")):
        role = Role.of(axes)
        assert role.sides == ((0,), (1,)) and not role.is_hidden_matrix and not role.is_vector
        assert role.is_table == (axes[0] != "classes")
    for axes in (("feature",), ("layers", "heads", "head_dim"), ("mlp",)):
        assert Role.of(axes).is_vector and Role.of(axes).sides == ((), ())


@pytest.mark.parametrize("axes", [("embed", "petals"), ("batch", "embed"), ("length",)])
def test_an_axis_that_no_rule_knows_for_parameters_is_refused(axes):
    with pytest.raises(UserError, match="logical axis"):
        Role.of(axes)
    with pytest.raises(UserError, match="logical axis"):
        Roles({"layers": {"w": axes}})


def test_every_axis_of_the_table_is_of_activations_or_has_a_side_that_a_role_knows():
    for name, axis in RULES.items():
        if axis.side:
            assert name in Role.of((name,)).axes
        else:
            assert name in ("batch", "length", "source_length")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_gpts_roles_are_those_of_its_parameters(scan_layers):
    """Its matrices, tables and vectors by name, as whoever wrote the model would list them."""
    config = block_section(
        num_layers=2, model_dim=8, num_heads=2, position="learned", norm="layernorm", use_bias=True,
        tie_embeddings=False, attention_sinks=True,
    )  # fmt: skip
    model = GPT(resolve(config), 16, 4, compute=LayerCompute(scan_layers=scan_layers))
    names = {"vector": set(), "table": set(), "matrix": set(), "head": set()}

    def sort(path, axes):
        role, name = Role.of(axes), path[-1].key
        kind = "vector" if role.is_vector else "table" if role.is_table else "matrix"
        names[kind if kind != "matrix" or role.is_hidden_matrix else "head"].add(name)

    jax.tree_util.tree_map_with_path(sort, model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    assert names["table"] == {"embedding_VD", "positions_TD"} and names["head"] == {"unembedding_VD"}
    matrices = {"wq_DNH", "wk_DKH", "wv_DKH", "wo_DNH", "w_up_DF", "w_gate_DF", "w_down_DF"}
    assert names["matrix"] == matrices
    assert all(name.endswith(("scale", "bias")) for name in names["vector"])
    assert "sink_bias" in names["vector"]


def test_norms_are_over_all_leaves_of_a_layer():
    rng = np.random.default_rng(0)
    roles = Roles(
        {
            "embedding": {"table": ("vocab", "embed")},
            "layers": {"mlp": {"up": ("layers", "embed", "mlp")}, "norm": {"scale": ("layers", "feature")}},
        }
    )
    tree = {
        "embedding": {"table": rng.normal(size=(7, 4))},
        "layers": {"mlp": {"up": rng.normal(size=(3, 4, 6))}, "norm": {"scale": rng.normal(size=(3, 4))}},
    }
    norms = roles.block_norms(tree)
    up, scale = tree["layers"]["mlp"]["up"], tree["layers"]["norm"]["scale"]
    expected = [np.sqrt(np.sum(up[i] ** 2) + np.sum(scale[i] ** 2)) for i in range(3)]
    np.testing.assert_allclose(norms["layers"], expected, rtol=1e-6)
    np.testing.assert_allclose(norms["embedding"], np.linalg.norm(tree["embedding"]["table"]), rtol=1e-6)
    assert roles.stacked(tree) == ["layers"]


def test_an_entry_that_is_stacked_over_layers_in_part_is_refused():
    roles = Roles({"layers": {"up": ("layers", "embed", "mlp"), "down": ("mlp_in", "residual")}})
    with pytest.raises(ValueError, match="stacked over layers"):
        roles.block_norms({"layers": {"up": np.ones((2, 3, 4)), "down": np.ones((3, 4))}})

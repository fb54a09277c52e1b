"""Roles of parameters for tests without a model: the letters at the end of a parameter's name say its axes."""

from llmjax.train.optim.param_roles import Role, Roles

# Dimension letter -> logical axis.
AXES = {
    "D": "embed", "F": "mlp", "N": "heads", "K": "kv_heads", "H": "head_dim", "V": "vocab", "T": "positions",
}  # fmt: skip
# Logical axis -> its name in the matrices that write to the residual stream.
WRITING = {"embed": "residual", "mlp": "mlp_in", "heads": "heads_in", "head_dim": "head_dim_in"}
# The number of dimensions of a bias in one layer. Other parameters without letters have one.
BIASES = {"q_bias": 2, "k_bias": 2, "v_bias": 2}


def axes_of(name: str, ndim: int) -> tuple[str, ...]:
    """The logical axes of a parameter with `ndim` dimensions. Leading dimensions without a letter are layers."""
    end = name.rsplit("_", 1)[-1]
    axes = [AXES[letter] for letter in end] if end.isupper() else ["feature"] * BIASES.get(name, 1)
    if name.startswith(("wo_", "w_down_")):
        axes = [WRITING[axis] for axis in axes]
    axes = axes[:ndim] if not end.isupper() else axes
    return (*["layers"] * (ndim - len(axes)), *axes)


class RolesByName(Roles):
    """The roles of all parameters in any tree whose names end in dimension letters."""

    def __init__(self) -> None:
        super().__init__({})

    def role(self, path, leaf) -> Role:
        return Role.of(axes_of(str(path[-1].key), leaf.ndim))


BY_NAME = RolesByName()

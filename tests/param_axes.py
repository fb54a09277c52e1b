"""Roles of parameters in tests that have no model: read from the letters at the end of a parameter's name."""

from llmjax.train.optim.param_roles import Role, Roles

AXES = {
    "D": "embed", "F": "mlp", "N": "heads", "K": "kv_heads", "H": "head_dim", "V": "vocab", "T": "positions",
}  # fmt: skip
# The same in matrices that write to the residual stream.
WRITING = {"embed": "residual", "mlp": "mlp_in", "heads": "heads_in", "head_dim": "head_dim_in"}
BIASES = {"q_bias": 2, "k_bias": 2, "v_bias": 2}  # dimensions of one layer; others have one


def axes_of(name: str, ndim: int) -> tuple[str, ...]:
    """The logical axes of a parameter; its leading dimensions, which have no letters, are layers."""
    end = name.rsplit("_", 1)[-1]
    axes = [AXES[letter] for letter in end] if end.isupper() else ["feature"] * BIASES.get(name, 1)
    if name.startswith(("wo_", "w_down_")):
        axes = [WRITING[axis] for axis in axes]
    axes = axes[:ndim] if not end.isupper() else axes
    return (*["layers"] * (ndim - len(axes)), *axes)


class RolesByName(Roles):
    """Those of any tree of parameters whose names have letters."""

    def __init__(self) -> None:
        super().__init__({})

    def role(self, path, leaf) -> Role:
        return Role.of(axes_of(str(path[-1].key), leaf.ndim))


BY_NAME = RolesByName()

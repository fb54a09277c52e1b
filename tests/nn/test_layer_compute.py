"""What a model is told of how its layers are computed: every name is known, and offloads fit what remat keeps."""

import pytest

from llmjax.errors import UserError
from llmjax.nn.layer_compute import LayerCompute


@pytest.mark.parametrize("changes, message", [
    ({"remat": "some"}, "compute.remat='some' is not known; use one of none, "),
    ({"kernel": "flash"}, "compute.kernel='flash' is not known; use one of auto, "),
    ({"offload": ("everything",)}, "compute.offload has 'everything', which is not known; use some of residual"),
    ({"offload": ("residual",)}, "compute.remat='none' does not keep; use compute.remat=attention or full"),
    ({"offload": ("attention",), "remat": "full"}, "'full' does not keep; use compute.remat=attention"),
])  # fmt: skip
def test_what_is_not_known_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        LayerCompute(**changes)


def test_what_remat_keeps_can_lie_on_the_host():
    LayerCompute(offload=("residual", "attention"), remat="attention")
    LayerCompute(offload=("residual",), remat="full")

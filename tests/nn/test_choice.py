"""The attention that a config gets, and one sentence where there is none."""

import dataclasses

import pytest

from llmjax.errors import UserError
from llmjax.nn.choice import choose_kernel
from llmjax.nn.config import ModelConfig, resolve
from llmjax.ops.attention.spread import KERNELS


@pytest.mark.parametrize("attention, platform, kernel", [
    ("auto", "cpu", "blockwise"),
    ("auto", "gpu", "pallas_gpu"),
    ("auto", "tpu", "pallas_tpu"),
    ("pallas", "gpu", "pallas_gpu"),
    ("pallas", "tpu", "pallas_tpu"),
    ("full", "gpu", "full"),
    ("blockwise", "gpu", "blockwise"),
])  # fmt: skip
def test_the_kernel_is_that_of_the_platform(attention, platform, kernel):
    model = dataclasses.replace(resolve(ModelConfig()), attention=attention)
    assert choose_kernel(model, platform)[0] == kernel
    assert kernel == "full" or kernel in KERNELS


def test_a_kernel_without_its_platform_is_one_sentence():
    model = dataclasses.replace(resolve(ModelConfig()), attention="pallas")
    with pytest.raises(
        UserError, match="model.attention='pallas' needs a GPU or a TPU, not a CPU; use auto or blockwise"
    ):
        choose_kernel(model, "cpu")

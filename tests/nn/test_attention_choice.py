"""The attention that a config gets, and one sentence where there is none."""

import pytest
from sections import mesh_section

from llmjax.errors import UserError
from llmjax.nn.attention_choice import choose_kernel, choose_sharing
from llmjax.ops.attention.sequence_attention import KERNELS


def sharing(heads=8, kv_heads=2, kernel="auto", data=1, seq=4, tensor=1, biased=False, **mesh):
    sizes = {"data": data, "fsdp": 1, "seq": seq, "tensor": tensor}
    return choose_sharing((heads, kv_heads), kernel, mesh_section(**mesh), sizes, biased)


@pytest.mark.parametrize("changes, algorithm, degree", [
    ({"kv_heads": 8}, "ulysses", 4),
    ({"kv_heads": 8, "tensor": 2}, "ulysses", 4),
    ({"kv_heads": 2}, "hybrid", 2),
    ({"kv_heads": 4, "tensor": 2}, "hybrid", 2),
    ({"kv_heads": 1}, "ring", 1),
    ({"kv_heads": 1, "kernel": "full"}, "gather", 1),
    ({"kv_heads": 4, "kernel": "full"}, "ulysses", 4),
    ({"kv_heads": 1, "seq_attention": "ulysses"}, "ulysses", 4),
    ({"kv_heads": 1, "seq": 8, "seq_attention": "hybrid"}, "hybrid", 4),
    ({"kv_heads": 8, "seq": 8, "seq_attention": "hybrid"}, "hybrid", 4),
    ({"kv_heads": 2, "seq": 8, "seq_attention": "hybrid"}, "hybrid", 2),
    ({"kv_heads": 8, "seq": 8, "seq_attention": "hybrid", "ulysses": 2}, "hybrid", 2),
    ({"seq_attention": "gather"}, "gather", 1),
    ({"kv_heads": 8, "biased": True}, "ulysses", 4),
    ({"kv_heads": 2, "biased": True}, "gather", 1),
])  # fmt: skip
def test_as_much_ulysses_as_there_are_key_heads_for(changes, algorithm, degree):
    got, why = sharing(**changes)
    assert (got.algorithm, got.ulysses, got.size) == (algorithm, degree, changes.get("seq", 4)) and why


def test_whole_sequences_are_not_shared():
    assert sharing(seq=1)[0] is None


def test_the_axes_that_split_the_batch_are_known_to_a_ring():
    assert sharing(data=2, kv_heads=1)[0].others == ("data",)


@pytest.mark.parametrize("changes, pattern", [
    ({"seq": 3, "seq_attention": "ulysses"}, "mesh.seq_attention='ulysses' cannot deal 8 query heads .* mesh.seq=3"),
    ({"seq": 3, "seq_attention": "hybrid"}, "mesh.seq_attention='hybrid' .* mesh.seq=3 devices; use ring or ulysses"),
    ({"seq": 8, "seq_attention": "hybrid", "ulysses": 3}, "mesh.ulysses=3 cannot deal .*; use one of 2, 4"),
    ({"ulysses": 2, "seq_attention": "ring"}, "mesh.ulysses=2 is without effect for mesh.seq_attention='ring'"),
    ({"kernel": "full", "seq_attention": "ring"}, "compute.kernel='full' needs all keys at once"),
    ({"biased": True, "seq_attention": "ring"}, "mesh.seq_attention='ring' cannot add the bias of .* use auto, gather"),
    ({"biased": True, "seq_attention": "hybrid"}, "mesh.seq_attention='hybrid' cannot add the bias of transformer.pos"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(changes, pattern):
    with pytest.raises(UserError, match=pattern):
        sharing(**changes)


def test_a_key_of_the_mesh_that_is_not_known_is_named():
    with pytest.raises(UserError, match="mesh.seq_attention='rings' is not known; use one of auto, gather"):
        mesh_section(seq_attention="rings")
    with pytest.raises(UserError, match="mesh.ulysses=-1 must not be negative"):
        mesh_section(ulysses=-1)


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
    assert choose_kernel(attention, platform, False)[0] == kernel
    assert kernel == "full" or kernel in KERNELS


def test_a_kernel_without_its_platform_is_one_sentence():
    with pytest.raises(
        UserError, match="compute.kernel='pallas' needs a GPU or a TPU, not a CPU; use auto or"
    ):
        choose_kernel("pallas", "cpu", False)


def test_positions_with_a_bias_have_a_kernel_that_adds_it():
    assert choose_kernel("auto", "tpu", True)[0] == choose_kernel("auto", "cpu", True)[0] == "blockwise"
    assert choose_kernel("full", "tpu", True)[0] == "full"
    with pytest.raises(
        UserError, match="compute.kernel='pallas' cannot add the bias .* use auto or full or blockwise"
    ):
        choose_kernel("pallas", "tpu", True)

"""Headers of safetensors files: what is whole is read, and anything else costs one sentence before it is used."""

import json
import random

import ml_dtypes
import numpy as np
import pytest

from llmjax.convert.files.safetensors_header import read_header
from llmjax.errors import UserError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.float32([]).reshape(0, 5),
    "d.weight": np.arange(3).astype(ml_dtypes.bfloat16),
}


@pytest.fixture
def whole(tmp_path):
    from safetensors.numpy import save_file

    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def entry(begin, end, shape=None, dtype="F32"):
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def write(path, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_a_whole_file_is_read_tensor_by_tensor(whole):
    found = read_header(whole)
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        array = tensor.read()
        assert array.dtype == TENSORS[name].dtype
        np.testing.assert_array_equal(array, TENSORS[name])


BROKEN = {
    "no JSON": (b"{nonsense", "not JSON"),
    "bytes that are no text": (b"\xff\xfe{}", "not JSON"),
    "JSON nested too deeply": (b"[" * 100_000, "not JSON"),
    "a list": ([], "no JSON object"),
    "a name twice": (b'{"a": 1, "a": 2}', "'a' is in it twice"),
    "a key of a tensor twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' is in it twice"),
    "metadata that are no texts": ({"__metadata__": {"n": 1}}, "no table of texts"),
    "an entry that is no tensor": ({"a": 5}, "'a' in its header is no tensor"),
    "a key too many": ({"a": entry(0, 16) | {"more": 1}}, "'a' in its header is no tensor"),
    "an unknown type": ({"a": entry(0, 16, dtype="F31")}, "type 'F31' of 'a' is not known"),
    "a type that is a list": ({"a": entry(0, 16, dtype=["F32"])}, "is not known"),
    "a negative size": ({"a": entry(0, 16, [-4])}, "the shape [-4] of 'a' is none"),
    "a size that is a truth value": ({"a": entry(0, 4, [True])}, "the shape [True]"),
    "a size that is a fraction": ({"a": entry(0, 16, [4.0])}, "the shape [4.0]"),
    "a size beyond 64 bits": ({"a": entry(0, 16, [2**64])}, "the shape"),
    "sizes whose product is enormous": ({"a": entry(0, 16, [2**62] * 8)}, "not those of F32"),
    "very many dimensions": ({"a": entry(0, 16, [1] * 9)}, "the shape"),
    "a range that ends before it begins": ({"a": entry(16, 0, [4])}, "the byte range [16, 0]"),
    "three offsets": ({"a": entry(0, 16) | {"data_offsets": [0, 8, 16]}}, "the byte range"),
    "bytes that are too few for the shape": ({"a": entry(0, 16, [5])}, "not those of F32 [5]"),
    "overlapping ranges": (
        {"a": entry(0, 12), "b": entry(8, 16)},
        "'b' do not begin where those before it end",
    ),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 16)}, "'b' do not begin where"),
    "bytes of no tensor at the end": ({"a": entry(0, 8)}, "its header describes"),
    "a range beyond the end": ({"a": entry(0, 1600)}, "its header describes"),
}


@pytest.mark.parametrize("header, said", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_costs_one_sentence(tmp_path, header, said):
    with pytest.raises(UserError) as error:
        read_header(write(tmp_path / "x.safetensors", header))
    assert said in str(error.value) and "x.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 10**9, 40])
def test_a_length_beyond_the_file_is_refused_before_anything_is_read(tmp_path, length):
    with pytest.raises(UserError, match=f"its header should have {length}"):
        read_header(write(tmp_path / "x", {}, b"", length))


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_a_length_is_refused(tmp_path, size):
    (tmp_path / "x").write_bytes(b"\1" * size)
    with pytest.raises(UserError, match="no whole safetensors file"):
        read_header(tmp_path / "x")


def test_every_shortened_file_is_refused(whole, tmp_path):
    data = whole.read_bytes()
    for size in range(len(data)):
        (tmp_path / "x").write_bytes(data[:size])
        with pytest.raises(UserError, match="no whole safetensors file"):
            read_header(tmp_path / "x")


@pytest.mark.parametrize("dtype", ["F64", "I64", "U8", "BOOL"])
def test_numbers_that_are_no_weights_are_named(tmp_path, dtype):
    with pytest.raises(
        UserError, match=f"stores 'a' as {dtype}, which is not read here; save the model as F32 or"
    ):
        read_header(write(tmp_path / "x", {"a": entry(0, 16, dtype=dtype)}))


def test_500_mutated_headers_are_read_exactly_or_refused_in_one_sentence(whole, tmp_path):
    """Bytes of length and header are changed, removed, doubled or moved; nothing but UserError may come of it."""
    data, rng, refused = whole.read_bytes(), random.Random(0), 0
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(500):
        header = bytearray(data[:end])
        for _ in range(rng.randint(1, 4)):
            at, other = rng.randrange(len(header)), rng.randrange(len(header))
            change = rng.choice(("set", "digit", "flip", "cut", "double", "swap"))
            if change == "set":
                header[at] = rng.randrange(256)
            elif change == "digit":
                header[at] = rng.choice(b'0123456789-,.[]{}":e')
            elif change == "flip":
                header[at] ^= 1 << rng.randrange(8)
            elif change == "cut":
                del header[at : at + rng.randint(1, 20)]
            elif change == "double":
                header[at:at] = header[at : at + rng.randint(1, 40)]
            else:
                header[at], header[other] = header[other], header[at]
        if rng.random() < 0.5:
            # Half of them with the length that they have, so that their contents are looked at.
            header[:8] = max(len(header) - 8, 0).to_bytes(8, "little")
        (tmp_path / "x").write_bytes(bytes(header) + data[end:])
        try:
            found = read_header(tmp_path / "x")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        # What is accepted lies within the file and can be read.
        for tensor in found.values():
            assert tensor.read().shape == tensor.shape
    assert refused > 400

"""Headers of GGUF files: what the package gguf wrote is read, and what is damaged or hostile costs one sentence."""

import struct

import gguf
import numpy as np
import pytest

from llmjax.convert.gguf.model import open_model
from llmjax.convert.gguf.writing import header_bytes, size_of
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats.gguf_vocabulary import gguf_facts
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.errors import UserError
from llmjax.gguf.header import is_gguf, read_header

FACTS = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 32, "llama.embedding_length": 8,
    "llama.feed_forward_length": 12, "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
SHAPES = {
    "token_embd.weight": (10, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (8, 8), "blk.0.attn_v.weight": (8, 8),
    "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,), "blk.0.ffn_gate.weight": (12, 8),
    "blk.0.ffn_up.weight": (12, 8), "blk.0.ffn_down.weight": (8, 12),
}  # fmt: skip
TYPES = dict.fromkeys(SHAPES, "F32")
BODY = sum(size_of(shape, "F32") for shape in SHAPES.values())


def whole(facts=FACTS, shapes=SHAPES):
    return header_bytes(facts, shapes, TYPES) + bytes(BODY)


def write(path, data):
    path.write_bytes(data)
    return path


def test_what_the_package_wrote_is_read(tmp_path):
    values = {
        "u8": (3, gguf.GGUFValueType.UINT8), "i8": (-3, gguf.GGUFValueType.INT8),
        "u16": (3, gguf.GGUFValueType.UINT16),
        "i16": (-3, gguf.GGUFValueType.INT16), "u32": (3, gguf.GGUFValueType.UINT32),
        "i32": (-3, gguf.GGUFValueType.INT32),
        "u64": (2**63, gguf.GGUFValueType.UINT64), "i64": (-(2**62), gguf.GGUFValueType.INT64),
        "f32": (0.5, gguf.GGUFValueType.FLOAT32), "f64": (0.1, gguf.GGUFValueType.FLOAT64),
        "bool": (True, gguf.GGUFValueType.BOOL), "text": ("中文", gguf.GGUFValueType.STRING),
        "texts": (["a", "", "é"], gguf.GGUFValueType.ARRAY), "numbers": ([1, -2], gguf.GGUFValueType.ARRAY),
        "flags": ([True, False], gguf.GGUFValueType.ARRAY),
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "x")
    for name, (value, kind) in values.items():
        writer.add_key_value(name, value, kind)
    tensors = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.arange(5, dtype=np.float16)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "a.gguf")
    found = {name: np.asarray(value).tolist() for name, value in header.facts.items()}
    assert found == {"general.architecture": "x", **{name: value for name, (value, _) in values.items()}}
    data = (tmp_path / "a.gguf").read_bytes()
    for name, tensor in tensors.items():
        entry = header.tensors[name]
        assert entry.shape == tensor.shape
        at = header.start + entry.offset
        assert data[at : at + tensor.nbytes] == tensor.tobytes()


def test_what_we_write_the_package_reads(tmp_path):
    facts = {**FACTS, "a": True, "b": "é", "c": ["x", "y"], "d": [1, -1], "e": [0.5, 1.0]}
    reader = gguf.GGUFReader(write(tmp_path / "a.gguf", whole(facts)))
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {**found, "llama.attention.layer_norm_rms_epsilon": 1e-5} == facts
    assert {tensor.name: tensor.data.shape for tensor in reader.tensors} == SHAPES


def test_a_whole_file_is_a_model(tmp_path):
    source = open_model(write(tmp_path / "a.gguf", whole()))
    assert (
        source.settings["transformer.norm_eps"] == 1e-5
        and source.vocab_size == 10
        and source.tokenizer is None
    )
    assert is_gguf(tmp_path / "a.gguf") and not is_gguf(tmp_path) and not is_gguf(tmp_path / "b.gguf")


def fact(name, code, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", code) + value


def tensor(name, shape, code, offset):
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return head + struct.pack("<IQ", code, offset)


def file(*parts, tensors=0, facts=0, version=3):
    data = b"GGUF" + struct.pack("<IQQ", version, tensors, facts) + b"".join(parts)
    return data + bytes(-len(data) % 32)


HUGE = 2**62
LLAMA = fact("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
HOSTILE = {
    "empty": (b"", "it ends within its first letters"),
    "other letters": (b"GGUX" + bytes(100), "does not begin with the letters GGUF"),
    "version 1": (file(version=1), "it is of version 1, and 2 and 3 are read"),
    "big-endian": (file(version=3 << 24), "it is of version 50331648"),
    "number of tensors": (file(tensors=HUGE), f"too short for {HUGE} of tensors"),
    "number of facts": (file(facts=HUGE), f"too short for {HUGE} of facts"),
    "length of a name": (file(struct.pack("<Q", HUGE), bytes(40), facts=1), f"for {HUGE} of bytes of the name"),
    "length of a text": (file(fact("a", 8, struct.pack("<Q", HUGE)), facts=1), f"{HUGE} of bytes of 'a'"),
    "length of a list": (file(fact("a", 9, struct.pack("<IQ", 8, HUGE)), facts=1), f"{HUGE} of 'a'"),
    "length of an array": (file(fact("a", 9, struct.pack("<IQ", 6, HUGE)), facts=1), f"{HUGE} of 'a'"),
    "list of lists": (file(fact("a", 9, struct.pack("<IQ", 9, 1)), bytes(40), facts=1), "type 9 of the values of 'a'"),
    "type of a fact": (file(fact("a", 99, bytes(40)), facts=1), "the type 99 of 'a' is not known"),
    "two facts of a name": (file(LLAMA, LLAMA, facts=2), "the fact 'general.architecture' is in it twice"),
    "no UTF-8": (file(fact("a", 8, struct.pack("<Q", 1) + b"\xff"), bytes(40), facts=1), "'a' is no UTF-8"),
    "alignment": (file(fact("general.alignment", 4, struct.pack("<I", 7)), facts=1), "its alignment is 7"),
    "dimensions": (file(tensor("t", (1,) * 5, 0, 0), tensors=1), "'t' has 5 dimensions"),
    "no dimensions": (file(tensor("t", (), 0, 0), bytes(40), tensors=1), "'t' has 0 dimensions"),
    "shape": (file(tensor("t", (HUGE, 8), 0, 0), tensors=1), "of 't' is none"),
    "two tensors of a name": (file(tensor("t", (1,), 0, 0), tensor("t", (1,), 0, 32), tensors=2), "'t' is in it twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_sentence(tmp_path, name):
    data, message = HOSTILE[name]
    with pytest.raises(UserError, match=message) as error:
        read_header(write(tmp_path / "a.gguf", data))
    assert "\n" not in str(error.value) and "fetch or write it again" in str(error.value)


def with_tensor(entry):
    """A whole file whose last tensor is another."""
    header = header_bytes(FACTS, SHAPES, TYPES)
    at = header.index(b"blk.0.ffn_down.weight") - 8
    return header[:at] + entry


TENSORS = {
    "beyond the end": (tensor("blk.0.ffn_down.weight", (12, 8), 0, 10**6), "end at .*, and the file at"),
    "far beyond the end": (
        tensor("blk.0.ffn_down.weight", (12, 8), 0, 2**64 - 8),
        "end at .*, and the file at",
    ),
    "overlap": (tensor("blk.0.ffn_down.weight", (12, 8), 0, 32), "overlap those of"),
    "unknown type": (tensor("blk.0.ffn_down.weight", (12, 8), 77, 2048), "the type 77 of .* is not known"),
    "rows of no whole blocks": (tensor("blk.0.ffn_down.weight", (12, 8), 8, 2048), "are no multiple of 32"),
    "numbers that are none": (
        tensor("blk.0.ffn_down.weight", (12, 8), 26, 1900),
        "as I32, which cannot be read here",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_hostile_tensor_is_one_sentence(tmp_path, name):
    entry, message = TENSORS[name]
    data = with_tensor(entry)
    with pytest.raises(UserError, match=message) as error:
        open_model(write(tmp_path / "a.gguf", data + bytes(-len(data) % 32 + BODY)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", range(0, 700, 29))
def test_a_file_that_was_cut_short_is_one_sentence(tmp_path, size):
    with pytest.raises(UserError, match="no whole GGUF file"):
        open_model(write(tmp_path / "a.gguf", whole()[:-size] if size > 400 else whole()[: size + 1]))


LENGTHS = (0, 1, 2**31, 2**63, 2**64 - 1)


def test_500_mutated_headers_are_read_or_refused_in_one_sentence(tmp_path):
    tokenizer = ByteTokenizer(0)
    shapes = {**SHAPES, "token_embd.weight": (tokenizer.vocab_size, 8)}
    start = header_bytes({**FACTS, **gguf_facts(tokenizer)}, shapes, TYPES)
    body = bytes(BODY + size_of(shapes["token_embd.weight"], "F32"))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(500):
        header = bytearray(start)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(header) - 8))
            kind = rng.integers(0, 5)
            if kind == 0:
                header[at] ^= 1 << rng.integers(0, 8)
            elif kind == 1:
                header[at : at + 8] = struct.pack("<Q", LENGTHS[rng.integers(0, len(LENGTHS))])
            elif kind == 2:
                del header[at : at + int(rng.integers(1, 9))]
            elif kind == 3:
                header[at:at] = rng.bytes(int(rng.integers(1, 9)))
            else:
                header[at : at + 4] = rng.bytes(4)
        path = write(tmp_path / "a.gguf", bytes(header) + body)
        for read in (open_model, load_tokenizer):
            try:
                read(path)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700, error
    assert refused > 300

"""A model file of llama2.c (Karpathy 2023), version 0: seven whole numbers, then all weights as float32.

The layout is that of `legacy_export` in export.py and of `memory_map_weights` in run.c of
https://github.com/karpathy/llama2.c. The tensors of all layers lie stacked; here each layer is a tensor of its own.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct

from llmjax.convert.files.tensor_files import StoredTensor
from llmjax.errors import UserError

# The first bytes of files of later versions.
MAGIC = 0x616B3432
# The largest size that a header may give. A choice: what is larger is no file of llama2.c.
MOST = 2**24


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The header.

    seq_len  the length of the table of rotary positions
    tied     whether the embedding is the output matrix
    """

    model_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool


def open_file(path: pathlib.Path) -> tuple[Sizes, dict[str, StoredTensor]]:
    """The header and the tensors of a file, none of them read. UserError if it is no such file, or not a whole one."""
    with open(path, "rb") as file:
        data = file.read(28)
    sizes = _sizes(path, data)
    D, F, L, V = sizes.model_dim, sizes.mlp_dim, sizes.num_layers, sizes.vocab_size
    H = D // sizes.num_heads
    kv = sizes.num_kv_heads * H
    # (name, whether each layer has one, shape), in the order of the file.
    tensors: list[tuple[str, bool, tuple[int, ...]]] = [
        ("tok_embeddings", False, (V, D)),
        ("attention_norm", True, (D,)),
        ("wq", True, (D, D)), ("wk", True, (kv, D)), ("wv", True, (kv, D)), ("wo", True, (D, D)),
        ("ffn_norm", True, (D,)),
        ("w1", True, (F, D)), ("w2", True, (D, F)), ("w3", True, (F, D)),
        ("norm", False, (D,)),
        # cos and sin of the rotary positions, which are computed here.
        ("freqs_cos", False, (sizes.seq_len, H // 2)), ("freqs_sin", False, (sizes.seq_len, H // 2)),
    ]  # fmt: skip
    if not sizes.tied:
        tensors.append(("output", False, (V, D)))
    found, at = {}, 28
    for name, layered, shape in tensors:
        for layer in range(L if layered else 1):
            found[f"layers.{layer}.{name}" if layered else name] = StoredTensor(path, "F32", shape, at)
            at += 4 * math.prod(shape)
    if at != path.stat().st_size:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, and its header describes {at}; give a whole file of llama2.c, "
            "version 0"
        )
    return sizes, found


def _sizes(path: pathlib.Path, data: bytes) -> Sizes:
    if len(data) == 28 and struct.unpack("<I", data[:4])[0] == MAGIC:
        raise UserError(f"{path} is a file of llama2.c of a later version; export it with --version 0")
    values = struct.unpack("<7i", data) if len(data) == 28 else (0,) * 7
    D, F, L, N, K, V, T = values
    whole = all(0 < abs(value) <= MOST for value in values) and min(D, F, L, N, K, T) > 0
    if not whole or D % N or N % K or D // N % 2:
        raise UserError(
            f"{path} is no file of llama2.c; its first numbers are no sizes of a model, so give another"
        )
    return Sizes(D, F, L, N, K, abs(V), T, tied=V > 0)

"""Packed rows cut into shorter ones: the same tokens in the same order, for a run that begins with short sequences."""

from __future__ import annotations

import numpy as np

from llmjax.batch import along
from llmjax.data.layout.layout import Arrays


def cut_rows(arrays: Arrays, length: int) -> Arrays:
    """Rows [B, T] as [B T/length, length], the pieces of a row one after the other; as they are where T == length.

    A document that crosses a cut goes on as another one, its positions counting from 0 again; segments count from 1 in
    every new row. Tokens, targets and weights stay, so that every target is still predicted exactly once. `index` is
    that of the row times T / length, plus the number of the piece; it wraps at 2^31.
    """
    T = arrays["tokens"].shape[1]
    pieces, rest = divmod(T, length)
    if rest:
        raise ValueError(f"Rows of {T} cannot be cut into rows of {length}.")
    if pieces == 1:
        return arrays
    index = arrays["index"].astype(np.int64)[:, None] * pieces + np.arange(pieces)
    cut = {name: arrays[name].reshape(-1, length) for name in along("length") if name in arrays}
    segments, positions = cut["segments"], cut["positions"]
    used, goes_on = segments > 0, segments == segments[:, :1]
    cut["segments"] = np.where(used, segments - segments[:, :1] + 1, 0).astype(np.int32)
    cut["positions"] = np.where(used & goes_on, positions - positions[:, :1], positions).astype(np.int32)
    return cut | {"index": (index.reshape(-1) % 2**31).astype(np.int32)}

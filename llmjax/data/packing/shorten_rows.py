"""Cuts packed rows into shorter rows of the same tokens in the same order, for runs that start on short sequences."""

from __future__ import annotations

import numpy as np

from llmjax.batch import along
from llmjax.data.layout.layout import Arrays


def cut_rows(arrays: Arrays, length: int) -> Arrays:
    """Cuts rows [B, T] into rows [B * T / length, length]; the parts of a row follow one another.

    Tokens, targets and weights keep their values, so that every target is still predicted exactly once. A document
    that crosses a cut continues as a new document: its positions count from 0 again, and the segments of each new row
    count from 1. The `index` of a new row is index * (T / length) + (number of the part), modulo 2**31.

    Returns `arrays` itself if T == length. Raises ValueError if `length` does not divide T.
    """
    T = arrays["tokens"].shape[1]
    pieces, rest = divmod(T, length)
    if rest:
        raise ValueError(f"Rows of {T} cannot be cut into rows of {length}.")
    if pieces == 1:
        return arrays
    # int64, because the product may exceed int32; the result wraps around at 2**31 to stay a non-negative int32.
    index = arrays["index"].astype(np.int64)[:, None] * pieces + np.arange(pieces)
    cut = {name: arrays[name].reshape(-1, length) for name in along("length") if name in arrays}
    segments, positions = cut["segments"], cut["positions"]
    used, continued = segments > 0, segments == segments[:, :1]
    # Segments of a row are consecutive numbers, so subtracting the first one makes them count from 1.
    cut["segments"] = np.where(used, segments - segments[:, :1] + 1, 0).astype(np.int32)
    # Only the first document of a new row can continue one that was cut, so only its positions move.
    cut["positions"] = np.where(used & continued, positions - positions[:, :1], positions).astype(np.int32)
    return cut | {"index": (index.reshape(-1) % 2**31).astype(np.int32)}

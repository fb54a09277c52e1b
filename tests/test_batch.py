"""A batch's fields say their own dimensions, and whatever makes, moves or places batches reads that."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax import batch
from llmjax.batch import FIELDS, Field, along, empty_arrays
from llmjax.data.layout.layout import RowLayout, lay_out
from llmjax.data.packing.shorten_rows import cut_rows
from llmjax.types import Batch


def test_fields_are_those_of_the_dataclass_and_jax_knows_it():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(Batch)]
    arrays = empty_arrays({"batch": 2, "length": 4})
    assert {name: x.shape for name, x in arrays.items()} == {
        name: (2,) if name == "index" else (2, 4) for name, field in FIELDS.items() if not field.optional
    }
    assert {x.dtype.name for name, x in arrays.items() if name != "weights"} == {"int32"}
    assert len(jax.tree.leaves(Batch(**arrays))) == len(arrays)


@pytest.mark.parametrize("dims, moves", [(("batch", "length"), True), (("batch",), False)])
def test_a_new_field_is_one_line(dims, moves, monkeypatch):
    """What moves and cuts rows takes along a field that it has never heard of."""
    monkeypatch.setitem(batch.FIELDS, "labels", Field(dims))
    sizes = {"batch": 2, "length": 16}
    arrays = empty_arrays(sizes)
    arrays["segments"][:, :12] = np.repeat([1, 2], [5, 7])
    arrays["labels"] += np.arange(16, dtype=np.int32)[None] if moves else np.arange(2, dtype=np.int32)
    assert ("labels" in along("length")) == moves
    laid = lay_out(arrays, RowLayout("zigzag", 4))
    np.testing.assert_array_equal(laid["labels"], laid["columns"] if moves else [0, 1])
    if moves:
        assert cut_rows(arrays, 4)["labels"].shape == (8, 4)

"""Rows and columns of a leaf, read from the letters of its name."""

import pytest

from llmjax.train.optim.matrices import matrix_axes, muon_dimensions


def test_dimension_letters_name_the_rows_and_columns_of_a_matrix():
    assert muon_dimensions("wq_DNH", 3) == ((0,), (1, 2))
    assert muon_dimensions("wk_DKH", 4) == ((1,), (2, 3))
    assert muon_dimensions("wo_NHD", 4) == ((1, 2), (3,))
    assert muon_dimensions("wo_DNH", 4) == ((1,), (2, 3))
    assert muon_dimensions("w_down_FD", 2) == ((0,), (1,))
    for name in ("embedding_VD", "positions_TD", "scale", "q_bias", "up_bias", "b_NH"):
        assert muon_dimensions(name, 2) is None
    with pytest.raises(ValueError, match="wq_DNH"):
        muon_dimensions("wq_DNH", 2)


def test_tables_are_matrices_but_not_of_the_inside():
    for name in ("embedding_VD", "unembedding_VD", "positions_TD"):
        assert matrix_axes(name, 2) == ((0,), (1,)) and muon_dimensions(name, 2) is None
    for name, rank in (("scale", 2), ("q_bias", 3), ("b_NH", 2), ("table", 2)):
        assert matrix_axes(name, rank) == ((), ())


def test_letters_that_no_rule_knows_are_an_error():
    for name in ("w_DX", "w_XY", "w_DFV", "w_DFD"):
        with pytest.raises(ValueError, match=name):
            matrix_axes(name, len(name) - 2)

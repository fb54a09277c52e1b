"""Tiny models that transformers saved, with its logits: the same logits here, without transformers or PyTorch."""

import pathlib

import numpy as np
import pytest
from random_models import VARIANTS, one_text, read

FOLDER = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_that_transformers_gave(variant):
    folder = FOLDER / variant.replace(" ", "_")
    golden = np.load(folder / "logits.npz")
    logits = read(folder).logits(one_text(golden["tokens_BT"]))
    scale = np.abs(golden["logits_BTV"]).max()
    assert scale > 0.1 and np.abs(logits - golden["logits_BTV"]).max() <= 1e-4 * scale


def test_golden_files_are_small():
    assert all(path.stat().st_size < 10_000 for path in FOLDER.rglob("*") if path.is_file())

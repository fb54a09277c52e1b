"""Folders of weights: shards and their index, files that are missing, paths that lead away, and pickles."""

import json

import numpy as np
import pytest

from llmjax.convert.files.safetensors_folder import INDEX, open_tensors, write_tensors
from llmjax.errors import UserError

ARRAYS = {name: np.full((4, 2), i, np.float32) for i, name in enumerate("abcde")}


def write(folder, shard_bytes):
    folder.mkdir(exist_ok=True)
    sizes = {name: array.nbytes for name, array in ARRAYS.items()}
    return write_tensors(folder, sizes, ARRAYS.items(), shard_bytes)


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shard_bytes, files", [(1, 5), (32, 5), (64, 3), (95, 3), (96, 2), (1000, 1)])
def test_what_is_written_is_read_from_any_number_of_shards(tmp_path, shard_bytes, files):
    names = write(tmp_path, shard_bytes)
    assert len(names) == files + (files > 1) and {path.name for path in tmp_path.iterdir()} == {*names}
    found = open_tensors(tmp_path)
    assert found.keys() == ARRAYS.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), ARRAYS[name])


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\x.safetensors",
        "model.bin",
        "",
        5,
        None,
    ],
)
def test_an_index_leads_to_no_file_outside_of_its_folder(tmp_path, file):
    write(tmp_path / "model", 64)
    (tmp_path / "outside.safetensors").write_bytes(
        (tmp_path / "model" / "model-00001-of-00003.safetensors").read_bytes()
    )
    change_index(tmp_path / "model", lambda index: index["weight_map"].update(a=file))
    with pytest.raises(UserError, match="which is no safetensors file of this folder"):
        open_tensors(tmp_path / "model")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"), "lacks 'x', which"),
        (
            lambda index: index["weight_map"].update(x="model-9.safetensors"),
            "lacks model-9.safetensors, which",
        ),
        (lambda index: index["weight_map"].pop("a"), "holds 'a', which .* does not say"),
        (lambda index: index["weight_map"].update(a="model-00003-of-00003.safetensors"), "holds 'a', which"),
    ],
)
def test_an_index_and_its_files_say_the_same(tmp_path, change, said):
    write(tmp_path, 64)
    change_index(tmp_path, change)
    with pytest.raises(UserError, match=said):
        open_tensors(tmp_path)


def test_a_name_in_an_index_twice_is_refused(tmp_path):
    write(tmp_path, 64)
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"b": "x.safetensors", '))
    with pytest.raises(UserError, match="'b' is in it twice"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickles_are_refused_with_advice_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=f"{name}, a pickle, .* safe_serialization=True"):
        open_tensors(tmp_path)


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        open_tensors(tmp_path)

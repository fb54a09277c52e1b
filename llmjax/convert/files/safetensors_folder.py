"""The tensors of a folder with safetensors files: one file, or several (shards) with an index of what lies in which.

Files that Python would unpickle (.bin, .pt) are never read, because such a file may run any program.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llmjax.convert.files.json_file import read_object
from llmjax.convert.files.safetensors_header import read_header
from llmjax.convert.files.tensor_files import StoredTensor
from llmjax.errors import UserError
from llmjax.files import write_atomically
from llmjax.ranges import shown

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The most bytes of tensors in a file that is written. A choice: all tensors of a file are in memory at once.
SHARD_BYTES = 1_000_000_000
# What `transformers` wants to find in a file.
METADATA = {"format": "pt"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def open_tensors(
    folder: pathlib.Path, skips: Callable[[str], bool] = lambda name: False
) -> dict[str, StoredTensor]:
    """All tensors of the model in `folder`, by name, none of them read. `skips` is that of `read_header`.

    Raises UserError, in one sentence, if there are none, or if a file or the index is damaged.
    """
    if (folder / WHOLE).is_file():
        return read_header(folder / WHOLE, skips)
    if (folder / INDEX).is_file():
        return _open_shards(folder, skips)
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, a pickle, which may run any program when it is read, and no {WHOLE}; save "
            "the model anew where you trust it, with save_pretrained(folder, safe_serialization=True) of transformers"
        )
    raise UserError(f"{folder} holds neither {WHOLE} nor {INDEX}; give the folder of a model")


def _open_shards(folder: pathlib.Path, skips: Callable[[str], bool]) -> dict[str, StoredTensor]:
    index = folder / INDEX
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} has no weight_map; fetch or write it again")
    for name, file in where.items():
        # Only files of this folder: no path may lead out of it.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII):
            raise UserError(
                f"{index} says that {shown(name)} lies in {shown(file)}, which is no safetensors file of this "
                "folder; fetch or write it again"
            )
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks {file}, which {INDEX} names; fetch it")
        for name, tensor in read_header(folder / file, skips).items():
            if where.get(name) != file:
                raise UserError(
                    f"{folder / file} holds {shown(name)}, which {INDEX} does not say; fetch or write both again"
                )
            found[name] = tensor
    if missing := sorted(where.keys() - found.keys()):
        raise UserError(
            f"{folder / where[missing[0]]} lacks {shown(missing[0])}, which {INDEX} says; fetch or write it again"
        )
    return found


def write_tensors(
    folder: pathlib.Path,
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes tensors into an empty folder, as one file or as shards with an index; returns the names of the files.

    sizes    the bytes of each tensor, by name, in the order in which `tensors` has them
    """
    shards = list(_shards(sizes, shard_bytes))
    pattern = "model-{:05d}-of-{:05d}.safetensors"
    files = [pattern.format(i, len(shards)) for i in range(1, len(shards) + 1)] if shards[1:] else [WHOLE]
    rest = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        part = {}
        for name in names:
            found, array = next(rest)
            assert found == name, (found, name)
            part[name] = np.ascontiguousarray(array)
        save_tensors(part, folder / file)
    if shards[1:]:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_atomically(folder / INDEX, json.dumps(index, indent=2))
        files.append(INDEX)
    return files


def save_tensors(tensors: dict[str, np.ndarray], file: pathlib.Path) -> None:
    """Writes tensors into one file."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise UserError(
            "safetensors files are written with the package safetensors; pip install llmjax[convert]"
        ) from None
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file, metadata=METADATA)
    # Some versions of the package write files that only their owner may read.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _shards(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """The names of the tensors of each file: as many as have `most` bytes together, and at least one."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names

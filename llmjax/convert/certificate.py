"""What a conversion did, for certificate.json beside its result: every tensor, tying, rotary positions, digests."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import llmjax
from llmjax.convert.places import Place
from llmjax.convert.source import Source
from llmjax.files import write_atomically

NAME = "certificate.json"


def side(kind: str, path: pathlib.Path, **facts: Any) -> dict[str, Any]:
    """What is said of the source or the result of a conversion."""
    return {"kind": kind, "path": str(path), **facts}


def model_facts(settings: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Facts about a model by which mistakes of conversions show: sizes, tying, and rotary positions."""
    rope = {key: value for key, value in settings.items() if key.startswith("transformer.rope_")}
    return {
        "vocab_size": vocab_size,
        "settings": dict(sorted(settings.items())),
        "output matrix": "the embedding" if settings["model.tie_embeddings"] else "one of its own",
        "rotary positions": {**rope, "pairs": "dimension i with i + head_dim / 2"}
        if (position := settings.get("transformer.position", "not told to the model")) == "rope"
        else f"none, positions are {position}",
    }


def source_tensors(source: Source, places: Mapping[str, Place], digests: Mapping[str, str]) -> dict[str, Any]:
    """Every tensor of the source: what became of it, its type, its shape, and the SHA-256 of its bytes.

    digests  those of all tensors that were read, by their names in the file
    """
    matched = source.match(places)
    ours = {matched.names[name]: [_part(part) for part in place.parts] for name, place in places.items()}
    listed = {}
    for name, tensor in source.tensors.items():
        became: Any = ours.get(name)
        if name in matched.buffers:
            became = "nothing: it holds nothing that was learned"
        if name in matched.copies:
            became = f"nothing: it repeats {matched.copies[name]}"
        if name in matched.left_out:
            became = f"nothing: {matched.left_out[name]} has no place in llmjax"
        listed[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "became": became}
        if name in digests:
            listed[name]["sha256"] = digests[name]
    return {"tensors": listed, "missing": [], "unexpected": []}


def written_tensors(
    places: Mapping[str, Place], dtypes: Mapping[str, str], digests: Mapping[str, str]
) -> dict[str, Any]:
    """Every tensor that was written: of what it was made, its type, its shape, and the SHA-256 of its bytes."""
    return {
        "tensors": {
            name: {
                "dtype": dtypes[name],
                "shape": list(place.shape),
                "made of": [_part(part) for part in place.parts],
                "sha256": digests[name],
            }
            for name, place in places.items()
        }
    }


def _part(part: Any) -> str:
    return part.path + "".join(f"[{number}]" for number in part.index)


def write(folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes certificate.json into `folder`, with the SHA-256 of all files that lie there."""
    files = {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    whole = {"llmjax": llmjax.__version__, **facts, "files": files}
    write_atomically(folder / NAME, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

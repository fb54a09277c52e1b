"""Adapters as the library `peft` saves them: adapter_config.json and adapter_model.safetensors.

A linear layer W of theirs, [out, in], is used as W + scale x lora_B lora_A, with lora_A [r, in] and lora_B [out, r].
Ours are matrices A [inputs ..., r] and B [r, outputs ...]. Whatever the name table does to a matrix (transposing it,
joining its heads) is done to each of the two, with the other side shortened to r. Where one matrix of theirs holds
several of ours (queries, keys and values of GPT-2), its r is that of all of them together, and lora_B has a block for
each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmjax.convert.architectures.contract import Architecture
from llmjax.convert.architectures.forms import Form
from llmjax.convert.files.json_file import read_object
from llmjax.convert.files.safetensors_folder import save_tensors
from llmjax.convert.files.safetensors_header import read_header
from llmjax.convert.places import LAYERS, STACKS, Place, places_of
from llmjax.errors import UserError
from llmjax.files import write_atomically
from llmjax.ranges import shown
from llmjax.types import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Before the name of a module of the model.
PREFIX = "base_model.model."
# Ways to begin adapters that leave the model as it is. Others, such as PiSSA, take a part of it into the adapters.
INITS = (True, False, "gaussian", "eva", "orthogonal")
# What peft calls the task of a class of transformers; there is no name for masked tokens.
TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForMaskedLM": None,
    "AutoModel": "FEATURE_EXTRACTION",
}
# What peft can do to a model besides, which would be lost here.
NOT_READ = (
    "use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layers_to_transform",
    "layer_replication", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "alora_invocation_tokens", "exclude_modules",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `lora` says of all adapters of a run."""

    rank: int
    alpha: float
    rslora: bool

    def scale(self, rank: int, alpha: float) -> float:
        """What an adapter of this rank and alpha is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclasses.dataclass(frozen=True)
class Side:
    """Which dimensions of one of our matrices, without layers, are its inputs and which its outputs."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# Paths of our matrices, such as `layers/attention/wq_DNH`.
Sides = Mapping[str, Side]
# The same -> A and B, with a leading dimension for the layers: [L, inputs ..., r] and [L, r, outputs ...].
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_adapters(
    folder: pathlib.Path,
    architecture: Architecture,
    shapes: Params,
    sides: Sides,
    pairs: Pairs,
    lora: Settings,
    base: str,
) -> None:
    """Writes both files into `folder`. `base` is the folder of transformers of the model, if it came from one."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, place in _places(architecture, shapes, sides).items():
        blocks = []
        for part in place.parts:
            if part.path not in sides:
                blocks.append(
                    (np.zeros((0, 0), np.float32), np.zeros((_rows(place, part.shape, sides), 0), np.float32))
                )
                continue
            (a, b), side = pairs[part.path], sides[part.path]
            blocks.append(_theirs(place.form, side, len(part.shape), a[part.index], b[part.index]))
        lora_a = np.concatenate([a for a, _ in blocks if a.size])
        lora_b = np.zeros((sum(len(b) for _, b in blocks), len(lora_a)), np.float32)
        row = column = 0
        for _, b in blocks:
            lora_b[row : row + len(b), column : column + b.shape[1]] = b
            row, column = row + len(b), column + b.shape[1]
        tensors[f"{_module(name)}.lora_A.weight"], tensors[f"{_module(name)}.lora_B.weight"] = lora_a, lora_b
        ranks[_target(architecture, name)] = len(lora_a)
    save_tensors(tensors, folder / TENSORS)
    write_atomically(folder / CONFIG, json.dumps(_config(architecture, ranks, lora, base), indent=2) + "\n")


def _config(
    architecture: Architecture, ranks: Mapping[str, int], lora: Settings, base: str
) -> dict[str, Any]:
    """adapter_config.json; `ranks` has the r of each module, by its name in `target_modules`."""
    larger = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    grown = {name: rank / lora.rank for name, rank in larger.items()}
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[architecture.opened_as],
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(ranks),
        "rank_pattern": larger,
        # The scale stays alpha / r, or alpha / sqrt(r).
        "alpha_pattern": {
            name: lora.alpha * (math.sqrt(x) if lora.rslora else x) for name, x in grown.items()
        },
        "fan_in_fan_out": architecture.model_type == "gpt2",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def check_adapters(folder: pathlib.Path, lora: Settings, key: str) -> None:
    """UserError, which names the config key `key`, where the adapters in `folder` are not of these settings."""
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise UserError(
            f"{key}={str(folder)!r} does not hold {CONFIG} and {TENSORS}; give a folder that peft saved"
        )
    config = read_object(folder / CONFIG)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder / CONFIG} has peft_type={shown(config.get('peft_type'))} and bias={shown(config.get('bias'))}, "
            "and only LORA without biases is read; use other adapters"
        )
    if (init := config.get("init_lora_weights", True)) not in INITS:
        raise UserError(
            f"{folder / CONFIG} has init_lora_weights={shown(init)}, so that its adapters belong to a model that was "
            "changed when they were made; use the model with the adapters merged, or adapters that began otherwise"
        )
    if more := [name for name in NOT_READ if config.get(name)]:
        raise UserError(
            f"{folder / CONFIG} has {more[0]}={shown(config[more[0]])}, which is not read here; use other adapters"
        )
    for name, theirs, ours, default in (
        ("rank", "r", lora.rank, 8),
        ("alpha", "lora_alpha", lora.alpha, 8),
        ("rslora", "use_rslora", lora.rslora, False),
    ):
        if config.get(theirs, default) != ours:
            raise UserError(
                f"lora.{name}={ours}, but {folder / CONFIG} has {theirs}={shown(config.get(theirs, default))}; use "
                "that value to begin with its adapters"
            )


def check_tensors(folder: pathlib.Path, architecture: Architecture, shapes: Params, sides: Sides) -> None:
    """UserError where an adapted matrix has no adapter in `folder`, or where one there has no matrix.

    shapes  the parameters of the model, of which only the names count, so that the vocabulary may have any size
    """
    tensors = read_header(folder / TENSORS)
    modules = [_module(name) for name in _places(architecture, shapes, sides)]
    wanted = {f"{module}.lora_{half}.weight" for module in modules for half in "AB"}
    for names, what, remedy in (
        (wanted - tensors.keys(), "lacks", "name in lora.targets the matrices that it adapts"),
        (tensors.keys() - wanted, "has", "let lora.targets name its matrix, if this model has it"),
    ):
        if names:
            raise UserError(f"{folder / TENSORS} {what} the tensor {min(names)!r}; {remedy}")


def remarks(folder: pathlib.Path) -> list[str]:
    """What the adapters in a folder were trained with and are not trained with here, a sentence each."""
    dropout = read_object(folder / CONFIG).get("lora_dropout", 0)
    if not dropout:
        return []
    return [
        f"{folder / CONFIG} has lora_dropout={shown(dropout)}, and the adapters train without dropout here"
    ]


def read_adapters(
    folder: pathlib.Path, architecture: Architecture, shapes: Params, sides: Sides, lora: Settings
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The adapters in a folder for which `check_adapters` passes, as `Pairs`.

    Raises UserError as `check_tensors` does, where a shape is not that of the model, or where an adapter is multiplied
    by another number than all others.
    """
    check_tensors(folder, architecture, shapes, sides)
    tensors, alphas = read_header(folder / TENSORS), read_object(folder / CONFIG).get("alpha_pattern") or {}
    layers: dict[str, dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]] = {}
    for name, place in _places(architecture, shapes, sides).items():
        a, b = (tensors[f"{_module(name)}.lora_{half}.weight"].read().astype(np.float32) for half in "AB")
        alpha = next(
            (x for key, x in alphas.items() if re.search(rf"(^|\.)({key})$", _module(name))), lora.alpha
        )
        if not math.isclose(lora.scale(len(a), alpha), lora.scale(lora.rank, lora.alpha)):
            raise UserError(
                f"{folder / CONFIG} gives {name} r={len(a)} and lora_alpha={shown(alpha)}, and all adapters are "
                "multiplied by the same number here; use other adapters"
            )
        for path, index, pair in _parts(name, place, sides, lora.rank, a, b):
            layers.setdefault(path, {})[index] = pair
    return {
        path: (np.stack([found[i][0] for i in sorted(found)]), np.stack([found[i][1] for i in sorted(found)]))
        for path, found in layers.items()
    }


def _parts(
    name: str, place: Place, sides: Sides, rank: int, a: np.ndarray, b: np.ndarray
) -> list[tuple[Any, ...]]:
    """(path, (layer,), (A, B)) of each adapted matrix of ours in one of theirs."""
    adapted = [part for part in place.parts if part.path in sides]
    rows = [_rows(place, part.shape, sides) for part in place.parts]
    inputs = math.prod(adapted[0].shape[i] for i in sides[adapted[0].path].inputs)
    blocks = len(a) == rank * len(adapted)
    if (
        a.ndim != 2
        or a.shape[1] != inputs
        or not (blocks or len(a) == rank)
        or b.shape != (sum(rows), len(a))
    ):
        raise UserError(
            f"the adapter of {name} has the shapes {list(a.shape)} and {list(b.shape)}, which this model with "
            f"lora.rank={rank} does not have; use adapters that were made for it"
        )
    found, row, column = [], 0, 0
    for part, count in zip(place.parts, rows, strict=True):
        own = b[row : row + count]
        row += count
        if part.path not in sides:
            rest = own
        else:
            columns = slice(column, column + rank) if blocks else slice(None)
            column += rank
            pair = _ours(place.form, sides[part.path], part.shape, a[columns], own[:, columns])
            found.append((part.path, part.index, pair))
            rest = np.delete(own, columns, axis=1) if blocks else own[:, :0]
        if np.any(rest):
            raise UserError(
                f"the adapter of {name} mixes parts that are adapted one by one here; use other adapters"
            )
    return found


def _places(architecture: Architecture, shapes: Params, sides: Sides) -> dict[str, Place]:
    """The places of their matrices that hold an adapted one of ours. UserError for one of a mixture of experts."""
    if mixed := [path for path in sides if path.startswith(f"{LAYERS}/experts/")]:
        raise UserError(
            f"lora.targets names {min(mixed)}, and peft adapts no matrix of a mixture of experts; leave it out to "
            "exchange adapters with peft"
        )
    places = places_of(architecture, shapes)
    return {name: place for name, place in places.items() if any(part.path in sides for part in place.parts)}


def _module(name: str) -> str:
    """The module of their tensor `name`, as files of adapters call it."""
    return f"{PREFIX}{name.removesuffix('.weight')}"


def _target(architecture: Architecture, name: str) -> str:
    """What `target_modules` calls the module of a tensor: the end of its name, such as self_attn.q_proj, which all
    layers have, or its whole name where it lies in no layer, or where that is the end of other names too. With an
    encoder, whose layers have the same ends, it is always the whole name."""
    if architecture.encoder:
        return name.removesuffix(".weight")
    ends = [line.split("{}.", 1)[1] for line in architecture.layer]
    end = next((end for end in ends if re.search(rf"\.\d+\.{re.escape(end)}$", name)), name)
    if any(other.endswith(f".{end}") for other in ends):
        end = name
    return end.removesuffix(".weight")


def _rows(place: Place, shape: tuple[int, ...], sides: Sides) -> int:
    """The outputs of one of our matrices in one of theirs. All matrices in one of theirs have the same sides."""
    side = next(sides[part.path] for part in place.parts if part.path in sides)
    return math.prod(shape[i] for i in side.outputs)


def _is_transposed(form: Form, side: Side) -> bool:
    """Whether their matrix is [in, out], as in GPT-2, and not [out, in]."""
    sizes = dict.fromkeys((*side.inputs, *side.outputs), 1) | {side.inputs[-1]: 2, side.outputs[-1]: 3}
    return form.shape(tuple(sizes[i] for i in sorted(sizes))) == (2, 3)


def _theirs(form: Form, side: Side, ndim: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [r, in] and lora_B [out, r] of one of our matrices with `ndim` dimensions."""
    thin_a = form.theirs(_thin(a, side.inputs, side.outputs))
    thin_b = form.theirs(_thin(np.moveaxis(b, 0, -1), side.outputs, side.inputs))
    return (thin_a.T, thin_b.T) if _is_transposed(form, side) else (thin_a, thin_b)


def _thin(x: np.ndarray, own: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
    """[own ..., r] as a matrix of ours, whose `other` side has r entries: its last dimension; the rest of it are 1."""
    x = x.reshape(*x.shape[:-1], *(1,) * (len(other) - 1), x.shape[-1])
    order = (*own, *other)
    return x.transpose([order.index(i) for i in range(len(order))])


def _ours(
    form: Form, side: Side, shape: tuple[int, ...], a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Our A [inputs ..., r] and B [r, outputs ...] of a matrix of `shape`: the inverse of `_theirs`."""
    rank, transposed = len(a), _is_transposed(form, side)

    def thick(x: np.ndarray, own: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
        sizes = {i: shape[i] for i in own} | dict.fromkeys(other, 1) | {other[-1]: rank}
        x = form.ours(x.T if transposed else x, tuple(sizes[i] for i in sorted(sizes)))
        return x.transpose((*own, *other)).reshape(*(shape[i] for i in own), rank)

    return thick(a, side.inputs, side.outputs), np.moveaxis(thick(b, side.outputs, side.inputs), -1, 0)


def side_of(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Side:
    """The side of a stack of matrices whose dimensions are counted with the layers."""
    first = 1 if path.split("/")[0] in STACKS else 0
    return Side(tuple(i - first for i in inputs), tuple(i - first for i in outputs))

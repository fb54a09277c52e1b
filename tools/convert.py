"""Converts a model between llmjax, Hugging Face transformers, GGUF files of llama.cpp, and llama2.c.

    python -m tools.convert --from hf --to llmjax TinyLlama-1.1B runs/tinyllama
    python -m tools.convert --from llmjax --to hf runs/base exported --verify
    python -m tools.convert --from llmjax --to gguf runs/base exported --dtype q8_0
    python -m tools.convert --from llmjax --to peft runs/tuned adapters
    python -m tools.convert --from llama2c --to hf stories260K.bin exported

A model of transformers is a folder with config.json and safetensors files, one of llmjax a workdir, and one of llama2.c
a file of version 0. The result is a folder with a certificate in it: what became of every tensor. `docs/weights.md`
says which families can be converted.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from llmjax.build.conversion import (
    OPEN,
    Model,
    check_destination,
    load_foreign,
    load_run,
    save_as_gguf,
    save_as_hf,
    save_as_peft,
    save_as_run,
)
from llmjax.convert.config_keys import choose_architecture
from llmjax.convert.gguf.export import FILE
from llmjax.convert.gguf.writing import WRITTEN as GGUF_WRITTEN
from llmjax.convert.verify import check, compare, their_logits
from llmjax.errors import UserError, reason_of
from llmjax.terminal.lines import say, warn

# What writes a model for other programs, by --to.
SAVE = {"hf": save_as_hf, "gguf": save_as_gguf, "peft": save_as_peft}
# The rows and the tokens of a row that --verify compares. A choice.
ROWS, COLUMNS = 4, 128


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; it ends the program where it is wrong."""
    parser = argparse.ArgumentParser(
        "python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source_kind", required=True, choices=("llmjax", *OPEN))
    parser.add_argument("--to", dest="kind", required=True, choices=("llmjax", *SAVE))
    parser.add_argument("source", type=pathlib.Path, help="a folder, a GGUF file, or a file of llama2.c")
    parser.add_argument("destination", type=pathlib.Path, help="a folder to be made")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="instead of the tokenizer beside the source")
    parser.add_argument("--checkpoint", default="latest", help="of a workdir: latest, best or a number")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=tuple(GGUF_WRITTEN),
        help="of the weights; q8_0 for --to gguf only",
    )
    parser.add_argument("--verify", action="store_true", help="compares logits with transformers")
    parser.add_argument("--verify_text", type=pathlib.Path, default=pathlib.Path(argparse.__file__))
    return parser.parse_args(arguments)


def verification(model: Model, kind: str, path: pathlib.Path, text: pathlib.Path) -> dict[str, Any]:
    """The facts about the logits of a model on a text, here and in transformers, for the certificate.

    model  what was read
    kind   what is compared with transformers, of the kind of a key of `SAVE`: the model in the folder or file `path`
    """
    if kind == "gguf" and model.settings["transformer.rope_scaling"] != "none":
        raise UserError(
            "--verify compares with transformers, which reads no scaling of rotary positions from GGUF files; verify "
            "with --to hf"
        )
    head_dim = model.settings["transformer.head_dim"]
    if kind == "gguf" and choose_architecture(model.settings).model_type == "qwen3" and head_dim != 128:
        raise UserError(
            "--verify compares with transformers, which takes each Qwen 3 in a GGUF file for one of head_dim=128, and "
            f"this one has {head_dim}; verify with --to hf"
        )
    # What was written is read again, so that numbers that were rounded are so on both sides.
    written = model if path == pathlib.Path(model.facts["path"]) else load_foreign(kind, path)
    columns = min(COLUMNS, model.program.config.data.seq_len)
    if model.tokenizer is None:
        tokens, what = np.random.default_rng(0).integers(0, model.vocab_size, ROWS * columns), "random ids"
    else:
        ids = model.tokenizer.encode(text.read_text(encoding="utf-8")[: 16 * ROWS * columns])
        tokens, what = np.resize(np.asarray(ids), ROWS * columns), str(text)
    tokens_BT = tokens.reshape(ROWS, columns).astype(np.int32)
    ours_BTV = written.logits(tokens_BT)
    facts = {"text": what, **compare(ours_BTV, their_logits(path, tokens_BT, model.opened_as))}
    check(facts)
    found = {"verified against transformers": facts}
    if written is not model:
        found["changed by rounding"] = compare(ours_BTV, model.logits(tokens_BT))
    return found


def run(asked: argparse.Namespace) -> None:
    """Converts as `asked`. Raises UserError, and writes nothing, for a mistake."""
    check_destination(asked.destination)
    if asked.verify and not SAVE.keys() & {asked.source_kind, asked.kind}:
        raise UserError(
            f"--verify needs a model of transformers on one side; convert --to {' or '.join(SAVE)}"
        )
    if asked.kind == "peft" and (asked.verify or asked.source_kind != "llmjax"):
        raise UserError(
            "--to peft writes the adapters of a run, which are no model; convert --from llmjax, and leave out --verify"
        )
    if asked.source_kind == "llmjax" and asked.tokenizer:
        raise UserError(
            f"--tokenizer={asked.tokenizer} is for models without one, and a run has its own; leave it out"
        )
    if asked.source_kind == "llmjax":
        model = load_run(asked.source, asked.checkpoint)
    else:
        model = load_foreign(asked.source_kind, asked.source, asked.tokenizer)
    for remark in model.remarks:
        warn(f"note: {remark}")

    def verify(folder: pathlib.Path) -> dict[str, Any]:
        path = folder / FILE if asked.kind == "gguf" else folder
        return verification(model, asked.kind, path, asked.verify_text) if asked.verify else {}

    if asked.kind in SAVE:
        SAVE[asked.kind](model, asked.destination, asked.dtype, verify)
    else:
        facts = {}
        if asked.verify:
            facts = verification(model, asked.source_kind, asked.source, asked.verify_text)
        save_as_run(model, asked.destination, facts)


def main(arguments: list[str]) -> int:
    """The exit code: 0, or 2 after one sentence about what was wrong."""
    asked = parse(arguments)
    try:
        run(asked)
    except (UserError, OSError) as error:
        print(f"error: {reason_of(error)}", file=sys.stderr)
        return 2
    written = json.loads((asked.destination / "certificate.json").read_text(encoding="utf-8"))
    say(
        f"{asked.destination} holds the model of {asked.source}; certificate.json says what became of each tensor"
    )
    for name, value in written.get("verified against transformers", {}).items():
        say(f"  {name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

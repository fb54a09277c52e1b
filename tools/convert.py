"""Converts a model between llmjax, Hugging Face transformers and llama2.c, with a certificate beside the result.

    python -m tools.convert --from hf --to llmjax TinyLlama-1.1B runs/tinyllama
    python -m tools.convert --from llmjax --to hf runs/base exported --verify
    python -m tools.convert --from llama2c --to hf stories260K.bin exported

A model of transformers is a folder with config.json and safetensors files, one of llmjax a workdir, and one of llama2.c
a file of version 0. `docs/weights.md` says which families can be converted.
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
    save_as_hf,
    save_as_run,
)
from llmjax.convert.params import WRITTEN
from llmjax.convert.verify import check, compare, their_logits
from llmjax.errors import UserError, reason_of
from llmjax.terminal.lines import say

# The rows and the tokens of a row that --verify compares. A choice.
ROWS, COLUMNS = 4, 128


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; it ends the program where it is wrong."""
    parser = argparse.ArgumentParser(
        "python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source_kind", required=True, choices=("llmjax", *OPEN))
    parser.add_argument("--to", dest="kind", required=True, choices=("llmjax", "hf"))
    parser.add_argument("source", type=pathlib.Path, help="a folder, or a file of llama2.c")
    parser.add_argument("destination", type=pathlib.Path, help="a folder to be made")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="instead of the tokenizer beside the source")
    parser.add_argument("--checkpoint", default="latest", help="of a workdir: latest, best or a number")
    parser.add_argument(
        "--dtype", default="float32", choices=tuple(WRITTEN), help="of the weights for --to hf"
    )
    parser.add_argument("--verify", action="store_true", help="compares logits with transformers")
    parser.add_argument("--verify_text", type=pathlib.Path, default=pathlib.Path(argparse.__file__))
    return parser.parse_args(arguments)


def verification(model: Model, folder: pathlib.Path, text: pathlib.Path) -> dict[str, Any]:
    """The facts about the logits of `model` and of the model in `folder`, on a text, for the certificate."""
    columns = min(COLUMNS, model.program.config.data.seq_len)
    if model.tokenizer is None:
        tokens, what = np.random.default_rng(0).integers(0, model.vocab_size, ROWS * columns), "random ids"
    else:
        ids = model.tokenizer.encode(text.read_text(encoding="utf-8")[: 16 * ROWS * columns])
        tokens, what = np.resize(np.asarray(ids), ROWS * columns), str(text)
    tokens_BT = tokens.reshape(ROWS, columns).astype(np.int32)
    facts = {"text": what, **compare(model.logits(tokens_BT), their_logits(folder, tokens_BT))}
    check(facts)
    return {"verified against transformers": facts}


def run(asked: argparse.Namespace) -> None:
    """Converts as `asked`. Raises UserError, and writes nothing, for a mistake."""
    check_destination(asked.destination)
    if asked.verify and "hf" not in (asked.source_kind, asked.kind):
        raise UserError("--verify needs a model of transformers on one side; convert --to hf")
    if asked.source_kind == "llmjax":
        model = load_run(asked.source, asked.checkpoint)
    else:
        model = load_foreign(asked.source_kind, asked.source, asked.tokenizer)

    def verify(folder: pathlib.Path) -> dict[str, Any]:
        return verification(model, folder, asked.verify_text) if asked.verify else {}

    if asked.kind == "hf":
        save_as_hf(model, asked.destination, asked.dtype, verify)
    else:
        save_as_run(model, asked.destination, verify(asked.source))


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

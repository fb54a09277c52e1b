"""The tokenizer of an exported model: as files that `transformers` reads, or as facts of a GGUF file."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from llmjax.convert.tokenizer_files import tokenizer_config, tokenizer_json
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats.bytes_as_bpe import as_bpe
from llmjax.data.tokenizer.formats.gguf_vocabulary import gguf_facts
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer
from llmjax.data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llmjax.data.tokenizer.tokenizer import MODEL_FILE, TEMPLATE_FILE, Tokenizer
from llmjax.files import write_atomically
from llmjax.terminal.lines import warn
from llmjax.workdir.contents import write_json

# Files of a tokenizer beside weights, which are copied from one folder of transformers to another.
TOKENIZER_FILES = (
    "tokenizer.model", "spiece.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", TEMPLATE_FILE,
)  # fmt: skip


def copy_tokenizer_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the files of a tokenizer from one folder of transformers to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def save_for_transformers(
    tokenizer: Tokenizer | None, ids: Mapping[str, Any], chat_template: str, folder: pathlib.Path
) -> None:
    """Writes the files of a tokenizer that transformers reads, or says why there are none.

    ids  the ids of the special tokens, by their names in config.json
    """
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer = as_bpe(tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        write_atomically(folder / "tokenizer.json", tokenizer.definition)
    elif not isinstance(tokenizer, SentencePieceTokenizer):
        warn("note: transformers has no tokenizer like that of this model; its folder gets none")
        return
    else:
        write_atomically(folder / MODEL_FILE, tokenizer.model)
        if not tokenizer.is_bpe:
            warn(
                "note: only tokenizer.model is written, because tokenizer.json is made of lossless BPE models only"
            )
            return
        write_json(folder / "tokenizer.json", _tokenizer_json(tokenizer))
    named = {**ids, "unk_token_id": tokenizer.unk_id}
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.is_word_piece:
        own = {"cls": tokenizer.bos_id, "sep": tokenizer.eos_id, "mask": tokenizer.mask_id}
        named |= {f"{name}_token_id": i for name, i in own.items()}
    names = {name.removesuffix("_id"): tokenizer.piece(i) for name, i in named.items() if i is not None}
    write_json(folder / "tokenizer_config.json", tokenizer_config(names))
    if chat_template:
        write_atomically(folder / TEMPLATE_FILE, chat_template)


def _tokenizer_json(own: SentencePieceTokenizer) -> dict[str, Any]:
    special = {own.pad_id, own.bos_id, own.eos_id, own.unk_id, own.mask_id, *own.reserved_ids}
    pieces, scores = own.scored_pieces()
    named = {i: pieces[i] for i in special}
    return tokenizer_json(pieces, scores, named, own.bos_id, own.unk_id, bool(own.text_prefix))


def facts_for_gguf(tokenizer: Tokenizer | None, chat_template: str) -> dict[str, Any]:
    """The facts of a GGUF file about a tokenizer. UserError if such files have none like it."""
    if tokenizer is None:
        warn("note: the model has no tokenizer that is read here; the file gets none")
        return {}
    return gguf_facts(tokenizer) | ({"tokenizer.chat_template": chat_template} if chat_template else {})

"""The byte tokenizer as byte-level BPE without merges, for programs that have no tokenizer of bytes."""

from __future__ import annotations

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats.byte_bpe import SPLITTINGS, byte_characters, definition
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer, SpecialIds
from llmjax.data.tokenizer.tokenizer import SPECIAL_PIECES


def as_bpe(tokenizer: ByteTokenizer) -> JsonTokenizer:
    """A tokenizer with the same ids."""
    silent = [*SPECIAL_PIECES, *(f"<reserved_{i}>" for i in range(len(tokenizer.reserved_ids)))]
    characters = {byte: character for character, byte in byte_characters().items()}
    pieces = [*silent, *(characters[byte] for byte in range(256))]
    ids = SpecialIds(
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id
    )
    silent_ids = range(len(silent))
    return JsonTokenizer(definition(pieces, [], SPLITTINGS["gpt-2"], silent_ids, begin=tokenizer.bos_id), ids)

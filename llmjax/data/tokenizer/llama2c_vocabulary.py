"""The tokenizer file of llama2.c (tok512.bin, tokenizer.bin) as the SentencePiece model that it was made of.

The file is written by tokenizer.py of https://github.com/karpathy/llama2.c: the length of the longest piece, then for
each piece its score (float32), its length (int32) and its bytes. The ids 0, 1 and 2 are the unknown piece, the
beginning and the end of a text. llama2.c encodes as SentencePiece does with BPE: of all neighbours it merges those
whose joined piece has the best score, and it spells what is in no piece in bytes.
"""

from __future__ import annotations

import re
import struct

from llmjax.data.tokenizer.model_file import BYTE, CONTROL, NORMAL, UNKNOWN, bpe_model
from llmjax.data.tokenizer.passages import SPACE_MARK

SPECIAL = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]


def as_model(data: bytes, vocab_size: int) -> bytes:
    """The bytes of a SentencePiece model for the bytes of such a file, which does not say how many pieces it has.

    Raises ValueError if it is not such a file with `vocab_size` pieces.
    """
    pieces, at = [], 4
    for i in range(vocab_size):
        if at + 8 > len(data):
            raise ValueError(f"it ends at piece {i} of {vocab_size}")
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + length].decode("utf-8")
        if not 0 <= length <= len(data) - at - 8 or score != score:
            raise ValueError(f"piece {i} is damaged")
        at += 8 + length
        kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL
        pieces.append((text.replace(" ", SPACE_MARK), score, kind))
    if at != len(data):
        raise ValueError(f"it holds more than {vocab_size} pieces")
    for i, (name, kind) in enumerate(SPECIAL[:vocab_size]):
        pieces[i] = (name, 0.0, kind)
    return bpe_model(pieces)

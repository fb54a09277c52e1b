"""A tokenizer without training: every byte of UTF-8 is a token. It is fast to make, and small enough for tests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llmjax.data.tokenizer import cuts
from llmjax.data.tokenizer.passages import check_unicode
from llmjax.data.tokenizer.tokenizer import META_FILE, NUM_BYTES, SPECIAL_PIECES, checked_ids, save_template
from llmjax.files import write_atomically


class ByteTokenizer:
    """The ids are the special pieces, then `num_reserved` reserved ids, then the 256 bytes. See `Tokenizer`."""

    chat_template = ""
    text_prefix = b""
    strips_spaces = False
    prefixes_parts = False
    lossless = True

    def __init__(self, num_reserved: int = 16):
        self._num_reserved = num_reserved
        self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.mask_id = range(len(SPECIAL_PIECES))
        self._first_byte = len(SPECIAL_PIECES) + num_reserved
        self.reserved_ids = tuple(range(len(SPECIAL_PIECES), self._first_byte))
        self.vocab_size = self._first_byte + NUM_BYTES
        self.fingerprint = hashlib.sha256(f"byte {num_reserved}".encode()).hexdigest()

    def encode(self, text: str, continues: bool = False) -> list[int]:
        check_unicode(text)
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        return (data.astype(np.int64) + self._first_byte).tolist()

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        # Bytes do not depend on their neighbours, so a text may be cut anywhere.
        return cuts.cut_text(chunks, lambda text, i: True, cuts.PIECE_CHARS)

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        data = b"".join([self.id_to_bytes(i) for i in checked_ids(ids, self.vocab_size)])
        return data.decode("utf-8", "replace")

    def id_to_bytes(self, i: int) -> bytes:
        i = checked_ids([i], self.vocab_size)[0] - self._first_byte
        return bytes((i,)) if i >= 0 else b""

    def save(self, directory: str | os.PathLike) -> None:
        meta = {"kind": "byte", "num_reserved": self._num_reserved, "fingerprint": self.fingerprint}
        write_atomically(Path(directory) / META_FILE, json.dumps(meta, indent=2))
        save_template(directory, self.chat_template)

    def __reduce__(self):
        return ByteTokenizer, (self._num_reserved,), {"chat_template": self.chat_template}

"""Held-out text without files: documents in a list, of words or of ids."""

from __future__ import annotations

import numpy as np
import tiny_run

from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.pipeline import PackedSequences
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.evaluate.scoring import Text

TOKENIZER = ByteTokenizer(num_reserved=3)  # 264 ids, which split over mesh.tensor
V = TOKENIZER.vocab_size


class ListStore:
    """What probes read of a store."""

    def __init__(self, documents):
        self.documents = [np.asarray(document, np.int32) for document in documents]
        self.lengths = np.array([len(document) for document in self.documents])

    def tokens(self, document, start, stop):
        assert 0 <= start <= stop <= len(self.documents[document])
        return self.documents[document][start:stop]


def text_of(documents, seq_len):
    """A Text of documents given as ids, bos and eos included."""
    store, ids = ListStore(documents), np.arange(len(documents))
    plan = plan_packing(store.lengths, ids, seq_len, seed=0)
    return Text(PackedSequences(store, plan, 0, repeat=False), ids, TOKENIZER)


def spelled(*texts):
    """Texts as documents of bytes."""
    return [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts]


def words(count, seed=0):
    """English of a sort."""
    return " ".join(np.random.default_rng(seed).choice(tiny_run.WORDS, count))


def chinese(count, seed=0):
    """`count` characters of a poem in no order."""
    return "".join(np.random.default_rng(seed).choice(list(tiny_run.CHINESE), count))

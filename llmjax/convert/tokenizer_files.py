"""What `transformers` wants to find beside a SentencePiece model."""

from __future__ import annotations

from typing import Any


def tokenizer_config(pieces: dict[str, str], adds_space: bool) -> dict[str, Any]:
    """The contents of tokenizer_config.json for a SentencePiece model.

    pieces      the special pieces, by their names there: bos_token, eos_token, unk_token, pad_token
    adds_space  whether the model puts a space before a text
    """
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": adds_space,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        **pieces,
    }

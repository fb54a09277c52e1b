"""Names for the ids of a tokenizer, for files with a line for each id whose fields are separated by spaces."""

from __future__ import annotations

from llmjax.data.tokenizer.passages import SPACE_MARK
from llmjax.data.tokenizer.tokenizer import SPECIAL_PIECES, Tokenizer


def token_names(tokenizer: Tokenizer) -> list[str]:
    """A name for each id: its text, in which U+2581 stands for a space.

    Other white space and bytes that are no whole characters are written as <0x0A>; special ids are called <s> and the
    like. No name has white space, and no two ids have the same name.
    """
    special = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
    # An id may have several roles, and is called by the first of them.
    roles = dict(reversed(list(zip(special, SPECIAL_PIECES, strict=True))))
    names: list[str] = []
    taken: set[str] = set()
    for i in range(tokenizer.vocab_size):
        data = tokenizer.id_to_bytes(i)
        name = _shown(data) if data else roles.get(i, f"<id_{i}>")
        if name in taken:
            name = f"{name}<id_{i}>"
        taken.add(name)
        names.append(name)
    return names


def _shown(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)
    return "".join(map(_without_white_space, text.replace(" ", SPACE_MARK)))


def _without_white_space(character: str) -> str:
    if not character.isspace() and character.isprintable():
        return character
    return "".join(f"<0x{byte:02X}>" for byte in character.encode())

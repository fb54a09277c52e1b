"""Names of token ids for files whose fields are separated by spaces."""

from test_json_tokenizer import MAKERS

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats.token_names import token_names


def test_no_name_has_white_space_and_no_two_are_the_same():
    for tokenizer in (ByteTokenizer(3), *(make() for make in MAKERS.values())):
        names = token_names(tokenizer)
        assert len(names) == len(set(names)) == tokenizer.vocab_size
        assert all(name and len(name.split()) == 1 and name.isprintable() for name in names)


def test_names_say_what_ids_are():
    names = token_names(ByteTokenizer(1))
    tokenizer = ByteTokenizer(1)
    assert [names[i] for i in tokenizer.encode("a \n中")] == [
        "a",
        "▁",
        "<0x0A>",
        "<0xE4>",
        "<0xB8>",
        "<0xAD>",
    ]
    assert names[tokenizer.bos_id] == "<s>" and names[tokenizer.mask_id] == "<mask>"
    words = MAKERS["words"]()
    assert [token_names(words)[i] for i in (0, 1, 3, 6, 8, 13)] == [
        "<pad>", "<id_1>", "<s>", "▁the", "ick", "中",
    ]  # fmt: skip

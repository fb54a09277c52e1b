"""The model families there are, by their names in the config (`model.family`), and the sections of their keys."""

from __future__ import annotations

import dataclasses

from llmjax.errors import UserError, choose
from llmjax.models.bert import BERT_FAMILY
from llmjax.models.encoder_decoder import ENCODER_DECODER_FAMILY
from llmjax.models.family import Family, Sections
from llmjax.models.gpt import GPT_FAMILY
from llmjax.models.lstm import LSTM_FAMILY
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ranges import check_unread, shown

FAMILIES: dict[str, Family] = {
    "gpt": GPT_FAMILY,
    "bert": BERT_FAMILY,
    "lstm": LSTM_FAMILY,
    "encoder_decoder": ENCODER_DECODER_FAMILY,
}
# The sections of all families, with their dataclasses. Families may share one.
SECTIONS: dict[str, type] = {
    name: section for family in FAMILIES.values() for name, section in family.sections.items()
}


def check_all_read(name: str, sections: Sections, compute: LayerCompute) -> None:
    """UserError where a key is set that the family `name` does not read, since it would have no effect."""
    family, chosen = choose(FAMILIES, "model.family", name), f"model.family={name!r}"
    for section, keys in sections.items():
        if section not in family.sections:
            readers = [other for other, kind in FAMILIES.items() if section in kind.sections]
            check_unread(section, keys, chosen, f"model.family={' or '.join(readers)}")
    for field in dataclasses.fields(LayerCompute):
        value = getattr(compute, field.name)
        if field.name not in family.compute and value != field.default:
            raise UserError(
                f"compute.{field.name}={shown(value)} is without effect for {chosen}; leave it at {field.default!r}"
            )

"""A small bidirectional encoder in the style of ModernBERT: masked language modelling with whole words, local layers.

    python -m llmjax.main --config=configs/bert_small.py

Smaller forms of it are trained by the tests. The run itself has not been made to its end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(family="bert")
    # Every third layer is global, the others see 64 tokens to each side.
    c.transformer.update(window=64, global_every=3)
    c.task.update(name="masked_language_model")
    c.masked_language_model.update(rate=0.3, whole_words=True)
    c.data.update(seq_len=256)
    return c

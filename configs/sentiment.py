"""Is a sentence about a film for it or against it? A small encoder, trained from nothing on 10,662 English sentences.

python -m llmjax.main --config=configs/sentiment.py --config.data.sources=rt-polarity.neg,rt-polarity.pos
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.task.update(name="classification")
    # A sentence a line, and a file for each label.
    c.classification.update(label_from="file", labels=("rt-polarity.neg", "rt-polarity.pos"))
    c.data.update(
        sources=("rt-polarity.neg", "rt-polarity.pos"),
        split_on=r"\n",
        seq_len=256,
        held_out_fraction=0.2,
    )
    c.tokenizer.update(kind="unigram", vocab_size=8192)
    c.model.update(family="bert", num_layers=2, dropout=0.4)
    c.train.update(num_updates=240, tokens_per_update=2048)
    c.compute.update(accumulation_steps=1, kernel="full")
    c.optimizer.update(learning_rate=3e-3, warmup_updates=10, final_lr_fraction=0.0)
    c.evaluate.update(every=60)
    return c

"""The film sentences of `sentiment`, begun with all-MiniLM-L6-v2 instead of nothing."""

from ml_collections import ConfigDict

from configs import minilm


def get_config() -> ConfigDict:
    c = minilm.get_config()
    c.task.update(name="classification")
    c.classification.update(label_from="file", labels=("rt-polarity.neg", "rt-polarity.pos"))
    c.data.update(sources=("rt-polarity.neg", "rt-polarity.pos"), split_on=r"\n", held_out_fraction=0.2)
    c.train.update(num_updates=60, tokens_per_update=2048)
    c.compute.update(micro_batch_size=0, accumulation_steps=1, kernel="full")
    c.optimizer.update(learning_rate=1e-4, warmup_updates=6, final_lr_fraction=0.0)
    c.evaluate.update(every=0)
    c.checkpoint.update(every=0)
    return c

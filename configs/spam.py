"""Is a text message spam? A small encoder, trained from nothing on 4,501 messages in English, of which a fifth is held out.

python -m llmjax.main --config=configs/spam.py --config.data.sources=sms_spam_train.tsv
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.task.update(name="classification")
    c.classification.update(labels=("ham", "spam"))
    # Each line is a label, a tab and a message; no first line names the columns.
    c.data.update(
        sources=("sms_spam_train.tsv",), columns=("label", "text"), seq_len=256, held_out_fraction=0.2
    )
    c.tokenizer.update(vocab_size=2048)
    c.model.update(family="bert", num_layers=2, dropout=0.1)
    c.train.update(num_updates=160, tokens_per_update=2048)
    c.compute.update(accumulation_steps=1, kernel="full")
    c.optimizer.update(learning_rate=3e-3, warmup_updates=10, final_lr_fraction=0.0)
    c.evaluate.update(every=40)
    return c

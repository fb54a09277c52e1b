"""A small encoder-decoder (4.3 M parameters) that translates English into Chinese.

    python -m llmjax.main --config=configs/translation.py --config.data.sources=cmn.tsv
    python -m llmjax.main --workdir=runs/translation --mode=translate --prompt='I like this book.'

The pairs are those of Tatoeba (manythings.org/anki, `cmn.txt` under the name `cmn.tsv`): English, Chinese and the
authors of both between tabs; 27,707 were at hand. Ends at 2.385 nats per token and BLEU 39.3 (zh) on the 847 sentences
held out, after 1.64 M tokens, 8 epochs (2 cores of an AMD EPYC, 2026-11-29, 29 minutes beside other work). The second
command then writes 我喜欢这本书。
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(family="encoder_decoder", num_layers=3, model_dim=192, dropout=0.1)
    c.transformer.update(num_heads=4)
    c.task.update(name="translation")
    c.translation.update(source_field="en", label_smoothing=0.1)
    c.tokenizer.update(vocab_size=6144)
    c.data.update(
        sources=("cmn.tsv",),
        columns=("en", "zh", "attribution"),
        text_field="zh",
        seq_len=256,
        source_len=320,
    )
    c.train.update(num_updates=400, tokens_per_update=4096)
    c.compute.update(accumulation_steps=1)
    c.optimizer.update(learning_rate=1e-2, warmup_updates=40)
    c.evaluate.update(every=100)
    c.checkpoint.update(every=100)
    c.generate.update(num_beams=4, max_tokens=64)
    return c

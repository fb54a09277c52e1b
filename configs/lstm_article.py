"""A recurrent language model: 2 layers of long short-term memory, 1024 wide, over 10,000 words embedded in 512.

    python -m llmjax.main --config=configs/lstm_article.py

Its updates are timed by `tools/bench_models.py`. The run itself has not been made to its end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(family="lstm", num_layers=2, model_dim=512, init_std=0.05, dropout=0.1)
    c.lstm.update(hidden_dim=1024)
    c.tokenizer.update(vocab_size=10_000)
    c.data.update(seq_len=128)
    c.train.update(num_updates=80, tokens_per_update=4096)
    c.compute.update(accumulation_steps=1)
    c.optimizer.update(warmup_updates=10)
    return c

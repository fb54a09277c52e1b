"""A GPT of 0.2 million parameters on the text of `base`, in micro-steps of 512 tokens: small enough for 200 runs.

    python -m llmjax.main --config=experiments/2026-11-batch-size-rivals/config.py

`run.py` beside this file sets batch, schedule, learning rate and seed of every run over it.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(num_layers=2, model_dim=64)
    c.transformer.update(num_heads=2)
    c.tokenizer.vocab_size = 1024
    c.data.update(seq_len=128, held_out_fraction=0.05)
    # 409,600 tokens; the learning rate is that of an update of 2,048.
    c.train.update(num_updates=200, tokens_per_update=2048)
    c.compute.update(micro_batch_size=4, accumulation_steps=0)
    c.optimizer.update(warmup_updates=20, schedule="linear", final_lr_fraction=0.0, constant_in="tokens")
    c.controller.update(k_min=2, k_max=48, half_life=50_000)
    c.stability.on_spike = "none"
    c.evaluate.update(every=0, batch_size=64)
    c.checkpoint.every = 0
    c.generate.max_tokens = 1
    return c

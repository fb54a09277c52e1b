"""GPT-2 124M (Radford et al. 2019): 12 layers, 768 wide, learned positions, 1024 tokens.

    python -m llmjax.main --config=configs/gpt2_124m.py --config.data.sources=PATH/*.jsonl.gz

Tokens per update and learning rate follow the 125M model in the GPT-3 paper (Brown et al. 2020, table 2.1). The
config is meant for one GPU or one TPU v5e host, and has not been trained to the end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(num_layers=12, model_dim=768, dtype="bfloat16")
    c.transformer.update(
        num_heads=12, activation="gelu", norm="layernorm", norm_eps=1e-5, position="learned", qk_norm=False,
        use_bias=True,
    )  # fmt: skip
    c.tokenizer.update(vocab_size=50_304, train_bytes=1_000_000_000)
    c.data.update(seq_len=1024)
    c.train.update(num_updates=19_073, tokens_per_update=524_288)
    c.compute.update(micro_batch_size=32, accumulation_steps=0, scan_layers=True, remat="dots")
    c.optimizer.update(name="adamw", learning_rate=6e-4, warmup_updates=715)
    c.evaluate.update(every=1000)
    c.checkpoint.update(every=1000)
    return c

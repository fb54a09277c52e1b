"""A Llama-style decoder of 1.2 billion parameters (Llama 3.2 1B: 16 layers, 2048 wide, 32 query and 8 key/value heads).

    python -m llmjax.main --config=configs/llama_1b.py --mode=plan

This config has been planned and compiled for a TPU v5e 4x4, but not trained. To train, set data.sources and set
plan.topology to "".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(num_layers=16, model_dim=2048, dtype="bfloat16")
    c.transformer.update(
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=8192,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        qk_norm=False,
    )
    c.tokenizer.update(vocab_size=128_256, train_bytes=2_000_000_000)
    c.data.update(seq_len=4096)
    c.mesh.update(data=1, fsdp=-1)
    c.train.update(num_updates=20_000, tokens_per_update=1_048_576)
    c.compute.update(micro_batch_size=16, accumulation_steps=0, scan_layers=True, remat="full")
    c.optimizer.update(name="adamw", learning_rate=3e-4, warmup_updates=2000)
    c.evaluate.update(every=1000)
    c.checkpoint.update(every=1000)
    c.plan.topology = "v5e:4x4"
    return c

"""Llama 3.1 8B on one sequence of 16,777,216 tokens, spread over all 64 chips of a TPU v5p 4x4x4, AdamW, bfloat16.

python -m llmjax.main --config=configs/llama3_8b_long.py --mode=plan
"""

from ml_collections import ConfigDict

from configs import llama_8b


def get_config() -> ConfigDict:
    c = llama_8b.get_config()
    c.model.update(scan_layers=True, remat="full", tile=16_384, rope_theta=5e5)
    c.mesh.update(data=1, seq=64, seq_attention="ring")
    c.data.update(seq_len=2**24)
    c.train.update(num_updates=100, tokens_per_update=2**24, micro_batch_size=1, accumulation_steps=0)
    return c

"""Llama 3.1 8B on one sequence of 16,777,216 tokens, spread over all 64 chips of a TPU v5p 4x4x4, AdamW, bfloat16.

    python -m llmjax.main --config=configs/llama3_8b_long.py --mode=plan            # four minutes on two cores
    python -m llmjax.main --config=configs/llama3_8b_long.py --mode=plan --config.compute.offload=residual \
        --config.data.seq_len=25165824 --config.train.tokens_per_update=25165824

The TPU compiler says what the commands need. The first needs 92.6 GB of the 102.8 GB of a chip. The second, for
25,165,824 tokens, needs 60.7 GB of a chip and 103 GB of host memory per chip, which hold the residuals. On a TPU v5e
16x16 (`--config.plan.topology=v5e:16x16 --config.mesh.seq=256`) a sequence of 6,291,456 tokens needs 13.3 GB of a chip,
and with offload it may be twice as long.
"""

from ml_collections import ConfigDict

from configs import llama_8b


def get_config() -> ConfigDict:
    c = llama_8b.get_config()
    c.transformer.update(rope_theta=5e5)
    c.compute.update(scan_layers=True, remat="full", tile=16_384, micro_batch_size=1, accumulation_steps=0)
    c.mesh.update(data=1, seq=64, seq_attention="ring")
    c.data.update(seq_len=2**24)
    c.train.update(num_updates=100, tokens_per_update=2**24)
    return c

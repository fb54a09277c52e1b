"""A Llama-style decoder of 8 billion parameters (Llama 3.1 8B: 32 layers, 4096 wide, 32 query and 8 key/value heads).

    python -m llmjax.main --config=configs/llama_8b.py --mode=plan

This config has been planned and compiled for a TPU v5p 4x4x4, but not trained. To train, set data.sources and set
plan.topology to "".
"""

from ml_collections import ConfigDict

from configs import llama_1b


def get_config() -> ConfigDict:
    c = llama_1b.get_config()
    c.model.update(num_layers=32, model_dim=4096, tie_embeddings=False)
    c.transformer.update(head_dim=128, mlp_dim=14_336)
    c.data.update(seq_len=8192)
    c.train.update(tokens_per_update=4_194_304)
    c.compute.update(micro_batch_size=64)
    c.plan.topology = "v5p:4x4x4"
    return c

"""The model of `llama_8b` trained on at 131,072 tokens instead of 8192, with Llama 3.1's own scaling of positions.

    python -m llmjax.main --config=configs/extend_llama_8b.py --mode=plan

This config has been planned and compiled for a TPU v5p 4x4x4, but not trained. The compiler says that it needs 48.5 GB
per device. It trains on one billion tokens: half a billion to five billion are enough to extend a model to this length
(Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context"). To train, have a run of `llama_8b` in
runs/llama_8b, set data.sources and set plan.topology to "".
"""

from ml_collections import ConfigDict

from configs import llama_8b


def get_config() -> ConfigDict:
    c = llama_8b.get_config()
    # The published factor is 8, although 131,072 / 8192 is 16. The pairs of dimensions that rotate most slowly so reach
    # angles that they were not trained at.
    c.transformer.update(rope_scaling="llama3", rope_factor=8.0, rope_original_len=8192)
    c.data.update(seq_len=131_072)
    c.mesh.update(fsdp=16, tensor=4)
    c.train.update(num_updates=250)
    c.compute.update(micro_batch_size=16)
    c.optimizer.update(learning_rate=2e-5, warmup_updates=20)
    c.evaluate.update(every=50)
    c.checkpoint.update(every=50, init_from="runs/llama_8b")
    return c

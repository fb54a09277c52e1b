"""The model of `base` trained on at 2048 tokens instead of 512, its positions scaled by YaRN (Peng et al. 2023).

    python -m llmjax.main --config=configs/base.py
    python -m llmjax.main --config=configs/extend_base.py

Held-out loss at 2048 tokens of the parameters as they come from runs/base (the second command with --mode=evaluate and
--config.model.rope_scaling=...): none 3.738, linear 3.864, ntk 3.718, yarn 3.704, llama3 3.702; at 512 it was 3.659.
Ends at 3.626, or 1.518 bits per byte, after 71 seconds on 2 cores of an AMD EPYC (2026-11-24, Python 3.11). The same
100 updates at 512 tokens give 3.658 when scored at 2048 with yarn, and 3.610 at 512: so small a model, of so few
updates, makes little of the longer text.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(rope_scaling="yarn", rope_factor=4.0, rope_original_len=512)
    c.data.update(seq_len=2048)
    c.train.update(num_updates=100)
    c.optimizer.update(learning_rate=1e-3, warmup_updates=10)
    c.evaluate.update(every=25)
    c.checkpoint.update(init_from="runs/base")
    return c

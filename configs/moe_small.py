"""A small mixture of experts: 8 experts a layer, of which a token goes through 2, in the shape of `base`.

    python -m llmjax.main --config=configs/moe_small.py

Smaller forms of it are trained by the tests. The run itself has not been made to its end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.experts.update(num_experts=8, expert_dim=128)
    c.train.update(num_updates=100)
    c.optimizer.update(warmup_updates=10)
    c.evaluate.update(every=50)
    return c

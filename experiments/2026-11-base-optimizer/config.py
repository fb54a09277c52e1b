"""The base run with AdamW, the variant that lost. The others: optimizer.learning_rate on the command line."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.optimizer.update(name="adamw", learning_rate=3e-3)
    return c

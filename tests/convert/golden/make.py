"""Makes the golden files: a tiny random model of each architecture, and the logits that transformers gives for it.

    pip install -e '.[interop]'
    PYTHONPATH=.:tests:tests/convert python tests/convert/golden/make.py

Weights are float16, which both sides read exactly. A folder that is there is left alone, because the same seed does not
give the same weights in every version of PyTorch.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from random_models import TINY, VARIANTS, architecture, config_json, with_random_numbers

from llmjax.convert.verify import logits_of

FOLDER = pathlib.Path(__file__).parent


def make(variant: str, folder: pathlib.Path) -> None:
    config = config_json(variant)
    folder.mkdir()
    config |= {key: TINY[key] for key in config.keys() & TINY.keys()}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    (folder / "config.json").write_text(json.dumps(config))
    settings = transformers.AutoConfig.from_pretrained(folder)
    settings.initializer_range = 0.4
    torch.manual_seed(0)
    opened_as = architecture(variant).opened_as
    pooler = {"add_pooling_layer": False} if opened_as == "AutoModel" else {}
    model = getattr(transformers, opened_as).from_config(settings, attn_implementation="eager", **pooler)
    with_random_numbers(model, config, torch)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            # The sinusoids are not read from a file.
            if "embed_positions" not in name:
                tensor.copy_(tensor.half().float())
    tokens_BT = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 12))
    with torch.no_grad():
        logits_BTV = logits_of(model.eval(), torch.as_tensor(tokens_BT)).numpy()
    np.savez(folder / "logits.npz", tokens_BT=tokens_BT.astype(np.int32), logits_BTV=logits_BTV)
    # Not earlier: it would round the rotary frequencies, too.
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    for variant in VARIANTS:
        folder = FOLDER / variant.replace(" ", "_")
        if not folder.exists():
            make(variant, folder)

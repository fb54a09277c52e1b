"""Compares logits of ours with those of `transformers` on the same weights and tokens. Logits are the proof of a
conversion: equal weights in the wrong places look alike."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from llmjax.errors import UserError

# The largest difference of two logits that counts as equal, divided by the largest logit. A choice: float32 in two
# programs differs by about 1e-6, and a mistake of a conversion by more than 1e-2.
TOLERANCE = 1e-3


def their_logits(
    path: pathlib.Path, tokens_BT: np.ndarray, opened_as: str = "AutoModelForCausalLM"
) -> np.ndarray:
    """logits_BTV, float32, as `transformers` computes them with the model in a folder or a GGUF file.

    opened_as  the class of `transformers` that opens it

    UserError if the package is missing.
    """
    in_file = path.is_file()
    try:
        import torch
        import transformers

        if in_file:
            import accelerate  # noqa: F401 - transformers reads GGUF files with it
    except ImportError:
        raise UserError("--verify compares with transformers; pip install llmjax[interop]") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = getattr(transformers, opened_as).from_pretrained(
            path.parent if in_file else path,
            gguf_file=path.name if in_file else None,
            dtype=torch.float32,
            attn_implementation="eager",
        )
    except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
        raise UserError(
            f"--verify cannot compare, because transformers {transformers.__version__} does not open what was written "
            f"({str(error).strip().splitlines()[0]}); leave --verify out"
        ) from error
    with torch.no_grad():
        logits: np.ndarray = logits_of(model.eval(), torch.as_tensor(tokens_BT, dtype=torch.long)).numpy()
    return logits


def logits_of(model: Any, tokens_BT: Any, **arguments: Any) -> Any:
    """logits_BTV of a model of `transformers`, as a tensor of PyTorch.

    A model without a head, such as BertModel, gets the one that it has here: the embedding is the output matrix. A
    model that reads a second text reads the same tokens.
    """
    if model.config.is_encoder_decoder:
        arguments = {"decoder_input_ids": tokens_BT, **arguments}
    out = model(tokens_BT, **arguments)
    return out.logits if "logits" in out else out.last_hidden_state @ model.get_input_embeddings().weight.T


def compare(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> dict[str, Any]:
    """How two arrays of logits differ.

    The largest difference; the same divided by the largest logit; the mean Kullback-Leibler divergence of our
    probabilities from theirs, in nats; and the share of positions at which both have the same likeliest token.
    """
    ours, theirs = ours_BTV.astype(np.float64), theirs_BTV.astype(np.float64)
    difference, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    return {
        "positions": int(np.prod(ours.shape[:-1])),
        "largest logit": scale,
        "largest difference": difference,
        "largest difference / largest logit": difference / max(scale, 1e-30),
        "KL": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))),
        "argmax agreement": float(np.mean(ours.argmax(-1) == theirs.argmax(-1))),
    }


def check(facts: dict[str, Any]) -> None:
    """UserError if `compare` found more than rounding."""
    relative = facts["largest difference / largest logit"]
    if not relative <= TOLERANCE:
        raise UserError(
            f"the logits differ from those of transformers by {relative:.2g} of the largest logit, and at most "
            f"{TOLERANCE:g} is rounding; nothing was written, so report this model"
        )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

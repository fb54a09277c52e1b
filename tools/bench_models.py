"""Measures how many tokens per second the recurrent family trains on, beside torch.nn.LSTM with the same sizes.

    pip install torch==2.13.0
    python tools/bench_models.py

The sizes are those of `configs/lstm_article.py`: 10,000 words, embeddings of 512, 2 layers of 1024, an output matrix
that is the embedding. Both sides are float32, with AdamW and clipping. Ours is the training step of the config on
packed documents, whose states begin anew. The rival reads rows of one text each, in which no state does.

Each side runs in a process of its own, and the two take turns. Values are medians over the rounds, and the ratio is the
median of the ratios of each round. The output has one JSON object in each line. Run it on an idle machine.
"""

from __future__ import annotations

import functools
import runpy
import statistics
from collections.abc import Callable
from typing import Any

from bench_train import ROOT, WARMUP_UPDATES, make_ours
from lines import can_run, make_parser, report
from turns import seconds, take_turns

from llmjax.config.reading import read_config
from llmjax.config.resolve import Derived, resolve_config
from llmjax.config.schema import Config
from llmjax.parallel.host_memory import keep_freed_memory

# The goal of the ratio ours / rival: as fast as PyTorch.
GOAL = 1.0
# Changes to configs/lstm_article.py that both sides have.
ALIKE = {"optimizer.name": "adamw", "model.dropout": 0.0}
# The shapes that can be measured, as changes to configs/lstm_article.py.
SHAPES = {
    "article": ALIKE,
    "smoke": {
        **ALIKE,
        "train.tokens_per_update": 4 * 32,
        "compute.accumulation_steps": 1,
        "data.seq_len": 32,
        "model.model_dim": 32,
        "lstm.hidden_dim": 48,
        "tokenizer.vocab_size": 512,
    },
}


def load_config(changes: dict[str, Any]) -> tuple[Config, Derived]:
    """configs/lstm_article.py with these changes, {whole key: value}, resolved for one device."""
    raw = runpy.run_path(str(ROOT / "configs" / "lstm_article.py"))["get_config"]()
    raw.update_from_flattened_dict(changes)
    return resolve_config(read_config(raw.to_dict()), 1)


def make_rival(config: Config, derived: Derived) -> tuple[Callable[[], float], int]:
    """A function that makes one update with torch.nn.LSTM and returns its loss, and the number of parameters."""
    import torch

    model, batch, vocab = config.model, derived.batch, config.tokenizer.vocab_size
    hidden = config.families["lstm"].hidden_dim
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(vocab, model.model_dim)
    network = torch.nn.LSTM(model.model_dim, hidden, model.num_layers, batch_first=True)
    projection = torch.nn.Linear(hidden, model.model_dim, bias=False)
    parameters = [p for part in (embedding, network, projection) for p in part.parameters()]
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=model.init_std)
    o, betas = config.optimizer, (config.adamw.beta1, config.adamw.beta2)
    optimizer = torch.optim.AdamW(
        parameters, lr=o.learning_rate, betas=betas, weight_decay=o.weight_decay, fused=True
    )
    rows, steps = batch.micro_batch_size, batch.accumulation_steps
    micro = [torch.randint(0, vocab, (rows, batch.seq_len + 1)) for _ in range(steps)]

    def update() -> float:
        total = 0.0
        for tokens in micro:
            out, _ = network(embedding(tokens[:, :-1]))
            logits = projection(out) @ embedding.weight.T
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, vocab), tokens[:, 1:].reshape(-1))
            (loss / steps).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / steps

    return update, sum(p.numel() for p in parameters)


def make_side(side: str, shape: str) -> tuple[Callable[[], float], tuple[int, str]]:
    """One side, "ours" or "rival", for `take_turns`: a function that measures an update in seconds, and the number of
    parameters with the name of the side."""
    config, derived = load_config(SHAPES[shape])
    if side == "ours":
        keep_freed_memory()
        (update, size), name = make_ours(config, derived), "llmjax"
    else:
        import torch

        (update, size), name = make_rival(config, derived), f"torch.nn.LSTM of PyTorch {torch.__version__}"
    for _ in range(WARMUP_UPDATES):
        update()
    return functools.partial(seconds, update), (size, name)


def bench(shape: str, rounds: int) -> None:
    """Measures both sides in turn, `rounds` times, and reports tokens per second for a shape of `SHAPES`."""
    ours, other = take_turns(
        [functools.partial(make_side, side, shape) for side in ("ours", "rival")], rounds
    )
    (size, _), (rival_size, rival_name) = ours.facts, other.facts
    batch = load_config(SHAPES[shape])[1].batch
    # Times are the inverse of speeds, so this is ours / rival in tokens per second.
    ratio = statistics.median(b / a for a, b in zip(ours.values, other.values, strict=True))
    report(
        f"train_lstm_{shape}",
        round(batch.tokens_per_update / statistics.median(ours.values)),
        "tokens/s",
        rival_name,
        round(batch.tokens_per_update / statistics.median(other.values)),
        GOAL,
        ratio >= GOAL,
        ratio=round(ratio, 3),
        parameters=size,
        rival_parameters=rival_size,
        batch=batch.describe(),
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    shape, rounds = ("smoke", 1) if args.smoke else ("article", args.rounds)
    if can_run(f"train_lstm_{shape}", "torch", args.smoke):
        bench(shape, rounds)


if __name__ == "__main__":
    main()

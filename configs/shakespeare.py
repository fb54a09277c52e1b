"""Tiny Shakespeare by bytes, as quickly as possible to a held-out loss of 1.88 nats per character.

    python -m llmjax.main --config=configs/shakespeare.py --config.data.sources=tinyshakespeare.txt

The text is github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt, of which the last tenth is held out, as in
nanoGPT. Ends at 1.865 and 1.870 nats per character there with the seeds 7 and 8 (2 cores of an Intel Xeon, 2026-11-29),
after 307,200 tokens. The whole command took 28 s, and 21 s with compiled programs in the cache, where nanoGPT's recipe
took 57 s (2 cores of an AMD EPYC, 2026-11-30, seeds 101 to 103: 1.885, 1.851, 1.873; `tools/bench_time_to_loss.py`).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.update(num_layers=2)
    c.tokenizer.update(kind="byte", num_reserved=0)
    c.data.update(
        sources=("tinyshakespeare.txt",), seq_len=128, hold_out="tails", held_out_fraction=0.1, num_workers=1
    )
    c.train.update(num_updates=300, tokens_per_update=1024)
    # Rows are so short that all scores of a row at once are cheap, and compile sooner than blocks.
    c.compute.update(accumulation_steps=1, kernel="full")
    c.optimizer.update(learning_rate=1.2e-2, warmup_updates=15, final_lr_fraction=0.0)
    # One evaluation, sample and checkpoint at the end.
    c.evaluate.update(every=0, batch_size=64)
    c.checkpoint.update(every=0)
    return c

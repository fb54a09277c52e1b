"""Keys that have another name now: the config of an older run, or a command line from before, says the old one."""

MOVED = {
    "model.scan_layers": "compute.scan_layers",
    "model.remat": "compute.remat",
    "model.offload": "compute.offload",
    "model.tile": "compute.tile",
    "model.attention": "compute.kernel",
    "train.micro_batch_size": "compute.micro_batch_size",
    "train.accumulation_steps": "compute.accumulation_steps",
    "train.accumulation": "compute.engine",
    "train.fused_gather": "compute.gather",
    "optimizer.offload": "compute.offload_optimizer",
}

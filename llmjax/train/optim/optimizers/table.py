"""The optimizers there are, by their names in the config (`optimizer.name`), which are the names of their sections."""

from __future__ import annotations

from llmjax.ranges import check_unread
from llmjax.train.optim.optimizers.adafactor import ADAFACTOR
from llmjax.train.optim.optimizers.adamw import ADAMW
from llmjax.train.optim.optimizers.contract import OptimizerKind, Sections
from llmjax.train.optim.optimizers.lion import LION
from llmjax.train.optim.optimizers.muon import MUON
from llmjax.train.optim.optimizers.schedule_free_adamw import SCHEDULE_FREE_ADAMW

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": ADAMW,
    "lion": LION,
    "adafactor": ADAFACTOR,
    "muon": MUON,
    "schedule_free_adamw": SCHEDULE_FREE_ADAMW,
}


def check_all_read(name: str, sections: Sections) -> None:
    """UserError where a key is set that the optimizer `name` does not read, since it would have no effect."""
    for section, keys in sections.items():
        if section not in OPTIMIZERS[name].reads:
            readers = [other for other, kind in OPTIMIZERS.items() if section in kind.reads]
            check_unread(section, keys, f"optimizer.name={name!r}", f"optimizer.name={' or '.join(readers)}")

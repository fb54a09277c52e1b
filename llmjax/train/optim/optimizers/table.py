"""The optimizers there are, by their names in the config (`optimizer.name`), which are the names of their sections."""

from __future__ import annotations

from llmjax.errors import UserError
from llmjax.ranges import shown, unset
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
    unread = {section: keys for section, keys in sections.items() if section not in OPTIMIZERS[name].reads}
    for section, keys in unread.items():
        cls: type = type(keys)
        for key, value in unset(cls).items():
            if getattr(keys, key) != value:
                readers = [other for other, kind in OPTIMIZERS.items() if section in kind.reads]
                raise UserError(
                    f"{section}.{key}={shown(getattr(keys, key))} is without effect for optimizer.name={name!r}; "
                    f"set optimizer.name={' or '.join(readers)}, or leave {section}.{key} at {value!r}"
                )

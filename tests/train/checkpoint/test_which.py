"""A checkpoint is the one that was named, or a sentence says why there is none."""

import pytest

from llmjax.errors import UserError
from llmjax.train.checkpoint.config import CheckpointConfig
from llmjax.train.checkpoint.which import check_name, named_updates


class Saved:
    """Checkpoints that know their held-out losses."""

    directory = "runs/base/checkpoints"

    def __init__(self, **losses):
        self.losses = {int(name[1:]): loss for name, loss in losses.items()}

    def updates(self):
        return sorted(self.losses)

    def best(self):
        scored = {update: loss for update, loss in self.losses.items() if loss is not None}
        return min(scored, key=scored.get, default=None)


KEYS = ("--checkpoint", "checkpoint.init_checkpoint")


@pytest.mark.parametrize("key", KEYS)
def test_the_best_of_none_that_was_evaluated_is_a_sentence_and_not_the_latest(key):
    sentence = rf"^{key}=best, but no checkpoint in runs/base/checkpoints has a held-out loss .*: 2, 4$"
    with pytest.raises(UserError, match=sentence):
        named_updates(Saved(u2=None, u4=None), key, "best")
    assert named_updates(Saved(u2=1.0, u4=None), key, "best") == [2]


def test_names_and_numbers_are_what_they_say():
    saved = Saved(u2=1.0, u4=2.0)
    names = {"latest": [None], "best": [2], "0": [0], "4": [4], "7": [7], "average:2": [2, 4]}
    assert {name: named_updates(saved, "--checkpoint", name) for name in names} == names
    with pytest.raises(
        UserError, match="--checkpoint=average:3 averages 3 checkpoints, and runs/base/.* holds 2; give"
    ):
        named_updates(saved, "--checkpoint", "average:3")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Best",
        "LATEST",
        " latest",
        "newest",
        "average",
        "average:1",
        "average:02",
        "007",
        "-1",
        "+4",
        "4.0",
        "1e3",
        "٣",
        "²",
        "9" * 20,
        "9" * 5000,
    ],
)
def test_what_is_no_name_of_a_checkpoint_is_one_sentence(name):
    rule = "is neither latest, best, the number of an update nor an average of several; give one of these"
    for key in KEYS:
        with pytest.raises(UserError, match=rf"^{key}='.*{rule}") as error:
            check_name(key, name)
        assert len(str(error.value)) < 250
    with pytest.raises(UserError, match=rule):
        CheckpointConfig(init_from="run", init_checkpoint=name)

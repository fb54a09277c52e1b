"""The length of rows follows from the tokens seen; what makes no schedule is one sentence."""

import pytest

from llmjax.errors import UserError
from llmjax.train.steering.length_schedule import make_length_schedule


def test_a_length_holds_for_the_updates_that_begin_at_its_point_or_after():
    schedule = make_length_schedule(("0:128", "1000:512", "5000:64"), 512)
    seen = (0, 999, 1000, 4999, 5000, 10**13)
    assert [schedule.length(s) for s in seen] == [128, 128, 512, 512, 64, 64]
    assert schedule.lengths == (64, 128, 512)
    assert schedule.describe() == "128 tokens, 512 from 1,000 tokens seen on, 64 from 5,000 tokens seen on"


def test_without_points_rows_are_whole():
    schedule = make_length_schedule((), 512, seq_shards=8)
    assert {schedule.length(seen) for seen in (0, 10**13)} == {512} == set(schedule.lengths)


@pytest.mark.parametrize(
    ("points", "shards", "sentence"),
    [
        (("128",), 1, "data.length_points has '128', which is not TOKENS_SEEN:LENGTH"),
        (("0:a",), 1, "data.length_points has '0:a', which is not"),
        (("5:128",), 1, r"data.length_points=\('5:128',\) does not say how the run begins; .* 0:LENGTH"),
        (("0:128", "9:256", "9:512"), 1, "data.length_points goes backwards from 9:256 to 9:512; .* tokens seen"),
        (("0:100",), 1, "0:100, but rows of data.seq_len=512 cannot be cut into rows of 100; .* example 128"),
        (("0:0",), 1, "0:0, but rows of data.seq_len=512 cannot be cut into rows of 0; .* example 1"),
        (("0:-4",), 1, "0:-4, but rows"),
        (("0:1024",), 1, "0:1024, but rows of data.seq_len=512 .* example 512"),
        (("0:512", "7:4"), 8, "7:4, but 4 is not divisible by mesh.seq=8; use for example 8"),
    ],
)  # fmt: skip
def test_points_that_make_no_schedule_are_one_sentence(points, shards, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        make_length_schedule(points, 512, shards)
    assert "\n" not in str(error.value)

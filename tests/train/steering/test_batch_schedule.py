"""The arithmetic of a batch closes or says why not; batches grow as scheduled."""

import pytest

from llmjax.errors import UserError
from llmjax.train.steering.batch_schedule import BatchArithmetic, make_batch_schedule, resolve_batch


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation_steps", "expected"),
    [(8, 2, (8, 2)), (0, 2, (8, 2)), (4, 0, (4, 4)), (0, 0, (16, 1)), (16, 0, (16, 1))],
)
def test_what_is_not_given_of_the_batch_follows(micro_batch_size, accumulation_steps, expected):
    batch = resolve_batch(8192, 512, micro_batch_size, accumulation_steps, data_shards=4)
    assert (batch.micro_batch_size, batch.accumulation_steps) == expected
    assert batch.sequences_per_update == 16 and batch.tokens_per_update == 8192


def test_the_batch_describes_its_arithmetic():
    assert resolve_batch(8192, 512, 0, 2).describe() == (
        "8 sequences x 512 tokens x 2 micro-steps = 8,192 tokens per update"
    )
    assert (
        resolve_batch(512, 512, 0, 0).describe()
        == "1 sequence x 512 tokens x 1 micro-step = 512 tokens per update"
    )


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ((8000, 512, 0, 0), ("train.tokens_per_update=8000", "data.seq_len=512", "7680")),
        ((100, 512, 0, 0), ("train.tokens_per_update=100", "data.seq_len=512", "use for example 512")),
        (
            (8192, 512, 4, 2),
            ("compute.micro_batch_size=4", "compute.accumulation_steps=2", "tokens_per_update=4096"),
        ),
        ((8192, 512, 3, 0), ("compute.micro_batch_size=3", "16 sequences")),
        ((8192, 512, 0, 5), ("compute.accumulation_steps=5", "16 sequences")),
        ((8192, 512, 0, 32), ("compute.accumulation_steps=32", "16 sequences")),
        ((8192, 512, 4, 0, 8), ("compute.micro_batch_size=4", "8 shards", "mesh.data x mesh.fsdp")),
        ((8192, 512, 0, 4, 8), ("compute.micro_batch_size=4", "8 shards", "compute.accumulation_steps=4")),
        ((0, 512, 0, 0), ("train.tokens_per_update=0",)),
        ((8192, 0, 0, 0), ("data.seq_len=0",)),
        ((8192, 512, -1, 0), ("compute.micro_batch_size=-1",)),
        ((8192, 512, 0, -2), ("compute.accumulation_steps=-2",)),
    ],
)
def test_batch_arithmetic_that_does_not_close_is_one_sentence_that_names_the_keys(arguments, keys):
    with pytest.raises(UserError) as error:
        resolve_batch(*arguments)
    assert all(key in str(error.value) for key in keys), str(error.value)
    assert "\n" not in str(error.value)


BATCH = BatchArithmetic(seq_len=512, micro_batch_size=2, accumulation_steps=4)  # 1024 tokens a micro-step


def test_a_constant_schedule_is_the_batch_itself():
    schedule = make_batch_schedule("constant", (), BATCH)
    assert {schedule.accumulation_steps(seen) for seen in (0, 10**6, 10**13)} == {4} == {schedule.max_steps}


def test_a_piecewise_schedule_holds_each_point_until_the_next():
    schedule = make_batch_schedule("piecewise", ("0:1024", "10000:4096", "20000:8192"), BATCH)
    seen = (0, 9999, 10000, 19999, 20000, 10**12)
    assert [schedule.accumulation_steps(s) for s in seen] == [1, 1, 4, 4, 8, 8]
    assert schedule.max_steps == 8


def test_a_linear_schedule_interpolates_in_whole_micro_steps():
    schedule = make_batch_schedule("linear", ("0:1024", "70000:8192"), BATCH)
    assert [schedule.accumulation_steps(s) for s in (0, 10000, 35000, 69999, 70000, 10**9)] == [
        1,
        2,
        4,
        8,
        8,
        8,
    ]
    steps = [schedule.accumulation_steps(s) for s in range(0, 80000, 500)]
    assert steps == sorted(steps) and set(steps) == set(range(1, 9))


@pytest.mark.parametrize(
    ("kind", "points", "sentence"),
    [
        ("cubic", (), "train.batch_schedule='cubic' .* constant, piecewise, linear"),
        ("constant", ("0:1024",), "train.batch_points=.* no meaning"),
        ("linear", (), "how the run begins"),
        ("piecewise", ("5:1024",), "how the run begins"),
        ("piecewise", ("0:2048", "100:1024"), "goes backwards from 0:2048 to 100:1024"),
        ("piecewise", ("0:1024", "100:2048", "100:4096"), "goes backwards from 100:2048 to 100:4096"),
        (
            "linear",
            ("0:1024", "100:1500"),
            "100:1500, but 1500 is no multiple of the 1024 tokens .* example 1024",
        ),
        ("linear", ("0:0", "100:1024"), "0:0, but"),
        ("linear", ("1024",), "'1024', which is not TOKENS_SEEN:TOKENS_PER_UPDATE"),
    ],
)
def test_points_that_make_no_schedule_are_one_sentence(kind, points, sentence):
    with pytest.raises(UserError, match=sentence):
        make_batch_schedule(kind, points, BATCH)

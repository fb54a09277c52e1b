"""What processes tell each other: alone nothing changes, and of two none is left waiting."""

import pytest
from test_hosts import free_port, start_worker

from llmjax.errors import UserError
from llmjax.parallel import agreement

WORKER = """
import jax
jax.config.update("jax_platforms", "cpu")
from llmjax.errors import UserError
from llmjax.parallel import agreement, hosts
hosts.initialize()
index = jax.process_index()
assert agreement.gather({"index": index, "text": "诗" * index}) == [
    {"index": 0, "text": ""}, {"index": 1, "text": "诗"}]
assert agreement.from_primary(index + 5) == 5
assert agreement.on_primary(lambda: [index, "a"]) == [0, "a"]
agreement.check_same({"config": "a", "update": "60"}, "remedy")

def said(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def fail(on, error):
    if index == on:
        raise error
    return index

assert agreement.together(lambda: index) == index
print(said(lambda: agreement.check_same({"config": "a", "update": str(60 - index)}, "share the disk")))
print(said(lambda: agreement.together(lambda: fail(1, UserError("no file")))))
print(said(lambda: agreement.together(lambda: fail(0, ZeroDivisionError("by zero")))))
print(said(lambda: agreement.on_primary(lambda: fail(0, OSError("disk full")))))
"""


@pytest.mark.slow
def test_of_two_processes_both_go_on_or_both_say_why_not():
    port = free_port()
    workers = [start_worker(WORKER, port, index) for index in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    differ = (
        "UserError: the 2 processes differ in update: process 0 sees 60, process 1 sees 59; share the disk"
    )
    first, second = ([line for line in out.splitlines() if "Error" in line] for out in outputs)
    other = "UserError: process {} of 2 cannot go on: {}"
    assert first == [differ, other.format(1, "no file"), "ZeroDivisionError: by zero", "OSError: disk full"]
    assert second == [
        differ,
        "UserError: no file",
        other.format(0, "by zero"),
        other.format(0, "disk full"),
    ]


def test_alone_a_process_agrees_with_itself():
    assert agreement.gather([1, "诗"]) == [[1, "诗"]] and agreement.from_primary({"a": 1}) == {"a": 1}
    agreement.check_same({"update": "60"}, "remedy")
    assert agreement.together(lambda: 5) == 5 == agreement.on_primary(lambda: 5)

    def fail():
        raise UserError("no file")

    for way in (agreement.together, agreement.on_primary):
        with pytest.raises(UserError, match="^no file$"):
            way(fail)

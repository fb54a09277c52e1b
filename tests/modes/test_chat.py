"""`--mode=chat`: answers that were learned, the commands, and a conversation that grows too long."""

import io
import json
import re

import pytest
import tiny_run
from tiny_run import command

from llmjax import main
from llmjax.modes.chat import Chat
from llmjax.modes.dispatch import make_request
from llmjax.modes.generate import load
from llmjax.workdir.contents import saved_config
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

SETTINGS = {
    "task__name": "conversation", "data__text_field": "messages", "data__seq_len": 64, "train__num_updates": 100,
    "compute__accumulation_steps": 1, "optimizer__name": "muon", "optimizer__learning_rate": 0.01,
    "evaluate__every": 0, "checkpoint__every": 0, "model__model_dim": 32, "generate__temperature": 0.0,
    "generate__max_tokens": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    tiny_run.write_pairs(folder / "pairs", 400)
    pairs = [
        json.loads(line)
        for line in (folder / "pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    (folder / "corpus").mkdir()
    talks = [{"messages": [pair["source"], pair["text"]]} for pair in pairs]
    (folder / "corpus" / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    assert main.main(command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    return folder / "run"


def talk(capsys, monkeypatch, workdir, *lines):
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8")
    )
    return run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=chat"])


@pytest.mark.parametrize("leave", ["/exit", "exit", "退出", ""])
def test_it_answers_until_one_leaves(trained, leave, capsys, monkeypatch):
    lines = ["river", leave, "stone"] if leave else ["river"]
    assert talk(capsys, monkeypatch, trained, *lines) == "河\n"


def test_commands_reset_save_and_help(trained, capsys, monkeypatch, tmp_path):
    file = tmp_path / "talk.jsonl"
    said = talk(capsys, monkeypatch, trained, "/help", "river", f"/save {file}", "/reset", "stone")
    assert "/system TEXT" in said and "2 messages are in" in said and said.endswith("石\n")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved == {
        "messages": [{"role": "user", "content": "river"}, {"role": "assistant", "content": "河"}]
    }


def test_what_is_saved_is_all_that_was_said_and_no_file_is_lost(trained, capsys, monkeypatch, tmp_path):
    old, file = tmp_path / "old", tmp_path / "all.jsonl"
    old.write_text("precious")
    lines = [
        f"/save {file}",
        *["river stone cloud"] * 6,
        f"/save {old}",
        f"/save {tmp_path}/no/x",
        f"/save {file}",
    ]
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8")
    )
    assert main.main(["llmjax", f"--workdir={trained}", "--mode=chat"]) == 0
    err = capsys.readouterr().err
    assert "there is no answer to save yet" in err and f"{str(old)!r} exists; give a new file" in err
    assert "does not exist; give a file in one that does" in err and not (tmp_path / "no").exists()
    assert old.read_text() == "precious" and "left out" in err
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 12


def test_long_conversations_are_cut_between_turns_which_the_plan_says(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    talks = [["a b", "c " * 10] * 9, ["a", "b" * 200], *[[str(i), "b"] for i in range(60)]]
    lines = [json.dumps({"messages": talk}) for talk in talks]
    (tmp_path / "corpus" / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    said = run(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", "--mode=plan", **SETTINGS))
    assert (
        "2 conversations of more than data.seq_len=64 tokens, between turns; 1 of them within a turn of more than that"
        in said
    )
    spoken = "<1><6>a b<7>[[c c c c c c c c c c <2>]]<6>a b<7>[[c c"
    assert f"learned of the first document: what is [[marked]]\n  | {spoken}" in said


def test_no_two_answers_are_drawn_alike(trained, monkeypatch):
    raw = saved_config(trained)
    raw["generate"] |= {"temperature": 50.0, "max_tokens": 16}
    chat, answers = Chat(load(make_request("chat", raw, trained))), set()
    for _ in range(4):
        chat.reset()
        answers.add(chat.answer("river"))
    assert len(answers) > 1


@pytest.mark.parametrize("key", ["num_samples", "num_beams"])
def test_a_key_that_chat_does_not_read_is_refused(trained, key, capsys):
    said = refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=chat", f"--config.generate.{key}=3"])
    assert f"generate.{key}=3 is without effect for --mode=chat" in said


def test_a_wrong_command_is_one_sentence_and_the_conversation_goes_on(trained, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"/nothing\n/save\nriver\n"), encoding="utf-8")
    )
    assert main.main(["llmjax", f"--workdir={trained}", "--mode=chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "河\n"
    assert "/nothing is no command; /help lists them" in err and "/save needs a file" in err


def test_the_oldest_turns_are_left_out_and_said_to_be(trained, capsys):
    request = make_request("chat", saved_config(trained), trained)
    chat = Chat(load(request))
    chat.reset("be kind")
    chat.answer("river " * 4)
    before = list(chat.messages)
    chat.answer("stone " * 4)
    assert chat.messages[0].text == "be kind" and before[1] not in chat.messages
    assert "the oldest turn is left out" in capsys.readouterr().err


def test_a_message_that_is_too_long_is_refused_and_forgets_nothing(trained, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"river\n" + b"x" * 200 + b"\nstone\n"), encoding="utf-8")
    )
    assert main.main(["llmjax", f"--workdir={trained}", "--mode=chat"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("河\n") and out.count("\n") == 2
    assert "data.seq_len=64 leaves room for 56 before an answer; shorten it" in err


def test_a_sample_of_the_run_is_an_answer_and_the_next_command_is_chat(trained):
    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    assert summary["commands"]["chat"].endswith("--mode=chat") and "generate" not in summary["commands"]


def test_modes_for_other_runs_say_which_is_right(trained, tmp_path, capsys):
    said = refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=generate", "--prompt=a"])
    assert "task.name='conversation' learns what an assistant says; use --mode=chat" in said
    assert "gives no labels; use --mode=chat" in refuse(
        capsys, ["llmjax", f"--workdir={trained}", "--mode=classify", "--prompt=a"]
    )
    tiny_run.write_corpus(tmp_path / "corpus")
    words = command(tmp_path, f"--workdir={tmp_path / 'run'}", train__num_updates=1, evaluate__every=0)
    assert main.main(words) == 0
    capsys.readouterr()
    said = refuse(capsys, ["llmjax", f"--workdir={tmp_path / 'run'}", "--mode=chat"])
    assert "task.name='language_model' learns no conversation; use --mode=generate" in said


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_broken_conversation_is_named_by_its_file_and_line(kind, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "talks.jsonl").write_text('{"messages": ["a", "b"]}\n{"messages": ["hi"]}\n')
    settings = {**SETTINGS, "tokenizer__kind": kind}
    said = refuse(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings))
    assert re.search(r"talks.jsonl\W*2: a conversation has no message of the assistant", said), said

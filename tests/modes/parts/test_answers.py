"""Questions as a user asks them: scores on the terminal, answers in a file, and two runs compared."""

import json

import pytest
import tiny_run

import llmjax
from llmjax import main
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture

SETTINGS = {
    "tokenizer__kind": "byte", "train__num_updates": 30, "evaluate__every": 0, "checkpoint__every": 0,
    "compute__accumulation_steps": 1,
}  # fmt: skip
QUESTIONS = [
    {"query": "river stone", "choices": ["cloud river", "zzq#xkw@vvj"], "gold": 0},
    {"query": "", "choices": ["@@##", "stone light"], "gold": 1},
    {"context_options": ["light", "stone"], "continuation": "river", "gold": 1},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_once):  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("questions")
    tiny_run.write_corpus(folder / "corpus")
    assert main.main(tiny_run.command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    return folder / "run"


def write(path, records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return path


def test_answers_are_the_likeliest_texts_and_their_likelihoods_those_of_the_texts(trained, tmp_path, capsys):
    path = write(tmp_path / "words.jsonl", QUESTIONS)
    words = ["llmjax", f"--workdir={trained}", "--mode=evaluate", f"--questions={path}"]
    said = run(capsys, words)
    assert "3 of " in said and "accuracy per byte" in said
    found = json.loads((trained / "questions" / "words.json").read_text())
    likelihoods = [item["log_likelihoods"] for item in found["items"]]
    assert [item["chosen"] for item in found["items"]] == [
        values.index(max(values)) for values in likelihoods
    ]
    # Bytes have no token that reaches from one text into the next, and an end costs the same after both.
    model, item = llmjax.load(trained), found["items"][0]
    whole, context = (model.score(text) for text in ("river stone cloud river", "river stone"))
    total = {key: score["loss"] * score["tokens"] for key, score in (("whole", whole), ("context", context))}
    ends = [generated_end(model, text) for text in ("river stone cloud river", "river stone")]
    assert -item["log_likelihoods"][0] == pytest.approx(
        total["whole"] - ends[0] - (total["context"] - ends[1]), abs=1e-3
    )
    again = run(capsys, [*words, f"--against={trained / 'questions' / 'words.json'}"])
    assert "+0.0000  (+0.0000 to +0.0000): no difference is shown" in again
    assert "\n" not in (sentence := refuse(capsys, [*words, f"--against={path}"])).rstrip("\n")
    assert "holds no answers" in sentence


def generated_end(model, text):
    """The nats of the end of a text."""
    import numpy as np

    from llmjax.evaluate.scoring import Piece, score_pieces

    loaded = model._loaded
    tokens = np.array([loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text), loaded.tokenizer.eos_id])
    labels = np.full(len(tokens) - 1, -1, np.int32)
    labels[-1] = 0
    program = loaded.program

    def losses(params, arrays):
        return program.token_losses(params, program.placement.place(arrays))

    sums = score_pieces(losses, loaded.params, [Piece(tokens, labels)], 1, program.probe_shape)
    return float(sums.loss[0])


@pytest.mark.parametrize("flags, message", [
    (["--questions=absent.jsonl"], "--questions=absent.jsonl does not exist"),
    (["--against=answers.json"], "--against compares answers to --questions, which are not given"),
    (["--mode=generate", "--questions=a"], "--questions is not heeded by --mode=generate"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(trained, flags, message, capsys):
    assert message in refuse(capsys, ["llmjax", f"--workdir={trained}", "--mode=evaluate", *flags])

"""Settings of `--mode=generate`: texts side by side are those of all at once, and stop strings end them."""

import dataclasses

import pytest
import tiny_run
from sections import section

from llmjax import main
from llmjax.errors import UserError
from llmjax.modes.dispatch import make_request
from llmjax.modes.generate import Writer, load
from llmjax.workdir.contents import saved_config
from tests.modes.test_modes import compile_once  # noqa: F401 - a fixture
from tests.modes.test_serve import SETTINGS

PROMPTS = ["river", "a stone", "春江", "", "cloud cloud cloud", "x"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, compile_once):  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("settings")
    tiny_run.write_corpus(folder / "corpus", text=tiny_run.CHINESE)
    assert main.main(tiny_run.command(folder, f"--workdir={folder / 'run'}", **SETTINGS)) == 0
    return load(make_request("generate", saved_config(folder / "run"), folder / "run"))


def write(loaded, prompts=PROMPTS, on_text=lambda row, text: None, **settings):
    changed = dataclasses.replace(loaded.program.config.generate, max_tokens=12, temperature=0.9, **settings)
    program = dataclasses.replace(
        loaded.program, config=dataclasses.replace(loaded.program.config, generate=changed)
    )
    return Writer(dataclasses.replace(loaded, program=program)).write(prompts, on_text, first=3)


def test_texts_side_by_side_are_those_of_all_at_once(loaded):
    pieces = {}

    def add(row, text):
        pieces[row] = pieces.get(row, "") + text

    found = write(loaded, slots=3, num_samples=2, on_text=add)
    assert found == write(loaded, num_samples=2) and len({text for texts in found for text in texts}) > 6
    assert [pieces[row] for row in range(12)] == [text for texts in found for text in texts]


@pytest.mark.parametrize("slots", [0, 3])
def test_a_text_ends_before_its_stop_string_and_the_others_go_on(loaded, slots):
    whole = [texts[0] for texts in write(loaded)]
    stop = whole[0][3:5]
    found = [texts[0] for texts in write(loaded, slots=slots, stop=(stop, "not in any of them"))]
    assert found == [text.split(stop)[0] for text in whole] and found[0] != whole[0] and found[-1] != ""


def test_texts_that_have_all_been_stopped_are_written_no_further(loaded, monkeypatch):
    (text,) = write(loaded, ["river"])[0]
    seen, writer = [], Writer(loaded)
    config = dataclasses.replace(loaded.program.config.generate, stop=(text[0],), temperature=0.9)
    monkeypatch.setattr(writer, "_config", config)
    generate = writer._generate
    monkeypatch.setattr(writer, "_generate", lambda *args: (seen.append(1) or new for new in generate(*args)))
    assert len(writer.write(["river"])[0][0]) < len(text) and len(seen) < 12


def test_min_p_and_a_penalty_change_what_is_written(loaded):
    plain = write(loaded)
    assert write(loaded, repetition_penalty=5.0) != plain and write(loaded, min_p=0.9) != plain
    likeliest = dataclasses.replace(loaded.program.config.generate, temperature=0.0)
    assert write(loaded, min_p=1.0) == [
        Writer(_with(loaded, dataclasses.replace(likeliest, max_tokens=12))).write([prompt])[0]
        for prompt in PROMPTS
    ]


def test_slots_are_refused_where_texts_read_others(loaded):
    class ReadsSources:
        columns = ("source",)

    changed = _with(loaded, dataclasses.replace(loaded.program.config.generate, slots=2))
    derived = dataclasses.replace(loaded.program.derived, examples=ReadsSources())
    program = dataclasses.replace(changed.program, derived=derived)
    with pytest.raises(
        UserError, match="generate.slots=2 writes side by side, and each text reads another one"
    ):
        Writer(dataclasses.replace(changed, program=program))


def _with(loaded, generate):
    config = dataclasses.replace(loaded.program.config, generate=generate)
    return dataclasses.replace(loaded, program=dataclasses.replace(loaded.program, config=config))


@pytest.mark.parametrize(
    "key, value", [("min_p", 0.1), ("repetition_penalty", 2.0), ("stop", ("a",)), ("slots", 4)]
)
def test_beam_search_refuses_what_it_does_not_heed(key, value):
    with pytest.raises(UserError, match=rf"generate.{key}=.* is without effect for generate.num_beams=2"):
        section("generate", num_beams=2, **{key: value})


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="generate.stop has an empty string"):
        section("generate", stop=("a", ""))

"""Conversions from the command line: workdirs that work, folders of transformers, certificates, and mistakes."""

import json

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import command

from llmjax import main
from llmjax.build.conversion import load_run
from llmjax.convert.files.safetensors_folder import open_tensors
from llmjax.data.tokenizer.loading import load_tokenizer
from tests.convert import random_models
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture
from tools import convert

CERTIFICATE = "certificate.json"


@pytest.fixture(scope="module")
def stories(tmp_path_factory, request):
    """The workdir of stories260K, converted from llama2.c."""
    data = request.getfixturevalue("shared_data") / "weights" / "stories260K"
    workdir = tmp_path_factory.mktemp("stories") / "workdir"
    assert convert_to("llama2c", "llmjax", data / "stories260K.bin", workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a tiny run with a SentencePiece tokenizer, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_run.write_corpus(folder / "corpus")
    settings = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 320, "model__tie_embeddings": False}
    assert main.main(command(folder, f"--workdir={folder / 'run'}", **settings)) == 0
    return folder / "run"


def convert_to(source_kind, kind, source, destination, *words):
    return convert.main(["--from", source_kind, "--to", kind, str(source), str(destination), *words])


def refused(capsys, *words):
    assert convert_to(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def certificate(folder):
    return json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))


def greedy(capsys, workdir, tokens, *words):
    settings = [f"--config.generate.max_tokens={tokens}", "--config.generate.temperature=0", *words]
    return run(capsys, ["llmjax", f"--workdir={workdir}", "--mode=generate", *settings])


def test_stories260k_writes_what_llama2c_writes_character_by_character(stories, shared_data, capsys):
    golden = (shared_data / "weights" / "stories260K" / "golden_greedy_200.txt").read_text()
    assert greedy(capsys, stories, 200).endswith(golden + "\n")


def test_through_transformers_and_back_every_parameter_is_the_same(stories, tmp_path, capsys):
    assert convert_to("llmjax", "hf", stories, tmp_path / "hf") == 0
    assert convert_to("hf", "llmjax", tmp_path / "hf", tmp_path / "again") == 0
    before, after = load_run(stories), load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert before.settings == after.settings and before.tokenizer.fingerprint == after.tokenizer.fingerprint
    capsys.readouterr()
    assert greedy(capsys, stories, 20) == greedy(capsys, tmp_path / "again", 20)


def test_a_certificate_accounts_for_every_tensor_and_every_file(stories, shared_data, tmp_path):
    found = certificate(stories)
    tensors = found["from"]["tensors"]
    assert len(tensors) == 5 * 9 + 4 and not found["from"]["missing"] and not found["from"]["unexpected"]
    assert tensors["layers.2.wq"]["became"] == ["layers/attention/wq_DNH[2]"]
    assert "nothing" in tensors["freqs_cos"]["became"]
    assert found["to"]["output matrix"] == "the embedding"
    assert found["to"]["rotary positions"]["transformer.rope_theta"] == 10000.0
    assert {"config.json", "tokenizer/tokenizer.model"} <= found["files"].keys()
    assert convert_to("llmjax", "hf", stories, tmp_path / "hf", "--dtype", "bfloat16") == 0
    written = certificate(tmp_path / "hf")["to"]["tensors"]
    there = open_tensors(tmp_path / "hf")
    assert written.keys() == there.keys()
    assert all(list(there[name].shape) == facts["shape"] for name, facts in written.items())
    assert {tensor.dtype for tensor in there.values()} == {"BF16"}


def test_a_trained_run_is_exported_and_a_new_run_begins_with_it(trained, tmp_path, capsys):
    exported = tmp_path / "hf"
    assert convert_to("llmjax", "hf", trained, exported) == 0
    # A model that is written whole has nothing to remark on.
    assert capsys.readouterr().err == ""
    assert certificate(exported)["to"]["architecture"] == "Qwen3ForCausalLM"
    settings = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 320, "model__tie_embeddings": False}
    settings |= {"checkpoint__init_from": exported, "train__num_updates": 1}
    words = command(trained.parent, f"--workdir={tmp_path / 'new'}", **settings)
    out = run(capsys, [*words, "--mode=evaluate"])
    last = tiny_run.read_lines(trained)[-1]
    assert f"{last['loss']:.4f}" in out and f"update 0 of {exported}" in out
    assert f"beginning with the parameters of update 0 of {exported}" in run(capsys, words)
    # It goes on without the folder.
    (exported / "model.safetensors").unlink()
    run(capsys, ["llmjax", f"--workdir={tmp_path / 'new'}", "--config.train.num_updates=2"])
    other = command(
        trained.parent, f"--workdir={tmp_path / 'other'}", **settings | {"checkpoint__init_from": trained}
    )
    err = refuse(capsys, [*other, "--config.model.num_layers=2", "--config.transformer.qk_norm=false"])
    assert "model.num_layers=2, but the run in" in err and "and also transformer.qk_norm=True" in err


def test_a_folder_without_what_a_run_needs_is_refused(trained, tmp_path, capsys):
    exported = tmp_path / "hf"
    assert convert_to("llmjax", "hf", trained, exported) == 0
    capsys.readouterr()
    settings = {"checkpoint__init_from": exported, "model__tie_embeddings": False}
    words = command(trained.parent, f"--workdir={tmp_path / 'new'}", **settings)
    assert "init_checkpoint='best' has no meaning" in refuse(
        capsys, [*words, "--config.checkpoint.init_checkpoint=best"]
    )
    (exported / "tokenizer.model").rename(exported / "other.model")
    (exported / "tokenizer.json").unlink()
    assert "has no tokenizer that is read here" in refuse(capsys, words)
    assert "has no tokenizer that is read here" in refused(capsys, "hf", "llmjax", exported, tmp_path / "x")
    named = ["--tokenizer", str(exported / "other.model")]
    assert convert_to("hf", "llmjax", exported, tmp_path / "named", *named) == 0
    (exported / "model.safetensors").write_bytes(b"\1" * 30)
    assert "no whole safetensors file" in refuse(capsys, words)
    assert not (tmp_path / "new").exists()


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged (it is not JSON)"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
        (
            lambda folder: change_config(folder, num_hidden_layers=2**30),
            "should have 1073741824 layers and has",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "no whole safetensors file"),
    ],
)
def test_a_mistake_costs_one_sentence_and_writes_nothing(trained, tmp_path, capsys, change, said):
    assert convert_to("llmjax", "hf", trained, tmp_path / "hf") == 0
    capsys.readouterr()
    change(tmp_path / "hf")
    assert said in refused(capsys, "hf", "llmjax", tmp_path / "hf", tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_what_lies_at_the_destination_is_never_replaced(trained, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert "exists and is not empty" in refused(capsys, "llmjax", "hf", trained, tmp_path)
    assert "exists and is not empty" in refused(capsys, "llmjax", "hf", trained, tmp_path / "mine")
    assert "does not exist" in refused(capsys, "hf", "hf", tmp_path / "nothing", tmp_path / "x")
    assert "holds no run" in refused(capsys, "llmjax", "hf", tmp_path / "nothing", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("size", [0, 27, 28, 1000])
def test_a_file_that_is_not_of_llama2c_is_refused(stories, shared_data, tmp_path, capsys, size):
    data = (shared_data / "weights" / "stories260K" / "stories260K.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[:size])
    assert "llama2.c" in refused(capsys, "llama2c", "hf", tmp_path / "cut.bin", tmp_path / "x")
    (tmp_path / "cut.bin").write_bytes(b"\xff" * size)
    assert "llama2.c" in refused(capsys, "llama2c", "hf", tmp_path / "cut.bin", tmp_path / "x")


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_verify_compares_logits_and_stops_a_wrong_conversion(stories, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert convert_to("llmjax", "hf", stories, tmp_path / "hf", "--verify") == 0
    facts = certificate(tmp_path / "hf")["verified against transformers"]
    assert facts["argmax agreement"] == 1 and facts["KL"] < 1e-9
    assert facts["largest difference / largest logit"] < 1e-4
    capsys.readouterr()
    right = convert.their_logits
    monkeypatch.setattr(convert, "their_logits", lambda *words: right(*words) * 1.01)
    assert "the logits differ" in refused(capsys, "llmjax", "hf", stories, tmp_path / "x", "--verify")
    assert not (tmp_path / "x").exists()


HARD = [
    "", " ", "  two  spaces ", "\n\nlines\n", "tab\tt", "你好 é x", "fi\ufb01 \u3000 \u200b e\u0301", "😀🏳️‍🌈",
    "1234567 3.14", "a" * 300, "def f(x):\n    return x ** 2  # ok",
]  # fmt: skip


@pytest.mark.interop
def test_the_exported_tokenizer_gives_the_same_ids_as_ours(stories, trained, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    for number, workdir in enumerate((stories, trained)):
        folder = tmp_path / str(number)
        assert convert_to("llmjax", "hf", workdir, folder) == 0
        theirs, ours = (
            tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
            load_run(workdir).tokenizer,
        )
        for text in [*HARD, (tiny_run.ROOT / "README.zh.md").read_text(encoding="utf-8")]:
            ids = theirs.encode(text).ids
            assert ids == [ours.bos_id, *ours.encode(text)]
            assert theirs.decode(ids) == text


def test_a_run_on_bytes_is_exported_with_a_tokenizer_of_the_same_ids(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus")
    assert main.main(command(tmp_path, f"--workdir={tmp_path / 'run'}", train__num_updates=1)) == 0
    ours = load_run(tmp_path / "run").tokenizer
    for kind, found in (("hf", "hf"), ("gguf", "gguf/model.gguf")):
        assert convert_to("llmjax", kind, tmp_path / "run", tmp_path / kind) == 0
        theirs = load_tokenizer(tmp_path / found)
        assert [theirs.encode(text) for text in HARD] == [ours.encode(text) for text in HARD]
        assert theirs.reserved_ids == ours.reserved_ids and theirs.mask_id == ours.mask_id
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert theirs.encode("a b").ids == [ours.bos_id, *ours.encode("a b")]


def test_tokenizer_json_alone_gives_the_ids_of_the_sentencepiece_model(trained, tmp_path, capsys):
    assert convert_to("llmjax", "hf", trained, tmp_path / "hf") == 0
    (tmp_path / "hf" / "tokenizer.model").unlink()
    ours, theirs = load_run(trained).tokenizer, load_tokenizer(tmp_path / "hf")
    assert [theirs.encode(text) for text in HARD] == [ours.encode(text) for text in HARD]
    assert (theirs.bos_id, theirs.eos_id, theirs.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)


OTHERS = {
    "lstm": {"model__family": "lstm"},
    "experts": {"experts__num_experts": 2, "experts__expert_dim": 16, "experts__shared_experts": 1},
    "bert": {"model__family": "bert", "task__name": "masked_language_model"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_runs_of_other_families_are_copied_whole_or_refused_in_a_sentence(name, tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus")
    workdir, settings = tmp_path / "run", {**OTHERS[name], "train__num_updates": 2}
    run(capsys, command(tmp_path, f"--workdir={workdir}", **settings))
    said = refused(capsys, "llmjax", "hf", workdir, tmp_path / "exported")
    assert not (tmp_path / "exported").exists() and any(
        word in said for word in ("family", "experts", "BertForMaskedLM with")
    )
    assert convert_to("llmjax", "llmjax", workdir, tmp_path / "copy") == 0
    capsys.readouterr()
    if name == "bert":
        jax.tree.map(
            np.testing.assert_array_equal, load_run(workdir).params, load_run(tmp_path / "copy").params
        )
        return
    assert greedy(capsys, tmp_path / "copy", 8) == greedy(capsys, workdir, 8)


BERT = {
    "model__family": "bert", "task__name": "masked_language_model", "transformer__norm_at": "sum",
    "transformer__position": "learned", "transformer__norm": "layernorm", "transformer__activation": "gelu_erf",
    "transformer__use_bias": True, "transformer__qk_norm": False, "bert__token_types": 2, "bert__embedding_norm": True,
    "train__num_updates": 2, "evaluate__every": 0,
}  # fmt: skip


@pytest.mark.slow
def test_a_bert_without_a_head_is_exported_and_gets_one_in_a_run_that_asks_for_it(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus")
    headless = {**BERT, "bert__transform": False}
    run(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", **headless))
    assert convert_to("llmjax", "hf", tmp_path / "run", tmp_path / "hf") == 0
    assert certificate(tmp_path / "hf")["to"]["architecture"] == "BertModel"
    assert convert_to("hf", "llmjax", tmp_path / "hf", tmp_path / "again") == 0
    assert f"note: {tmp_path / 'hf'} has no head that predicts masked tokens" in capsys.readouterr().err
    before, after = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    for source in ("run", "hf"):
        settings = {**BERT, "bert__output_bias": True, "checkpoint__init_from": tmp_path / source}
        words = command(tmp_path, f"--workdir={tmp_path / f'from_{source}'}", **settings)
        # Adapters would leave the new head as it begins.
        assert "so that it would stay as random as it begins; set bert.transform=False" in refuse(
            capsys, [*words, "--config.lora.rank=2"]
        )
        out = run(capsys, words)
        anew = "has all parameters but transform and output, which bert.transform=True and bert.output_bias=True add"
        assert anew in out.replace("\n", " ")
        assert convert_to("llmjax", "hf", tmp_path / f"from_{source}", tmp_path / f"hf_{source}") == 0
        assert certificate(tmp_path / f"hf_{source}")["to"]["architecture"] == "BertForMaskedLM"
    # The other way, something would be lost.
    refusal = refuse(capsys, command(tmp_path, f"--workdir={tmp_path / 'other'}", **headless,
                                     checkpoint__init_from=tmp_path / "from_run"))  # fmt: skip
    assert "bert.transform=False, but the run in" in refusal


T5 = {
    "model__family": "encoder_decoder", "task__name": "span_corruption", "transformer__position": "relative",
    "transformer__qk_norm": False, "transformer__score_dim": 1, "transformer__activation": "relu",
    "encoder_decoder__scale_output": True, "train__num_updates": 2,
}  # fmt: skip


@pytest.mark.slow
def test_a_t5_that_learned_to_fill_gaps_is_exported_and_a_new_run_begins_with_it(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path / "corpus")
    run(capsys, command(tmp_path, f"--workdir={tmp_path / 'run'}", **T5))
    assert convert_to("llmjax", "hf", tmp_path / "run", tmp_path / "hf") == 0
    assert certificate(tmp_path / "hf")["to"]["architecture"] == "T5ForConditionalGeneration"
    assert convert_to("hf", "llmjax", tmp_path / "hf", tmp_path / "again") == 0
    before, after = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["decoder_start_token_id"] == before.tokenizer.bos_id
    words = command(tmp_path, f"--workdir={tmp_path / 'new'}", **T5, checkpoint__init_from=tmp_path / "hf")
    last = tiny_run.read_lines(tmp_path / "run")[-1]
    assert "note: what is written is a model that writes after a source" in capsys.readouterr().err
    assert f"{last['loss']:.4f}" in run(capsys, [*words, "--mode=evaluate"])
    # A model that begins its texts with another id than the tokenizer would write nonsense.
    change_config(tmp_path / "hf", decoder_start_token_id=7)
    assert "has decoder_start_token_id=7, and its tokenizer begins a text with id 1" in refuse(capsys, words)
    assert "has decoder_start_token_id=7" in refused(capsys, "hf", "llmjax", tmp_path / "hf", tmp_path / "x")


def test_a_t5_of_transformers_has_its_own_tokenizer_and_a_marian_has_none(shared_data, tmp_path, capsys):
    t5, marian = tmp_path / "t5", tmp_path / "marian"
    random_models.write(t5, "T5ForConditionalGeneration", vocab_size=32128, pad_token_id=0, eos_token_id=1)
    spiece = (shared_data / "tokenizers" / "spm" / "t5_32k.model").read_bytes()
    (t5 / "spiece.model").write_bytes(spiece)
    assert convert_to("hf", "llmjax", t5, tmp_path / "run") == 0
    found = load_run(tmp_path / "run")
    assert found.tokenizer.bos_id == found.tokenizer.pad_id == 0 and found.tokenizer.eos_id == 1
    # The sentinels of T5 are the last of its own 100 ids.
    assert found.tokenizer.reserved_ids[:100][::-1][0] == 32099
    random_models.write(marian, "MarianMTModel")
    (marian / "vocab.json").write_text("{}")
    assert convert_to("hf", "hf", marian, tmp_path / "copy") == 0
    assert open_tensors(tmp_path / "copy").keys() == open_tensors(marian).keys()
    assert "has no tokenizer that is read here" in refused(capsys, "hf", "llmjax", marian, tmp_path / "x")

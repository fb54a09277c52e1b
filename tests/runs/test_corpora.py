"""Real texts as they come, each by one command: they train, hold out a part that is never trained on, and write on."""

import json
import re
import shutil

import pytest
import tiny_run

from llmjax.main import main

pytestmark = pytest.mark.slow

# A name -> the files below the shared data, further settings, and whether the text is Chinese.
CORPORA = {
    "a play": ("lm_en/tinyshakespeare.txt", {}, False),
    "a novel": ("lm_en/gutenberg/moby_dick.txt", {}, False),
    "a Chinese novel": ("lm_zh/novels/hongloumeng.txt", {"data.split_on": "第.{1,9}回"}, True),
    "two Chinese novels": ("lm_zh/novels/*.txt", {}, True),
    "GB18030": ("gb18030", {"data.encoding": "gb18030"}, True),
    "compressed rows": ("lm_zh/poetry/songci.jsonl.gz", {"data.text_field": "paragraphs"}, True),
    "an array": ("lm_zh/poetry/tang300.json", {"data.text_field": "paragraphs"}, True),
    "an unknown suffix": ("lm_en/wikitext-2-raw/wiki.valid.raw", {}, False),
    "a folder of mixed files": ("mixed", {}, False),
}
SIZES = {
    **tiny_run.SETTINGS, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 3000, "tokenizer.train_bytes": 300_000,
    "data.seq_len": 64, "train.tokens_per_update": 1024, "train.num_updates": 30, "evaluate.every": 0,
    "optimizer.learning_rate": 0.02, "data.num_workers": 2, "generate.max_tokens": 60,
}  # fmt: skip


def make_sources(kind, data, folder):
    """The path of the corpus; what the shared data do not have is made of what they have."""
    if kind == "gb18030":
        text = (data / "lm_zh/novels/xiyouji.txt").read_text(encoding="utf-8")
        (folder / "novel.txt").write_text(text, encoding="gb18030")
        return folder / "novel.txt"
    if kind == "mixed":
        mixed = folder / "mixed"
        (mixed / "deep").mkdir(parents=True)
        shutil.copy(data / "lm_en/tinystories/tinystories_197k.txt", mixed)
        shutil.copy(data / "lm_en/wikitext-2-raw/wiki.valid.raw", mixed / "deep" / "wiki.md")
        (mixed / "notes.jsonl").write_text("\n".join(json.dumps({"text": f"a note {i}"}) for i in range(20)))
        (mixed / "settings.json").write_text('{"colour": 1}')
        (mixed / "picture.png").write_bytes(b"\x89PNG")
        return mixed
    return data / kind


@pytest.mark.parametrize("name", CORPORA)
def test_a_real_text_trains_holds_out_and_is_written_on(name, shared_data, tmp_path, capsys):
    kind, changes, is_chinese = CORPORA[name]
    settings = SIZES | changes | {"data.sources": make_sources(kind, shared_data, tmp_path),
                                  "data.cache_dir": tmp_path / "cache"}  # fmt: skip
    workdir = tmp_path / "work"
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main(["llmjax", "--config=base", f"--workdir={workdir}", *words]) == 0
    out = capsys.readouterr().out
    share = float(re.search(r"held out +.*?([\d.]+)% of the text", out)[1])
    assert 1 < share < 15
    losses = tiny_run.losses(workdir)
    assert losses[-1] < losses[0] - 0.5
    if kind == "mixed":
        assert re.search(
            r"files +3 files, .*; left out: 1 JSON without the text field, 1 of unknown suffix", out
        )
    prompt = "却说" if is_chinese else "The "
    assert main(["llmjax", f"--workdir={workdir}", "--mode=generate", f"--prompt={prompt}"]) == 0
    text = capsys.readouterr().out.removeprefix(prompt)
    letters = re.findall(r"\w", text)
    chinese = re.findall(r"[\u4e00-\u9fff]", text)
    assert len(letters) > 20 and (len(chinese) > len(letters) / 2) == is_chinese

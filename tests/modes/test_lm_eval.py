"""lm-evaluation-harness drives the server unchanged, and gets the log-likelihoods that `transformers` gives."""

import json
import os
import subprocess
import sys

import pytest
import tiny_run

from llmjax import main
from tests.modes.test_serve import SETTINGS, serving
from tools import convert

pytestmark = pytest.mark.interop
QUESTIONS = [
    {"q": f"river stone{' light' * i}", "c": [" cloud", " code loop", " zzz"], "a": i % 3} for i in range(6)
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: "{{q}}"
"""
CHOICES = """task: choices
output_type: multiple_choice
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXTS = """task: texts
output_type: generate_until
doc_to_target: "{{c[0]}}"
generation_kwargs: {until: ["o"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def samples(folder, task):
    """What the harness logged of a task."""
    (file,) = folder.rglob(f"samples_{task}*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_harness_gets_the_likelihoods_of_transformers(tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tiny_run.write_corpus(tmp_path / "corpus")
    settings = {**SETTINGS, "tokenizer__kind": "bpe", "tokenizer__vocab_size": 300, "data__seq_len": 64}
    assert main.main(tiny_run.command(tmp_path, f"--workdir={tmp_path / 'run'}", **settings)) == 0
    folder = tmp_path / "hf"
    assert convert.main(["--from", "llmjax", "--to", "hf", str(tmp_path / "run"), str(folder)]) == 0
    capsys.readouterr()
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in (("choices", CHOICES), ("texts", TEXTS)):
        (tasks / f"{name}.yaml").write_text(text + COMMON.replace("FILE", str(tmp_path / "questions.jsonl")))
    with serving(tmp_path / "run") as server:
        address = f"http://127.0.0.1:{server.port}/v1/completions"
        words = f"model=run,base_url={address},tokenizer={folder},num_concurrent=4,max_length=64"
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", words,
             "--tasks", "choices,texts", "--include_path", str(tasks), "--log_samples",
             "--output_path", str(tmp_path / "out")],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for sample in samples(tmp_path / "out", "choices"):
        for asked, (loglikelihood, is_greedy) in zip(
            sample["arguments"].values(), sample["filtered_resps"], strict=True
        ):
            given = tokenizer.encode(asked["arg_0"], add_special_tokens=False)
            whole = tokenizer.encode(asked["arg_0"] + asked["arg_1"], add_special_tokens=False)
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
            places = range(len(given), len(whole))
            expected = sum(float(logprobs[i - 1, whole[i]]) for i in places)
            assert float(loglikelihood) == pytest.approx(expected, abs=1e-4)
            assert str(is_greedy) == str(all(int(logprobs[i - 1].argmax()) == whole[i] for i in places))
    texts = [sample["filtered_resps"][0] for sample in samples(tmp_path / "out", "texts")]
    assert len(texts) == len(QUESTIONS) and not any("o" in text for text in texts)

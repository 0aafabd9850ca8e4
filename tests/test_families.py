"""What a model must be: whole, scored by hidden @ W.T, a decoder with attention; else it is refused early."""

import importlib.util
import json
import shutil
from pathlib import Path

import check
import common
import lm
import gpu
import pytest
from conftest import ROOT, TINY, flags, ids_of, run_forked, save_model
from safetensors.torch import load_file, save_file

import torch
import transformers

SPEC = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
families = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)
CPU = torch.device("cpu")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(name, tmp_path):
    """Right against plain transformers, or refused in the expected words."""
    refused = families.FAMILIES[name][2]
    row = families.try_family(name, tmp_path / "model", families.tokenizer())
    if refused:
        assert refused in row["refused"]
    else:
        assert not row["refused"] and row["difference"] < 1e-4 and row["agree"] == row["tokens"] == 48


def edited(folder: str, path: Path, change, **config) -> str:
    """A copy of a model folder; change(state) edits its tensors in place or returns others."""
    shutil.copytree(folder, path)
    state = load_file(path / "model.safetensors")
    state = change(state) or state
    save_file(state, path / "model.safetensors", {"format": "pt"})
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(about | config))
    return str(path)


def prefixed(prefix: str):
    return lambda state: {prefix + key: value for key, value in state.items()}


def without(part: str):
    return lambda state: {key: value for key, value in state.items() if part not in key}


def nothing(state):
    return None


def wider(state):
    state["model.norm.weight"] = torch.ones(40)


def with_one_more(state):
    state["model.layers.0.mlp.extra.weight"] = torch.ones(3)


REFUSED = {  # what is done to a whole model: the sentence
    "compiled": (prefixed("_orig_mod."), {}, "tensor\\(s\\) missing in its files"),
    "no head": (without("lm_head"), {}, "1 tensor\\(s\\) missing in its files, for example lm_head.weight"),
    "one norm": (without("layers.1.input_layernorm"), {}, "1 tensor\\(s\\) missing in its files"),
    "more layers": (nothing, {"num_hidden_layers": 3}, "9 tensor\\(s\\) missing in its files"),
    "fewer layers": (nothing, {"num_hidden_layers": 1}, "9 tensor\\(s\\) of its files without a place in the model"),
    "one more": (with_one_more, {}, "1 tensor\\(s\\) of its files without a place in the model"),
    "other shape": (wider, {}, "no model could be loaded"),
    "quantised": (nothing, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised \\(gptq\\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name, tiny_model, tmp_path):
    """Weights that would be random, and weights that would be left out."""
    change, config, words = REFUSED[name]
    folder = edited(tiny_model, tmp_path / "model", change, **config)
    for load in (lm.load_tokenizer, lambda x: lm.load_model(x, device=CPU)):
        with pytest.raises(common.BadInput, match=words):
            load(folder)
    if name != "no head":  # which a scalar head replaces
        with pytest.raises(common.BadInput, match=words):
            lm.load_model(folder, head="scalar", device=CPU)


def test_a_truncated_file(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(common.BadInput, match="could be loaded"):
        lm.load_tokenizer(str(tmp_path / "model"))


def test_reward_models(tiny_model, tmp_path):
    """A whole one loads with its head, is no language model, and is refused without that head."""
    model = lm.load_model(tiny_model, head="scalar", device=CPU)
    torch.nn.init.normal_(lm.scalar_head(model).weight)
    common.export_model(tmp_path / "judge", model, lm.load_tokenizer(tiny_model))
    judge = str(tmp_path / "judge")
    lm.load_tokenizer(judge)
    with pytest.raises(common.BadInput, match="missing in its files, for example lm_head.weight"):
        lm.load_model(judge, device=CPU)
    for number, change in enumerate((prefixed("_orig_mod."), without("score"))):
        folder = edited(judge, tmp_path / str(number), change)
        with pytest.raises(common.BadInput, match="missing in its files"):
            lm.load_model(folder, head="saved", device=CPU)


@pytest.mark.parametrize("script", ["lco.py", "ppo_baseline.py"])
def test_refused_before_a_folder_exists(script, tiny_model, reward_file, tmp_path):
    """Exit code 2, one sentence, no run folder: the corrected command may use the same name."""
    folder = edited(tiny_model, tmp_path / "model", without("lm_head"))
    settings = TINY | dict(model=folder, reward_file=reward_file, out=tmp_path / "run")
    done = run_forked(script, *flags(**settings), expect=2)
    last = done.stderr.splitlines()[-1]
    assert last == f"{script}: error: --model {folder}: 1 tensor(s) missing in its files, for example lm_head.weight"
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_capped_logits_are_found_in_any_dtype(letter_tokenizer, tmp_path):
    """Small logits of a random model hide a cap: what is compared are large ones."""
    config = transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=500.0, **ids_of(letter_tokenizer))
    folder = save_model(tmp_path / "model", config, letter_tokenizer)
    transformers.AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    with pytest.raises(common.BadInput, match="final_logit_softcapping=500.0"):
        lm.load_tokenizer(folder)


def test_large_models_too(letter_tokenizer, tmp_path, monkeypatch):
    """The body of a large model is not run before a run begins, its head is."""
    monkeypatch.setattr(lm, "SMALL", 0)
    monkeypatch.setattr(lm, "_check_body", lambda *args: pytest.fail("the body was run"))
    config = transformers.GraniteConfig(**SHAPE, logits_scaling=8.0, **ids_of(letter_tokenizer))
    folder = save_model(tmp_path / "model", config, letter_tokenizer)
    with pytest.raises(common.BadInput, match="logits_scaling=8.0"):
        lm.load_tokenizer(folder)


def test_composite_configurations(tmp_path):
    """Gemma 3 with vision: dropout is off in all parts, the vocabulary is the text's, the export is whole."""
    tokens = families.tokenizer()
    families.save("Gemma 3, with vision", tmp_path / "model", tokens)
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    about["text_config"]["attention_dropout"] = about["vision_config"]["attention_dropout"] = 0.5
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    model = lm.load_model(str(tmp_path / "model"), device=CPU)
    assert check.dropout_is_off({"policy": model})[0]
    assert not model.config.text_config.attention_dropout and not model.config.vision_config.attention_dropout
    assert max(tokens.get_vocab().values()) < model.config.get_text_config().vocab_size
    sizes = dict(rows=4, micro_batch=2, rollout_rows=4, max_prompt=8, max_new_tokens=8, dtype="auto")
    assert gpu.estimate_memory({"policy": model}, **sizes)[0]
    common.export_model(tmp_path / "out", model, tokens)
    again = lm.load_model(str(tmp_path / "out"), device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_layerdrop_is_off(tmp_path):
    families.save("OPT", tmp_path / "model", families.tokenizer())
    model = lm.load_model(str(tmp_path / "model"), device=CPU)
    batch = common.make_batch([[3, 4]] * 8, [[5, 6, 7]] * 8, 0, CPU)
    assert model.training and check.dropout_is_off({"policy": model})[0]
    assert torch.equal(lm.completion_hidden(model, batch), lm.completion_hidden(model, batch))


# ---- ids without an embedding ----------------------------------------------------------------------------------------


def with_tokens(folder: str, path: Path, **special) -> str:
    shutil.copytree(folder, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if "added" in special:
        tokenizer.add_tokens(special["added"])
    else:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(path)
    return str(path)


def test_padding_outside_the_embeddings(tiny_model, tmp_path):
    """A padding token that was added without resizing: rows are padded with the end of the sequence."""
    folder = with_tokens(tiny_model, tmp_path / "model", pad_token="<new>")
    rows = lm.load_config(folder).vocab_size
    assert transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == rows
    tokenizer = lm.load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < rows


def test_words_outside_the_embeddings(tiny_model, tmp_path):
    folder = with_tokens(tiny_model, tmp_path / "model", added=["<think>", "</think>"])
    with pytest.raises(common.BadInput, match="2 tokens without an embedding, for example '<think>' .id 16, 16 embedd"):
        lm.load_tokenizer(folder)


def test_the_place_of_an_image_needs_no_embedding(tiny_model, tmp_path):
    """Gemma 3's text models have such a token, which no text holds."""
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model, extra_special_tokens={"image_token": "<image>"})
    tokenizer.save_pretrained(tmp_path / "model")
    found = lm.load_tokenizer(str(tmp_path / "model"))
    assert found.get_vocab()["<image>"] == lm.load_config(tiny_model).vocab_size

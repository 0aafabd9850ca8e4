"""Loading: the weights of the file to the last bit, a memory map until they are sharded, shards within a node."""

import gc
import json
import os
import shutil
import weakref

import common
import lm
import gpu
import lco
import ppo_baseline
import pytest
from conftest import TINY, assert_same_metrics, ids_of, read_metrics, run_forked, run_here, run_script

import torch
import transformers

CPU = torch.device("cpu")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LONG = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, rope_theta=1e4)
LONG |= dict(original_max_position_embeddings=32)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="dynamic", factor=3.3)),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    # The square root of 40, by which embeddings are multiplied, is not a bfloat16; two kinds of rotary frequencies.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE | dict(hidden_size=40), head_dim=10, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**SHAPE, max_position_embeddings=64, rope_parameters=LONG),
}


def save_as(folder, config, tokenizer, dtype: str) -> str:
    """A model with random weights whose file is in `dtype`; mixed: norms in fp32, the rest in bfloat16."""
    for key, value in ids_of(tokenizer).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
        if dtype == "mixed" and "norm" not in name:
            p.data = p.data.bfloat16().float()
    if dtype == "mixed":
        state = {k: v if "norm" in k else v.bfloat16() for k, v in model.state_dict().items()}
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder, state_dict=state)
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(config))
    else:
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_the_file(family, dtype, letter_tokenizer, tmp_path):
    """Parameters and buffers are those of from_pretrained in fp32, bit for bit; frozen ones are rounded once."""
    folder = save_as(tmp_path / "model", FAMILIES[family](), letter_tokenizer, dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, buffers = dict(plain.named_parameters()), dict(plain.named_buffers())
    model = lm.load_model(folder, device=CPU)
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, expected[name]), name
    frozen = lm.load_model(folder, device=CPU, dtype="bfloat16", trainable=False)
    for name, p in frozen.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p.full_tensor(), expected[name].bfloat16()), name
    for found in (model, frozen):
        assert dict(found.named_buffers()).keys() == buffers.keys()
        for name, b in found.named_buffers():
            assert b.dtype == buffers[name].dtype and torch.equal(b, buffers[name]), name
    assert model.config.dtype == torch.float32
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_adapters_are_fp32(head, compute, letter_tokenizer, tmp_path):
    """The same adapters for any dtype of the file; weights under them keep all bits of the file, and no more."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        folder = save_as(tmp_path / dtype, FAMILIES["llama"](), letter_tokenizer, dtype)
        model = lm.load_model(folder, head=head, device=CPU, dtype=compute, lora_rank=4, seed=3)
        whole = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in model.named_parameters()}
        found[dtype] = {n: whole[n] for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 for p in found[dtype].values())
        kept = {p.dtype for n, p in whole.items() if n not in found[dtype]}
        assert kept == {torch.bfloat16 if (dtype, compute) == ("bfloat16", "bfloat16") else torch.float32}
        assert any(p.any() for p in found[dtype].values())
        assert not any(p.is_meta for p in whole.values())
    assert all(torch.equal(found["float32"][n], p) for n, p in found["bfloat16"].items())


def test_export_of_bfloat16_weights_under_adapters(letter_tokenizer, tmp_path):
    """Adapters that are 0 change nothing, and the exported file is fp32."""
    folder = save_as(tmp_path / "model", FAMILIES["qwen3"](), letter_tokenizer, "bfloat16")
    model = lm.load_model(folder, device=CPU, dtype="bfloat16", lora_rank=2)
    common.export_model(tmp_path / "out", model, letter_tokenizer)
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(x, dtype="auto") for x in (folder, tmp_path / "out"))
    for x, y in zip(a.parameters(), b.parameters()):
        assert y.dtype == torch.float32 and torch.equal(x.float(), y)


def test_a_head_of_its_own_in_a_model_called_tied(tiny_model, tmp_path):
    """As merges and trainers write it: the file decides, and the exported model has the head, too."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = lm.load_model(str(tmp_path / "model"), device=CPU)
    common.export_model(tmp_path / "out", model, lm.load_tokenizer(tiny_model))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = lm.load_model(tiny_model, device=CPU)(ids).logits
        assert torch.equal(model(ids).logits, expected)
        out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(out(ids).logits, expected) and not out.config.tie_word_embeddings


def test_export_of_several_chat_templates(tiny_model, tmp_path):
    """They lie in a folder, which everyone can enter and which a second export replaces."""
    tokenizer = lm.load_tokenizer(tiny_model)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ messages[0].role }}"}
    for _ in range(2):
        common.export_model(tmp_path / "out", lm.load_model(tiny_model, device=CPU), tokenizer)
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert folder.stat().st_mode & 0o111 and not (tmp_path / "out.part").exists()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dead_models_die(dtype, tiny_model):
    """Whoever drops a model has its memory back when the next one is loaded; without FSDP, at once."""
    gc.collect()
    gc.disable()
    try:
        model = lm.load_model(tiny_model, device=CPU, dtype=dtype)
        weight = weakref.ref(lm.head_weight(model))
        lm.completion_hidden(model, common.make_batch([[3, 4]], [[5, 6]], 0, CPU)).sum().backward()
        del model
        assert dtype == "bfloat16" or weight() is None
        lm.load_model(tiny_model, device=CPU, dtype=dtype)
        assert weight() is None
    finally:
        gc.enable()


def test_automatic_dtype(monkeypatch, capsys):
    """bfloat16 on CUDA, float32 on a CPU, said in one line."""
    assert common.compute_dtype("auto", CPU) == "float32" and common.compute_dtype("bfloat16", CPU) == "bfloat16"
    assert common.compute_dtype("auto", torch.device("cuda", 0)) == "bfloat16"
    assert common.parse_args(lco.Args, lco.BUILTIN, []).dtype == "float32"
    assert capsys.readouterr().out == "--dtype auto: float32 on cpu\n"


def test_one_visible_device_per_process(monkeypatch):
    """LOCAL_RANK 5 of a process that sees two devices is the second one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert common.local_device("auto") == torch.device("cuda", 1)


def test_world_size_without_an_address():
    """Some schedulers set WORLD_SIZE in every job."""
    done = run_forked("lco.py", expect=2, WORLD_SIZE="8")
    assert done.stderr.splitlines()[-1] == (
        "lco.py: error: WORLD_SIZE is set but RANK and MASTER_ADDR and MASTER_PORT not: "
        "start with torchrun, or unset WORLD_SIZE"
    )


# ---- several ranks ---------------------------------------------------------------------------------------------------

MEMORY = """
import sys, threading, time
import common, lm
import torch

def anonymous():  # in KiB: what belongs to this process alone and is no map of a file
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0])

def main():
    lm.load_model(sys.argv[2], device=torch.device("cpu"), trainable=False, dtype="float32")  # imports and groups
    before = most = anonymous()
    loading = True

    def watch():
        nonlocal most
        while loading:
            most = max(most, anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    model = lm.load_model(sys.argv[1], device=torch.device("cpu"))
    loading = False
    thread.join()
    shards = sum(p.to_local().numel() * 4 for p in model.parameters())
    sys.stdout.write(f"peak {1024 * (most - before)} shards {shards}\\n")  # in one piece: both ranks have this pipe

common.cpu.keep_freed_memory = lambda: None  # counts what is in use, not what the C heap keeps
common.launch(main, "cpu")
"""


def test_host_memory_of_a_load(tiny_model, letter_tokenizer, tmp_path):
    """Two ranks, a bfloat16 file of 200 MB: what a rank has to itself is never more than the file and 5 %.

    Half of the weights in fp32, its shards, are as large as the file; those of the file are a map that both share.
    """
    shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=8)
    config = transformers.LlamaConfig(**shape, num_key_value_heads=8, max_position_embeddings=64)
    folder = save_as(tmp_path / "large", config, letter_tokenizer, "bfloat16")
    size = os.path.getsize(tmp_path / "large" / "model.safetensors")
    assert 190e6 < size < 220e6
    (tmp_path / "memory.py").write_text(MEMORY)
    done = run_script(tmp_path / "memory.py", folder, tiny_model, ranks=2, timeout=240, MALLOC_MMAP_THRESHOLD_="65536")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("peak")]
    assert len(rows) == 2
    for _, peak, _, shards in rows:
        assert abs(int(shards) / size - 1) < 0.01
        assert int(shards) < int(peak) < 1.05 * size, (peak, shards, size)


HYBRID = """
import json, os, sys
os.environ["LOCAL_WORLD_SIZE"] = sys.argv[2]
import common, lm, lco, ppo_baseline
import torch

def main():
    model = lm.load_model(json.load(open(sys.argv[1]))["model"], device=torch.device("cpu"))
    mesh = lm.head_weight(model).device_mesh
    assert tuple(mesh.shape) == {"2": (2, 2), "4": (4,), "1": (4,), "3": (4,)}[sys.argv[2]], mesh
    if sys.argv[2] == "2":
        sums = []
        reduce = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda *a, **k: sums.append(1) or reduce(*a, **k)
        batch = common.make_batch([[3, 4]] * 2, [[5, 6]] * 2, 0, torch.device("cpu"))
        batch["completion_ids"][:] += common.rank()
        gradients = {}
        for once in (False, True):
            sums.clear()
            for i in lm.accumulate_over(model, [0, 1, 2]) if once else range(3):
                (lm.completion_hidden(model, batch).cos().sum() * (i + 1)).backward()
            gradients[once] = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            groups = 3  # two blocks and the rest
            assert len(sums) == groups * (1 if once else 3), sums
        for a, b in zip(gradients[False], gradients[True]):
            torch.testing.assert_close(a, b)
    ppo_baseline.train(ppo_baseline.Args(**json.load(open(sys.argv[1]))))

common.launch(main, "cpu")
"""


@pytest.mark.parametrize("per_node", [2, 3])
def test_shards_within_a_node(per_node, tiny_model, reward_file, tmp_path):
    """Two nodes of two ranks: replicas of shards, gradients cross nodes once a step, and the numbers are the same."""
    base = TINY | dict(model=tiny_model, reward_file=reward_file, lr=3e-4, advantage="gae", kl_coef=0.1)
    alone = read_metrics(run_here(ppo_baseline, **base, out=str(tmp_path / "alone")))
    (tmp_path / "job.json").write_text(json.dumps(base | {"out": str(tmp_path / "nodes")}))
    (tmp_path / "nodes.py").write_text(HYBRID)
    run_forked(tmp_path / "nodes.py", tmp_path / "job.json", per_node, ranks=4, timeout=240)
    assert_same_metrics(alone, read_metrics(tmp_path / "nodes"))
    resumed = base | {"steps": 3, "out": str(tmp_path / "nodes"), "resume": True}
    run_here(ppo_baseline, **resumed)
    assert (tmp_path / "nodes" / "model" / "model.safetensors").exists()


def test_an_output_folder_that_nodes_do_not_share(tiny_model, reward_file, tmp_path):
    """Two ranks that see two folders under one name end before the first step, with a sentence that names the ranks."""
    (tmp_path / "apart.py").write_text("""
import functools, json, os, pathlib, sys
os.environ["LOCAL_WORLD_SIZE"] = "1"
home = pathlib.Path(sys.argv[2], os.environ["RANK"])
home.mkdir()
os.chdir(home)
import common, lm, ppo_baseline

common._require_shared = functools.partial(common._require_shared, seconds=1)
common.launch(lambda: ppo_baseline.train(ppo_baseline.Args(**json.load(open(sys.argv[1])))), "cpu")
""")
    (tmp_path / "job.json").write_text(json.dumps(TINY | dict(model=tiny_model, reward_file=reward_file, out="run")))
    done = run_forked(tmp_path / "apart.py", tmp_path / "job.json", tmp_path, ranks=2, expect=None)
    assert "error: --out run: ranks [1] do not see it; with several nodes it must be on shared storage" in done.stderr
    assert "step 0" not in done.stdout


# ---- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_activations_are_counted(family):
    """Bytes kept per token, counted on a copy without storage, are within a fifth of those of a real forward pass."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name in ("hidden_size", "n_embd"):
        if hasattr(config, name):
            setattr(config, name, 256)
    config.intermediate_size, config.vocab_size = 768, 64
    config.head_dim = 64
    model = transformers.AutoModelForCausalLM.from_config(config)
    kept, (B, S) = {}, (2, 24)

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    ids, mask = torch.ones(B, S, dtype=torch.long), torch.ones(B, S, dtype=torch.long)
    mask[0, :3] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    real = sum(size for key, size in kept.items() if key not in weights) / (B * S)
    assert out.last_hidden_state.requires_grad
    assert 0.85 < gpu.kept_per_token(model, "float32") / real < 1.2


def test_estimate_counts_parameters_and_cache(tiny_model):
    """Weights, gradients and Adam are 16 bytes per trained parameter; frozen ones are in the computation's dtype."""
    policy = lm.load_model(tiny_model, device=CPU)
    n, config = sum(p.numel() for p in policy.parameters()), policy.config
    ref = lm.load_model(tiny_model, device=CPU, trainable=False)
    sizes = dict(rows=12, micro_batch=2, rollout_rows=8, tokens=30, new_tokens=10, chunk_mib=64)
    parts = gpu.memory_parts({"policy": policy, "ref": ref}, shards=4, dtype="bfloat16", **sizes)
    assert parts["state"] == (16 + 2) * n / 4 and parts["whole weights"] == 2 * n
    assert parts["KV cache"] == 2 * 2 * 2 * 8 * 2 * 8 * 30  # keys and values, layers, heads, width, bytes, rows, tokens
    assert parts["kept states"] == 12 * 10 * config.hidden_size * 2
    alone = gpu.memory_parts({"policy": policy}, shards=1, dtype="float32", **sizes)
    assert alone["state"] == 16 * n and alone["whole weights"] == alone["loading"] == 0
    recomputed = lm.load_model(tiny_model, device=CPU, activation_checkpointing=True)
    assert gpu.memory_parts({"policy": recomputed}, shards=1, dtype="float32", **sizes)["activations"] == (
        2 * 30 * (gpu.kept_per_token(policy, "float32") / 2 + 2 * config.hidden_size * 4)
    )
    assert gpu.peak_memory(alone) == alone["state"] + max(
        alone["KV cache"] + alone["sampling"],
        *[sum(alone[k] for k in ("embeddings and head", "activations", "vocabulary", "kept states"))],
    )

"""What the tests share: one process group, the real command lines, tiny models with random weights."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit both
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import importlib.util
import json
import logging
import math
import multiprocessing
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import common  # before torch: it sets how OpenMP threads wait
import check
import forked
import gpu  # noqa: F401, before a test puts benchmarks/gpu.py on the path
import lm
import tasks
from builtin import tasks as toys

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent

# A run of a second or two. 16 rows of unequal length, and 5 held-out ones, which do not divide among 2 ranks.
TINY = dict(
    steps=3,
    prompts_per_step=4,
    samples_per_prompt=4,
    minibatches=2,
    micro_batch=2,
    max_prompt=24,
    max_new_tokens=12,
    test_rows=5,
    eval_every=2,
    lr=1e-3,
    critic_lr=1e-3,
    dtype="float32",
)

# Gives nearly every completion of a random model another value: without a signal Adam amplifies rounding errors.
REWARD = """
def reward(prompts, completions, rows):
    return [len(set(text)) - 0.3 * len(text) + 0.1 * text.count("1") for text in completions]
"""


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """A group of one process, as common.launch makes it."""
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False  # pages of it beside each failed test
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


# ---- command lines ---------------------------------------------------------------------------------------------------


def flags(**settings) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def command(script, *args, ranks: int = 0) -> list[str]:
    """The command line of a script at the root of the repository; ranks > 0: under torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return [sys.executable, *start, str(ROOT / script), *map(str, args)]


def start(words: list[str], **env) -> subprocess.Popen:
    """A process in a session of its own, with the repository on its path."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | env
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process: subprocess.Popen, expect: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess:
    """Wait for the end, and compare the exit code with `expect` (None: any but 0)."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun and its ranks
        out, err = process.communicate()
        raise AssertionError(f"not over after {timeout} s\n{out[-3000:]}\n{err[-3000:]}") from None
    code = process.returncode
    right = code != 0 if expect is None else code == expect
    assert right, f"exit code {code}, expected {expect}\n{out[-3000:]}\n{err[-5000:]}"
    return subprocess.CompletedProcess(process.args, code, out, err)


def run_script(script, *args, ranks: int = 0, expect: int | None = 0, timeout: float = 120, **env):
    """A script through its real command line; returns the completed process."""
    return finish(start(command(script, *args, ranks=ranks), **env), expect, timeout)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Read the screen of a process until a line contains `text`."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without printing {text!r}\n{process.stderr.read()}")


# The same command in a process forked from one that has imported everything: starts at once, where Python needs six
# seconds of CPU, and torchrun those of each rank and two more.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["common", "lco", "ppo_baseline", "matplotlib.pyplot", "peft", "transformers.models.llama.modeling_llama"]
)


def fork_script(script, *args, log: Path, errors: Path | None = None, **env):
    """A script started as by its command line, in a forked process; its screen is appended to the file `log`."""
    words, logs = [str(ROOT / script), *map(str, args)], [str(log), str(errors or log)]
    process = _forks.Process(target=forked.be, args=(words, logs, env))
    process.start()
    return process


def run_forked(script, *args, ranks: int = 0, expect: int | None = 0, timeout: float = 120, **env):
    """As run_script, in forked processes. Ranks meet as those of torchrun, but none is closed by it when one fails."""
    meet = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    envs = [meet | dict(RANK=rank, LOCAL_RANK=rank) | env for rank in range(ranks)] or [env]
    with tempfile.TemporaryDirectory() as home:
        out, err = Path(home, "out"), Path(home, "err")
        out.touch(), err.touch()
        processes = [fork_script(script, *args, log=out, errors=err, **mine) for mine in envs]
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        out, err, codes = out.read_text(), err.read_text(), [process.exitcode for process in processes]
    right = all(codes) if expect is None else set(codes) == {expect}
    assert right, f"exit codes {codes}, expected {expect}\n{out[-3000:]}\n{err[-5000:]}"
    return subprocess.CompletedProcess([script, *args], codes[0], out, err)


# ---- what runs leave behind ------------------------------------------------------------------------------------------


def read_metrics(folder, times: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if times or not k.startswith("time/")} for line in lines]


def assert_same_metrics(a: list[dict], b: list[dict], relative: float = 1e-5, floor: float = 1e-6) -> None:
    """Equal to a relative error; `floor` is for values that cancel to nearly nothing."""
    assert [list(x) for x in a] == [list(x) for x in b]
    for x, y in zip(a, b):
        wrong = {
            k: (x[k], y[k]) for k in x if x[k] != y[k] and not math.isclose(x[k], y[k], rel_tol=relative, abs_tol=floor)
        }
        assert not wrong, f"step {x['step']}: {wrong}"


def run_here(script, stop_after: int | None = None, **settings) -> Path:
    """A script in this process, without the plot, which takes longer than the run; returns the run folder."""
    entry = getattr(script, {"evaluate": "evaluate", "answers": "main"}.get(script.__name__, "train"))
    leaves = pytest.raises(SystemExit) if stop_after else contextlib.nullcontext()
    with mock.patch.object(common.RunFolder, "report"), mock.patch.object(common.Run, "stop_after", stop_after), leaves:
        entry(common.check_args(script.Args(**settings)))
    return Path(settings["out"])


def check_here(script, **settings) -> None:
    """check.py on a script, in this process."""
    check.Checks(script, common.check_args(script.Args(**settings))).run()


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "run")


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return str(path)


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory) -> str:
    """16 pairs of the built-in task in a file; with 4 of them held out, 12 are left to train on."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = tasks.builtin().slipping_pairs(0, 1)[0][:16]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- tiny models -----------------------------------------------------------------------------------------------------


def make_builtin():
    """The module benchmarks/make_builtin.py."""
    spec = importlib.util.spec_from_file_location("make_builtin", ROOT / "benchmarks" / "make_builtin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(folder: Path, config, tokenizer, seed: int = 0) -> str:
    """A model with random weights in a folder; embeddings large enough for rows that differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # a policy that has preferences
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ids_of(tokenizer) -> dict:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names} | {"vocab_size": len(tokenizer)}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A Llama of 2 layers with random weights and the tokenizer of the built-in model."""
    from transformers import LlamaConfig

    tokenizer = make_builtin().make_tokenizer()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=64, **ids_of(tokenizer))
    return save_model(tmp_path_factory.mktemp("models") / "llama", config, tokenizer)


@pytest.fixture(scope="session")
def letter_tokenizer():
    """A tokenizer of another vocabulary, without a chat template and without a padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<eos>", "<unk>", *"0123456789+= abcdefghijklmnopqrstuvwxyz?"]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def gpt2_model(tmp_path_factory, letter_tokenizer) -> str:
    """A GPT-2: absolute positions, Conv1D, tied embeddings, dropout in its config; another vocabulary."""
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids_of(letter_tokenizer))
    return save_model(tmp_path_factory.mktemp("models") / "gpt2", config, letter_tokenizer)


@pytest.fixture(scope="session")
def qwen_model(tmp_path_factory, letter_tokenizer) -> str:
    """A Qwen3: norms on queries and keys, heads of their own width, tied embeddings."""
    from transformers import Qwen3Config

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
    return save_model(
        tmp_path_factory.mktemp("models") / "qwen", Qwen3Config(**shape, **ids_of(letter_tokenizer)), letter_tokenizer
    )


@pytest.fixture(scope="session")
def judges(tiny_model, tmp_path_factory) -> dict:
    """{how the score of an answer comes from its tokens: arguments of a reward model that is rated so}."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    home = tmp_path_factory.mktemp("judges")
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toys.preference_pairs(21, 0)))
    shared = dict(model=tiny_model, pairs=str(home / "pairs.jsonl"), test_pairs=5)

    def saved(name, cls, **config):
        torch.manual_seed(1)
        model = cls.from_pretrained(tiny_model, **config)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        model.save_pretrained(home / name)
        lm.load_tokenizer(tiny_model).save_pretrained(home / name)
        return shared | {"reward_model": str(home / name), "micro_batch": 2}

    found = {"last": saved("orm", AutoModelForTokenClassification, num_labels=1)}
    found["mean"] = saved("qrm", AutoModelForTokenClassification, num_labels=1)
    found["mean, LM head"] = saved("qrm-lm", AutoModelForCausalLM)
    for name in ("qrm", "qrm-lm"):
        file = home / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"reward_score": "mean"}))
    return found | {"sum": saved("dpo", AutoModelForCausalLM) | {"reward_ref": tiny_model}}


# ---- losses without a model ------------------------------------------------------------------------------------------


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class FixedStates(torch.nn.Module):
    """A policy whose final hidden states and LM head are its parameters: what objective() asks of a model, no more."""

    pack_limit = 0  # rows are read one by one

    def __init__(self, hidden, weight):
        super().__init__()
        self.hidden, self.weight = torch.nn.Parameter(hidden), torch.nn.Parameter(weight)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(weight)))

    def final_hidden(self, input_ids, attention_mask, position_ids):
        return self.hidden

    def get_output_embeddings(self):
        return self

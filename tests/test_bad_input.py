"""Every wrong argument or file gives one sentence that names it, what was found and what was expected."""

import importlib.util
import json

import common
import lco
import lm
import ppo_baseline
import pytest
from conftest import TINY, flags, run_here, run_script

BOTH = (ppo_baseline, lco)


@pytest.fixture
def base(tiny_model, out) -> dict:
    return TINY | dict(model=tiny_model, out=out, steps=1)


@pytest.fixture
def refused(base, monkeypatch):
    """refused(script, [parts of the message], **changes): train() says so before a model is loaded."""

    def check(script, parts, **changes):
        monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            script.train(common.check_args(script.Args(**base | changes)))
        message = str(error.value)
        assert all(part in message for part in parts), message
        assert "\n" not in message and len(message) < 500
        return message

    return check


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("loss", "hinge", "one of"),
        ("advantage", "luck", "one of"),
        ("kl_estimator", "k4", "one of k1, k2, k3"),
        ("long_prompts", "keep", "drop"),
        ("dtype", "float16", "one of auto, float32, bfloat16"),
        ("task", "riddles", "one of auto, chains"),
        ("lr", -1.0, "at least 0"),
        ("lr", float("nan"), "at least 0"),
        ("lr", float("inf"), "at least 0"),
        ("critic_lr", -1e-3, "at least 0"),
        ("temperature", 0.0, "at least 1e-06"),
        ("max_grad_norm", float("nan"), "at least 1e-06"),
        ("kl_coef", -0.1, "at least 0"),
        ("gamma", float("nan"), "at least 0"),
        ("lam", -1.0, "at least 0"),
        ("vf_coef", float("inf"), "at least 0"),
        ("steps", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("micro_batch", 0, "at least 1"),
        ("minibatches", 0, "at least 1"),
        ("prompts_per_step", 0, "at least 1"),
        ("max_new_tokens", 0, "at least 1"),
        ("eval_every", 0, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("test_rows", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("device", "tpu", "auto, cpu"),
        ("lora_rank", -1, "at least 0"),
        ("rollout_rows", 0, "at least 1"),
        ("missing_eos_penalty", float("nan"), "at least"),
    ],
)
def test_wrong_value(script, name, value, expected, refused):
    """The argument, the value found and what was expected."""
    refused(script, [f"--{name}", str(value), expected], **{name: value})


@pytest.mark.parametrize(
    "script, changes, parts",
    [
        (ppo_baseline, dict(clip=0.0), ["--clip", "at least"]),
        (lco, dict(beta=0.0), ["--beta", "at least"]),
        (lco, dict(negative_beta_scale=float("inf")), ["--negative_beta_scale", "inf"]),
        (lco, dict(target="sideways"), ["--target", "exp, linear", "sideways"]),
        (lco, dict(loss="mse", target="linear"), ["--target linear", "--loss kld"]),
        *((s, dict(advantage="group", samples_per_prompt=1), ["--advantage group", "at least 2"]) for s in BOTH),
        *((s, dict(advantage="token"), ["--advantage token needs --reward_file"]) for s in BOTH),
    ],
)
def test_combination_that_means_nothing(script, changes, parts, refused):
    refused(script, parts, **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(prompts_per_step=5, minibatches=3), ["--minibatches 3", "20 rows", "--prompts_per_step 5"]),
        (dict(minibatches=2, micro_batch=3), ["--micro_batch 3", "8 rows"]),
    ],
)
def test_geometry_that_does_not_divide(changes, parts, refused):
    refused(lco, [*parts, "does not divide"], **changes)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_model_folders(refused, tmp_path):
    """A folder that is not there, one without config.json, one without a tokenizer."""
    missing, empty, no_tokenizer = tmp_path / "missing", tmp_path / "empty", tmp_path / "no_tokenizer"
    empty.mkdir()
    no_tokenizer.mkdir()
    (no_tokenizer / "config.json").write_text('{"model_type": "llama"}')
    refused(lco, [f"--model {missing}: no such folder"], model=str(missing))
    refused(lco, [f"--model {empty}", "no config.json"], model=str(empty))
    refused(lco, [f"--model {no_tokenizer}", "no tokenizer"], model=str(no_tokenizer))


def test_hub_name_without_a_network(refused):
    refused(lco, ["--model minalign/nothing", "no tokenizer could be loaded"], model="minalign/nothing")


def test_tokenizers_that_differ(refused, tiny_model, gpt2_model):
    """Models that are compared token by token must have one vocabulary."""
    parts = ["tokenizers of", tiny_model, gpt2_model, "differ in"]
    refused(lco, parts, advantage="token", reward_model=tiny_model, reward_ref=gpt2_model)


# ---- data ------------------------------------------------------------------------------------------------------------


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_datasets(refused, tmp_path, reward_file):
    """Missing, empty, of the wrong columns, with a row that is wrong: the file, the row, and what was expected."""
    missing = str(tmp_path / "missing.jsonl")
    refused(lco, [missing], dataset=missing)
    empty = write(tmp_path / "empty.jsonl", [])
    refused(lco, [empty, "expected"], dataset=empty)
    columns = write(tmp_path / "columns.jsonl", [{"query": "1+1?"}] * 9)
    refused(lco, [columns, "query", "expected", "prompt", "answer+question"], dataset=columns)
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "1+1="}\n{"prompt": "1+')
    refused(lco, [str(torn), "2"], dataset=str(torn), reward_file=reward_file)
    prompts = [{"prompt": "1+1="}] * 8 + [{"prompt": None}]
    null = write(tmp_path / "null.jsonl", prompts)
    refused(lco, [null, "row 9", "'prompt'", "expected text"], dataset=null, reward_file=reward_file)
    small = write(tmp_path / "small.jsonl", prompts[:4])
    refused(lco, ["--test_rows 5", small, "4 rows"], dataset=small, reward_file=reward_file)


def test_no_row_has_an_answer(refused, tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", [{"question": f"{i}+1?", "answer": f"It is {i + 1}."} for i in range(9)])
    refused(lco, [path, "no row has an answer", "'#### '"], dataset=path)


def test_prompts_without_a_reward(refused, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}="} for i in range(9)])
    refused(lco, ["--reward_file is empty", path], dataset=path)


def test_dataset_for_a_task_that_makes_its_own(refused, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "1="}] * 9)
    refused(lco, [path, "--task chains"], task="chains", dataset=path)


@pytest.mark.parametrize("how", ["error", "drop", "truncate"])
def test_long_prompts(how, base, tmp_path, reward_file, capsys):
    """Prompts longer than --max_prompt are counted, and refused, dropped or truncated as asked."""
    sums = [f"{i}+{i}=" for i in range(1, 10)] + ["1+1+1+1+1+1+1=", "2+2+2+2+2+2+2="]
    sums += ["3+3+3+3+3+3=", "11=", "12=", "13=", "14="]
    path = write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in sums])
    changes = dict(dataset=path, reward_file=reward_file, max_prompt=6, long_prompts=how)
    found = "2 training and 1 held-out prompts are longer than 6 tokens"
    args = lco.Args(**base | changes)
    if how == "error":
        with pytest.raises(common.BadInput, match=f"--max_prompt 6: {found}"):
            lco.prepare(args)
        return
    task, tokenizer = lco.prepare(args)
    assert f"{found}, {'left out' if how == 'drop' else 'truncated'}" in capsys.readouterr().out
    assert (len(task.train), len(task.test)) == ((9, 4) if how == "drop" else (11, 5))
    run_here(lco, **base | changes)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert ("3+3+3+3+3+3=" in {json.loads(line)["prompt"] for line in lines}) == (how == "truncate")


def test_all_prompts_too_long(refused):
    """The endless built-in task has nothing to drop: a limit that its prompts exceed is refused."""
    refused(lco, ["--max_prompt 2"], max_prompt=2)


# ---- rewards ---------------------------------------------------------------------------------------------------------

SIGNATURE = "reward(prompts, completions, rows)"


@pytest.mark.parametrize(
    "text, parts",
    [
        (None, ["no such file", SIGNATURE]),
        ("score = 1", ["no function 'reward'", SIGNATURE]),
        ("def reward(completions): return []", ["reward(completions)", SIGNATURE]),
        ("import nothing_of_this_name", ["ModuleNotFoundError", SIGNATURE]),
        ("def reward(", ["SyntaxError", SIGNATURE]),
    ],
)
def test_reward_file_that_cannot_be_used(text, parts, refused, tmp_path):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text)
    refused(lco, [f"--reward_file {path}", *parts], reward_file=str(path))


@pytest.mark.parametrize(
    "result, parts",
    [
        ("[1.0]", ["returned 1 rewards", "16 rows"]),
        ("[float('nan')] * 16", ["row 1", "nan", "finite"]),
        ("[0.0] * 15 + [float('inf')]", ["row 16", "inf", "finite"]),
        ("None", ["NoneType", "expected a list"]),
        ("['good'] * 16", ["row 1", "str", "expected a number"]),
        ("[0.0] * 15 + [[0.0]]", ["row 16", "list", "expected one kind"]),
    ],
)
def test_reward_that_is_wrong(result, parts, base, tmp_path):
    """What a reward function returns is checked at its first call."""
    path = tmp_path / "mine.py"
    path.write_text(f"def reward(prompts, completions, rows):\n    return {result}\n")
    with pytest.raises(common.BadInput) as error:
        run_here(lco, **base | {"reward_file": str(path)})
    assert all(part in str(error.value) for part in [str(path), *parts]), str(error.value)


def test_one_reward_a_token_has_the_right_length(base, tmp_path):
    """A list of rewards for each completion has one number a token."""
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompts, completions, rows):\n    return [[1.0] * 40 for _ in completions]\n")
    with pytest.raises(common.BadInput, match="40 .* token"):
        run_here(lco, **base | {"reward_file": str(path)})


# ---- folders and trackers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", BOTH)
def test_existing_run_folder(script, refused, tmp_path):
    """A folder with anything in it is refused and left as it was; an empty one is welcome."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all of it")
    refused(script, [f"--out {tmp_path / 'run'} exists and is not empty", "--resume"])
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_wandb_that_is_not_installed(refused, monkeypatch, out):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else there(name, *a))
    refused(lco, ["--wandb", "not installed"], wandb=True)


# ---- through the command line ----------------------------------------------------------------------------------------


def test_command_line(base):
    """A wrong value: one line on the screen, exit code 2, no traceback."""
    done = run_script("lco.py", *flags(**base | {"lr": -1}), expect=2)
    assert done.stderr.strip() == "lco.py: error: --lr must be at least 0, found -1.0"


@pytest.mark.parametrize("words", [["--learning_rate", "1"], ["--steps", "many"], ["--resume", "perhaps"]])
def test_words_that_are_no_arguments(words, capsys):
    """An unknown argument, or a value of another type: named on the screen, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        common.parse_args(lco.Args, lco.BUILTIN, words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_failure_on_the_command_line(base, tmp_path):
    """A reward function that raises is no wrong argument: its traceback is shown, exit code 1."""
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompts, completions, rows):\n    raise ValueError('the grader broke down')\n")
    done = run_script("lco.py", *flags(**base | {"reward_file": path}), expect=1)
    assert "ValueError: the grader broke down" in done.stderr and "mine.py" in done.stderr

"""DPO, DCKD and ADPA end to end: command lines, the chain, every switch, bad input."""

import json
import math
import re

import adpa
import common
import lm
import dckd
import dpo
import pytest
import seft
import tasks
from conftest import flags, read_metrics, run_here, run_forked

SCRIPTS = {"dpo": dpo, "dckd": dckd, "adpa": adpa}
FILES = [".lock", "args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html"]
FILES += ["samples.jsonl", "source.py"]
TINY = dict(steps=3, prompts_per_step=4, micro_batch=4, max_prompt=24, max_new_tokens=24, test_rows=4)
TINY |= dict(eval_every=2, lr=1e-3)


@pytest.fixture(scope="module")
def base(tiny_model, few_pairs) -> dict:
    return TINY | dict(model=tiny_model, dataset=few_pairs)


def settings_of(name: str, base: dict, **changes) -> dict:
    more = {"dckd": dict(teacher="builtin"), "adpa": dict(teacher="builtin", ref_teacher="builtin-small")}
    return base | more.get(name, {}) | changes


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folders and screens of three commands: the bare dpo.py, dckd.py and adpa.py with less to do, one from the other."""
    home = tmp_path_factory.mktemp("chain")
    less = dict(steps=2, prompts_per_step=8, test_rows=16, micro_batch=16, max_prompt=24, max_new_tokens=24)
    commands = {
        "dpo": {},
        "dckd": dict(teacher=home / "dpo" / "model"),
        "adpa": dict(teacher=home / "dpo" / "model", model=home / "dckd" / "model"),
    }
    return {
        name: (home / name, run_forked(f"{name}.py", *flags(**less, **more, out=home / name)).stdout)
        for name, more in commands.items()
    }


def test_chain(chain):
    """Each run leaves a whole folder; a teacher names what it was aligned from, so adpa.py need not be given it."""
    for name, (folder, screen) in chain.items():
        expected = FILES + ["states"] * (name == "adpa")
        assert sorted(p.name for p in folder.iterdir()) == sorted(expected)
        lines = [line for line in screen.splitlines() if line.startswith("step ")]
        assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
        assert all(word in lines[-1] for word in ("loss/total", "loss/nll", "s/step", "left", "eval/"))
    assert json.loads((chain["dpo"][0] / "model" / "config.json").read_text())["aligned_from"] == "builtin"
    assert "training: 2000 pairs; held out: 16 pairs; 8 per step, 8 on each of 1 rank(s)" in chain["dpo"][1]


def test_metrics(chain):
    """Held-out accuracy and pairs before and after; DPO starts at log 2, every number is finite and namespaced."""
    for folder, _ in chain.values():
        lines = read_metrics(folder)
        assert all("/" in k for line in lines for k in line if k not in ("step", "lr", "grad_norm"))
        assert all(math.isfinite(x) for line in lines for x in line.values())
        for line in (lines[0], lines[-1]):
            assert line.keys() >= {"eval/sampled", "eval/nll", "eval/pair_accuracy"}
        page = (folder / "report.html").read_text()
        assert "eval/pair_accuracy" in page and not re.search(r"https?://|<script", page)
    first = {name: read_metrics(folder)[1] for name, (folder, _) in chain.items()}
    assert first["dpo"]["loss/dpo"] == pytest.approx(math.log(2)) and first["dpo"]["dpo/margin"] == 0
    assert first["dckd"].keys() >= {"kl/chosen", "kl/rejected", "length/rejected"}
    assert first["adpa"].keys() >= {"adpa/advantage", "adpa/gap", "kl/start", "length/states"}


def test_the_built_in_teacher_is_aligned():
    """builtin-aligned knows what it came from, and the bare commands of both students start with it."""
    assert lm.load_config("builtin-aligned").aligned_from == "builtin"
    for script in (dckd, adpa):
        args = common.parse_args(script.Args, script.BUILTIN, [])
        assert args.teacher == "builtin-aligned" and args.model == "builtin-small"
    assert adpa.reference_teacher(args) == "builtin"


# ---- losses and switches ---------------------------------------------------------------------------------------------

SWITCHES = [
    ("dpo", dict(nll=1.0, label_smoothing=0.1)),
    ("dpo", dict(loss="sft", warmup_steps=2)),
    ("dpo", dict(lora_rank=4)),
    ("dckd", dict(rejected_weight=0.0)),
    ("dckd", dict(lora_rank=4)),
    ("dckd", dict(dtype="bfloat16", activation_checkpointing=True)),
    ("adpa", dict(lora_rank=4, adv_topk=5)),
    ("adpa", dict(objective="kl", beta=0.5, lora_rank=4)),
    ("adpa", dict(objective="opd", opd_lambda=1.5, nll=0.0, refresh_every=1, state_temperature=1.0)),
    ("adpa", dict(dtype="bfloat16")),
]


@pytest.mark.parametrize("name", ["dpo", "dckd", "adpa", "seft"])
def test_graded_prompts_are_not_trained_on(name, tmp_path):
    """--task holds prompts out of the built-in sums; a pair of --dataset with one of them is not trained on."""
    held_out = tasks.load_task("chains", test_rows=8).test
    prompts = [row["prompt"] for row in held_out] + [f"{i}+{i}+{i}+{i}=" for i in range(10, 22)]
    data = written(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": "1", "rejected": "2"} for p in prompts])
    script = seft if name == "seft" else SCRIPTS[name]
    given = dict(dataset=data, task="chains", test_rows=8, prompts_per_step=4, max_prompt=24, max_new_tokens=24)
    args, tokenizer = script.Args(**given), lm.load_tokenizer("builtin")
    found = (
        seft.load_data(args, tokenizer).pairs
        if name == "seft"
        else script.load_data(args, tokenizer, tasks.load_pairs)[0]
    )
    assert sorted(row["prompt"] for row in found) == sorted(prompts[8:12])


@pytest.mark.parametrize("name", ["dpo", "dckd", "adpa", "seft"])
def test_no_prompt_of_a_test_set_is_trained_on(name, tmp_path, reward_file):
    """Not even those that are not evaluated, and those that are text in one file and messages in the other."""
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(10, 34)]
    prompts = [{"prompt": f"{i}+1="} for i in range(10, 14)]
    prompts += [{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(14, 18)]
    data, test = (written(tmp_path / f"{n}.jsonl", rows) for n, rows in (("pairs", pairs), ("test", prompts)))
    script = seft if name == "seft" else SCRIPTS[name]
    given = dict(dataset=data, test_dataset=test, reward_file=reward_file, test_rows=2, prompts_per_step=4)
    args, tokenizer = script.Args(**given, max_prompt=24, max_new_tokens=24), lm.load_tokenizer("builtin")
    task = tasks.load_task("auto", "", reward_file, 2, test, graded=False, train=False)
    assert len(task.test) == 2 and len(task.held_out) == 8
    if name == "seft":
        train = seft.load_data(args, tokenizer).pairs
    else:
        train = script.load_data(args, tokenizer, tasks.load_pairs)[0]
    assert [row["prompt"] for row in train] == [f"{i}+1=" for i in range(18, 32)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_graded(name, base, tmp_path, capsys):
    """--test_dataset holds the graded prompts, without --task too; long ones are left out; pairs have no part in it."""
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(10, 22)]
    prompts = [{"prompt": f"{i}+1="} for i in ("1+1+1+1+1+1", 10, 11, 30)]
    data, test = (written(tmp_path / f"{n}.jsonl", rows) for n, rows in (("pairs", pairs), ("test", prompts)))
    reward = tmp_path / "reward_of_length.py"
    reward.write_text("def reward(prompts, completions, rows):\n    return [float(len(c)) for c in completions]\n")
    given = dict(dataset=data, test_dataset=test, reward_file=str(reward), max_prompt=8)
    args, tokenizer = SCRIPTS[name].Args(**settings_of(name, base, **given)), lm.load_tokenizer("builtin")
    train, held_out, task = SCRIPTS[name].load_data(args, tokenizer, tasks.load_pairs)
    assert [row["prompt"] for row in task.test] == ["10+1=", "11+1=", "30+1="]
    assert [row["prompt"] for row in train] == [f"{i}+1=" for i in range(12, 18)] and len(held_out) == 4
    said = "3 held-out prompts are graded; 0 training and 1 held-out prompts are longer than 8 tokens, left out"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("script, changes", [(dpo, dict(loss="sft")), (dckd, dict(teacher="builtin-aligned"))])
def test_only_dpo_names_a_reference(script, changes, base, out):
    """A model after SFT or distillation was not aligned from what its start was: adpa.py must be told its reference."""
    folder = run_here(script, **base | dict(model="builtin-aligned", steps=1) | changes, out=out)
    assert "aligned_from" not in json.loads((folder / "model" / "config.json").read_text())


@pytest.mark.parametrize("name, switches", SWITCHES, ids=str)
def test_switches(name, switches, base, out):
    """Each runs, moves the model, and logs finite numbers."""
    lines = read_metrics(run_here(SCRIPTS[name], **settings_of(name, base, **switches), out=out))
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[1]["grad_norm"] > 0
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert lines[1]["loss/total"] != lines[3]["loss/total"]


def test_a_student_learns_its_teacher(base, out):
    """Distilled for some steps, the KL to the teacher falls on both sides."""
    changes = dict(steps=30, prompts_per_step=8, micro_batch=16, eval_every=100, lr=1e-2)
    changes |= dict(chosen_weight=1.0, rejected_weight=1.0)
    lines = read_metrics(run_here(dckd, **settings_of("dckd", base, **changes), out=out))
    for name in ("kl/chosen", "kl/rejected"):
        assert lines[-1][name] < 0.5 * lines[1][name]


def test_preferences_are_learnt(base, out):
    """DPO tells the better answers of its own pairs from the worse ones after some steps."""
    changes = dict(steps=20, prompts_per_step=12, micro_batch=24, eval_every=100, lr=3e-3, nll=0.1)
    lines = read_metrics(run_here(dpo, **base | changes, out=out))
    assert lines[-1]["dpo/accuracy"] == 1 and lines[-1]["loss/dpo"] < 0.5 * lines[1]["loss/dpo"]


# ---- data ------------------------------------------------------------------------------------------------------------


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_pairs(base, tmp_path, out):
    """A .jsonl of pairs, messages too: held-out pairs are scored, and the user's reward grades answers."""
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(15)]
    rows[3]["prompt"] = [{"role": "user", "content": "4+4="}]
    data = written(tmp_path / "pairs.jsonl", rows)
    lines = read_metrics(run_here(dckd, **settings_of("dckd", base, dataset=data), out=out))
    assert "eval/pair_accuracy" in lines[0] and "eval/sampled" not in lines[0] and "eval/reward" not in lines[0]
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    first = {key: samples[0][key] for key in ("prompt", "chosen", "rejected")}
    assert first == {"prompt": "11+1=", "chosen": "12", "rejected": "11"}
    assert all("reward" not in sample for sample in samples), "nobody graded"
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, completions, rows):\n    return [float(len(c)) for c in completions]\n")
    changes = dict(dataset=data, reward_file=str(reward))
    lines = read_metrics(run_here(dckd, **settings_of("dckd", base, **changes), out=str(tmp_path / "two")))
    assert lines[0]["eval/reward"] > 0


def test_sft_rows(base, tmp_path):
    """prompt + completion, messages, and TRL's conversations of one answer are the same rows, and so the same run."""
    made, user = [(f"{i}+1=", str(i + 1)) for i in range(15)], lambda text: {"role": "user", "content": text}
    answer = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    rows = {
        "text": [{"prompt": p, "completion": c} for p, c in made],
        "messages": [{"messages": [user(p), answer(c)]} for p, c in made],
        "trl": [{"prompt": [user(p)], "completion": [answer(c)]} for p, c in made],
    }
    runs = {}
    for name in rows:  # another column of that name is no answer
        data = written(tmp_path / f"{name}.jsonl", [row | {"rejected": None} for row in rows[name]])
        changes = dict(loss="sft", dataset=data, micro_batch=3)
        runs[name] = read_metrics(run_here(dpo, **base | changes, out=str(tmp_path / name)))
    assert "eval/nll" in runs["text"][0] and "eval/pair_accuracy" not in runs["text"][0]
    assert "length/rejected" not in runs["text"][1] and runs["text"][-1]["loss/nll"] < runs["text"][1]["loss/nll"]
    assert runs["messages"] == runs["trl"] == runs["text"]  # the built-in chat template adds nothing to a prompt


def test_sft_needs_no_rejected_answer(base, tmp_path, capsys):
    """One that is too long, or the same as the better one, costs no training row; held-out pairs are compared."""
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "1" * 50 if i % 2 else str(i + 1)} for i in range(8)]
    rows += [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(20, 24)]
    args = dpo.Args(**base | dict(loss="sft", dataset=written(tmp_path / "rows.jsonl", rows), test_rows=4))
    train, test, _, _ = dpo.prepare(args)
    assert len(train) == 8 and "training: 8 pairs; held out: 4 pairs" in capsys.readouterr().out
    assert "rejected_ids" not in train[0] and "rejected_ids" in test[0]


def test_sft_rows_that_are_refused(refused, tmp_path):
    question = {"role": "user", "content": "1+1="}
    for rows, parts in (
        ([{"messages": [question]}], ["row 1", "expected a prompt and one assistant m"]),
        ([{"messages": [question, question]}], ["row 1", "expected a prompt and one assistant m"]),
        ([{"question": "1+1="}], ["has the columns question", "expected chosen+rejected or messages or co"]),
    ):
        data = written(tmp_path / "rows.jsonl", rows * 20)
        refused("dpo", [data, *parts], dataset=data, loss="sft")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, out, monkeypatch):
    """refused(name, [parts of the message], **changes): the script refuses to start before a model is loaded."""

    def check(name, parts, **changes):
        script = SCRIPTS[name]
        monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            script.train(common.check_args(script.Args(**settings_of(name, base) | dict(out=out) | changes)))
        message = str(error.value)
        assert all(part in message for part in parts) and "\n" not in message, message

    return check


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(micro_batch=3), ["--micro_batch 3", "must be even"]),
        (dict(dataset="", task="gsm8k"), ["--task gsm8k", "--dataset is needed"]),
        (dict(max_prompt=2), ["no pair is left", "are too long"]),
        (dict(max_new_tokens=60), ["--max_prompt + --max_new_tokens is 84", "64 positions"]),
        (dict(task="chains", reward_file=__file__), ["--reward_file", "it has no function 'reward'"]),
        (dict(dataset="", test_dataset=__file__), ["--task chains makes its own rows"]),
    ],
    ids=str,
)
def test_wrong_value(name, changes, parts, refused):
    refused(name, parts, **changes)


@pytest.mark.parametrize("dataset", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_graders(name, dataset, refused, reward_file, base):
    """A reward file beside a task that grades its answers would never be called."""
    parts = ["--reward_file", "the task chains has a grader of its own; expected one of both"]
    refused(name, parts, dataset=base["dataset"] if dataset else "", task="chains", reward_file=reward_file)


@pytest.mark.parametrize(
    "name, changes, parts",
    [
        ("adpa", dict(ref_teacher=""), ["--ref_teacher is empty", "builtin does not name"]),
        ("adpa", dict(objective="opd"), ["--objective opd", "--refresh_every 1 and --state_temperature 1"]),
    ],
    ids=str,
)
def test_wrong_value_of_one(name, changes, parts, refused):
    refused(name, parts, **changes)


def test_pairs_of_wrong_columns(refused, tmp_path):
    data = written(tmp_path / "pairs.jsonl", [{"question": "1+1", "answer": "2"}] * 20)
    refused("dckd", [data, "question, answer", "chosen+rejected"], dataset=data)

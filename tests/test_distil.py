"""DCKD and ADPA end to end: command lines, stages, every loss and switch, ranks, resume, check.py, bad input."""

import json
import math
import re
from unittest import mock

import adpa
import check
import common
import dckd
import pytest
from conftest import assert_same_metrics, check_here, flags, read_metrics, run_here, run_script

SCRIPTS = {"dckd": dckd, "adpa": adpa}
FILES = ["args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html", "samples.jsonl", "source.py"]
TINY = dict(steps=3, prompts_per_step=4, micro_batch=4, max_prompt=24, max_new_tokens=24, test_rows=5)
TINY |= dict(builtin_pairs=12, eval_every=2, lr=1e-3)


def settings_of(script, base) -> dict:
    return base | ({"ref_teacher": "builtin-small"} if script is adpa else {})


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    return TINY | dict(model=tiny_model, teacher="builtin")


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCRIPTS)
def bare(request, tmp_path_factory):
    """(script, folder, screen) of the bare command with less to do: the built-in models and task, all stages."""
    name = request.param
    folder = tmp_path_factory.mktemp("bare") / name
    less = dict(steps=2, dpo_steps=2, sft_steps=2, prompts_per_step=8, builtin_pairs=32, test_rows=16, micro_batch=16)
    done = run_script(f"{name}.py", *flags(**less, out=folder))
    return SCRIPTS[name], folder, done.stdout


def test_stages(bare):
    """A run folder for each run; each starts from the one before; the student is asked to imitate the last."""
    script, folder, screen = bare
    runs = {p.parent.relative_to(folder).as_posix(): p.parent for p in folder.rglob("args.json")}
    assert sorted(runs) == ["student", "teacher/dpo", "teacher/ref"]
    about = {name: json.loads((run / "args.json").read_text())["args"] for name, run in runs.items()}
    assert about["teacher/ref"]["model"] == "builtin" and about["teacher/ref"]["loss"] == "sft"
    assert about["teacher/dpo"]["model"] == str(folder / "teacher/ref/model") and about["teacher/dpo"]["loss"] == "dpo"
    assert about["student"]["model"] == "builtin-small"
    assert about["student"]["teacher"] == str(folder / "teacher/dpo/model")
    if script is adpa:
        assert about["student"]["ref_teacher"] == str(folder / "teacher/ref/model")
    for name, run in runs.items():
        expected = FILES + ["states"] * (script is adpa and name == "student")
        assert sorted(p.name for p in run.iterdir()) == sorted(expected)
        assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]
    record = json.loads((folder / "teacher/dpo/model/aligned_from.json").read_text())
    assert record["fingerprint"] == common.fingerprint(about["teacher/dpo"]["model"])
    lines = [line for line in screen.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"] * 3
    assert "8 pairs (chosen) = 8 sequences a step on 1 rank(s); 1 micro-batch(es) of 8" in screen
    assert all(word in lines[-1] for word in ("loss/total", "loss/nll", "length", "s/step", "left", "eval/pass@1"))


def test_metrics(bare):
    """Held-out accuracy and pairs before and after; DPO starts at log 2, every number is finite and namespaced."""
    script, folder, _ = bare
    for name in ("teacher/ref", "teacher/dpo", "student"):
        lines = read_metrics(folder / name)
        assert all("/" in k for line in lines for k in line if k not in ("step", "lr", "grad_norm"))
        assert all(math.isfinite(x) for line in lines for x in line.values())
        for line in (lines[0], lines[-1]):
            assert line.keys() >= {"eval/pass@1", "eval/sampled", "eval/nll", "eval/pair_accuracy"}
    dpo = read_metrics(folder / "teacher/dpo")[1]
    assert dpo["loss/dpo"] == pytest.approx(math.log(2)) and dpo["dpo/margin"] == pytest.approx(0, abs=1e-5)
    student = read_metrics(folder / "student")[1]
    assert {"dckd": {"kl/chosen", "kl/rejected"}, "adpa": {"adpa/advantage", "adpa/gap", "kl/start"}}[
        script.__name__
    ] <= student.keys()
    page = (folder / "student" / "report.html").read_text()
    assert "eval/pair_accuracy" in page and not re.search(r"https?://|<script", page)


def test_finished_stages_are_left(bare):
    """--resume of all stages runs what has not ended and nothing else; without it the folder is refused."""
    script, folder, _ = bare
    about = json.loads((folder / "student" / "args.json").read_text())["args"]
    settings = about | dict(stage="all", teacher="builtin", out=str(folder)) | dict(sft_steps=2, dpo_steps=2, steps=2)
    settings |= {"ref_teacher": ""} if script is adpa else {}
    with pytest.raises(common.BadInput, match="exists and is not empty"):
        script.run_stages(script.Args(**settings))
    before = {p: p.read_bytes() for p in folder.rglob("*.jsonl")}
    with mock.patch.object(script, "train", side_effect=AssertionError):
        script.run_stages(script.Args(**settings | dict(resume=True)))
    (folder / "student" / "model").rename(folder / "student" / "model.part")
    with mock.patch.object(common.RunFolder, "report"):
        script.run_stages(script.Args(**settings | dict(resume=True)))
    assert (folder / "student" / "model").exists() and before == {p: p.read_bytes() for p in folder.rglob("*.jsonl")}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_check_on_the_built_in_task(script, capsys):
    args = common.parse_args(script.Args, script.BUILTIN, [])
    check.Checks(script, args).run()
    assert "all checks passed" in capsys.readouterr().out


# ---- losses and switches ---------------------------------------------------------------------------------------------

SWITCHES = [
    ("dckd", dict(loss="kd")),
    ("dckd", dict(loss="sft")),
    ("dckd", dict(loss="dpo", dpo_nll=1.0)),
    ("dckd", dict(lora_rank=4)),
    ("dckd", dict(loss="dpo", lora_rank=4)),
    ("dckd", dict(dtype="bfloat16", activation_checkpointing=True)),
    ("dckd", dict(a_w=0.0, a_l=0.0, warmup_steps=2)),
    ("adpa", dict(loss="dpo")),
    ("adpa", dict(lora_rank=4)),
    ("adpa", dict(objective="kl", beta=0.5, lora_rank=4)),
    ("adpa", dict(dtype="bfloat16", cache="hidden")),
    ("adpa", dict(adv_clip=[0.0, 1.0], adv_topk=5, ref_topk=5)),
    ("adpa", dict(advantage="dpo", states="chosen")),
]


@pytest.mark.parametrize("script, switches", SWITCHES, ids=str)
def test_switches(script, switches, base, out):
    """Each runs, moves the model, and logs finite numbers."""
    lines = read_metrics(run_here(SCRIPTS[script], **settings_of(SCRIPTS[script], base) | switches, out=out))
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[1]["grad_norm"] > 0
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert lines[1]["loss/total"] != lines[3]["loss/total"]


def test_a_student_learns_its_teacher(base, out):
    """Distilled for some steps, the KL to the teacher falls on both sides."""
    changes = dict(
        steps=30, prompts_per_step=8, micro_batch=16, builtin_pairs=8, eval_every=100, lr=1e-2, a_w=1.0, a_l=1.0
    )
    lines = read_metrics(run_here(dckd, **base | changes, out=out))
    for name in ("kl/chosen", "kl/rejected"):
        assert lines[-1][name] < 0.5 * lines[1][name]


def test_own_pairs(base, tmp_path, out):
    """A .jsonl of pairs, messages too: held-out pairs are scored, and the user's reward grades answers."""
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(15)]
    rows[3]["prompt"] = [{"role": "user", "content": "4+4="}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = read_metrics(run_here(dckd, **base | dict(dataset=str(data)), out=out))
    assert "eval/pair_accuracy" in lines[0] and "eval/pass@1" not in lines[0] and "eval/reward" not in lines[0]
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"] == "11+1=" or samples[0]["prompt"] == "10+1="
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, completions, rows):\n    return [float(len(c)) for c in completions]\n")
    changes = dict(dataset=str(data), reward_file=str(reward))
    lines = read_metrics(run_here(dckd, **base | changes, out=str(tmp_path / "two")))
    assert lines[0]["eval/reward"] > 0


# ---- ranks and resume ------------------------------------------------------------------------------------------------

JOBS = {
    "dckd": ("dckd", {}),
    "dpo": ("dckd", dict(loss="dpo", dpo_nll=0.5)),
    "cached": ("dckd", dict(cache="hidden", lora_rank=4)),
    "adpa": ("adpa", dict(refresh_every=2, state_temperature=1.0)),
    "topk": ("adpa", dict(cache="topk", cache_topk=4, adv_topk=4)),
}
DRIVER = """
import json, sys
import common, adpa, dckd

def main():
    for script, settings in json.load(open(sys.argv[1])):
        module = {"adpa": adpa, "dckd": dckd}[script]
        module.train(module.Args(**settings))

common.launch(main, "cpu")
"""


@pytest.fixture(scope="module")
def two_ranks(base, tmp_path_factory):
    """Run folders of all JOBS, from a single torchrun on two ranks."""
    home = tmp_path_factory.mktemp("two_ranks")
    jobs = []
    for name, (script, changes) in JOBS.items():
        jobs.append((script, settings_of(SCRIPTS[script], base) | changes | {"lr": 3e-4, "out": str(home / name)}))
    (home / "driver.py").write_text(DRIVER)
    (home / "jobs.json").write_text(json.dumps(jobs))
    run_script(home / "driver.py", home / "jobs.json", ranks=2)
    return home


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_are_one(name, base, two_ranks, out):
    """1 process = 2 ranks, to a relative 1e-5 in every metric."""
    script, changes = JOBS[name]
    alone = run_here(SCRIPTS[script], **settings_of(SCRIPTS[script], base) | changes | {"lr": 3e-4}, out=out)
    assert len(read_metrics(alone)) == 4
    assert_same_metrics(read_metrics(alone), read_metrics(two_ranks / name), relative=2e-5)


@pytest.mark.parametrize("name", JOBS)
def test_resume_is_bit_equal(name, base, tmp_path):
    """run(3) = run(1) + resume, to the last bit of every metric and weight."""
    script, changes = JOBS[name]
    module, settings = SCRIPTS[script], settings_of(SCRIPTS[script], base) | changes
    whole = run_here(module, **settings, out=str(tmp_path / "whole"))
    run_here(module, 1, **settings, out=str(tmp_path / "parts"))
    parts = run_here(module, **settings, out=str(tmp_path / "parts"), resume=True)
    assert read_metrics(whole) == read_metrics(parts)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


# ---- check.py finds what is broken ----------------------------------------------------------------------------------


def mean_a_micro_batch(script, monkeypatch):
    objective = script.objective

    def mean(models, heads, micro, *rest):
        loss, sums = objective(models, heads, micro, *rest)
        return loss / len(micro["mask"]), sums

    monkeypatch.setattr(script, "objective", mean)


def shift_the_teacher(script, monkeypatch):
    ask = script.ask

    def shifted(*args):
        return {k: x.roll(1, 1) for k, x in ask(*args).items()}

    monkeypatch.setattr(script, "ask", shifted)


def leave_out_eos(script, monkeypatch):
    monkeypatch.setattr(common, "encode_completion", lambda t, text, *_: t(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(
    "damage, name",
    [
        (mean_a_micro_batch, "gradient ignores micro-batches"),
        (shift_the_teacher, "a model is at distance 0 from itself"),
        (leave_out_eos, "EOS is inside the loss"),
    ],
)
def test_check_finds(script, damage, name, base, monkeypatch, capsys):
    damage(script, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        check_here(script, **settings_of(script, base))
    screen = capsys.readouterr().out
    assert stop.value.code == 1 and re.search(rf"FAIL +{name}", screen), screen


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, out, monkeypatch):
    """refused(script, [parts of the message], **changes): run_stages() says so before a model is loaded."""

    def check(script, parts, **changes):
        monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            script.run_stages(common.check_args(script.Args(**settings_of(script, base) | dict(out=out) | changes)))
        message = str(error.value)
        assert all(part in message for part in parts) and "\n" not in message, message

    return check


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(loss="hinge"), ["--loss", "one of", "hinge"]),
        (dict(stage="both"), ["--stage", "student, teacher, all"]),
        (dict(cache="disk"), ["--cache", "none, hidden, topk"]),
        (dict(teacher=""), ["--teacher is empty"]),
        (dict(teacher="", stage="all"), ["--teacher is empty: --stage all"]),
        (dict(lr=float("nan")), ["--lr", "nan"]),
        (dict(dpo_beta=0.0), ["--dpo_beta", "at least"]),
        (dict(dpo_steps=0), ["--dpo_steps", "at least 1"]),
        (dict(builtin_pairs=0), ["--builtin_pairs", "at least 1"]),
        (dict(builtin_slip=1.5), ["--builtin_slip", "1.5", "at most 1"]),
        (dict(micro_batch=3), ["--micro_batch 3 does not divide", "8 sequences"]),
        (dict(loss="dpo", micro_batch=1), ["--micro_batch 1", "must be even"]),
        (dict(task="gsm8k"), ["--task gsm8k", "--dataset is needed"]),
        (dict(seed=-1), ["--seed", "at least 0"]),
        (dict(max_prompt=2), ["no pair is left", "are too long"]),
        (dict(max_new_tokens=60), ["--max_prompt + --max_new_tokens is 84", "64 positions"]),
    ],
    ids=str,
)
def test_wrong_value(script, changes, parts, refused):
    refused(script, parts, **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(ref_teacher=""), ["--ref_teacher is empty"]),
        (dict(adv_clip=[1.0, 0.0]), ["--adv_clip", "lowest"]),
        (dict(adv_clip=[1.0]), ["--adv_clip", "lowest"]),
        (dict(gamma=-1.0), ["--gamma", "at least 0"]),
        (dict(beta=0.0), ["--beta", "at least"]),
        (dict(states="teacher"), ["--states", "student, chosen, rejected"]),
        (dict(objective="cubic"), ["--objective", "linear, kl"]),
        (dict(refresh_every=2, cache="hidden"), ["--refresh_every", "--cache none"]),
        (dict(refresh_every=2, states="chosen"), ["--refresh_every", "--states chosen"]),
        (dict(cache="topk", cache_topk=4, adv_topk=5), ["--cache topk", "--adv_topk", "4"]),
    ],
    ids=str,
)
def test_wrong_value_of_adpa(changes, parts, refused):
    refused(adpa, parts, **changes)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("stage", ["student", "all"])
def test_tokenizers_that_differ(script, stage, refused, gpt2_model, tiny_model):
    """Also before the teacher is trained for a student that could not use it."""
    refused(script, [f"the tokenizers of {tiny_model} and {gpt2_model} differ in"], stage=stage, teacher=gpt2_model)


def test_pairs_of_wrong_columns(refused, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"question": "1+1", "answer": "2"}\n' * 20)
    refused(dckd, [str(data), "question, answer", "chosen+rejected"], dataset=str(data))


def test_topk_of_the_whole_vocabulary(base, out):
    with pytest.raises(common.BadInput, match="--cache_topk 16"):
        run_here(dckd, **base | dict(cache="topk", cache_topk=16), out=out)


def test_fingerprint_needs_weights(tmp_path):
    """Nothing to hash is not a hash of nothing."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(common.BadInput, match="no .safetensors"):
        common.fingerprint(str(tmp_path))

"""SEFT end to end: command line, stages, every control and switch, ranks, resume, check.py, bad input."""

import inspect
import json
import math
import re
from pathlib import Path
from unittest import mock

import check
import common
import pytest
import seft
import tasks
from conftest import assert_same_metrics, check_here, flags, read_metrics, run_here, run_script

import torch

FILES = ["args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html", "samples.jsonl", "source.py"]
TINY = dict(steps=4, rounds=2, prompts_per_step=4, micro_batch=4, max_prompt=18, max_new_tokens=20, test_rows=5)
TINY |= dict(builtin_pairs=12, unannotated=16, lr=1e-3, reviser_lr=1e-3, eval_every=10, calibration=4)
TINY |= dict(ask="==", labels=["++", "+=", "=+"], lora_rank=0, warmup_reviser_steps=2, reviser_steps=2)


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    """An untrained policy, and the built-in model as its reviser: it writes sums, so that revisions survive."""
    return TINY | dict(model=tiny_model, stage="evolve", reviser="builtin", keep_threshold="0.3")


def rounds(run) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((Path(run) / "rounds").iterdir())]


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(folder, screen) of the bare command with less to do: both stages on the built-in task."""
    folder = tmp_path_factory.mktemp("bare") / "seft"
    less = dict(steps=2, warmup_reviser_steps=2, reviser_steps=2, prompts_per_step=8, builtin_pairs=32, test_rows=16)
    done = run_script("seft.py", *flags(**less, unannotated=32, calibration=8, out=folder))
    return folder, done.stdout


def test_stages(bare):
    """A run folder for each run; the revisers start from the policy, the labels come from both, the policy asks R."""
    folder, screen = bare
    runs = {p.parent.relative_to(folder).as_posix(): p.parent for p in folder.rglob("args.json")}
    assert sorted(runs) == ["policy", "reviser/adaptive", "reviser/warmup-0", "reviser/warmup-1"]
    about = {name: json.loads((run / "args.json").read_text())["args"] for name, run in runs.items()}
    assert about["reviser/adaptive"].pop("model") == str(folder / "reviser/warmup-0/model")
    assert {a["model"] for a in about.values() if "model" in a} == {"builtin"}
    assert about["reviser/adaptive"]["judges"] == [str(folder / f"reviser/warmup-{i}/model") for i in (0, 1)]
    assert about["policy"]["reviser"] == str(folder / "reviser/adaptive/model")
    own = {"policy": ["rounds"], "reviser/adaptive": ["labels.jsonl"]}
    for name, run in runs.items():
        assert sorted(p.name for p in run.iterdir()) == sorted(FILES + own.get(name, []))
        assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]
    assert "32 unannotated prompts; left out:" in screen and "training: 32 pairs" in screen


def test_metrics(bare):
    """What is always logged is there, finite or not known, and namespaced."""
    folder, _ = bare
    lines = [line for file in folder.rglob("metrics.jsonl") for line in read_metrics(file.parent)]
    assert all("/" in k for line in lines for k in line if k not in ("step", "lr", "grad_norm"))
    assert all(x is None or math.isfinite(x) for line in lines for x in line.values())
    first, last = read_metrics(folder / "policy")[0], read_metrics(folder / "policy")[-1]
    assert first["kl/start"] == pytest.approx(0, abs=1e-6) and last["kl/start"] > 1e-6
    assert {"eval/pass@1", "eval/sampled"} <= first.keys() & last.keys()
    made = read_metrics(folder / "policy")[1]
    assert {"revise/fix", "revise/damage", "revise/keep_right", "revise/keep_wrong", "revise/auc"} <= made.keys()
    assert {"revise/distance_minor", "revise/same_major", "revise/length_ratio", "revise/threshold"} <= made.keys()
    assert sum(made[f"revise/{name}"] for name in seft.NAMES) == pytest.approx(1)
    reviser = read_metrics(folder / "reviser" / "adaptive")
    assert {"label/no", "label/quality_no", "eval/label_auc", "eval/fix", "eval/damage"} <= reviser[0].keys()
    assert {"loss/label", "loss/nll", "grad_norm"} <= reviser[1].keys()
    assert "loss/label" not in read_metrics(folder / "reviser" / "warmup-0")[1]


def test_samples_show_the_revision(bare):
    """x, y0, label and y* of each sample of a round."""
    folder, _ = bare
    samples = [json.loads(line) for line in (folder / "policy" / "samples.jsonl").read_text().splitlines()]
    shown = [s for s in samples if s["kind"].startswith("round")]
    assert len(shown) == 24 and {s["kind"].split()[1] for s in shown} == {"0", "1"}
    assert all({"prompt", "answer", "label", "completion", "dropped", "chances"} <= s.keys() for s in shown)
    page = (folder / "policy" / "report.html").read_text()
    assert "round 0" in page and not re.search(r"https?://|<script", page)


def test_no_pair_is_scored_by_a_model_that_saw_it(bare):
    """Each judge was trained on one half, and labels prompts of the other one alone."""
    folder, _ = bare
    pairs = tasks.load_task("chains").pairs(32, 0)
    lines = [json.loads(x) for x in (folder / "reviser/adaptive/labels.jsonl").read_text().splitlines()]
    assert sorted(line["pair"] for line in lines) == list(range(32 + 16))
    seen = [{p["prompt"] for p in pairs if seft.fold_of(p) == fold} for fold in (0, 1)]
    assert all(seen) and not seen[0] & seen[1]
    assert all(pairs[line["pair"]]["prompt"] not in seen[line["judge"]] for line in lines if line["pair"] < 32)
    for fold in (0, 1):
        about = json.loads((folder / f"reviser/warmup-{fold}" / "args.json").read_text())["args"]
        assert about["fold"] == fold and about["stage"] == "warmup"


def test_finished_stages_are_left(bare):
    """--resume of all stages runs what has not ended and nothing else; without it the folder is refused."""
    folder, _ = bare
    about = json.loads((folder / "policy" / "args.json").read_text())["args"]
    settings = about | dict(stage="all", reviser="", out=str(folder))
    with pytest.raises(common.BadInput, match="exists and is not empty"):
        seft.run_stages(seft.Args(**settings))
    before = {p: p.read_bytes() for p in folder.rglob("*.jsonl")}
    with mock.patch.object(seft, "train", side_effect=AssertionError):
        seft.run_stages(seft.Args(**settings | dict(resume=True)))
    (folder / "reviser/adaptive/model").rename(folder / "reviser/adaptive/model.part")
    with mock.patch.object(common.RunFolder, "report"):
        seft.run_stages(seft.Args(**settings | dict(resume=True)))
    assert (folder / "reviser/adaptive/model").exists() and before == {
        p: p.read_bytes() for p in folder.rglob("*.jsonl")
    }


def test_warmup_trains_on_its_half_alone(base, out, monkeypatch):
    """What R0 of a fold is given are the pairs of that fold."""
    given = []
    original = seft.rows_for_reviser
    monkeypatch.setattr(seft, "rows_for_reviser", lambda d, pairs, a: given.append(pairs) or original(d, pairs, a))
    for fold in (0, 1):
        run_here(seft, **base | dict(stage="warmup", fold=fold), out=f"{out}-{fold}")
    assert all(seft.fold_of(p) == fold for fold, pairs in enumerate(given) for p in pairs)
    assert len(given[0]) + len(given[1]) == 12


@pytest.mark.parametrize("argv", [[], ["--task", "strings"]], ids=["chains", "strings"])
def test_check_on_the_built_in_tasks(argv, capsys):
    args = common.parse_args(seft.Args, seft.BUILTIN, argv)
    assert args.model == ("builtin-strings" if argv else "builtin")
    check.Checks(seft, args).run()
    assert "all checks passed" in capsys.readouterr().out


# ---- controls and switches -------------------------------------------------------------------------------------------

SWITCHES = [
    dict(),
    dict(revise="always"),
    dict(revise="plain"),
    dict(revise="never", temperature=0.7),
    dict(revise="direct"),
    dict(then="{prompt}", max_new_tokens=12),
    dict(revise="gold", reviser=""),
    dict(revise="gold", reviser="", gold_slip=0.5),
    dict(keep_threshold="auto"),
    dict(keep_threshold="pairs"),
    dict(order="easy_to_hard"),
    dict(order="hard_to_easy", rounds=1),
    dict(pair_share=0.5),
    dict(revise_temperature=1.0),
    dict(lora_rank=4, warmup_steps=2),
    dict(dtype="bfloat16", activation_checkpointing=True),
    dict(external_model="builtin", external_rounds=1, revise="never"),
    dict(stage="warmup"),
    dict(stage="adaptive", judges=["builtin", "builtin"], builtin_flip=0.5),
    dict(stage="adaptive", judges=["builtin", "builtin"], label_rule="hardness", lora_rank=4),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_switches(switches, base, out):
    """Each runs, moves the model, and logs finite numbers."""
    if switches.get("revise") == "never" and "external_model" not in switches:
        switches = switches | dict(model="builtin")  # an untrained model does not end its answers
    lines = read_metrics(run_here(seft, **base | switches, out=out))
    assert lines[-1]["step"] == len(lines) - 1 and lines[1]["grad_norm"] > 0
    assert all(x is None or math.isfinite(x) for line in lines for x in line.values())
    assert lines[1]["loss/total"] != lines[-1]["loss/total"]
    assert "loss/label" in lines[1] or switches.get("stage") != "adaptive"


def test_no_returns_the_answer_as_it_is(base, out):
    """Where everything is kept, y* is y0 token by token; what has no end cannot be kept."""
    run = run_here(seft, **base | dict(model="builtin", keep_threshold="0", max_new_tokens=10), out=out)
    items = [item for made in rounds(run) for item in made["items"]]
    kept = [i for i in items if i["label"] == seft.NO]
    assert kept and all(i["completion_ids"] == i["answer_ids"] and i["revised"] == i["answer"] for i in kept)
    assert all(i["ended"] for i in kept) and all(i["label"] != seft.NO for i in items if not i["ended"])


def test_what_is_dropped_is_counted(base, out):
    """An untrained reviser: nothing that has no end or is no sum is learnt, and the shares add up."""
    changes = dict(reviser=base["model"], revise="plain", pair_share=0.5, model="builtin")
    with pytest.raises(common.BadInput, match="all 8 answers were dropped"):
        run_here(seft, **base | changes, out=out)
    items = rounds(out)[0]
    reasons = [i["fault"] for i in items["items"]]
    assert all(reasons) and sum(v for k, v in items["metrics"].items() if k.startswith("drop/")) == pytest.approx(1)


def test_prompts_are_new(base, out, tmp_path, capsys):
    """No prompt is there twice, in a pair or in the test set; what was left out is counted."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps(dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected="1")) + "\n" for i in range(1, 13))
    )
    names = [f"{i}+1=" for i in range(1, 31)] * 2
    prompts, test = tmp_path / "prompts.jsonl", tmp_path / "test.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in names))
    test.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(29, 35)))
    changes = dict(
        dataset=str(pairs), prompts=str(prompts), test_dataset=str(test), model="builtin", keep_threshold="0"
    )
    changes |= dict(max_growth=0.0)
    data = seft.prepare(seft.Args(**base | changes))
    assert sorted(int(r["prompt"].split("+")[0]) for r in data.prompts) == list(range(13, 29))
    run = run_here(seft, **base | changes | dict(revise="never"), out=out)  # and nobody grades
    assert "eval/pass@1" not in read_metrics(run)[0] and read_metrics(run)[1]["revise/before"] is None
    assert "16 unannotated prompts" in capsys.readouterr().out


def test_own_data_in_messages_with_a_reward(base, out, tmp_path):
    """Pairs and prompts as messages, graded by the user's function: rewards before and after a round."""
    rows = [
        dict(prompt=[dict(role="user", content=f"{i}+1=")], chosen=str(i + 1), rejected=str(i)) for i in range(10, 22)
    ]
    pairs, prompts, reward = (tmp_path / name for name in ("pairs.jsonl", "prompts.jsonl", "reward.py"))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text(
        "".join(json.dumps({"prompt": [dict(role="user", content=f"{i}+2=")]}) + "\n" for i in range(30))
    )
    reward.write_text("def reward(prompts, completions, rows):\n    return [float(len(c)) for c in completions]\n")
    changes = dict(dataset=str(pairs), prompts=str(prompts), reward_file=str(reward), revise="never", model="builtin")
    lines = read_metrics(run_here(seft, **base | changes, out=out))
    assert lines[0]["eval/reward"] > 0 and lines[1]["revise/before"] == lines[1]["revise/after"] > 0
    assert "revise/fix" not in lines[1]


def test_a_policy_learns_from_revisions(base, out):
    """Gold answers in the place of revisions: their likelihood rises, and the policy moves away from its start."""
    changes = dict(revise="gold", steps=20, rounds=1, unannotated=8, prompts_per_step=8, lr=1e-2, reviser="")
    lines = read_metrics(run_here(seft, **base | changes, out=out))
    assert lines[-1]["loss/nll"] < 0.8 * lines[1]["loss/nll"] and lines[-1]["kl/start"] > 0.01


# ---- ranks and resume ------------------------------------------------------------------------------------------------

JOBS = {
    "adaptive": dict(stage="adaptive", judges=["builtin", "builtin"], reviser_steps=3),
    "evolve": dict(keep_threshold="auto", order="easy_to_hard", pair_share=0.5, revise_temperature=1.0),
    "lora": dict(lora_rank=4),
}
DRIVER = """
import json, sys
import common, seft

def main():
    for settings in json.load(open(sys.argv[1])):
        seft.train(seft.Args(**settings))

common.launch(main, "cpu")
"""


@pytest.fixture(scope="module")
def two_ranks(base, tmp_path_factory):
    """Run folders of all JOBS, from a single torchrun on two ranks."""
    home = tmp_path_factory.mktemp("two_ranks")
    jobs = [base | changes | {"lr": 3e-4, "out": str(home / name)} for name, changes in JOBS.items()]
    (home / "driver.py").write_text(DRIVER)
    (home / "jobs.json").write_text(json.dumps(jobs))
    run_script(home / "driver.py", home / "jobs.json", ranks=2)
    return home


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_are_one(name, base, two_ranks, out):
    """1 process = 2 ranks, to a relative 1e-5 in every metric."""
    alone = run_here(seft, **base | JOBS[name] | {"lr": 3e-4}, out=out)
    assert_same_metrics(read_metrics(alone), read_metrics(two_ranks / name), relative=2e-5)


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("name", JOBS)
def test_resume_is_bit_equal(name, stop, base, tmp_path):
    """run = run(stop) + resume, inside a round and between two, to the last bit of every metric and weight."""
    settings = base | JOBS[name]
    if name != "evolve" and stop != 1:
        pytest.skip("one stop is enough for what differs here")
    whole = run_here(seft, **settings, out=str(tmp_path / "whole"))
    run_here(seft, stop, **settings, out=str(tmp_path / "parts"))
    parts = run_here(seft, **settings, out=str(tmp_path / "parts"), resume=True)
    assert read_metrics(whole) == read_metrics(parts)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]
    if name != "adaptive":
        assert rounds(whole) == rounds(parts)


# ---- --check finds what is broken ------------------------------------------------------------------------------------


def mean_a_micro_batch(monkeypatch):
    objective = seft.objective

    def mean(models, micro, args):
        return {k: x / len(micro["mask"]) for k, x in objective(models, micro, args).items()}

    monkeypatch.setattr(seft, "objective", mean)


def labels_of_the_batch(monkeypatch):
    """Normalised over a batch in the place of the three labels."""
    judge = seft.judge

    def mixed(*args):
        return (torch.tensor(judge(*args)).softmax(0)).tolist()

    monkeypatch.setattr(seft, "judge", mixed)


def keep_a_copy(monkeypatch):
    revise = seft.revise

    def decoded(*args):
        items, threshold = revise(*args)
        return [i | {"completion_ids": list(i["completion_ids"])} for i in items], threshold

    monkeypatch.setattr(seft, "revise", decoded)


def leave_out_eos(monkeypatch):
    monkeypatch.setattr(common, "encode_completion", lambda t, text, *_: t(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "damage, name",
    [
        (mean_a_micro_batch, "gradient ignores micro-batches"),
        (labels_of_the_batch, "labels are scored as a distribution"),
        (keep_a_copy, "No keeps an answer as it is"),
        (leave_out_eos, "EOS is inside the loss"),
    ],
)
def test_check_finds(damage, name, base, monkeypatch, capsys):
    damage(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        check_here(seft, **base | dict(model="builtin"))
    screen = capsys.readouterr().out
    assert stop.value.code == 1 and re.search(rf"FAIL +{name}", screen), screen


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, out, monkeypatch):
    """refused([parts of the message], **changes): run_stages() says so before a model is loaded."""

    def check(parts, **changes):
        monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            seft.run_stages(common.check_args(seft.Args(**base | dict(out=out) | changes)))
        message = str(error.value)
        assert all(part in message for part in parts) and "\n" not in message, message

    return check


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(stage="both"), ["--stage", "all, reviser, warmup", "both"]),
        (dict(revise="sometimes"), ["--revise", "adaptive, always", "sometimes"]),
        (dict(label_rule="size"), ["--label_rule", "contrast, gap, hardness"]),
        (dict(order="random"), ["--order", "easy_to_hard", "random"]),
        (dict(keep_threshold="high"), ["--keep_threshold 'high'", "auto, pairs or a number"]),
        (dict(keep_threshold="1.5"), ["--keep_threshold '1.5'", "from 0 to 1"]),
        (dict(labels=["++", "+="]), ["--labels takes three", "found 2"]),
        (dict(labels=["+", "+=", "=+"]), ["--labels", "'+=' begins with '+'"]),
        (dict(labels=["Major", "+=", "=+"]), ["--labels and --ask", "cannot write 'Major'"]),
        (dict(ask="revise"), ["--labels and --ask", "cannot write 'revise'"]),
        (dict(stage="warmup", then="{prompt}"), ["a reviser reads a prompt", "64 positions"]),
        (dict(reviser=""), ["--reviser is empty", "--revise adaptive needs one"]),
        (dict(stage="all"), ["--stage all makes its own", "--reviser"]),
        (dict(stage="adaptive"), ["--judges takes", "found 0"]),
        (dict(rounds=3), ["--steps 4 does not divide into --rounds 3"]),
        (dict(micro_batch=3), ["--micro_batch 3 does not divide", "4 rows"]),
        (dict(unannotated=1), ["1 new prompts, expected 2"]),
        (dict(gold_slip=0.5), ["--gold_slip is of --revise gold"]),
        (dict(gold_slip=2.0), ["--gold_slip must be at most 1", "2.0"]),
        (dict(pair_share=-0.1), ["--pair_share must be at least 0"]),
        (dict(external_rounds=1), ["--external_rounds needs --external_model"]),
        (dict(external_rounds=3, external_model="builtin"), ["--external_rounds 3 of --rounds 2"]),
        (dict(stage="warmup", task="words"), ["--dataset is empty: --stage warmup needs preference pairs"]),
        (dict(stage="warmup", max_new_tokens=30), ["a reviser reads a prompt", "64 positions"]),
        (dict(seed=-1), ["--seed"]),
        (dict(max_prompt=2), ["no pair is left", "are too long"]),
    ],
    ids=str,
)
def test_wrong_value(changes, parts, refused):
    refused(parts, **changes)


def test_tokenizers_that_differ(refused, gpt2_model, tiny_model):
    refused([f"the tokenizers of {tiny_model} and {gpt2_model} differ in"], reviser=gpt2_model)


def test_answers_of_its_own(refused, tmp_path):
    """--revise gold where nobody has the answers."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(40)))
    refused(["--revise gold: --task prompts has no answers"], revise="gold", prompts=str(prompts))


def test_the_source_says_what_is_reconstructed():
    assert all(f"[{x}]" in inspect.getdoc(seft) for x in "PTI")

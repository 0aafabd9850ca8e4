"""SEFT end to end: command line, both stages, every switch, bad input."""

import contextlib
import inspect
import json
import math
import re
from pathlib import Path

import common
import lm
import pytest
import seft
from builtin import tasks as toys
from conftest import flags, read_metrics, run_here, run_forked

import torch

FILES = [".lock", "args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html"]
FILES += ["samples.jsonl", "source.py"]
TINY = dict(steps=4, rounds=2, prompts_per_step=4, micro_batch=4, max_prompt=18, max_new_tokens=20, test_rows=5)
TINY |= dict(builtin_pairs=12, unannotated=16, lr=1e-3, reviser_lr=1e-3, eval_every=10, calibration=4)
TINY |= dict(ask="==", labels=["++", "+=", "=+"], lora_rank=0, warmup_reviser_steps=2, reviser_steps=2)


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    """An untrained policy, and the built-in model as its reviser: it writes sums, so that revisions survive."""
    return TINY | dict(model=tiny_model, stage="evolve", reviser="builtin", keep_threshold="0.3")


def rounds(run) -> list[list[seft.Answer]]:
    """The answers of each round."""
    files = sorted((Path(run) / "rounds").iterdir())
    return [[seft.Answer(**json.loads(line)) for line in file.read_text().splitlines()] for file in files]


def needs(run) -> list[dict]:
    """What the R0 of each half found of the pairs of the other one; held-out pairs count to half 0."""
    lines = [x for half in (0, 1) for x in (Path(run) / f"needs-{half}.jsonl").read_text().splitlines()]
    return [json.loads(x) for x in lines]


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(folder, screen) of the commands of the header with less to do, on the built-in task."""
    folder = tmp_path_factory.mktemp("bare")
    less = dict(prompts_per_step=8, builtin_pairs=32, test_rows=16)
    words = flags(**less, warmup_reviser_steps=2, reviser_steps=2, out=folder / "reviser")
    screen = run_forked("seft.py", *words).stdout
    words = flags(**less, steps=2, unannotated=32, calibration=8, out=folder / "policy", stage="evolve")
    return folder, screen + run_forked("seft.py", *words, "--reviser", folder / "reviser" / "model").stdout


def test_stages(bare):
    """Two run folders; the first stage says how to go on."""
    folder, screen = bare
    own = {"policy": ["rounds"], "reviser": ["needs-0.jsonl", "needs-1.jsonl"]}
    for name, more in own.items():
        assert sorted(p.name for p in (folder / name).iterdir()) == sorted(FILES + more)
    assert [line["step"] for line in read_metrics(folder / "reviser")] == list(range(7))
    assert [line["step"] for line in read_metrics(folder / "policy")] == [0, 1, 2]
    assert f"--stage evolve --reviser {folder / 'reviser' / 'model'}" in screen
    assert "32 unannotated prompts; left out:" in screen and "training: 32 pairs" in screen


def test_metrics(bare):
    """What is always logged is there, finite or not known, and namespaced."""
    folder, _ = bare
    lines = [line for file in folder.rglob("metrics.jsonl") for line in read_metrics(file.parent)]
    assert all("/" in k for line in lines for k in line if k not in ("step", "lr", "grad_norm"))
    assert all(x is None or math.isfinite(x) for line in lines for x in line.values())
    first, made, last = read_metrics(folder / "policy")
    assert first["kl/start"] == pytest.approx(0, abs=1e-6) and last["kl/start"] > 1e-6
    assert {"eval/greedy", "eval/sampled"} <= first.keys() & last.keys()
    assert {"revise/fix", "revise/damage", "revise/keep_right", "revise/keep_wrong", "revise/auc"} <= made.keys()
    assert {"revise/same_major", "revise/length_ratio", "revise/threshold"} <= made.keys()
    assert sum(made[f"revise/{name}"] for name in seft.NAMES) == pytest.approx(1)
    reviser = read_metrics(folder / "reviser")
    assert {"eval/fix", "eval/damage", "eval/nll"} <= reviser[0].keys() & reviser[2].keys() & reviser[4].keys()
    assert {"label/no", "label/quality_no", "loss/label", "loss/nll", "grad_norm"} <= reviser[5].keys()
    assert {"eval/label_auc", "eval/label_loss", "eval/fix"} <= reviser[6].keys()
    assert not any(k.startswith(("loss/label", "label/", "eval/label")) for line in reviser[:5] for k in line)


def test_samples_show_the_revision(bare):
    """x, y0, label and y* of each sample of a round."""
    folder, _ = bare
    samples = [json.loads(line) for line in (folder / "policy" / "samples.jsonl").read_text().splitlines()]
    shown = [s for s in samples if s["kind"].startswith("round")]
    assert len(shown) == 24 and {s["kind"].split()[1] for s in shown} == {"0", "1"}
    names = {"prompt", "answer", "before", "label", "chances", "threshold", "completion", "dropped"}
    assert all(names <= s.keys() for s in shown)
    page = (folder / "policy" / "report.html").read_text()
    assert "round 0" in page and not re.search(r"https?://|<script", page)


def test_no_pair_is_scored_by_a_model_that_saw_it(base, out, monkeypatch):
    """Each R0 is given one half of the pairs, with all pairs of a prompt, and scores those of the other; R sees all."""
    given, original = [], seft.reviser_rows
    monkeypatch.setattr(seft, "reviser_rows", lambda d, pairs, a: given.append(pairs) or original(d, pairs, a))
    run = run_here(seft, **base | dict(stage="reviser", reviser="", builtin_pairs=32), out=out)
    pairs = toys.preference_pairs(32, 0)
    seen = [{p["prompt"] for p in some} for some in given]
    assert len(given) == 3 and not seen[0] & seen[1] and len(given[0]) + len(given[1]) == len(given[2]) == 32
    assert sorted(line["pair"] for line in needs(run)) == list(range(32 + 5))
    for line in needs(run):
        assert line["pair"] >= 32 or pairs[line["pair"]]["prompt"] not in seen[line["half"]]
    assert {line["half"] for line in needs(run) if line["pair"] >= 32} == {1}


def test_the_second_r0_starts_anew(base, out, monkeypatch):
    """Its first step is that of a run which trains it alone; R goes on from it, with an optimizer of its own."""
    seen, original = [], seft.update

    def update(models, optimizer, batch, rate, args):
        start = [p.detach().clone() for p in models.parameters()]
        seen.append((start, len(optimizer.state), rate))
        metrics = original(models, optimizer, batch, rate, args)
        seen[-1] += ([p.detach().clone() for p in models.parameters()],)
        return metrics

    monkeypatch.setattr(seft, "update", update)
    run_here(seft, **base | dict(stage="reviser", reviser=""), out=out)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))  # noqa: E731
    assert len(seen) == 6 and [n > 0 for _, n, _, _ in seen] == [False, True] * 3
    assert same(seen[0][0], seen[2][0]) and not same(seen[1][3], seen[2][0]) and same(seen[3][3], seen[4][0])
    assert [rate for _, _, rate, _ in seen] == [1e-3, 5e-4] * 3


# ---- controls and switches -------------------------------------------------------------------------------------------

SWITCHES = [
    dict(),
    dict(revise="always"),
    dict(revise="never", temperature=0.7),
    dict(then="{prompt}", max_new_tokens=12),
    dict(keep_threshold="auto"),
    dict(rounds=1),
    dict(pair_share=0.5),
    dict(revise="never", pair_share=1.0, reviser=""),
    dict(lora_rank=4, warmup_steps=2),
    dict(dtype="bfloat16", activation_checkpointing=True),
    dict(external_model="builtin", external_rounds=1, revise="never"),
    dict(stage="reviser"),
    dict(stage="reviser", reviser="", lora_rank=4, warmup_steps=1),
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
    assert "loss/label" in lines[-1] or switches.get("stage") != "reviser"


def test_no_returns_the_answer_as_it_is(base, out):
    """Where everything is kept, y* is y0 token by token; what has no end cannot be kept."""
    run = run_here(seft, **base | dict(model="builtin", keep_threshold="0", max_new_tokens=10), out=out)
    answers = [a for made in rounds(run) for a in made]
    kept = [a for a in answers if a.label == seft.NO]
    assert kept and all(a.target == a.ids and a.after == a.before for a in kept)
    assert all(a.ended for a in kept) and all(a.label != seft.NO for a in answers if not a.ended)


def test_what_is_dropped_is_counted(base, out):
    """An untrained reviser: nothing that has no end or is no sum is learnt, and the shares add up."""
    changes = dict(reviser=base["model"], revise="always", pair_share=0.5, model="builtin")
    with contextlib.suppress(common.BadInput):  # if nothing at all is left
        run_here(seft, **base | changes, out=out)
    answers = rounds(out)[0]
    metrics = seft.revision_metrics(answers)
    dropped = sum(a.fault is not None for a in answers)
    assert dropped >= len(answers) - 2  # one may be a number by chance
    assert sum(v for k, v in metrics.items() if k.startswith("drop/")) == pytest.approx(dropped / len(answers))


def test_nothing_to_find_a_threshold_by(base, out, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(40)))
    with pytest.raises(common.BadInput, match="nothing can grade these answers"):
        run_here(seft, **base | dict(prompts=str(prompts), keep_threshold="auto"), out=out)


def test_a_dropped_revision_counts_as_the_worst(base, monkeypatch):
    """Rewards may be below 0: then a dropped revision, from which nothing is learnt, must not look like a good one."""
    args = seft.Args(**base | dict(keep_threshold="auto"))
    revised = {0: (-5.0, None), 1: (-4.0, None), 2: (None, "long")}  # grade and fault of each revision

    def write(reviser, answers, data, args):
        for a in answers:
            a.after, a.fault = revised[a.number]

    monkeypatch.setattr(seft, "write_revisions", write)
    answers = [seft.Answer(i, {}, [], "", True, -4.0 - (i == 1)) for i in range(3)]  # -4, -5, -4
    for a, chance in zip(answers, (0.6, 0.2, 0.5)):
        a.chances = [1 - chance, 0.0, chance]
    assert 0.2 <= seft.find_threshold(None, answers, None, args) < 0.5  # the first and the last are kept


def test_pairs_with_an_end_of_their_own(base, tmp_path):
    """<eos> in the text of a pair is the end of its answer, not a part of what a reviser reads and a grader judges."""
    rows = [dict(prompt=f"{i}+1=", chosen=f"{i + 1}<eos>", rejected="1<eos>") for i in range(10, 40)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = seft.prepare(seft.Args(**base | dict(stage="reviser", dataset=str(pairs), task="chains")))
    assert [pair["chosen"] for pair in data.test_pairs] == [str(i + 1) for i in range(35, 40)]
    assert data.grade([pair["chosen"] for pair in data.test_pairs], data.test_pairs) == [1.0] * 5
    assert all(pair["rejected"] == "1" for pair in data.pairs)


@pytest.mark.parametrize("task, answer, right", [
    ("gsm8k", 72, "72"), ("gsm8k", "72.0", "72"), ("gsm8k", "24*3 = 72\n#### 72", "72"),
    ("math", 72, "\\boxed{72}"), ("math", "$72$", "\\boxed{72}"), ("math", "It is \\boxed{72}.", "\\boxed{72}"),
])  # fmt: skip
def test_pairs_with_an_answer_are_graded(base, tmp_path, task, answer, right):
    """The `answer` of a pair is read as that of the task's own rows; a pair without one is not graded."""
    if task == "math":
        pytest.importorskip("math_verify")
    rows = [dict(prompt=f"{i}+1=", chosen="2", rejected="1", answer=answer) for i in range(10, 40)]
    rows[-1]["answer"] = None
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    question, wrong = {"gsm8k": "question", "math": "problem"}[task], right.replace("2", "3")
    prompts.write_text("".join(json.dumps({question: f"{i}+2=", "answer": "1"}) + "\n" for i in range(40)))
    args = base | dict(stage="reviser", dataset=str(pairs), prompts=str(prompts), task=task, max_prompt=999)
    data = seft.load_data(seft.Args(**args), lm.load_tokenizer("builtin"))
    assert data.grade([right, wrong, right], data.test_pairs[2:]) == [1.0, 0.0, None]


@pytest.mark.parametrize("name", ["chains", "strings", "words", "gym:chain_sum"])
def test_a_row_that_the_grader_cannot_read_is_not_graded(name):
    """A pair of a user's may have its prompt in another form than the task's own rows, or none of their columns."""
    if ":" in name:
        pytest.importorskip("reasoning_gym")
    task = seft.tasks.load_task(name, test_rows=2)
    row, (column, kind) = task.test[0], task.reads
    data = seft.Data(None, task, [], [], [])
    assert data.grade(["?"] * 3, [row, row | {column: kind is list or [{}]}, row]) == [0.0, None, 0.0]


def test_a_column_of_the_user_is_no_label(base, tmp_path):
    """Nor does an empty --ask stand in every revision."""
    rows = [dict(prompt=f"{i}+1=", chosen="2", rejected="1", label="good", keep_chosen=True) for i in range(10, 40)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = seft.Args(**base | dict(stage="reviser", dataset=str(pairs), task="chains", ask=""))
    data = seft.prepare(args)
    assert not any({"label", "keep_chosen"} & pair.keys() for pair in data.pairs + data.test_pairs)
    reviser = lm.Sampling(lm.load_model("builtin", device=common.local_device("cpu")), data.tokenizer, 24, 24, 1.0, 8)
    end = data.tokenizer.eos_token_id
    assert seft.fault_of([*data.tokenizer("12")["input_ids"], end], [end], reviser, data, args) is None


def test_answers_of_an_external_model_keep_to_the_limit(base, monkeypatch):
    """Its tokenizer may need fewer tokens than that of the policy, or have characters that the policy has not."""
    args, other = seft.Args(**base | dict(rounds=1)), lm.load_tokenizer("builtin")
    data = seft.prepare(args)
    texts = iter(["1" * 40, "1§2", "12"])
    monkeypatch.setattr(common, "decode", lambda tokenizer, ids: [next(texts) for _ in ids])
    monkeypatch.setattr(seft, "revise", lambda *_: None)
    policy, limits = lm.load_model("builtin", device=common.local_device("cpu")), (18, 20, 1.0, 8)
    writer = lm.Sampling(policy, other, *limits)
    data.prompts = data.prompts[:3]
    answers = seft.make_round({"policy": writer}, data, 0, 0, args)
    assert [a["ended"] for a in answers][:2] == [False, False] and max(len(a["ids"]) for a in answers) <= 20


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
    changes |= dict(revise="never", ask="revise")  # which the tokenizer cannot write, and no reviser reads
    run = run_here(seft, **base | changes, out=out)  # and nobody grades
    assert "eval/greedy" not in read_metrics(run)[0] and read_metrics(run)[1]["revise/before"] is None
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


def test_what_comes_after_a_reviser_of_ones_own_pairs(base, out, tmp_path, capsys):
    """Nothing in these arguments tells --stage evolve of prompts or of a grader."""
    pairs = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run_here(seft, **base | dict(stage="reviser", reviser="", dataset=str(tmp_path / "pairs.jsonl")), out=out)
    assert "and another --out, and --prompts FILE, and --keep_threshold 0.5" in capsys.readouterr().out


def test_a_policy_learns_from_revisions(base, out):
    """The revisions become likelier, and the policy moves away from its start."""
    changes = dict(revise="always", steps=20, rounds=1, unannotated=8, prompts_per_step=8, lr=1e-2)
    lines = read_metrics(run_here(seft, **base | changes, out=out))
    assert lines[-1]["loss/nll"] < 0.8 * lines[1]["loss/nll"] and lines[-1]["kl/start"] > 0.01


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, out, monkeypatch):
    """refused([parts of the message], **changes): train() says so before a model is loaded."""

    def check(parts, **changes):
        monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            seft.train(common.check_args(seft.Args(**base | dict(out=out) | changes)))
        message = str(error.value)
        assert all(part in message for part in parts) and "\n" not in message, message

    return check


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(keep_threshold="high"), ["--keep_threshold 'high'", "auto or a number"]),
        (dict(pair_share=0.1), ["--pair_share 0.1", "no pair of --prompts_per_step 4"]),
        (dict(keep_threshold="1.5"), ["--keep_threshold '1.5'", "from 0 to 1"]),
        (dict(labels=["++", "+="]), ["--labels takes three", "found 2"]),
        (dict(labels=["+", "+=", "=+"]), ["--labels ['+', '+=', '=+']", "one of them begins another"]),
        (dict(labels=["++", "++", "=+"]), ["--labels", "one of them begins another"]),
        (dict(labels=["Major", "+=", "=+"]), ["--labels and --ask", "cannot write ['Major']"]),
        (dict(ask="revise"), ["--labels and --ask", "cannot write ['revise']"]),
        (dict(stage="reviser", reviser="", then="{prompt}"), ["--max_prompt + --max_new_tokens", "64 positions"]),
        (dict(reviser=""), ["--reviser is empty", "--revise adaptive needs one"]),
        (dict(rounds=3), ["--steps 4 does not divide into --rounds 3"]),
        (dict(unannotated=1), ["1 new prompts, expected 2 or more"]),
        (dict(external_rounds=1), ["--external_model and --external_rounds go together"]),
        (dict(external_model="builtin"), ["--external_model and --external_rounds go together"]),
        (dict(external_model="./nosuch", external_rounds=1), ["./nosuch: no such folder"]),
        (
            dict(stage="reviser", task="words"),
            ["--dataset is empty: --stage reviser and --pair_share need preference pairs"],
        ),
        (dict(stage="reviser", builtin_pairs=1), ["1 pairs", "two halves"]),
        (dict(reward_file="REWARD"), ["--reward_file", "the task chains has a grader of its own"]),
        (dict(max_prompt=2), ["no pair is left", "are too long"]),
    ],
    ids=str,
)
def test_wrong_value(changes, parts, refused, reward_file):
    refused(parts, **{k: v.replace("REWARD", reward_file) if k == "reward_file" else v for k, v in changes.items()})


def test_a_reviser_of_other_words(bare, refused):
    """What the reviser learnt to read and to write stands in the args.json of its run."""
    reviser = dict(model="builtin", reviser=str(bare[0] / "reviser" / "model"))
    refused(["--then ''", "was trained with '{prompt}'; expected the same"], **reviser, then="")


def test_all_pairs_are_held_out(refused, tmp_path):
    rows = [dict(prompt=f"{i}+1=", chosen=str(i + 1), rejected=str(i)) for i in range(10, 30)]
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+2="}) + "\n" for i in range(30)))
    files = dict(dataset=str(pairs), prompts=str(prompts), test_dataset=str(pairs), test_rows=4)
    refused(["pairs.jsonl: its training prompts are all held-out ones"], **files, keep_threshold="0.3")


def test_begun_answers_are_refused(refused, tmp_path):
    rows = [[dict(role="user", content=f"{i}+1"), dict(role="assistant", content="=")] for i in range(30)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    refused(["row 1", "the last message is not the user's"], prompts=str(prompts), revise="never", reviser="")


def test_the_source_says_what_is_reconstructed():
    assert all(f"[{x}]" in inspect.getdoc(seft) for x in "PTI")

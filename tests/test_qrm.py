"""qrm.py end to end: three stages by one command, every reward model, every loss with every reward, ranks, resume."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from unittest import mock

import common
import pytest
import qrm
import tasks
from builtin import tasks as toys
from conftest import TINY, assert_same_metrics, flags, read_metrics, run_script

import torch

CPU = torch.device("cpu")
KINDS = {  # name: what --stage reward changes
    "qrm": dict(objective="qrm"),
    "qrm-lm": dict(objective="qrm", head="lm"),
    "orm": dict(objective="orm"),
    "step_prm": dict(objective="step_prm"),
    "dpo": dict(objective="dpo", head="lm", dpo_beta=1.0),
}
FILES = ["args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html", "samples.jsonl", "source.py"]
LESS = dict(
    head="scalar",
    pair_prompts=64,
    pair_samples=4,
    test_pairs=6,
    pairs_per_step=4,
    reward_epochs=1,
    steps=2,
    eval_every=5,
)
LESS |= dict(prompts_per_step=16, samples_per_prompt=4, test_rows=16)


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(stage, stop_after=None, **settings) -> Path:
    """A stage in this process, without the plot, which takes longer than the run; returns the run folder."""
    with mock.patch.object(common.RunFolder, "report"), mock.patch.object(common.Run, "stop_after", stop_after):
        {"reward": qrm.train_reward, "policy": qrm.train}[stage](qrm.Args(**settings, stage=stage))
    return Path(settings["out"])


def assert_finite(lines: list[dict]) -> None:
    for line in lines:
        assert all(value is None or math.isfinite(value) for value in line.values()), line


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """21 pairs of the built-in task with labels of their steps; 16 of them train, in 4 steps an epoch."""
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", toys.chain_pairs(21, 0))


@pytest.fixture(scope="module")
def reward_base(tiny_model, pairs) -> dict:
    """5 held-out pairs, which do not divide among 2 ranks."""
    small = dict(max_prompt=24, max_new_tokens=24, micro_batch=4, eval_every=2, step_separator="=", warmup_steps=1)
    return small | dict(model=tiny_model, pairs=pairs, pairs_per_step=4, test_pairs=5, reward_lr=3e-3)


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    """Policies of two steps."""
    return TINY | dict(model=tiny_model, steps=2, save_every=5, step_separator="=")


@pytest.fixture(scope="module")
def reward_run(reward_base, tmp_path_factory):
    """reward_run(kind): the folder of a reward model of one epoch, trained when it is first asked for."""
    home = tmp_path_factory.mktemp("rewards")

    @functools.cache
    def of(kind: str) -> Path:
        return run("reward", **reward_base | KINDS[kind], out=str(home / kind))

    return of


def judged_by(reward_run, name: str) -> dict:
    """The arguments of --stage policy for a reward."""
    return dict(reward=name) if name == "rule" else dict(reward=name, reward_model=str(reward_run(name) / "model"))


# ---- all three stages by one command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(folder, screen) of the bare command with less to do."""
    folder = tmp_path_factory.mktemp("bare") / "run"
    return folder, run_script("qrm.py", *flags(**LESS, out=folder)).stdout


def test_three_folders(bare):
    """pairs/, reward/ and policy/, each a run folder that explains itself."""
    folder, screen = bare
    assert sorted(p.name for p in folder.iterdir()) == ["pairs", "policy", "reward"]
    assert sorted(p.name for p in (folder / "policy").iterdir()) == FILES
    assert sorted(p.name for p in (folder / "reward").iterdir()) == sorted([*FILES, "credit.html"])
    explained = {"args.json", "metrics.jsonl", "samples.jsonl", "source.py", "pairs.jsonl"}
    assert explained <= {p.name for p in (folder / "pairs").iterdir()}
    for name in ("pairs", "reward", "policy"):
        about = json.loads((folder / name / "args.json").read_text())["args"]
        assert list(about) == [f.name for f in dataclasses.fields(qrm.Args)]
        assert about["stage"] == name and f"---- stage {name}" in screen
        assert about["out"] == str(folder / name)
        lines = read_metrics(folder / name, times=True)
        assert_finite(lines)
        assert all("/" in key for line in lines for key in line if key not in ("step", "lr", "grad_norm"))
    assert len(read_metrics(folder / "pairs")) == 4


def test_pairs(bare):
    """One right and one wrong answer of each prompt, by the task's own grader, with exact labels of their steps."""
    rows = read(bare[0] / "pairs" / "pairs.jsonl")
    kept = read_metrics(bare[0] / "pairs")[-1]["pairs/kept"]
    assert len(rows) == kept >= 16
    truth = [{"answer": str(sum(toys.chain_terms(row["prompt"][:-1])))} for row in rows]
    assert all(toys.chain_correct([row["chosen"] for row in rows], truth))
    assert not any(toys.chain_correct([row["rejected"] for row in rows], truth))
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert not any(toys.chain_is_held_out(row["prompt"]) for row in rows)
    tokenizer = common.load_tokenizer("builtin")
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_labels"] == toys.chain_step_labels(row, row[side])
            ids = common.encode_completion(tokenizer, row[side])
            assert len(qrm.find_steps([ids], tokenizer, "=")[0]) == len(row[f"{side}_labels"])


def test_metrics_of_the_stages(bare):
    """Held-out pairs before the first step and after the last; the policy starts on policy."""
    folder, _ = bare
    reward, policy = read_metrics(folder / "reward"), read_metrics(folder / "policy")
    assert [line["step"] for line in reward] == list(range(len(reward))) and len(reward) >= 3
    for line in (reward[0], reward[-1]):
        assert 0 <= line["eval/pair_accuracy"] <= 1
        assert line["eval/margin_p10"] <= line["eval/margin_p50"] <= line["eval/margin_p90"]
    assert reward[0]["eval/margin"] == 0 and reward[-1]["eval/margin"] != 0
    assert reward[1]["loss/reward_model"] == pytest.approx(2.1269, abs=1e-3)  # the head starts at 0
    assert [line["step"] for line in policy] == [0, 1, 2]
    assert 0 <= policy[0]["eval/pass@1"] <= 1 and policy[1]["policy/kl_old"] < 0.01
    assert {"loss/value", "critic/explained_variance", "reward/mean", "policy/entropy"} <= policy[1].keys()


def test_exported_reward_model(bare):
    """reward/model is a token classifier with one label for transformers alone, and gives the script's scores."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    folder = bare[0] / "reward" / "model"
    theirs, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.config.num_labels == 1 and theirs.config.reward_objective == "qrm"
    ours = {"reward": common.load_model(str(folder), head="saved", device=CPU, trainable=False)}
    prompt, answer = tokenizer("7+15=")["input_ids"], common.encode_completion(tokenizer, "22")
    batch = common.make_batch([prompt, [1, 5]], [answer, [5] * 6], tokenizer.pad_token_id, CPU)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) :, 0]
        found = qrm.token_scores(ours, batch, "qrm")[0, : len(answer)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0


def test_credit_page(bare):
    """credit.html: one page without links, one span a token in each colouring; the truth where the task knows it."""
    page = (bare[0] / "reward" / "credit.html").read_text()
    assert not re.search(r"https?://|<link|<script|@import|url\(|<img", page)
    held_out = read(bare[0] / "pairs" / "pairs.jsonl")[-LESS["test_pairs"] :]
    tokens = sum(len(row[side]) + 1 for row in held_out for side in ("chosen", "rejected"))
    assert page.count('title="qrm: ') == page.count('title="still right: ') == tokens
    assert page.count('class="chosen"') == page.count('class="rejected"') == len(held_out)
    assert page.count("&lt;eos&gt;") == 4 * len(held_out) and "<eos>" not in page
    assert all(f"{row['prompt']} <small>chosen" in page for row in held_out)


def test_resume_skips_what_is_whole(bare, monkeypatch):
    """--resume with all stages whole touches no file; with the policy gone, it is trained again, and it alone."""
    folder, _ = bare
    settings = qrm.BUILTIN | LESS | dict(out=str(folder), resume=True)

    def contents(name):
        return {p: p.read_bytes() for p in (folder / name).rglob("*") if p.is_file()}

    before = {name: contents(name) for name in ("pairs", "reward", "policy")}
    monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    qrm.run_stages(qrm.Args(**settings))
    assert before == {name: contents(name) for name in before}
    monkeypatch.undo()

    again, metrics = folder / "policy", read_metrics(folder / "policy")
    again.rename(folder.parent / "old policy")
    with mock.patch.object(common.RunFolder, "report"):
        qrm.run_stages(qrm.Args(**settings))
    assert read_metrics(again) == metrics and weights(again) == weights(folder.parent / "old policy")
    assert contents("pairs") == before["pairs"] and contents("reward") == before["reward"]


@pytest.fixture
def some_pairs(tiny_model, out):
    """some_pairs(**changes): the rows and metrics of --stage pairs with a random model and a grader of lengths."""
    settings = TINY | dict(model=tiny_model, stage="pairs", pair_prompts=16, pair_samples=8, max_new_tokens=6)
    settings |= dict(prompts_per_step=8, max_prompt=24, out=out)

    def pairs_of(**changes):
        with mock.patch.object(tasks, "chain_correct", lambda texts, rows: [len(t) % 2 == 0 for t in texts]):
            qrm.make_pairs(qrm.Args(**settings | changes))
        return read(Path(out) / "pairs.jsonl"), read_metrics(out)

    return pairs_of


def test_resume_of_interrupted_pairs(some_pairs, out):
    """A stage `pairs` that was killed starts again: pairs.jsonl and the log are those of a run that was not."""
    whole = some_pairs()
    assert len(whole[1]) == 2 and len(whole[0]) >= 4
    (Path(out) / "pairs.jsonl").unlink()
    assert some_pairs(resume=True) == whole


def test_pairs_can_be_loaded_again(some_pairs, out):
    """Whatever a policy says, an answer of no text at all included, the next stage takes what this one wrote."""
    rows, _ = some_pairs(pair_prompts=64)
    assert len(rows) >= 16
    assert tasks.load_answers(str(Path(out) / "pairs.jsonl"), "=")[0] == rows


# ---- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reward_model_learns(kind, reward_base, out):
    """Each objective with each head fits sixteen pairs: the loss falls, and the training pairs are told apart."""
    lines = read_metrics(
        run("reward", **reward_base | KINDS[kind] | dict(reward_epochs=6, eval_every=8, reward_lr=0.005), out=out)
    )
    assert [line["step"] for line in lines] == list(range(25))
    assert_finite(lines)
    assert lines[1]["lr"] == pytest.approx(0.0025) and lines[24]["lr"] == pytest.approx(0.005 / 24)
    first, last = (sum(line["loss/reward_model"] for line in lines[i : i + 4]) / 4 for i in (1, 21))
    assert last < first - 0.01
    assert all("eval/margin" in lines[i] and "eval/pair_accuracy" in lines[i] for i in (0, 8, 24))
    steps = kind == "step_prm"
    assert ("eval/step_accuracy" in lines[0]) == ("reward_model/step_accuracy" in lines[1]) == steps
    assert ("reward_model/pair_accuracy" in lines[1]) != steps
    what = "reward_model/step_accuracy" if steps else "reward_model/pair_accuracy"
    assert sum(line[what] for line in lines[21:]) / 4 > 0.6
    start = {"qrm": 2.1269, "orm": math.log(2), "step_prm": math.log(2), "dpo": math.log(2)}
    assert kind == "qrm-lm" or lines[1]["loss/reward_model"] == pytest.approx(start[kind], abs=1e-3)


def test_held_out_accuracy_is_that_of_the_exported_model(reward_run, reward_base, pairs):
    """eval/pair_accuracy and eval/margin from the model of the run folder, pair by pair, without a batch."""
    folder = reward_run("qrm")
    models = {"reward": common.load_model(str(folder / "model"), head="saved", device=CPU, trainable=False)}
    tokenizer, margins = common.load_tokenizer(reward_base["model"]), []
    for row in read(Path(pairs))[-5:]:
        prompt, means = common.encode_prompt(tokenizer, row["prompt"]), []
        for side in ("chosen", "rejected"):
            answer = common.encode_completion(tokenizer, row[side])
            with torch.no_grad():
                scores = qrm.token_scores(models, common.make_batch([prompt], [answer], 0, CPU), "qrm")
            means.append(scores.mean().item())
        margins.append(means[0] - means[1])
    last = read_metrics(folder)[-1]
    assert last["eval/margin"] == pytest.approx(sum(margins) / 5, abs=1e-6)
    assert last["eval/pair_accuracy"] == sum(m > 0 for m in margins) / 5


def test_steps_without_pairs(reward_base, tmp_path):
    """Rows {prompt, steps, labels} train a step reward model; there are no pairs to compare."""
    rows = []
    for pair in toys.chain_pairs(21, 1):
        rows.append({"prompt": pair["prompt"], "steps": pair["rejected"].split("="), "labels": pair["rejected_labels"]})
    changes = dict(objective="step_prm", pairs=write(tmp_path / "steps.jsonl", rows), out=str(tmp_path / "run"))
    lines = read_metrics(run("reward", **reward_base | changes))
    assert_finite(lines)
    assert len(lines) == 5 and 0 <= lines[-1]["eval/step_accuracy"] <= 1 and "eval/pair_accuracy" not in lines[-1]
    page = (tmp_path / "run" / "credit.html").read_text()
    assert page.count('class="answer"') == 5 and page.count('title="step_prm: ') > 20


@pytest.mark.parametrize("kind", ["qrm-lm", "dpo"])
def test_language_model_head(kind, reward_run):
    """--head lm leaves a causal language model for transformers alone, with the script's scores."""
    from transformers import AutoModelForCausalLM

    folder = reward_run(kind) / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = {"reward": common.load_model(str(folder), head="saved", device=CPU, trainable=False)}
    ids = [1, 5, 6, 7, 8, 2]
    with torch.no_grad():
        found = qrm.token_scores(ours, common.make_batch([ids[:2]], [ids[2:]], 0, CPU), "qrm")[0]
        expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)[range(1, 5), ids[2:]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [dict(lora_rank=4), dict(dtype="bfloat16"), dict(activation_checkpointing=True)],
                         ids=["lora", "bfloat16", "checkpointing"])  # fmt: skip
@pytest.mark.parametrize("kind", ["qrm", "dpo"])
def test_reward_model_switches(kind, changes, reward_base, out):
    """Adapters, bfloat16 and recomputed activations: it runs, it moves, and its export loads without adapters."""
    folder = run("reward", **reward_base | KINDS[kind] | changes, out=out)
    lines = read_metrics(folder)
    assert_finite(lines)
    assert len(lines) == 5 and lines[1]["grad_norm"] > 0 and lines[-1]["eval/margin"] != lines[0]["eval/margin"]
    exported = common.load_model(str(folder / "model"), head="saved", device=CPU, trainable=False)
    assert not any("lora" in name for name in exported.state_dict())
    assert common.has_scalar_head(exported.config) == (kind == "qrm")


def test_adapters_are_merged_into_the_reward_model(reward_base, out, pairs):
    """The export of a LoRA run has the held-out margin that the run logged last."""
    settings = reward_base | dict(lora_rank=4, reward_lr=3e-2)
    folder = run("reward", **settings, out=out)
    args = qrm.Args(**settings, stage="reward")
    tokenizer, sides, _, test_rows = qrm.prepare_reward(args)
    models = {"reward": common.load_model(str(folder / "model"), head="saved", device=CPU, trainable=False)}
    found = qrm.evaluate_reward(models, test_rows, sides, tokenizer, args, CPU)
    last = read_metrics(folder)[-1]
    assert abs(last["eval/margin"]) > 1e-4
    assert all(found[k] == pytest.approx(last[k], abs=1e-5) for k in found)


# ---- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ppo", "reinforce"])
@pytest.mark.parametrize("reward", ["qrm", "orm", "step_prm", "dpo", "rule"])
def test_policy(reward, loss, reward_run, base, reward_file, out):
    """Every reward with every loss: finite, it moves, and its rewards lie where they belong, standardised."""
    rewards = []
    real = qrm.estimate_advantages

    def spy(batch, args):
        real(batch, args)
        rewards.append((batch["rewards"], batch["advantages"], batch["mask"]))

    with mock.patch.object(qrm, "estimate_advantages", spy):
        settings = base | judged_by(reward_run, reward) | dict(loss=loss, reward_file=reward_file)
        lines = read_metrics(run("policy", **settings, out=out))
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert_finite(lines)
    assert lines[1]["grad_norm"] > 0 and ("loss/value" in lines[1]) == (loss == "ppo")
    for given, advantages, mask in rewards:
        assert (given[~mask] == 0).all() and advantages[mask].std() > 1e-3
        if reward in ("qrm", "dpo"):
            assert given[mask].mean().item() == pytest.approx(0, abs=1e-4)
            assert given[mask].std(correction=0).item() == pytest.approx(1, abs=1e-3)
            assert loss == "ppo" or torch.equal(advantages, given)
        elif reward in ("orm", "rule"):
            last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
            assert (given[~last] == 0).all() and (given[last] != 0).any()


SWITCHES = [
    dict(center=False, eos_reward="mean", value_baseline_weight=0.01, kl_coef=0.01, kl_estimator="abs"),
    dict(loss="reinforce", epochs=3, eos_reward="mean"),
    dict(critic=False),
    dict(advantage="return"),
    dict(advantage="gae", critic=False),
    dict(advantage="group"),
    dict(advantage="reward", temperature=0.7, missing_eos_penalty=1.0),
    dict(lora_rank=4, kl_coef=0.1),
    dict(dtype="bfloat16"),
    dict(activation_checkpointing=True, warmup_steps=3, critic_warmup=1),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s)))
def test_switches(switches, reward_run, base, out):
    """Each departure of the authors' code, and each switch of the trunk, with Q-RM as the reward."""
    lines = read_metrics(run("policy", **base | judged_by(reward_run, "qrm") | switches, out=out))
    assert_finite(lines)
    assert len(lines) == 3 and lines[1]["grad_norm"] > 0
    assert ("kl/ref" in lines[1]) == ("kl_coef" in switches)
    without = {"critic", "loss"} & switches.keys() or switches.get("advantage") in ("return", "group", "reward")
    assert ("loss/value" in lines[1]) != bool(without)


def test_head_lm_as_the_reward(reward_run, base, out):
    """A Q-RM with an LM head scores tokens as one with a scalar head does."""
    settings = base | dict(reward="qrm", reward_model=str(reward_run("qrm-lm") / "model"))
    assert_finite(read_metrics(run("policy", **settings, out=out)))


@pytest.mark.parametrize("reward", ["qrm", "orm", "step_prm", "dpo"])
def test_prompts_that_nobody_can_grade(reward, reward_run, base, tmp_path, out):
    """With a reward model, prompts alone are enough: what is reported is the model's score of the answers."""
    data = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}+{i + 1}="} for i in range(20)])
    settings = base | judged_by(reward_run, reward) | dict(dataset=data, temperature=1.0)
    folder = run("policy", **settings, out=out)
    lines = read_metrics(folder)
    assert_finite(lines)
    assert {"eval/reward", "eval/reward_sampled"} <= lines[0].keys() and "eval/pass@1" not in lines[0]
    tokenizer, models = common.load_tokenizer(base["model"]), {}
    models["reward"] = common.load_model(settings["reward_model"], head="saved", device=CPU, trainable=False)
    if reward == "dpo":
        models["reward_ref"] = common.load_model(base["model"], device=CPU, trainable=False)
    policy = common.load_model(base["model"], device=CPU, trainable=False)
    expected = []
    for row in read(Path(data))[-5:]:
        prompt = common.encode_prompt(tokenizer, row["prompt"])
        stops = common.stop_ids(policy, tokenizer)
        (answer,) = common.generate(policy, [prompt], max_new_tokens=12, stop_ids=stops, pad_id=0)
        batch = common.make_batch([prompt], [answer], 0, CPU)
        ends = qrm.step_mask([answer], tokenizer, "=", batch["mask"])
        with torch.no_grad():
            scores = qrm.token_scores(models, batch, reward)
        expected.append(qrm.sequence_score(scores, batch["mask"], ends, reward).item())
    assert lines[0]["eval/reward"] == pytest.approx(sum(expected) / 5, abs=1e-5) and max(expected) != min(expected)


def test_reward_ref(reward_run, base, tiny_model, out):
    """--reward_ref: the model below a DPO model, where it is not --model; the same model twice gives no signal."""
    judge = str(reward_run("dpo") / "model")
    args = qrm.Args(
        **base | dict(stage="policy", reward="dpo", reward_model=judge, reward_ref=judge, advantage="token")
    )
    models, _ = qrm.build(args, CPU)
    with torch.no_grad():
        scores = qrm.token_scores(models, common.make_batch([[3, 4]], [[5, 6, 2]], 0, CPU), "dpo")
        other, _ = qrm.build(dataclasses.replace(args, reward_ref=""), CPU)
        assert scores.abs().max() < 1e-6
        assert qrm.token_scores(other, common.make_batch([[3, 4]], [[5, 6, 2]], 0, CPU), "dpo").abs().max() > 1e-3


# ---- resume and ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qrm", "dpo"])
def test_reward_resumes_bit_equal(kind, reward_base, tmp_path):
    """run(4) = run(2) + resume(2), to the last bit of every metric, weight and colour."""
    settings = reward_base | KINDS[kind]
    whole = run("reward", **settings, out=str(tmp_path / "whole"))
    parts = run("reward", 2, **settings, out=str(tmp_path / "parts"))
    assert len(read_metrics(parts)) == 3
    run("reward", **settings, out=str(parts), resume=True)
    assert len(read_metrics(whole)) == 5 and read_metrics(whole) == read_metrics(parts)
    assert weights(whole) == weights(parts)
    assert (whole / "credit.html").read_text() == (parts / "credit.html").read_text()


@pytest.mark.parametrize("changes", [dict(), dict(loss="reinforce", lora_rank=4, kl_coef=0.1)], ids=["ppo", "lora"])
def test_policy_resumes_bit_equal(changes, reward_run, base, tmp_path):
    settings = base | judged_by(reward_run, "qrm") | changes | dict(steps=4)
    whole = run("policy", **settings, out=str(tmp_path / "whole"))
    parts = run("policy", 2, **settings, out=str(tmp_path / "parts"))
    run("policy", **settings, out=str(parts), resume=True)
    assert len(read_metrics(whole)) == 5 and read_metrics(whole) == read_metrics(parts)
    assert weights(whole) == weights(parts)


DRIVER = """
import json, sys
import common, qrm, torch
from unittest import mock

def main():
    for stage, settings in json.load(open(sys.argv[1])):
        with mock.patch.object(common.RunFolder, "report"):
            {"reward": qrm.train_reward, "policy": qrm.train}[stage](qrm.Args(**settings, stage=stage))
    scores, mask = torch.load(sys.argv[2], weights_only=True)
    share = len(scores) // common.world()
    mine = slice(common.rank() * share, (common.rank() + 1) * share)
    out = [qrm.standardise(scores[mine], mask[mine], center) for center in (True, False)]
    torch.save(out, f"{sys.argv[2]}.{common.rank()}")

common.launch(main, "cpu")
"""


@pytest.fixture(scope="module")
def jobs(reward_run, reward_base, base, reward_file, tmp_path_factory) -> dict:
    """name: (stage, settings). Held-out rows do not divide among 2 ranks, nor into equally many micro-batches."""
    prompts = write(tmp_path_factory.mktemp("data") / "prompts.jsonl", [{"prompt": f"{i}+{i + 1}="} for i in range(20)])
    told = base | dict(reward_file=reward_file, lr=3e-4)
    ungraded = base | dict(dataset=prompts, lr=3e-4, test_rows=5)
    return {
        **{
            f"reward {kind}": ("reward", reward_base | KINDS[kind] | dict(micro_batch=2, reward_lr=1e-3))
            for kind in KINDS
        },
        "policy qrm": ("policy", told | judged_by(reward_run, "qrm") | dict(kl_coef=0.1)),
        "policy step_prm": ("policy", told | judged_by(reward_run, "step_prm") | dict(loss="reinforce")),
        "policy orm": ("policy", ungraded | judged_by(reward_run, "orm") | dict(test_rows=1)),
        "policy dpo": ("policy", ungraded | judged_by(reward_run, "dpo")),
    }


def some_scores():
    noise = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 6, 2, 3, 6, 5])
    return torch.randn(6, 6, generator=noise) * 3 + 5, torch.arange(6) < lengths[:, None]


@pytest.fixture(scope="module")
def two_ranks(jobs, tmp_path_factory):
    """The run folders of all jobs from a single torchrun on two ranks."""
    home = tmp_path_factory.mktemp("two_ranks")
    work = [(stage, settings | {"out": str(home / name)}) for name, (stage, settings) in jobs.items()]
    (home / "driver.py").write_text(DRIVER)
    (home / "jobs.json").write_text(json.dumps(work))
    torch.save(some_scores(), home / "scores.pt")
    run_script(home / "driver.py", home / "jobs.json", home / "scores.pt", ranks=2, timeout=150)
    return home


NAMES = [*(f"reward {kind}" for kind in KINDS), "policy qrm", "policy step_prm", "policy orm", "policy dpo"]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(name, jobs, two_ranks, out):
    """1 process = 2 ranks, to a relative 1e-5 in every metric."""
    stage, settings = jobs[name]
    alone, both = read_metrics(run(stage, **settings, out=out)), read_metrics(two_ranks / name)
    assert len(alone) == (5 if stage == "reward" else 3)
    assert_same_metrics(alone, both)


def test_standardised_over_all_ranks(two_ranks):
    """Two ranks of unequal means standardise with one mean and one deviation: those of all tokens together."""
    scores, mask = some_scores()
    parts = [torch.load(f"{two_ranks / 'scores.pt'}.{rank}", weights_only=True) for rank in (0, 1)]
    for center, found in zip((True, False), zip(*parts)):
        torch.testing.assert_close(torch.cat(found), qrm.standardise(scores, mask, center))
    first = parts[0][0][mask[:3]]
    assert first.std(correction=0).item() != pytest.approx(1, abs=1e-3)  # alone it would have been


# ---- --check ---------------------------------------------------------------------------------------------------------


def check(**settings) -> None:
    with mock.patch.object(common.RunFolder, "report"):
        qrm.check(qrm.Args(**settings))


def test_check_on_the_command_line():
    """--check of the bare command looks at the reward model and at the policy."""
    screen = run_script("qrm.py", "--check").stdout
    assert screen.count("all checks passed") == 2 and "FAIL" not in screen
    for word in ("vocabular", "dropout", "EOS", "padding", "KL = 0", "micro-batches", "resuming", "GiB"):
        assert word in screen, word


@pytest.mark.parametrize("kind", KINDS)
def test_check_of_reward_models(kind, reward_base, out, capsys):
    check(**reward_base | KINDS[kind], stage="reward", out=out)
    assert capsys.readouterr().out.count("all checks passed") == 1


def test_check_of_rows_with_steps(reward_base, tmp_path, capsys):
    rows = [{"prompt": f"{i}+{i}=", "steps": ["1+1", "2"], "labels": [True, False]} for i in range(1, 30)]
    changes = dict(objective="step_prm", pairs=write(tmp_path / "steps.jsonl", rows), stage="reward")
    check(**reward_base | changes)
    assert capsys.readouterr().out.count("all checks passed") == 1


def test_check_of_many_pairs_a_prompt(reward_base, tmp_path, capsys):
    """Pairs are often sorted by prompt: the few that --check takes may not all have one."""
    rows = [{"prompt": f"{i // 8}+1=", "chosen": "1" * (1 + i % 8), "rejected": "2"} for i in range(80)]
    check(**reward_base | dict(pairs=write(tmp_path / "pairs.jsonl", rows), stage="reward"))
    assert capsys.readouterr().out.count("all checks passed") == 1


@pytest.mark.parametrize(
    "changes",
    [
        dict(stage="all", lora_rank=4, loss="reinforce"),
        dict(stage="all", objective="dpo", head="lm", reward="dpo", dtype="bfloat16"),
        dict(stage="policy", reward="orm"),
        dict(stage="policy", reward="dpo"),
        dict(stage="policy", reward="rule"),
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_check_of_policies(changes, base, capsys):
    """A reward model that is not there yet is a random one."""
    check(**base | changes)
    assert capsys.readouterr().out.count("all checks passed") == 1 + (changes["stage"] == "all")


def test_check_of_a_trained_reward_model(reward_run, base, capsys):
    check(**base | judged_by(reward_run, "step_prm"), stage="policy")
    assert capsys.readouterr().out.count("all checks passed") == 1


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(base, reward_base, out, monkeypatch):
    """refused(stage, [parts of the message], **changes): the stage says so before a model is loaded."""

    def check(stage, parts, **changes):
        monkeypatch.setattr(common, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        function = {"reward": qrm.train_reward, "policy": qrm.train, "pairs": qrm.make_pairs, "all": qrm.run_stages}
        settings = reward_base if stage == "reward" else base
        with pytest.raises(common.BadInput) as error:
            function[stage](qrm.Args(**settings | dict(out=out) | changes, stage=stage))
        message = str(error.value)
        assert all(part in message for part in parts), message
        assert "\n" not in message and len(message) < 500

    return check


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("objective", "luck", "one of qrm, orm"),
        ("head", "two", "one of scalar, lm"),
        ("beta", 0.0, "at least 1e-06"),
        ("dpo_beta", 0.0, "at least 1e-06"),
        ("margin", float("nan"), "at least 0"),
        ("ce_weight", -1.0, "at least 0"),
        ("reward_lr", float("inf"), "at least 0"),
        ("reward_epochs", 0, "at least 1"),
        ("test_pairs", 0, "at least 1"),
        ("pairs_per_step", 0, "at least 1"),
        ("micro_batch", 0, "at least 1"),
        ("pairs", "", "needs"),
        ("step_separator", "", "empty"),
    ],
)
def test_wrong_value_of_the_reward_stage(name, value, expected, refused):
    refused("reward", [f"--{name}", expected], **{name: value})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("reward", "praise", "one of qrm, orm, step_prm, dpo, rule"),
        ("eos_reward", "none", "one of own, mean"),
        ("orm_credit", "first", "one of last, broadcast"),
        ("loss", "hinge", "one of ppo, reinforce"),
        ("advantage", "luck", "one of auto, token"),
        ("kl_estimator", "k4", "one of k1, k2, k3, abs"),
        ("value_baseline_weight", -1.0, "at least 0"),
        ("pair_samples", 1, "at least 2"),
        ("clip", 0.0, "at least 1e-06"),
        ("lr", -1.0, "at least 0"),
        ("prompts_per_step", 0, "at least 1"),
    ],
)
def test_wrong_value_of_the_policy_stage(name, value, expected, refused):
    refused("policy", [f"--{name}", expected], **{"reward": "rule", name: value})


@pytest.mark.parametrize(
    "stage, changes, parts",
    [
        ("reward", dict(objective="orm", head="lm"), ["--objective orm", "--head scalar"]),
        ("reward", dict(objective="step_prm", head="lm"), ["--objective step_prm", "--head scalar"]),
        ("reward", dict(objective="dpo"), ["--objective dpo", "--head lm"]),
        ("all", dict(objective="orm"), ["--reward qrm needs --objective qrm", "--stage all", "orm"]),
        ("policy", dict(), ["--stage policy", "--reward qrm", "--reward_model"]),
        ("policy", dict(reward="dpo"), ["--reward dpo", "--reward_model"]),
        ("policy", dict(reward="rule", advantage="group", samples_per_prompt=1), ["--advantage group", "at least 2"]),
        ("policy", dict(reward="rule", prompts_per_step=5, minibatches=3), ["--minibatches 3", "20 rows", "divide"]),
        ("policy", dict(reward="rule", micro_batch=3), ["--micro_batch 3", "8 rows", "divide"]),
        ("reward", dict(pairs="nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
        ("reward", dict(pairs_per_step=17), ["--pairs_per_step 17", "16 pairs"]),
        ("reward", dict(test_pairs=21), ["--test_pairs 21", "21 pairs"]),
        ("reward", dict(max_prompt=60, max_new_tokens=60), ["--max_prompt + --max_new_tokens is 120", "64 positions"]),
        ("reward", dict(max_new_tokens=2), ["no pair is left", "21 of 21"]),
    ],
    ids=lambda x: "" if isinstance(x, list) else str(x),
)
def test_combination_that_means_nothing(stage, changes, parts, refused):
    refused(stage, parts, **changes)


def test_pairs_of_wrong_columns(refused, tmp_path):
    """Missing columns, missing labels, labels that are not those of the steps: the file and the row or what it has."""

    def file(rows):
        return write(tmp_path / "rows.jsonl", rows)

    good = toys.chain_pairs(21, 0)
    bare = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in good]
    steps = [{"prompt": row["prompt"], "steps": ["1", "2"], "labels": [True, False]} for row in good]
    short = [*good[:7], good[7] | {"rejected_labels": good[7]["rejected_labels"][:-1]}, *good[8:]]
    none = [*good[:7], bare[7], *good[8:]]
    odd = [*steps[:7], steps[7] | {"labels": [True]}, *steps[8:]]
    words = [*steps[:7], steps[7] | {"steps": ["1", 2]}, *steps[8:]]
    path = file([{"prompt": row["prompt"], "chosen": row["chosen"]} for row in bare])
    refused("reward", [path, "prompt, chosen", "expected chosen+rejected"], pairs=path)
    refused("reward", [file(bare), "step_prm", "labels"], pairs=path, objective="step_prm")
    refused("reward", [file(steps), "--objective qrm", "prompt, chosen, rejected"], pairs=path)
    text = repr(good[7]["rejected"])
    refused("reward", [file(short), "labels for the", "steps of", text], pairs=path, objective="step_prm")
    refused("reward", [file(odd), "row 8", "'steps' and 'labels'", "same length"], pairs=path, objective="step_prm")
    refused("reward", [file(words), "row 8", "steps"], pairs=path, objective="step_prm")
    refused("reward", [file(none), "row 8", "_labels"], pairs=path, objective="step_prm")


def test_reward_models_of_another_kind(refused, reward_run, tiny_model, gpt2_model):
    """Trained for another objective; no scalar head where one is needed; another tokenizer; no model at all."""
    orm, qrm_lm = (str(reward_run(kind) / "model") for kind in ("orm", "qrm-lm"))
    refused("policy", ["--reward qrm", orm, "trained as orm"], reward="qrm", reward_model=orm)
    refused("policy", ["--reward orm", qrm_lm, "trained as qrm"], reward="orm", reward_model=qrm_lm)
    refused("policy", ["--reward orm", tiny_model, "scalar head"], reward="orm", reward_model=tiny_model)
    refused("policy", ["--reward step_prm", "scalar head"], reward="step_prm", reward_model=tiny_model)
    parts = ["tokenizers of", tiny_model, gpt2_model, "differ in"]
    refused("policy", parts, reward="qrm", reward_model=gpt2_model)
    refused("policy", parts, reward="dpo", reward_model=tiny_model, reward_ref=gpt2_model)
    refused("policy", ["no such folder"], reward="qrm", reward_model="./nowhere")


def test_a_scalar_head_is_no_dpo_model(refused, reward_run, tmp_path):
    """A token classifier of unknown origin has no log-probabilities to compare."""
    import shutil

    folder = shutil.copytree(reward_run("qrm") / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["reward_objective"]
    (folder / "config.json").write_text(json.dumps(config))
    refused("policy", ["--reward dpo", str(folder)], reward="dpo", reward_model=str(folder))


def test_prompts_without_a_grader(refused, tmp_path):
    """Pairs and the rule reward need somebody who grades."""
    path = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}="} for i in range(9)])
    for stage, changes in (("pairs", {}), ("policy", dict(reward="rule")), ("all", {})):
        refused(stage, ["--reward_file is empty", path], dataset=path, **changes)


def test_pairs_that_tell_nothing(base, out, tmp_path):
    """When all answers are equally good there is no pair, and a sentence says so."""
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompts, completions, rows):\n    return [1.0 for _ in completions]\n")
    with pytest.raises(common.BadInput, match="no prompt has answers of different reward"):
        qrm.make_pairs(qrm.Args(**base | dict(stage="pairs", reward_file=str(path), pair_prompts=4, out=out)))


def test_existing_run_folders(refused, out):
    """A stage never writes into a folder that is not empty; of --stage all, the one that is there is named."""
    (Path(out) / "pairs").mkdir(parents=True)
    (Path(out) / "pairs" / "thesis.txt").write_text("all of it")
    refused("all", [f"--out {out}", "exists and is not empty", "--resume"])
    refused("policy", [f"--out {out} exists and is not empty"], reward="rule")
    refused("reward", [f"--out {out} exists and is not empty"])


def test_resume_needs_a_folder(refused):
    for stage, changes in (("policy", dict(reward="rule")), ("reward", {}), ("all", {})):
        refused(stage, ["--resume needs --out"], resume=True, out="", **changes)


def test_wrong_value_on_the_command_line():
    """A wrong value: one line on the screen, exit code 2, no traceback."""
    done = run_script("qrm.py", *flags(stage="reward"), expect=2)
    assert done.stderr.strip() == "qrm.py: error: --stage reward needs --pairs"

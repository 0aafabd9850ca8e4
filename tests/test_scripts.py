"""Every script end to end: its command line, every loss with every advantage, every switch, its run folder."""

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import common
import lm
import lco
import ppo_baseline
import pytest
import tasks
from conftest import REWARD, ROOT, TINY, assert_same_metrics, flags, read_metrics, run_forked, run_here, run_script
from safetensors.torch import load_file

import torch

SCRIPTS = {"ppo_baseline": ppo_baseline, "lco": lco}
ROLLOUT = {"reward/mean", "reward/spread", "length/mean", "length/finished", "lr", "grad_norm", "loss/policy"}
FILES = [".lock", "args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html"]
FILES += ["samples.jsonl", "source.py"]


@pytest.fixture(scope="module")
def base(tiny_model, reward_file) -> dict:
    """Runs of two steps."""
    return TINY | dict(model=tiny_model, reward_file=reward_file, steps=2, save_every=5)


def trained(script, base, out, **changes) -> list[dict]:
    """The metrics of a run in this process: all finite, the first minibatch on policy, and it moved."""
    lines = read_metrics(run_here(script, **base | changes, out=out))
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert all(value is None or math.isfinite(value) for value in line.values()), line
    assert lines[1].keys() >= ROLLOUT and lines[1]["grad_norm"] > 0 and lines[1]["lr"] == pytest.approx(1e-3)
    assert lines[2]["lr"] == pytest.approx(5e-4)
    return lines


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SCRIPTS)
def bare(request, tmp_path_factory):
    """(script, folder, screen) of the bare command with less to do: the built-in model and task."""
    name = request.param
    folder = tmp_path_factory.mktemp("bare") / name
    less = dict(steps=3, prompts_per_step=8, samples_per_prompt=4, test_rows=16)
    done = run_script(f"{name}.py", *flags(**less, out=folder))
    return SCRIPTS[name], folder, done.stdout


def test_one_line_a_step(bare):
    """Without a tracker: sizes at the start, then step/total, reward, loss, KL, length, pace and time left."""
    script, folder, screen = bare
    lines = [line for line in screen.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["0/3", "1/3", "2/3", "3/3"]
    step = "policy/logit_gap" if script is lco else "policy/kl_old"
    for word in ("reward", "loss/policy", step, "length", "s/step", "left"):
        assert all(word in line for line in lines[1:]), word
    assert "8 prompts x 4 samples = 32 rows per step on 1 rank(s)" in screen and f"run folder: {folder}" in screen


def test_run_folder(bare):
    """What product.md lists, and nothing else; the arguments are complete and the source is the script's."""
    script, folder, _ = bare
    assert sorted(p.name for p in folder.iterdir()) == FILES
    about = json.loads((folder / "args.json").read_text())
    assert list(about["args"]) == [f.name for f in dataclasses.fields(script.Args)]
    assert about["args"]["model"] == "builtin" and about["args"]["lr"] == script.BUILTIN["lr"]
    assert {"command", "world", "git", "torch", "time"} <= about.keys()
    assert (folder / "source.py").read_text() == inspect.getsource(script)
    assert [p.name for p in (folder / "checkpoint").iterdir()] == ["step-000003"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["kind"] for s in samples} == {"train", "eval/greedy", "eval/sampled"}
    assert all(s.keys() == {"step", "kind", "prompt", "completion", "reward"} for s in samples)


def test_metrics(bare):
    """Namespaced keys; held-out accuracy before the first step and after the last; on policy at step 1."""
    script, folder, _ = bare
    lines = read_metrics(folder, times=True)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("/" in k for line in lines for k in line if k not in ("step", "lr", "grad_norm"))
    for line in (lines[0], lines[-1]):
        assert 0 <= line["eval/greedy"] <= 1 and 0 < line["eval/sampled"] <= 1
    own = {"policy/logit_gap", "lco/gap"} if script is lco else {"policy/kl_old", "policy/ratio_gap", "policy/entropy"}
    assert lines[1].keys() >= ROLLOUT | own | {"time/step"}
    step = "policy/logit_gap" if script is lco else "policy/kl_old"
    assert lines[1][step] < 0.1


def test_plot_and_report(bare):
    """plot.png is an image; report.html is one page without links, with curves, samples and settings."""
    _, folder, _ = bare
    plot = (folder / "plot.png").read_bytes()
    assert plot[:8] == b"\x89PNG\r\n\x1a\n" and len(plot) > 10_000
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    assert re.findall(r'src="(.{15})', page) == ["data:image/png;"]
    assert page.endswith("</html>") and "samples_per_prompt" in page and "eval/greedy" in page


def test_exported_model_can_be_trained_on(bare, out):
    """model/ of one run is the --model of the next, and stands where it ended."""
    script, folder, _ = bare
    less = dict(model=folder / "model", out=out, steps=1, prompts_per_step=8, samples_per_prompt=4, test_rows=16)
    args = common.parse_args(script.Args, script.BUILTIN, flags(**script.BUILTIN | less))
    first = read_metrics(run_here(script, **dataclasses.asdict(args)))[0]
    last = read_metrics(folder)[-1]
    assert all(first[k] == pytest.approx(last[k], abs=0.07) for k in first if k.startswith("eval/"))


def test_check_on_the_command_line():
    """check.py passes for the built-in model, and says what it looked at."""
    screen = run_forked("check.py", "lco.py").stdout
    assert "all checks passed" in screen and "FAIL" not in screen
    for word in ("vocabular", "dropout", "EOS", "padding", "sampler", "KL = 0", "micro-batches", "resuming", "GiB"):
        assert word in screen, word


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help(script, capsys, monkeypatch):
    """--help prints every argument with its sentence, default and legal values, under the comments of Args."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        common.parse_args(script.Args, script.BUILTIN, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name}" in text and " ".join(field.metadata["help"].split()) in text, field.name
    assert "optimisation: --steps" in text and "(kld, mse, lch; default: 'kld')" in text or script is not lco
    assert "(default: 0.95; at least 0; at most 1)" in text


def test_builtin_defaults_are_for_the_built_in_model():
    """The bare command changes the defaults of what is not given; any other model has those of the class."""
    for script in SCRIPTS.values():
        bare = common.parse_args(script.Args, script.BUILTIN, [])
        assert all(getattr(bare, k) == v for k, v in script.BUILTIN.items())
        given = common.parse_args(script.Args, script.BUILTIN, ["--lr", "0.5"])
        assert given.lr == 0.5 and given.max_prompt == script.BUILTIN["max_prompt"]
        other = common.parse_args(script.Args, script.BUILTIN, ["--model", "x/y"])
        assert dataclasses.replace(other, model="builtin", dtype="auto") == script.Args()


# ---- losses, advantages, switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["gae", "reward", "group"])
@pytest.mark.parametrize("loss", ["ppo", "reinforce"])
def test_ppo(loss, advantage, base, out):
    lines = trained(ppo_baseline, base, out, loss=loss, advantage=advantage)
    assert ("loss/value" in lines[1]) == (advantage == "gae")
    assert ("critic/explained_variance" in lines[1]) == (advantage == "gae")


@pytest.mark.parametrize("advantage", ["gae", "reward", "group", "token"])
@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_lco(loss, advantage, base, out, tiny_model, other_model):
    """Every loss with every advantage; that of two models is dense."""
    dpo = dict(reward_model=other_model, reward_ref=tiny_model) if advantage == "token" else {}
    lines = trained(lco, base, out, loss=loss, advantage=advantage, **dpo)
    assert ("loss/value" in lines[1]) == (advantage == "gae")
    dense = loss == "kld" or advantage == "token"
    assert ("lco/target_kl" in lines[1]) == dense and ("lco/gap" in lines[1]) != dense
    assert not dense or lines[1]["lco/target_kl"] > 0


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_lco_with_token_scores(loss, head, base, out, lm_judge, scalar_model):
    """--reward_model: dense where it has an LM head, one score per token where it has a scalar head."""
    judge = {"lm": lm_judge, "scalar": scalar_model}[head]
    lines = trained(lco, base, out, loss=loss, advantage="token", reward_model=judge)
    assert "loss/value" not in lines[1] and ("lco/target_kl" in lines[1]) == (loss == "kld" or head == "lm")


@pytest.mark.parametrize("advantage", ["token", "gae", "group", "reward"])
@pytest.mark.parametrize("loss", ["ppo", "reinforce"])
def test_ppo_with_a_reward_model(loss, advantage, base, out, scalar_model, tmp_path):
    """Its scores are the rewards, on prompts that nothing else grades; QRM-2 takes a critic for PPO alone."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i + 1}="}) + "\n" for i in range(20)))
    changes = dict(reward_model=scalar_model, reward_file="", dataset=str(data), loss=loss, advantage=advantage)
    lines = trained(ppo_baseline, base, out, **changes)
    assert ("loss/value" in lines[1]) == (advantage == "gae" or (advantage, loss) == ("token", "ppo"))
    assert "eval/reward" in lines[0]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_reward_models_that_cannot_be_used(script, base, out, tiny_model, scalar_model):
    for changes, message in (
        (dict(reward_model=tiny_model), "give --reward_ref"),
        (dict(reward_model=scalar_model, reward_ref=tiny_model), "has a scalar head"),
        (dict(reward_ref=tiny_model), "give both"),
    ):
        with pytest.raises(common.BadInput, match=message):
            run_here(script, **base | changes, out=out)


def test_token_rewards_of_a_reward_model(base, scalar_model):
    """Standardised over the tokens that it scores: all of them with `token`, or (an ORM) the last ones alone."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    batch = {"mask": mask, "scores": torch.tensor([[1.0, 2.0, 6.0, 0], [3.0, 4.0, 0, 0]])}
    args = ppo_baseline.Args(reward_model=scalar_model)
    with mock.patch.object(lm, "score_of", return_value="last"):
        last = ppo_baseline.token_rewards(None, batch, [True, True], args)
    torch.testing.assert_close(last, torch.tensor([[0, 0, 1.0, 0], [0, -1.0, 0, 0]]))
    token = ppo_baseline.Args(reward_model=scalar_model, advantage="token")
    every = ppo_baseline.token_rewards(None, batch, [True, True], token)
    z = torch.tensor([1.0, 2.0, 6.0, 3.0, 4.0])
    torch.testing.assert_close(every[mask], (z - z.mean()) / z.std(correction=0))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_dense_scores_in_closed_form(temperature, base, out, lm_judge):
    """A(s,a) = (log phi(a|s) - mean) / deviation, both over the sampled tokens; the loss against whole logits."""
    names = dict(loss="kld", advantage="token", reward_model=lm_judge, beta=2.0, temperature=temperature)
    args = lco.Args(**base | names, out=out)
    models, _ = lco.build(args, torch.device("cpu"))
    rows = [[3, 4, 5], [6, 7, 8, 9, 1], [5]]
    batch = common.make_batch([[2, 3], [4], [5, 6, 7]], rows, 0, torch.device("cpu"))
    heads = lco.evaluate_models(models, batch, args)
    batch["rewards"] = lco.token_rewards(None, batch, [True] * 3, args)
    lco.estimate_advantages(batch, args)
    batch["beta"] = torch.full_like(batch["advantages"], args.beta)
    with torch.no_grad():
        loss, _ = lco.dense_objective(models["policy"], heads, batch, args)
        mask, ids = batch["mask"], batch["completion_ids"][batch["mask"]]
        z, q = (lm.completion_hidden(m, batch)[mask] @ lm.head_weight(m).T for m in models.values())
    scores = q.log_softmax(-1)
    sampled = scores.gather(-1, ids[:, None])
    dense = (scores - sampled.mean()) / sampled.std(correction=0)
    target = lco.target_logprobs(z / temperature, dense, 2.0, "exp")
    expected = lco.kld_loss((z / temperature).log_softmax(-1), target)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def lm_judge(other_model, tmp_path_factory):
    """A Q-RM with an LM head: a language model that says how it scores answers."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    shutil.copytree(other_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"reward_score": "mean"}))
    return str(folder)


@pytest.fixture(scope="module")
def scalar_model(tiny_model, tmp_path_factory):
    """The body of the tiny model with a random head to one number for each token, as a Q-RM has it."""
    folder = tmp_path_factory.mktemp("scalar") / "model"
    model = lm.load_model(tiny_model, head="scalar", device=torch.device("cpu"))
    model.config.reward_score = "mean"
    torch.nn.init.normal_(lm.scalar_head(model).weight)
    common.export_model(folder, model, lm.load_tokenizer(tiny_model))
    return str(folder)


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """Another model of the same tokenizer."""
    from conftest import save_model
    from transformers import AutoConfig

    config, tokenizer = AutoConfig.from_pretrained(tiny_model), lm.load_tokenizer(tiny_model)
    return save_model(tmp_path_factory.mktemp("other") / "model", config, tokenizer, seed=1)


LCO_SWITCHES = [
    dict(loss="kld", negative_beta_scale=100.0),
    dict(loss="kld", target="linear"),
    dict(loss="kld", kl_coef=0.1, lora_rank=4),
]
COMMON_SWITCHES = [
    dict(kl_coef=0.1, kl_estimator="k1"),
    dict(kl_coef=0.1, kl_estimator="k2"),
    dict(kl_coef=0.1, kl_estimator="k3"),
    dict(kl_coef=0.1, lora_rank=4),
    dict(activation_checkpointing=True),
    dict(epochs=2, minibatches=4),
    dict(advantage="gae", critic_warmup=1, value_clip=0.0, gamma=0.99),
    dict(temperature=0.7, missing_eos_penalty=1.0),
    dict(dtype="bfloat16"),
]
NAMES = [(name, s) for name, switches in (("ppo_baseline", COMMON_SWITCHES), ("lco", COMMON_SWITCHES + LCO_SWITCHES))
         for s in switches]  # fmt: skip


@pytest.mark.parametrize("script, switches", NAMES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)))
def test_switches(script, switches, base, out):
    """Each switch runs, and logs what it should."""
    lines = trained(SCRIPTS[script], base, out, **switches)
    if "kl_coef" in switches:
        assert lines[1]["kl/ref"] == pytest.approx(0, abs=1e-5) and lines[2]["kl/ref"] != 0
    if "critic_warmup" in switches:
        assert lines[1]["policy/kl_old"] == pytest.approx(0, abs=1e-6) and lines[2]["policy/kl_old"] > 1e-6


def test_critic_warmup_leaves_the_policy_alone(base, tmp_path):
    """While the critic warms up, not one weight of the policy moves, and the critic's loss falls."""
    from safetensors.torch import load_file

    changes = dict(advantage="gae", critic_warmup=2, critic_lr=0.01)
    run = run_here(ppo_baseline, **base | changes, out=str(tmp_path / "run"))
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base["model"], run / "model"))
    assert all(torch.equal(before[k], after[k]) for k in after)
    lines = read_metrics(run)
    assert lines[2]["loss/value"] < lines[1]["loss/value"]


def test_few_rows(base, out):
    """A step may be as small as one prompt with two samples."""
    trained(lco, base, out, prompts_per_step=1, samples_per_prompt=2, minibatches=1)


SINGLE = {"ppo": (ppo_baseline, dict(loss="ppo")), "lch": (lco, dict(loss="lch")), "kld": (lco, dict(advantage="gae"))}


@pytest.mark.parametrize("name", SINGLE)
def test_single_update_needs_no_forward_of_pi_old(name, base, tmp_path):
    """With one update per rollout pi = pi_old; it is evaluated with more updates, and for a KL penalty."""
    script, changes = SINGLE[name]
    settings = base | dict(minibatches=1, advantage="group") | changes
    evaluate, runs, reads = script.evaluate_models, {}, {}

    def as_if(**more):
        return lambda models, batch, args: evaluate(models, batch, dataclasses.replace(args, **more))

    for key, more in {"one": {}, "two": dict(minibatches=2), "epochs": dict(epochs=2)}.items():
        with (
            mock.patch.object(lm, "completion_hidden", wraps=lm.completion_hidden) as read,
            mock.patch.object(script, "evaluate_models", as_if(**more)),
        ):
            runs[key] = read_metrics(run_here(script, **settings, out=str(tmp_path / key)))
        reads[key] = read.call_count
    for key in ("two", "epochs"):
        assert_same_metrics(runs["one"], runs[key], relative=1e-4, floor=1e-5)
        assert reads[key] > reads["one"]
    kept = {}
    with mock.patch.object(script, "evaluate_models", lambda *given: (evaluate(*given), kept.update(given[1]))[0]):
        run_here(script, **settings | dict(kl_coef=0.1), out=str(tmp_path / "kl"))
    assert "old_logprobs" in kept


# ---- the user's own data ---------------------------------------------------------------------------------------------


def test_a_copy_needs_four_files(tmp_path):
    """lco.py, common.py, lm.py and tasks.py alone in a folder train a model given by its path, on a file, with its reward."""
    for name in ("lco.py", "common.py", "lm.py", "tasks.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "builtin" / "policy", tmp_path / "start")
    prompts = [{"prompt": f"{a}+{b}="} for a in range(1, 6) for b in range(1, 6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "mine.py").write_text("def reward(prompts, completions, rows): return [len(c) for c in completions]\n")
    settings = dict(model="start", dataset="prompts.jsonl", reward_file="mine.py", out="run", steps=1, test_rows=4)
    settings |= dict(prompts_per_step=4, samples_per_prompt=4, micro_batch=8, max_prompt=16, max_new_tokens=16, lr=1e-4)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "lco.py", *flags(**settings)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1]
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run/model"))
    assert start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("column", ["prompt", "messages"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_own_prompts_and_reward(script, column, base, tmp_path, out):
    """A .jsonl in TRL's columns with a reward function in a file, one number a completion; eval/reward is reported."""
    values = [f"{i}+{i + 1}=" for i in range(20)]
    if column == "messages":
        values = [[{"role": "user", "content": v}, {"role": "assistant", "content": "1"}] for v in values]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({column: v, "id": i}) + "\n" for i, v in enumerate(values)))
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD + '    assert all("id" in row for row in rows)\n')
    lines = trained(SCRIPTS[script], base, out, dataset=str(data), reward_file=str(reward))
    assert {"eval/reward", "eval/reward_sampled"} <= lines[0].keys() and "eval/greedy" not in lines[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_reward_a_token(script, base, tmp_path, out):
    """A reward function may give one number for each of rows[i]["completion_ids"]; their sum is what is logged."""
    path = tmp_path / "mine.py"
    path.write_text("""
def reward(prompts, completions, rows):
    return [[0.5 + 0.1 * (i == 3) for i in row["completion_ids"]] for row in rows]
""")
    data = tmp_path / "mine.jsonl"  # prompts that only the user's function can grade: it is called in evaluations too
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i + 1}="}) + "\n" for i in range(20)))
    lines = trained(SCRIPTS[script], base, out, dataset=str(data), reward_file=str(path), advantage="gae")
    assert 0.5 * lines[1]["length/mean"] < lines[1]["reward/mean"] < 0.6 * lines[1]["length/mean"]


def test_gsm8k_columns(base, gpt2_model, tmp_path, out):
    """Rows in GSM8K's columns train through a tokenizer without a chat template, whose prompts are cut as asked."""
    rows = [{"question": f"{i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(20)]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(model=gpt2_model, dataset=str(data), max_prompt=20, long_prompts="truncate")
    lines = trained(lco, base, out, **settings)
    assert 0 <= lines[0]["eval/greedy"] <= 1


def test_tasks_have_what_the_scripts_need():
    """rows, test and reward of the built-in tasks, as the scripts call them."""
    for name in ("chains", "words"):
        task = tasks.load_task(name, test_rows=4)
        rows = task.rows(0, 0, 3)
        assert len(rows) == 3 and len(task.test) == 4
        assert task.reward([r["prompt"] for r in rows], [r["answer"] for r in rows], rows) == [1.0] * 3

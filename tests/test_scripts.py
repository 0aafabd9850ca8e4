"""Every script end to end: its command line, every loss with every advantage, every switch, its run folder, --check."""

import dataclasses
import inspect
import json
import math
import re
from unittest import mock

import common
import lco
import ppo_baseline
import pytest
import qrm
import tasks
from conftest import REWARD, TINY, assert_same_metrics, flags, read_metrics, run_here, run_script

import torch

SCRIPTS = {"ppo_baseline": ppo_baseline, "lco": lco}
ROLLOUT = {"reward/mean", "reward/spread", "length/mean", "length/finished", "lr", "grad_norm", "loss/policy"}
FILES = ["args.json", "checkpoint", "metrics.jsonl", "model", "plot.png", "report.html", "samples.jsonl", "source.py"]


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
    assert "8 prompts x 4 samples = 32 rows a step on 1 rank(s)" in screen and f"run folder: {folder}" in screen


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
    assert {s["kind"] for s in samples} == {"train", "eval/pass@1", "eval/sampled"}
    assert all(s.keys() == {"step", "kind", "prompt", "completion", "reward"} for s in samples)


def test_metrics(bare):
    """Namespaced keys; held-out accuracy before the first step and after the last; on policy at step 1."""
    script, folder, _ = bare
    lines = read_metrics(folder, times=True)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("/" in k for line in lines for k in line if k not in ("step", "lr", "grad_norm"))
    for line in (lines[0], lines[-1]):
        assert 0 <= line["eval/pass@1"] <= 1 and 0 < line["eval/sampled"] <= 1
    own = {"policy/logit_gap", "lco/gap"} if script is lco else {"policy/kl_old", "policy/ratio_gap", "policy/entropy"}
    assert lines[1].keys() >= ROLLOUT | own | {"time/step"}
    step = "policy/logit_gap" if script is lco else "policy/kl_old"
    assert lines[1][step] < 0.1
    shown = {key for keys in script.PANELS.values() for key in keys}
    assert {"reward/mean", "loss/policy", step, "grad_norm"} <= shown & lines[1].keys()


def test_plot_and_report(bare):
    """plot.png is an image; report.html is one page without links, with curves, samples and settings."""
    _, folder, _ = bare
    plot = (folder / "plot.png").read_bytes()
    assert plot[:8] == b"\x89PNG\r\n\x1a\n" and len(plot) > 10_000
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    assert re.findall(r'src="(.{15})', page) == ["data:image/png;"]
    assert page.endswith("</html>") and "samples_per_prompt" in page and "eval/pass@1" in page


def test_exported_model_can_be_trained_on(bare, out):
    """model/ of one run is the --model of the next, and stands where it ended."""
    script, folder, _ = bare
    arguments = flags(model=folder / "model", out=out, **script.BUILTIN)
    less = flags(steps=1, prompts_per_step=8, samples_per_prompt=4, test_rows=16)
    args = common.parse_args(script.Args, script.BUILTIN, [*arguments, *less])
    first = read_metrics(run_here(script, **dataclasses.asdict(args)))[0]
    last = read_metrics(folder)[-1]
    assert all(first[k] == pytest.approx(last[k], abs=0.07) for k in first if k.startswith("eval/"))


def test_check_on_the_command_line():
    """--check passes for the built-in model, and says what it looked at."""
    screen = run_script("lco.py", "--check").stdout
    assert "all checks passed" in screen and "FAIL" not in screen
    for word in ("vocabular", "dropout", "EOS", "padding", "KL = 0", "micro-batches", "resuming", "GiB"):
        assert word in screen, word


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help(script, capsys):
    """--help prints every argument with its sentence."""
    with pytest.raises(SystemExit) as stop:
        common.parse_args(script.Args, script.BUILTIN, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name}" in text and " ".join(field.metadata["help"].split()) in text, field.name


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


@pytest.mark.parametrize("advantage", ["gae", "reward", "group", "dpo"])
@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_lco(loss, advantage, base, out, tiny_model, other_model):
    """Every loss with every advantage; that of two models is dense."""
    dpo = dict(dpo_model=other_model, dpo_ref=tiny_model) if advantage == "dpo" else {}
    lines = trained(lco, base, out, loss=loss, advantage=advantage, **dpo)
    assert ("loss/value" in lines[1]) == (advantage == "gae")
    dense = loss == "kld" or advantage == "dpo"
    assert ("lco/target_kl" in lines[1]) == dense and ("lco/gap" in lines[1]) != dense
    assert not dense or lines[1]["lco/target_kl"] > 0


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_lco_with_token_scores(loss, head, base, out, other_model, scalar_model):
    """--advantage qrm: dense where the scores come from an LM head, one a token where they come from a scalar head."""
    lines = trained(
        lco, base, out, loss=loss, advantage="qrm", qrm_model={"lm": other_model, "scalar": scalar_model}[head]
    )
    assert "loss/value" not in lines[1] and ("lco/target_kl" in lines[1]) == (loss == "kld" or head == "lm")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_dense_scores_in_closed_form(temperature, base, out, other_model):
    """A(s,a) = (log phi(a|s) - mean) / deviation, both over the sampled tokens; the loss against whole logits."""
    names = dict(loss="kld", advantage="qrm", qrm_model=other_model, beta=2.0, temperature=temperature)
    args = lco.Args(**base | names, out=out)
    models, _ = lco.build(args, torch.device("cpu"))
    rows = [[3, 4, 5], [6, 7, 8, 9, 1], [5]]
    batch = common.make_batch([[2, 3], [4], [5, 6, 7]], rows, 0, torch.device("cpu"))
    batch["rewards"] = torch.zeros(batch["mask"].shape)
    heads = lco.score(models, batch, args)
    lco.estimate_advantages(batch, args)
    with torch.no_grad():
        loss, _ = lco.objective(models, heads, batch, args)
        mask, ids = batch["mask"], batch["completion_ids"][batch["mask"]]
        z, q = (common.completion_hidden(m, batch)[mask] @ common.head_weight(m).T for m in models.values())
    scores = q.log_softmax(-1)
    sampled = scores.gather(-1, ids[:, None])
    dense = (scores - sampled.mean()) / sampled.std(correction=0)
    exact = dataclasses.replace(args, negative_beta_scale=1.0)
    expected, _ = lco.vocabulary_loss(z / temperature, z / temperature, dense, exact)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def scalar_model(tiny_model, tmp_path_factory):
    """The body of the tiny model with a random head to one number."""
    folder = tmp_path_factory.mktemp("scalar") / "model"
    model = common.load_model(tiny_model, head="scalar", device=torch.device("cpu"))
    torch.nn.init.normal_(common.scalar_head(model).weight)
    common.export_model(folder, model, common.load_tokenizer(tiny_model))
    return str(folder)


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """Another model of the same tokenizer."""
    from conftest import save_model
    from transformers import AutoConfig

    config, tokenizer = AutoConfig.from_pretrained(tiny_model), common.load_tokenizer(tiny_model)
    return save_model(tmp_path_factory.mktemp("other") / "model", config, tokenizer, seed=1)


LCO_SWITCHES = [
    dict(loss="kld", moving_target=True),
    dict(moving_target=True, loss="mse"),
    dict(loss="kld", negative_beta_scale=100.0),
    dict(loss="kld", token_mean="signed"),
    dict(token_mean="signed", loss="lch"),
    dict(loss="kld", fill="balanced", negative_beta_scale=1.0),
    dict(loss="kld", target="linear"),
    dict(loss="kld", target="linear", fill="balanced", beta=0.5, negative_beta_scale=1.0),
    dict(loss="kld", kl_coef=0.1, lora_rank=4, diagnose=True),
    dict(diagnose=True, loss="mse"),
]
COMMON_SWITCHES = [
    dict(diagnose=True),
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
    if switches.get("diagnose"):
        assert 0 <= lines[1]["diagnose/zero_gradient"] <= 1 and -1 <= lines[1]["diagnose/cosine"] <= 1
    if "critic_warmup" in switches:
        assert lines[1]["policy/kl_old"] == pytest.approx(0, abs=1e-6) and lines[2]["policy/kl_old"] > 1e-6


def test_old_topk(base, out):
    """With as many kept logits as there are symbols, only the rounding to fp16 is left of the authors' top-k."""
    trained(lco, base, out, loss="kld", old_topk=16)


def test_old_topk_of_the_authors(base, out):
    trained(lco, base, out, loss="kld", old_topk=5)


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


SINGLE = {
    "ppo": (ppo_baseline, dict(loss="ppo")),
    "lch": (lco, dict(loss="lch")),
    "kld": (lco, dict(loss="kld", advantage="gae")),
    "qrm": (qrm, dict(stage="policy", reward="rule")),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_update_asks_pi_old_in_passing(name, base, tmp_path):
    """One update a rollout spares the forward of pi_old; it is there with more updates, and for a KL penalty."""
    script, changes = SINGLE[name]
    settings = base | dict(minibatches=1, advantage="group") | changes
    runs, reads = {}, {}
    for asked in (False, True):
        with (
            mock.patch.object(common, "completion_hidden", wraps=common.completion_hidden) as read,
            mock.patch.object(script, "one_update", (lambda args: False) if asked else script.one_update),
        ):
            runs[asked] = read_metrics(run_here(script, **settings, out=str(tmp_path / f"{asked}")))
        reads[asked] = read.call_count
    assert_same_metrics(runs[False], runs[True], relative=1e-4, floor=1e-5)
    assert reads[True] == 2 * reads[False]  # score and update read equally many micro-batches
    one = script.Args(**settings)
    assert script.one_update(one)
    for more in (dict(minibatches=2), dict(epochs=2), dict(kl_coef=0.1)):
        assert not script.one_update(dataclasses.replace(one, **more))


# ---- the user's own data ---------------------------------------------------------------------------------------------


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
    assert {"eval/reward", "eval/reward_sampled"} <= lines[0].keys() and "eval/pass@1" not in lines[0]


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
    assert 0 <= lines[0]["eval/pass@1"] <= 1


# ---- --check fails when something is broken --------------------------------------------------------------------------


def check(script, base, **changes) -> None:
    """--check in this process; its resumed runs draw no plots."""
    with mock.patch.object(common.RunFolder, "report"):
        script.check(script.Args(**base | changes))


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("changes", [dict(advantage="gae", kl_coef=0.1), dict(lora_rank=4, dtype="bfloat16")])
def test_check_passes(script, changes, base, capsys):
    check(script, base, **changes)
    assert "all checks passed" in capsys.readouterr().out


def test_check_passes_for_every_loss(base, capsys, tiny_model, other_model):
    check(ppo_baseline, base, loss="reinforce", advantage="reward")
    check(lco, base, loss="mse")
    check(lco, base, loss="lch", advantage="dpo", dpo_model=other_model, dpo_ref=tiny_model)
    assert capsys.readouterr().out.count("all checks passed") == 3


def keep_dropout(monkeypatch):
    load = common.load_model

    def load_model(*args, **kwargs):
        model = load(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return model

    monkeypatch.setattr(common, "load_model", load_model)


def ignore_the_mask(monkeypatch):
    final_hidden = common._final_hidden

    def without_mask(model, attention_mask, **inputs):
        return final_hidden(model, attention_mask=torch.ones_like(attention_mask), **inputs)

    monkeypatch.setattr(common, "_final_hidden", without_mask)


def count_from_the_padding(monkeypatch):
    final_hidden = common._final_hidden

    def absolute(model, position_ids, **inputs):
        columns = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return final_hidden(model, position_ids=columns, **inputs)

    monkeypatch.setattr(common, "_final_hidden", absolute)


def leave_out_eos(monkeypatch):
    make = common.make_batch

    def make_batch(prompt_ids, completion_ids, pad_id, device):
        return make(prompt_ids, [c[:-1] or c for c in completion_ids], pad_id, device)

    monkeypatch.setattr(common, "make_batch", make_batch)


def mean_a_micro_batch(monkeypatch):
    objective = lco.objective

    def mean(models, heads, micro, *rest):
        loss, metrics = objective(models, heads, micro, *rest)
        return loss / micro["mask"].sum(), metrics

    monkeypatch.setattr(lco, "objective", mean)


def forget_the_optimizer(monkeypatch):
    def load(path, model, optimizer):
        state = {"model": common.get_model_state_dict(model)}
        common.dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state["model"])

    monkeypatch.setattr(common, "load_checkpoint", load)


def remember_other_logits(monkeypatch):
    score = lco.score

    def scaled(*args):
        heads = score(*args)
        return {name: 1.1 * weight for name, weight in heads.items()}

    monkeypatch.setattr(lco, "score", scaled)


@pytest.mark.parametrize(
    "model, damage, name",
    [
        ("gpt2_model", keep_dropout, "dropout is off"),
        ("gpt2_model", count_from_the_padding, "log-probs ignore padding"),
        ("tiny_model", ignore_the_mask, "log-probs ignore padding"),
        ("tiny_model", leave_out_eos, "EOS is inside the loss"),
        ("tiny_model", mean_a_micro_batch, "gradient ignores micro-batches"),
        ("tiny_model", forget_the_optimizer, "resuming changes nothing"),
        ("tiny_model", remember_other_logits, ".*KL = 0 at the start"),
    ],
)
def test_check_finds(model, damage, name, base, request, monkeypatch, capsys):
    """--check leaves with 1 at the first thing that is broken, and names it."""
    damage(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        check(lco, base, model=request.getfixturevalue(model))
    screen = capsys.readouterr().out
    assert stop.value.code == 1 and "all checks passed" not in screen
    assert re.search(rf"FAIL +{name}", screen), screen


def test_tasks_have_what_the_scripts_need():
    """rows, test and reward of the built-in tasks, as the scripts call them."""
    for name in ("chains", "words"):
        task = tasks.load_task(name, "", "", 0, 4)
        rows = task.rows(0, 0, 3)
        assert len(rows) == 3 and len(task.test) == 4
        assert task.reward([r["prompt"] for r in rows], [r["answer"] for r in rows], rows) == [1.0] * 3

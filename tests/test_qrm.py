"""qrm.py end to end: its command line, both objectives and heads, what it saves, bad input."""

import functools
import json
import math
import shlex

import common
import lco
import lm
import ppo_baseline
import pytest
import qrm
from builtin import tasks as toys
from conftest import TINY, flags, read_metrics, run_here, run_forked

import torch

CPU = torch.device("cpu")
KINDS = {"qrm": {}, "qrm-lm": dict(head="lm"), "orm": dict(objective="orm"), "lora": dict(head="lm", lora_rank=4)}
FILES = [".lock", "args.json", "checkpoint", "credit.html", "metrics.jsonl", "model", "plot.png", "report.html"]
FILES += ["samples.jsonl", "source.py"]


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> dict:
    """21 pairs, 16 of which train in 4 steps per epoch; 5 held-out pairs do not divide among 2 ranks."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in toys.preference_pairs(21, 0)))
    small = dict(max_prompt=24, max_new_tokens=24, micro_batch=4, eval_every=2, warmup_steps=1)
    return small | dict(model=tiny_model, pairs=str(file), pairs_per_step=4, test_pairs=5, lr=3e-3)


@pytest.fixture(scope="module")
def reward_run(base, tmp_path_factory):
    """reward_run(kind): the folder of a reward model of one epoch, trained once."""
    home = tmp_path_factory.mktemp("rewards")
    return functools.cache(lambda kind: run_here(qrm, **base | KINDS[kind], out=str(home / kind)))


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(folder, screen) of the bare command with less to do."""
    folder = tmp_path_factory.mktemp("bare") / "run"
    return folder, run_forked("qrm.py", *flags(steps=3, test_pairs=16, out=folder)).stdout


def test_the_next_command_has_quotes(base, tmp_path, capsys):
    folder = run_here(qrm, **base | dict(steps=1), out=str(tmp_path / "my qrm"))
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("next: "))
    assert words[words.index("--reward_model") + 1] == str(folder / "model")


def test_run_folder(bare):
    folder, screen = bare
    assert sorted(p.name for p in folder.iterdir()) == FILES
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and 0 <= lines[-1]["eval/pair_accuracy"] <= 1
    assert "1631 pairs" in screen and "16 held out" in screen
    page = (folder / "credit.html").read_text()
    assert page.count('class="chosen"') == page.count('class="rejected"') == 12 and "still right" in page


def test_printed_command(bare, tmp_path):
    """The command that the run ends with trains a policy with the reward model."""
    folder, screen = bare
    words = shlex.split(screen.splitlines()[-1].split("python ")[1])
    assert words[0] == "ppo_baseline.py" and str(folder / "model") in words
    args = common.parse_args(ppo_baseline.Args, ppo_baseline.BUILTIN, words[1:])
    less = dict(steps=1, prompts_per_step=4, samples_per_prompt=4, test_rows=4, out=str(tmp_path / "run"))
    lines = read_metrics(run_here(ppo_baseline, **vars(args) | less))
    assert lines[1]["policy/updates"] == 1 and "loss/value" in lines[1] and "kl/ref" in lines[1]


# ---- what it learns and saves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reward_model_learns(kind, base, tmp_path):
    """On a few pairs, seen often, the loss falls and training pairs are told apart."""
    lines = read_metrics(run_here(qrm, **base | KINDS[kind], epochs=5, out=str(tmp_path / "run")))
    assert all(value is None or math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["step"] == 20 and lines[-1]["loss/reward_model"] < lines[1]["loss/reward_model"]
    assert lines[-1]["reward_model/pair_accuracy"] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_exported_reward_model(kind, reward_run, base):
    """model/ scores held-out pairs as the run did, and says how; adapters are merged."""
    run, args = reward_run(kind), qrm.Args(**base | KINDS[kind])
    model = lm.load_model(str(run / "model"), head="saved", device=CPU, trainable=False)
    assert lm.has_scalar_head(model.config) == (args.head == "scalar")
    assert lm.score_of(str(run / "model"), "") == {"qrm": "mean", "orm": "last"}[args.objective]
    tokenizer, _, test_pairs = qrm.prepare(args)
    found = qrm.evaluate({"reward": model}, test_pairs, tokenizer, args, CPU)
    last = read_metrics(run)[-1]
    assert found == pytest.approx({k: last[k] for k in found}, abs=1e-5)


def test_the_kept_model_is_shown(base, out, monkeypatch):
    """With --keep best, credit.html has the scores of model/, and not those of the last step."""
    found, shown = iter([0.1, 0.9, 0.2]), {}  # the held-out pair accuracy of steps 0, 2 and 4
    monkeypatch.setattr(qrm, "evaluate", lambda *args: {"eval/pair_accuracy": next(found)})
    now = lambda models: {name: x.clone() for name, x in models["reward"].state_dict().items()}  # noqa: E731
    monkeypatch.setattr(qrm, "show_credit", lambda run, models, *args: shown.update(now(models)))
    folder = run_here(qrm, **base | KINDS["qrm-lm"], keep="best", out=out)
    kept = lm.load_model(str(folder / "model"), head="saved", device=CPU, trainable=False).state_dict()
    assert shown.keys() == kept.keys() and all(torch.equal(shown[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["qrm", "qrm-lm"])
@pytest.mark.parametrize("loss", ["ppo", "reinforce"])
def test_policies_with_it(kind, loss, reward_run, base, tiny_model, reward_file, tmp_path):
    """Rewards of tokens have mean 0 and variance 1 over the tokens that are scored; the task's reward is logged."""
    changes = dict(reward_model=str(reward_run(kind) / "model"), advantage="token", loss=loss, steps=1)
    settings = TINY | dict(model=tiny_model, reward_file=reward_file) | changes
    lines = read_metrics(run_here(ppo_baseline, **settings, out=str(tmp_path / "run")))
    assert ("loss/value" in lines[1]) == (loss == "ppo") and lines[1]["policy/updates"] == 1
    assert abs(lines[1]["reward/mean"]) > 1e-3


@pytest.mark.parametrize("script", [ppo_baseline, lco])
def test_scores_of_whole_answers_are_none_of_tokens(script, reward_run, tiny_model):
    """With an ORM --advantage token would train the last token alone."""
    settings = TINY | dict(model=tiny_model, reward_model=str(reward_run("orm") / "model"))
    with pytest.raises(common.BadInput, match="scores whole answers, on their last token; expected another one"):
        script.prepare(script.Args(**settings, advantage="token"))
    script.prepare(script.Args(**settings, advantage="gae"))


@pytest.mark.parametrize("penalty", ["kl_coef", "missing_eos_penalty"])
def test_dense_advantages_do_not_see_constants(penalty, reward_run, tiny_model, reward_file):
    """LCO's target ignores what is the same for all tokens of a state: such a penalty would do nothing, unheard."""
    settings = TINY | dict(model=tiny_model, reward_file=reward_file, advantage="token") | {penalty: 0.5}
    with pytest.raises(common.BadInput, match="are the same for all tokens of a state, so a dense"):
        lco.prepare(lco.Args(**settings, reward_model=str(reward_run("qrm-lm") / "model")))
    lco.prepare(lco.Args(**settings, reward_model=str(reward_run("qrm") / "model")))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(objective="orm", head="lm"), ["--objective orm needs --head scalar"]),
        (dict(pairs_per_step=17), ["--pairs_per_step 17", "16 pairs to train on"]),
        (dict(test_pairs=21), ["--test_pairs 21", "21 pairs"]),
        (dict(max_prompt=2), ["no pair is left"]),
        (dict(pairs="nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    ],
    ids=str,
)
def test_wrong_value(changes, parts, base, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(common.BadInput) as error:
        run_here(qrm, **base | changes, out=str(tmp_path / "run"))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), error.value

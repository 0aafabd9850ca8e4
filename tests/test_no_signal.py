"""Where no completion is better than another, the policy stays as it is, to the last bit; rounding is no signal."""

import shutil

import common
import lco
import lm
import ppo_baseline
import pytest
from conftest import REWARD, TINY, read_metrics, run_here
from safetensors.torch import load_file

import torch

CONSTANT = "def reward(prompts, completions, rows):\n    return [{} for _ in completions]\n"
# Constant in the first two steps, which are counted on disk.
LATE = (
    REWARD.replace("reward(", "varied(")
    + """
from pathlib import Path

def reward(prompts, completions, rows):
    calls = Path(__file__).with_name("calls")
    calls.open("a").write("x")
    return varied(prompts, completions, rows) if len(calls.read_text()) > 2 else [0.1 for _ in completions]
"""
)
KINDS = ("gae", "reward", "group")
JOBS = [(ppo_baseline, dict(loss=x, advantage=a)) for x in ("ppo", "reinforce") for a in KINDS]
JOBS += [(lco, dict(loss=x, advantage=a)) for x in ("kld", "mse", "lch") for a in KINDS]
JOBS += [(ppo_baseline, dict(loss="reinforce", advantage="return"))]
JOBS += [(lco, dict(loss="kld", advantage="gae", kl_coef=0.1)), (lco, dict(loss="mse", advantage="group", lora_rank=4))]
JOBS += [(ppo_baseline, dict(loss="ppo", advantage="reward", kl_coef=0.1))]
BOTH = pytest.mark.parametrize("script", [ppo_baseline, lco], ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    """Six samples of a prompt: in fp32 the mean of six times 0.1 is not 0.1."""
    return TINY | dict(model=tiny_model, prompts_per_step=2, samples_per_prompt=6, micro_batch=6, eval_every=50)


def settings_of(script, base, tmp_path, reward: str) -> dict:
    (tmp_path / "reward.py").write_text(reward)
    settings = base | dict(reward_file=str(tmp_path / "reward.py"), out=str(tmp_path / "run"))
    return settings


def same_weights(a, b) -> bool:
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (a, b))
    return all(torch.equal(before[k], after[k]) for k in after)


@pytest.mark.parametrize("value", [1.0, 0.1])
@pytest.mark.parametrize("script, changes", JOBS, ids=lambda x: "-".join(map(str, getattr(x, "values", tuple)())))
def test_constant_reward(script, changes, value, base, tmp_path, capsys):
    """Not one weight of the policy moves, and the screen says so; a critic learns its values."""
    run = run_here(script, **settings_of(script, base, tmp_path, CONSTANT.format(value)) | changes)
    assert same_weights(base["model"], run / "model")
    lines = read_metrics(run)[1:]
    assert all(line["policy/updates"] == 0 for line in lines)
    if changes["advantage"] == "gae":
        assert lines[-1]["loss/value"] < lines[0]["loss/value"] and lines[0]["grad_norm"] > 0
    else:
        assert all(line["grad_norm"] == 0 for line in lines)
    assert capsys.readouterr().out.count("no completion of this step is better than another") == len(lines)


@BOTH
def test_small_gradients(script, base, tmp_path):
    """A step is as long as the learning rate, for gradients a thousandth as large: those of a large model are small."""
    moved = []
    for scale in (1.0, 1e-3):
        folder = tmp_path / str(scale)
        folder.mkdir()
        scaled = f"[{scale} * x for x in varied(prompts, completions, rows)]"
        code = REWARD.replace("reward(", "varied(") + f"def reward(prompts, completions, rows):\n    return {scaled}\n"
        settings = settings_of(script, base, folder, code)
        run = run_here(script, **settings | dict(advantage="group", steps=1, minibatches=1))
        before, after = (load_file(f"{x}/model.safetensors") for x in (base["model"], run / "model"))
        moved.append(sum((after[k] - before[k]).abs().sum() for k in after))
    assert moved[1] > 0.8 * moved[0] > 0


@BOTH
def test_no_momentum(script, base, tmp_path):
    """Steps without a signal after one with: neither the policy nor Adam's state of it moves."""
    settings = settings_of(script, base, tmp_path, REWARD) | dict(advantage="gae")
    run = run_here(script, 1, **settings)
    shutil.copytree(run, tmp_path / "early")
    (tmp_path / "reward.py").write_text(CONSTANT.format(1.0))
    run_here(script, **settings, resume=True)
    assert [line["policy/updates"] for line in read_metrics(run)[1:]] == [1, 0, 0]
    states, weights = [], []
    for folder in (tmp_path / "early", run):
        models, optimizer = script.build(script.Args(**settings), torch.device("cpu"))
        common.load_checkpoint(common.latest_checkpoint(folder)[1], models, optimizer)
        states.append([optimizer.state[p] for name in ("policy", "critic") for p in models[name].parameters()])
        weights.append(list(models["policy"].parameters()))
    count = len(list(models["policy"].parameters()))
    equal = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(*states)]
    assert all(equal[:count]) and not any(equal[count:])
    start = lm.load_model(base["model"], device=torch.device("cpu")).parameters()
    assert all(map(torch.equal, *weights)) and not all(map(torch.equal, weights[0], start))


@pytest.mark.parametrize("changes", [dict(advantage="group"), dict(advantage="gae", critic_warmup=3)], ids=str)
@BOTH
def test_resume_before_the_first_signal(script, changes, base, tmp_path):
    """A checkpoint from before the policy's first update counts no update of Adam's."""
    runs = []
    for name, stops in (("whole", [None]), ("parts", [2, None])):
        (tmp_path / name).mkdir()
        settings = settings_of(script, base, tmp_path / name, LATE) | changes | dict(steps=4)
        for stop in stops:
            runs.append(run_here(script, stop, **settings, resume=stop != stops[0]))
    whole, _, parts = runs
    assert [line["policy/updates"] for line in read_metrics(whole)[1:]] == [0, 0, "critic_warmup" not in changes, 1]
    assert read_metrics(whole) == read_metrics(parts) and same_weights(whole / "model", parts / "model")


@BOTH
def test_minibatch(script, base, tmp_path):
    """A minibatch whose advantages are all 0 makes no update; one of them is enough for one."""
    args = script.Args(**settings_of(script, base, tmp_path, REWARD) | dict(advantage="group"))
    models, optimizer = script.build(args, torch.device("cpu"))
    batch = common.make_batch([[3, 4]] * 4, [[5, 6, 7], [5, 6], [8], [9, 5]], 0, torch.device("cpu"))
    heads = [x for x in [script.evaluate_models(models, batch, args)] if x is not None]
    batch["advantages"] = torch.zeros(4, 3)
    batch["advantages"][3, 1] = 0.5
    batch["beta"] = torch.ones(4, 3)
    before = [p.clone() for p in models["policy"].parameters()]
    for rows, updates in (([0, 1], 0), ([2, 3], 1)):
        sums, tokens = script.update(models, *heads, optimizer, batch, rows, args)
        assert sums["policy/updates"] == updates * tokens
        assert updates != all(torch.equal(a, b) for a, b in zip(before, models["policy"].parameters()))


def advantages_of(script, kind, rewards, lengths, **more):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = {"mask": mask, "rewards": rewards * mask, "values": torch.linspace(0, 1, mask.numel()).view_as(rewards)}
    script.estimate_advantages(batch, script.Args(advantage=kind, samples_per_prompt=len(lengths), **more))
    return batch["advantages"]


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_no_signal(script, kind):
    """Ten times 0.1 and once 1.0 are the same return, whatever the critic says; a thousandth more is another one."""
    rewards = torch.zeros(3, 10)
    rewards[0] = 0.1
    rewards[1, 2] = rewards[2, 0] = 1.0
    assert (advantages_of(script, kind, rewards, [10, 3, 1]) == 0).all()
    rewards[2, 0] = 1.001
    assert (advantages_of(script, kind, rewards, [10, 3, 1])[:, 0] != 0).all()


@BOTH
def test_rounding_of_scores_is_no_signal(script):
    """Equal answers in other micro-batches have scores that differ in the last digits; whitened ones are about 1."""
    rewards = torch.zeros(4, 3)
    rewards[:, 2] = torch.tensor([1e-4, 1e-4 + 2e-6, 1e-4, 1e-4 - 2e-6])
    given = advantages_of(script, "group", rewards, [3] * 4, reward_model="any")
    assert (given == 0).all()
    rewards[0, 2] = 1e-3
    assert (advantages_of(script, "group", rewards, [3] * 4, reward_model="any")[0] > 0).all()


@BOTH
def test_discounted(script):
    """With a discount the same reward is worth more the sooner it comes: that is a signal, to `gae`."""
    rewards = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    assert (advantages_of(script, "gae", rewards, [3, 1], gamma=0.9)[:, 0] != 0).all()
    assert (advantages_of(script, "gae", rewards, [3, 1]) == 0).all()

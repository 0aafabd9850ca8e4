"""Rewards of a reward file token by token: used where they are with --advantage token and gae, and else summed, aloud."""

import common
import lco
import ppo_baseline
import pytest
from conftest import TINY, read_metrics, run_here

import torch

BOTH = pytest.mark.parametrize("script", [ppo_baseline, lco], ids=lambda script: script.__name__)
LISTS = """
def reward(prompts, completions, rows):
    return [{} for ids in (row["completion_ids"] for row in rows)]
"""
FIRST, LAST = "[float(ids[0])] + [0.0] * (len(ids) - 1)", "[0.0] * (len(ids) - 1) + [float(ids[0])]"


def settings_of(script, tiny_model, tmp_path, reward: str, **changes) -> dict:
    (tmp_path / "reward.py").write_text(LISTS.format(reward))
    settings = TINY | dict(model=tiny_model, reward_file=str(tmp_path / "reward.py"), out=str(tmp_path / "run"))
    return settings | changes


def advantages_of(script, kind, credit, **more):
    """Of two completions, of 3 and 2 tokens, whose rewards are those of `credit`."""
    args = script.Args(advantage=kind, samples_per_prompt=2, reward_file="any", **more)
    batch = {"mask": torch.tensor([[True, True, True], [True, True, False]])}
    batch |= {"old_logprobs": torch.full((2, 3), -1.0), "ref_logprobs": torch.full((2, 3), -1.5)}
    batch["values"] = torch.zeros(2, 3)
    batch["rewards"] = script.token_rewards(credit, batch, [True, False], args)
    script.estimate_advantages(batch, args)
    return batch["advantages"]


@BOTH
def test_positions(script):
    """Credit on the first token and on the last: other advantages with `token` and `gae`, the same where it is summed."""
    first, last = [[1.0, 0.0, 0.0], [3.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 3.0]]
    for kind in ("token", "gae", "group", "reward"):
        same = torch.equal(*(advantages_of(script, kind, credit) for credit in (first, last)))
        assert same == (kind in ("group", "reward")), kind


@BOTH
def test_advantage_token(script):
    """The rewards of all tokens at mean 0 and variance 1, less the penalties, each where it is; nothing is summed."""
    given = [[1.0, 0.0, 0.5], [3.0, -2.0]]
    flat = torch.tensor(sum(given, []))
    expected = (flat - flat.mean()) / flat.std(correction=0)
    found = advantages_of(script, "token", given)
    torch.testing.assert_close(found, torch.tensor([[*expected[:3]], [*expected[3:], 0.0]]))
    less = advantages_of(script, "token", given, kl_coef=0.2, missing_eos_penalty=1.0)
    torch.testing.assert_close(less - found, torch.tensor([[-0.1, -0.1, -0.1], [-0.1, -1.1, 0.0]]))


@BOTH
@pytest.mark.parametrize("kind", ["group", "reward", "gae", "return"])
@pytest.mark.parametrize("how", ["mean", "sum", "last"])
def test_answers_are_ranked_by_the_score_of_the_model(script, kind, how, monkeypatch):
    """By the mean over tokens of a Q-RM, the sum of log-ratios, the last token of an ORM: whatever their lengths."""
    scores = {
        "mean": [[0.5, 0.5, 0, 0], [0.4] * 4],
        "sum": [[-0.5, -0.5, 0, 0], [-0.3] * 4],
        "last": [[1, 2, 0, 0], [3, 3, 3, 1]],
    }
    monkeypatch.setattr(script.lm, "score_of", lambda model, ref: how)
    args = script.Args(advantage=kind, samples_per_prompt=2, reward_model="any")
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    batch = {"mask": mask, "scores": torch.tensor(scores[how], dtype=torch.float32), "values": torch.zeros(2, 4)}
    batch["rewards"] = script.token_rewards([0.0, 0.0], batch, [True, True], args)
    script.estimate_advantages(batch, args)
    assert (batch["advantages"][0][mask[0]] > 0).all() and (batch["advantages"][1] < 0).all()


@BOTH
def test_no_discounted_future(script):
    """--gamma 0: the return of a first token is 0 whatever follows, and yet there is something to learn."""
    found = advantages_of(script, "gae", [[0.0, 0.0, 1.0], [0.0, 0.0]], gamma=0.0)
    assert found[0, 2] > 0 > found[1, 1]
    assert not advantages_of(script, "gae", [[0.0, 0.0, 1.0], [0.0, 1.0]], gamma=0.0).any(), "equal sums are no signal"


@BOTH
@pytest.mark.parametrize("kind", ["token", "gae", "group", "reward"])
def test_summed_aloud(script, kind, tiny_model, tmp_path, capsys):
    """One sentence, at the first step of a run, where positions are lost; a run with `token` learns from them."""
    run = run_here(script, **settings_of(script, tiny_model, tmp_path, LAST, advantage=kind))
    assert all(line["policy/updates"] == 1 for line in read_metrics(run)[1:])
    said = capsys.readouterr().out.count("token rewards are summed over each completion")
    assert said == (kind in ("group", "reward"))


@BOTH
def test_first_and_last_train_differently(script, tiny_model, tmp_path):
    runs = {}
    for name, credit in (("first", FIRST), ("last", LAST)):
        (tmp_path / name).mkdir()
        settings = settings_of(script, tiny_model, tmp_path / name, credit, advantage="token", steps=1)
        runs[name] = read_metrics(run_here(script, **settings))[1]
    assert runs["first"]["reward/mean"] == runs["last"]["reward/mean"]
    assert runs["first"]["grad_norm"] != runs["last"]["grad_norm"]


@BOTH
def test_equal_rewards_are_no_signal(script, tiny_model, tmp_path):
    """The same reward for every token: --advantage token leaves the policy alone."""
    settings = settings_of(script, tiny_model, tmp_path, "[0.1] * len(ids)", advantage="token")
    assert all(line["policy/updates"] == 0 for line in read_metrics(run_here(script, **settings))[1:])


@BOTH
def test_token_needs_lists(script, tiny_model, tmp_path):
    settings = settings_of(script, tiny_model, tmp_path, "1.0", advantage="token")
    with pytest.raises(common.BadInput, match="gave a number, expected one for each token"):
        run_here(script, **settings)

"""The mathematics of the PPO trunk against closed forms and enumeration.

What lco.py has under the same name is held to the same numbers.
"""

import pytest
import torch

import lco
import ppo_baseline

BOTH = pytest.mark.parametrize("script", [ppo_baseline, lco], ids=["ppo_baseline", "lco"])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_to_mask(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ---- the policy loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, loss, flat",
    [
        (2.0, 0.5, -1.0, False),  # below the range, and wanted more: pull up
        (2.0, 1.1, -2.2, False),
        (2.0, 1.5, -2.4, True),  # already far enough
        (-2.0, 0.5, 1.6, True),  # already far enough
        (-2.0, 0.9, 1.8, False),
        (-2.0, 1.5, 3.0, False),  # above the range, and wanted less: push down
        (0.0, 1.5, 0.0, True),
    ],
)
def test_clip_table(advantage, ratio, loss, flat):
    """PPO-1 for each sign of A x ratio below, inside, above: value, and gradient -A r or exactly zero."""
    old = torch.tensor([-1.3], dtype=torch.float64)
    new = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    value, metrics = ppo_baseline.policy_loss(new, old, torch.tensor([advantage]).double(), "ppo", 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert new.grad.item() == pytest.approx(0.0 if flat else -advantage * ratio, abs=1e-12)
    assert (new.grad.item() == 0) == flat
    assert metrics["policy/clip_fraction"].item() == (abs(ratio - 1) > 0.2)
    assert metrics["policy/ratio_gap"].item() == pytest.approx(abs(ratio - 1))
    assert metrics["loss/policy"].item() == pytest.approx(loss, abs=1e-12)


def test_policy_loss_is_a_sum_over_tokens():
    """The caller divides, once: N equal tokens give N times the loss of one."""
    one = torch.tensor([-1.0]), torch.tensor([-1.1]), torch.tensor([0.7])
    for loss in ("ppo", "reinforce"):
        single = ppo_baseline.policy_loss(*one, loss, 0.2)[0]
        many = ppo_baseline.policy_loss(*(x.repeat(5) for x in one), loss, 0.2)[0]
        assert many.item() == pytest.approx(5 * single.item())


def test_reinforce_gradient():
    """--loss reinforce: the gradient in the logits is -A (one-hot - pi), whatever the rollout policy was."""
    logits, advantages = random(4, 6).requires_grad_(), random(4, seed=1)
    ids = torch.tensor([0, 5, 2, 2])
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, None])[:, 0]
    loss, _ = ppo_baseline.policy_loss(chosen, chosen.detach() - 3, advantages, "reinforce", 0.2)
    loss.backward()
    one_hot = torch.nn.functional.one_hot(ids, 6)
    torch.testing.assert_close(logits.grad, -advantages[:, None] * (one_hot - logprobs.detach().exp()))


def test_kl_old_is_unbiased():
    """policy/kl_old, in expectation over a ~ pi_old, is KL(pi_old || pi)."""
    old, new = random(6).log_softmax(-1), random(6, seed=1).log_softmax(-1)
    metrics = [ppo_baseline.policy_loss(new[[a]], old[[a]], torch.zeros(1), "ppo", 0.2)[1] for a in range(6)]
    mean = sum(p * m["policy/kl_old"] for p, m in zip(old.exp(), metrics))
    torch.testing.assert_close(mean, (old.exp() * (old - new)).sum())


# ---- the critic ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "value, target, clip, loss, gradient",
    [
        (0.1, 1.0, 0.2, 0.405, -0.9),  # inside the range
        (0.5, 1.0, 0.2, 0.32, 0.0),  # moved far enough towards the return: flat
        (0.5, -1.0, 0.2, 1.125, 1.5),  # moved the wrong way: not flat
        (-0.5, -1.0, 0.2, 0.32, 0.0),
        (0.5, 1.0, 0.0, 0.125, -0.5),  # 0: no clip
    ],
)
def test_value_clip(script, value, target, clip, loss, gradient):
    """Half the larger squared error of clipped and free value; the rollout's value is 0."""
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    total, metrics = script.value_loss(v, torch.zeros(1).double(), torch.tensor([target]).double(), clip)
    total.backward()
    assert total.item() == pytest.approx(loss) == metrics["loss/value"].item()
    assert v.grad.item() == pytest.approx(gradient, abs=1e-12)


# ---- advantages ------------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 3]


def deltas(rewards, values, length, gamma):
    return [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0) - values[t] for t in range(length)]


@BOTH
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_is_its_definition(script, gamma, lam):
    """PPO-2, A_t = sum_l (gamma lam)^l delta_t+l, V after the last token 0; what lies in the padding does not count."""
    mask = lengths_to_mask(LENGTHS)
    rewards, values = random(3, 5), random(3, 5, seed=1)  # not zero in the padding
    advantages, returns = script.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(LENGTHS):
        delta = deltas(rewards[b], values[b], length, gamma)
        for t in range(length):
            expected = sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length))
            discounted = sum(gamma ** (u - t) * rewards[b, u] for u in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected.item())
            assert returns[b, t].item() == pytest.approx((expected + values[b, t]).item())
            if lam == 1:
                assert advantages[b, t].item() == pytest.approx((discounted - values[b, t]).item())
            if lam == 0:
                assert advantages[b, t].item() == pytest.approx(delta[t].item())
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@BOTH
def test_whiten(script):
    """Mean 0 and variance 1 over the mask, 0 outside; invariant to scale, shift and to what lies in the padding."""
    mask = lengths_to_mask([7, 2, 4])
    x = 5 + 3 * random(3, 7)
    out = script.whiten(x, mask)
    assert out[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert out[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(script.whiten(x.masked_fill(~mask, 1e6) * 2 - 1, mask), out, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[mask], (x[mask] - x[mask].mean()) / x[mask].std(correction=0), atol=1e-6, rtol=1e-6)
    assert script.whiten(torch.full((3, 7), 4.0), mask).abs().max() == 0  # no spread: no signal, and no nan


def scored_batch():
    mask = lengths_to_mask([3, 1, 4, 2])
    batch = {"mask": mask, "values": random(4, 4, seed=2) * mask, "rewards": torch.zeros(4, 4).double()}
    for b, reward in enumerate([1.0, 0.0, 3.0, -1.0]):
        batch["rewards"][b, mask[b].sum() - 1] = reward
    batch["rewards"][2, 0] = 0.5
    return batch


@BOTH
def test_advantage_reward(script):
    """`reward`: each token carries the return of its completion, whitened over tokens."""
    batch = scored_batch()
    script.estimate_advantages(batch, script.Args(advantage="reward"))
    tokens = torch.tensor([1.0] * 3 + [0.0] + [3.5] * 4 + [-1.0] * 2).double()
    expected = (tokens - tokens.mean()) / tokens.std(correction=0)
    torch.testing.assert_close(batch["advantages"][batch["mask"]], expected, atol=1e-6, rtol=1e-6)
    assert (batch["advantages"][~batch["mask"]] == 0).all()


@BOTH
def test_advantage_group(script):
    """`group`: return minus the mean over the samples of the same prompt, itself included, not divided by anything."""
    batch = scored_batch()
    script.estimate_advantages(batch, script.Args(advantage="group", samples_per_prompt=2))
    expected = torch.tensor([0.5, -0.5, 2.25, -2.25]).double()[:, None] * batch["mask"]
    torch.testing.assert_close(batch["advantages"], expected)


@BOTH
def test_advantage_gae(script):
    """`gae`: whitened GAE; the critic's targets are the advantages before whitening, plus the values."""
    batch = scored_batch()
    args = script.Args(advantage="gae", gamma=0.9, lam=0.8)
    script.estimate_advantages(batch, args)
    raw, returns = script.gae(batch["rewards"], batch["values"], batch["mask"], 0.9, 0.8)
    torch.testing.assert_close(batch["returns"], returns)
    torch.testing.assert_close(batch["advantages"], script.whiten(raw, batch["mask"]))
    assert (batch["advantages"] - raw).abs().max() > 0.1


# ---- rewards ---------------------------------------------------------------------------------------------------------


@BOTH
def test_reward_on_the_last_token(script):
    """The task's reward once, on the last token, less the penalty where no EOS came; a list is one reward a token."""
    batch = {"mask": lengths_to_mask([3, 1, 4, 2])}
    args = script.Args(missing_eos_penalty=0.25)
    scores = [1.0, 2.0, [0.1, 0.2, 0.3, 0.4], [7.0, 8.0]]
    rewards = script.token_rewards(scores, batch, [True, False, True, False], args)
    expected = [[0, 0, 1, 0], [1.75, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], [7, 7.75, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))


@BOTH
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty(script, estimator):
    """A token that pi makes likelier than ref costs kl_coef x the estimate; the padding costs nothing."""
    batch = {"mask": lengths_to_mask([3, 2])}
    batch |= {"old_logprobs": random(2, 3) - 2, "ref_logprobs": random(2, 3, seed=1) - 2}
    batch["old_logprobs"][0, 0], batch["ref_logprobs"][0, 0] = -1.0, -2.0
    args = script.Args(kl_coef=0.3, kl_estimator=estimator)
    rewards = script.token_rewards([1.0, 1.0], batch, [True, True], args)
    log_ratio = batch["old_logprobs"] - batch["ref_logprobs"]
    kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]
    expected = torch.tensor([[0.0, 0, 1], [0, 1, 0]]).double() - 0.3 * kl * batch["mask"]
    torch.testing.assert_close(rewards.double(), expected)
    assert rewards[0, 0].item() == pytest.approx({"k1": -0.3, "k2": -0.15, "k3": -0.3 * 0.36788}[estimator], abs=1e-5)


# ---- KL estimators ---------------------------------------------------------------------------------------------------


def expectations(script, p, q):
    return {k: (p.exp() * script.kl_estimate(p, q, k)).sum().item() for k in ("k1", "k2", "k3")}


@BOTH
def test_kl_estimators_by_enumeration(script):
    """E_pi[k1] = E_pi[k3] = KL(pi || ref); E_pi[k2] is not, but is to second order; k2 and k3 are never negative."""
    p, q, direction = random(5).log_softmax(-1), random(5, seed=1).log_softmax(-1), random(5, seed=2)
    exact = (p.exp() * (p - q)).sum().item()
    mean = expectations(script, p, q)
    assert mean["k1"] == pytest.approx(exact) and mean["k3"] == pytest.approx(exact)
    assert abs(mean["k2"] - exact) > 0.05 * exact
    assert (script.kl_estimate(p, q, "k2") >= 0).all() and (script.kl_estimate(p, q, "k3") >= 0).all()
    assert (script.kl_estimate(p, q, "k1") < 0).any()

    def error(step):
        near = (p + step * direction).log_softmax(-1)
        return abs(expectations(script, p, near)["k2"] - (p.exp() * (p - near)).sum().item())

    assert error(0.02) / error(0.01) == pytest.approx(8, rel=0.1)  # third order


@BOTH
def test_gradient_of_kl_estimators(script):
    """The reason why the penalty is in the reward: back-propagated, k1 pulls nowhere on average (k2 does it right)."""
    logits, ref = random(5).requires_grad_(), random(5, seed=1).log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    logp = logits.log_softmax(-1)
    exact = gradient((logp.exp() * (logp - ref)).sum())
    logp = logits.log_softmax(-1)
    weight = logp.detach().exp()  # how often each token is sampled
    k1 = gradient((weight * script.kl_estimate(logp, ref, "k1")).sum())
    logp = logits.log_softmax(-1)
    k2 = gradient((weight * script.kl_estimate(logp, ref, "k2")).sum())
    assert exact.norm() > 0.1 and k1.norm() < 1e-12
    torch.testing.assert_close(k2, exact)

"""LCO on an exact token MDP: every prefix of a tiny language is a state, and everything is known by enumeration.

The problem is max E[sum r] - tau KL(pi || pi_ref). Its solution comes from the soft Bellman equations; LCO has to find
it by its own losses, in steps of max E_pi[A_k] - beta KL(pi || pi_k), A_k the regularised advantages of pi_k.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

import lco


def Args(loss="kld", beta=1.0, target="exp"):
    return SimpleNamespace(loss=loss, beta=beta, target=target)


V, HORIZON, TAU = 4, 3, 0.5
PREFIXES = [p for length in range(HORIZON) for p in itertools.product(range(V), repeat=length)]
NUMBER = {prefix: i for i, prefix in enumerate(PREFIXES)}  # 1 + 4 + 16 states
CHILD = torch.tensor([[NUMBER.get((*p, a), len(PREFIXES)) for a in range(V)] for p in PREFIXES])  # the last: the end
STATES = torch.arange(len(PREFIXES))


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARDS, REFERENCE = 1.5 * random(len(PREFIXES), V, seed=0), random(len(PREFIXES), V, seed=1).log_softmax(-1)


def backwards(value_of):
    """Q [S, V] and V [S + 1] from the last states to the first; value_of(Q of some states, those states) -> V."""
    q, v = torch.zeros(len(PREFIXES), V).double(), torch.zeros(len(PREFIXES) + 1).double()
    for s in reversed(range(len(PREFIXES))):
        q[s] = REWARDS[s] + v[CHILD[s]]
        v[s] = value_of(q[s], s)
    return q, v


def optimum():
    """log pi* [S, V] and V*: V* = tau log sum pi_ref exp(Q* / tau), pi* ~ pi_ref exp(Q* / tau)."""
    q, v = backwards(lambda q, s: TAU * (REFERENCE[s] + q / TAU).logsumexp(-1))
    return (REFERENCE + q / TAU).log_softmax(-1), v


def evaluate(logp):
    """Advantages [S, V] and values of a policy under the rewards r - tau log(pi / pi_ref)."""
    cost = TAU * (logp - REFERENCE)
    q, v = backwards(lambda q, s: (logp[s].exp() * (q - cost[s])).sum())
    return q - cost - v[STATES, None], v


def visits(logp):
    """The probability of each prefix."""
    d = torch.zeros(len(PREFIXES) + 1, dtype=torch.float64)
    d[0] = 1
    for s in range(len(PREFIXES)):
        d[CHILD[s]] += d[s] * logp[s].exp()
    return d[:-1]


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def lco_step(old, advantages, args):
    """The policy [S, V] that minimises the script's own loss in each state, found by search over tabular logits."""
    z = old.clone().requires_grad_()
    search = torch.optim.LBFGS([z], max_iter=60, tolerance_grad=1e-7, history_size=30, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        if args.loss == "kld":
            target = lco.target_logprobs(old, advantages, args.beta, args.target)
            loss = lco.kld_loss(z.log_softmax(-1), target).sum()
        else:
            loss = (old.softmax(-1) * lco.LOSSES[args.loss](z - (old + advantages / args.beta))).sum()
        loss.backward()
        return loss

    search.step(closure)
    return z.detach().log_softmax(-1)


def test_soft_bellman_is_the_optimum():
    """The reference solution itself: no policy has a greater value, and its own advantages are 0."""
    best, v = optimum()
    advantages, value = evaluate(best)
    torch.testing.assert_close(value, v)
    assert advantages.abs().max() < 1e-12
    for i in range(50):
        other = (best + 0.1 * random(*best.shape, seed=10 + i)).log_softmax(-1)
        assert evaluate(other)[1][0] < v[0]


def test_advantages_average_zero():
    """E_pi[A] = 0 in each state, and the value is the enumerated expectation over all sequences."""
    logp = random(*REWARDS.shape, seed=2).log_softmax(-1)
    advantages, v = evaluate(logp)
    assert (logp.exp() * advantages).sum(-1).abs().max() < 1e-12
    total = 0
    for sequence in itertools.product(range(V), repeat=HORIZON):
        steps = [(NUMBER[sequence[:t]], sequence[t]) for t in range(HORIZON)]
        p = torch.stack([logp[i] for i in steps]).sum().exp()
        total += p * sum(REWARDS[i] - TAU * (logp[i] - REFERENCE[i]) for i in steps)
    torch.testing.assert_close(v[0], total)


@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_lco_converges_to_the_optimum(loss):
    """Repeated LCO steps, each fitted by the script's loss, reach pi*; return less tau KL never falls on the way."""
    args = Args(loss=loss, beta=1.25 * TAU)
    best, v = optimum()
    logp, values = random(*REWARDS.shape, seed=3).log_softmax(-1), []
    assert kl(logp, best).max() > 0.5
    for _ in range(10):
        advantages, value = evaluate(logp)
        values.append(value[0].item())
        logp = lco_step(logp, advantages, args)
    assert kl(logp, best).max() < 1e-4 and kl(best, logp).max() < 1e-4
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert v[0] - values[0] > 0.1 and abs(v[0] - values[-1]) < 1e-4


def test_beta_of_tau_is_soft_policy_iteration():
    """With beta = tau the rollout policy cancels: pi* is there after as many steps as the horizon, not one earlier."""
    best, _ = optimum()
    logp = random(*REWARDS.shape, seed=4).log_softmax(-1)
    for step in range(HORIZON):
        assert kl(best, logp).max() > 1e-2, step
        logp = lco_step(logp, evaluate(logp)[0], Args(beta=TAU))
    assert kl(best, logp).max() < 1e-4


def expected_gradient(logp, args):
    """The gradient at pi_old of the loss of sampled sequences, in expectation; a state knows A of its sampled token."""
    z = logp.clone().requires_grad_()
    advantages, d = evaluate(logp)[0], visits(logp)
    loss = 0
    for a in range(V):
        ids, chosen = torch.full_like(STATES, a), advantages[:, a]
        if args.loss == "kld":
            A = torch.zeros_like(logp).scatter(-1, ids[:, None], chosen[:, None])
            losses = lco.kld_loss(z.log_softmax(-1), lco.target_logprobs(logp, A, args.beta, args.target))
        else:
            losses = lco.LOSSES[args.loss](z[:, a] - (logp[:, a] + chosen / args.beta))
        loss = loss + (d * logp[:, a].exp() * losses).sum()
    return torch.autograd.grad(loss, z)[0]


def policy_gradient(logp):
    """The exact gradient of return less tau KL in the tabular logits (the policy gradient theorem)."""
    return visits(logp)[:, None] * logp.exp() * evaluate(logp)[0]


def test_policy_gradient_theorem():
    """What the tests below compare with, against finite differences of the exact value."""
    logits, direction = random(*REWARDS.shape, seed=5), random(*REWARDS.shape, seed=6)

    def value(step):
        return evaluate((logits + step * direction).log_softmax(-1))[1][0]

    slope = (policy_gradient(logits.log_softmax(-1)) * direction).sum()
    torch.testing.assert_close((value(1e-5) - value(-1e-5)) / 2e-5, slope, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        Args(loss="kld", target="linear", beta=16.0),
        Args(loss="mse", beta=1.0),
        Args(loss="lch", beta=1.0),
    ],
    ids=lambda a: f"{a.loss}-{a.target}",
)
def test_sampled_advantages_ascend(args):
    """One expected step with one-hot advantages of sampled tokens goes up: return less tau KL grows."""
    for seed in range(7, 17):
        logp = random(*REWARDS.shape, seed=seed).log_softmax(-1)
        step = -expected_gradient(logp, args)
        assert (step * policy_gradient(logp)).sum() > 1e-4 * step.norm()
        after = (logp + 1e-2 * step / step.norm()).log_softmax(-1)
        assert evaluate(after)[1][0] > evaluate(logp)[1][0]


def test_sampled_mse_is_the_policy_gradient():
    """At pi_old the expected gradient of LCO-MSE is 2 / beta times the policy gradient, exactly."""
    logp = random(*REWARDS.shape, seed=20).log_softmax(-1)
    step = -expected_gradient(logp, Args(loss="mse", beta=0.5))
    torch.testing.assert_close(step, 2 / 0.5 * policy_gradient(logp))


def test_sampled_linear_kld_in_closed_form():
    """At pi_old a sampled token moves the linear target by pi_old(a) A(a) (e_a - pi_old) / beta.

    So the policy gradient's terms carry one more factor pi_old(a): rare tokens learn more slowly (Cauchy-Schwarz keeps
    it an ascent direction).
    """
    logp = random(*REWARDS.shape, seed=21).log_softmax(-1)
    p, advantages, d = logp.exp(), evaluate(logp)[0], visits(logp)
    step = -expected_gradient(logp, Args(target="linear", beta=16.0))
    weight = p.square() * advantages
    torch.testing.assert_close(step, d[:, None] * (weight - p * weight.sum(-1, keepdim=True)) / 16)

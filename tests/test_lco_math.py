"""The mathematics of LCO against enumeration over a tiny vocabulary."""

import math

import pytest
import torch
from torch.autograd.functional import hessian

import lco
import ppo_baseline

V = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(a, value=1.0):
    return value * torch.nn.functional.one_hot(torch.as_tensor(a), V).double()


def kl(p, q):
    """KL of log-probabilities, a state."""
    return (p.exp() * (p - q)).sum(-1)


def dense(z, old, A, loss="kld", beta=1.0, target="exp", scale=1.0):
    """The losses [N] with A(s,.) known for the whole vocabulary, and their metrics."""
    beta = lco.scaled_beta(A, beta, scale)
    goal = lco.target_logprobs(old, A, beta, target)
    metrics = lco.step_sizes(z.log_softmax(-1), old.log_softmax(-1), goal)
    if loss == "kld":
        return lco.kld_loss(z.log_softmax(-1), goal), metrics
    return (old.softmax(-1) * lco.LOSSES[loss](z - (old + A / beta))).sum(-1), metrics


def sampled(logits, old_logits, ids, advantages, loss, beta=1.0, scale=1.0):
    """LCO-4 and LCO-5 of the tokens `ids` as a function of all logits."""
    z, old = (x.gather(-1, ids[:, None])[:, 0] for x in (logits, old_logits))
    return lco.LOSSES[loss](z - (old + advantages / lco.scaled_beta(advantages, beta, scale)))


# ---- LCO-1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
def test_target_is_the_optimum(beta):
    """LCO-1: no policy has more E_pi[A] - beta KL(pi || pi_old), whose maximum is beta log Z."""
    old, advantages = random(V), random(V, seed=1)

    def value(logp):
        return (logp.exp() * advantages).sum(-1) - beta * kl(logp, old.log_softmax(-1))

    target = lco.target_logprobs(old, advantages, beta, "exp")
    weight = old.softmax(-1) * (advantages / beta).exp()
    torch.testing.assert_close(target.exp(), weight / weight.sum())
    torch.testing.assert_close(value(target), beta * weight.sum().log())
    others = torch.cat([2 * random(1000, V, seed=2), target + 1e-2 * random(1000, V, seed=3)]).log_softmax(-1)
    assert (value(others) < value(target)).all()

    z = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([z], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step():
        search.zero_grad()
        loss = -value(z.log_softmax(-1))
        loss.backward()
        return loss

    search.step(step)
    torch.testing.assert_close(z.detach().softmax(-1), target.exp(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["exp", "linear"])
def test_target_ignores_constants(target):
    """A + c and z_old + c ask for the same policy: only differences within a state count."""
    old, advantages = random(3, V), random(3, V, seed=1)
    shifted = lco.target_logprobs(old + 7, advantages - 3, 2.0, target)
    torch.testing.assert_close(shifted, lco.target_logprobs(old, advantages, 2.0, target))


def test_linear_target():
    """pi_old (1 + (A - E[A]) / beta), a distribution by itself where nothing is clipped; tangent to LCO-1."""
    old, advantages = random(3, V), random(3, V, seed=1)
    p = old.softmax(-1)
    centred = advantages - (p * advantages).sum(-1, keepdim=True)
    linear = lco.target_logprobs(old, advantages, 4.0, "linear").exp()
    torch.testing.assert_close(linear, p * (1 + centred / 4))

    def gap(beta):
        first_order = lco.target_logprobs(old, advantages, beta, "linear").exp()
        return (first_order - (old + advantages / beta).softmax(-1)).norm()

    assert (gap(100) / gap(200)).item() == pytest.approx(4, rel=0.05)  # second order in A / beta
    clipped = lco.target_logprobs(old, advantages, 0.1, "linear").exp()
    weight = (p * (1 + centred / 0.1)).clamp_min(0)
    assert (clipped == 0).any()
    torch.testing.assert_close(clipped, weight / weight.sum(-1, keepdim=True))
    assert torch.isfinite(lco.kld_loss(random(3, V, seed=2).log_softmax(-1), clipped.log())).all()


# ---- LCO-3 to LCO-5 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["exp", "linear"])
def test_kld_value_and_gradient(target):
    """LCO-3: the loss is KL(pi* || pi), and its gradient in the logits pi - pi*."""
    z, old, advantages = random(4, V).requires_grad_(), random(4, V, seed=1), random(4, V, seed=2)
    losses, _ = dense(z, old, advantages, target=target, beta=4.0)
    goal = lco.target_logprobs(old, advantages, 4.0, target)
    torch.testing.assert_close(losses, kl(goal, z.log_softmax(-1)))
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    torch.testing.assert_close(gradient, z.detach().softmax(-1) - goal.exp())


@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_zero_at_the_target(loss):
    """At z* = z_old + A / beta loss and gradient are 0."""
    old, advantages, ids = random(4, V), random(4, V, seed=1), torch.tensor([0, 3, 1, 1])
    z = (old + advantages / 0.5).requires_grad_()
    losses = [dense(z, old, advantages, loss, beta=0.5)[0]]
    if loss != "kld":
        losses.append(sampled(z, old, ids, advantages.gather(-1, ids[:, None])[:, 0], loss, beta=0.5))
    for each in losses:
        (gradient,) = torch.autograd.grad(each.sum(), z)
        assert each.abs().amax() < 1e-12 and gradient.abs().amax() < 1e-12


@pytest.mark.parametrize("loss, slope", [("mse", lambda x: 2 * x), ("lch", torch.tanh)])
def test_sampled_gradient(loss, slope):
    """LCO-4, LCO-5: gradient 2 gap and tanh(gap) in the sampled logit, towards z*, and none in any other."""
    z, old, ids, a = random(3, V).requires_grad_(), random(3, V, seed=1), torch.tensor([4, 0, 2]), random(3, seed=2)
    (gradient,) = torch.autograd.grad(sampled(z, old, ids, a, loss, beta=2.0).sum(), z)
    gap = (z.detach() - old).gather(-1, ids[:, None])[:, 0] - a / 2
    torch.testing.assert_close(gradient, torch.zeros_like(old).scatter(-1, ids[:, None], slope(gap)[:, None]))


def test_log_cosh():
    """LCO-5 is log cosh, even, and |x| - log 2 where cosh itself overflows; also in fp32."""
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    torch.testing.assert_close(lco.log_cosh_loss(x), x.cosh().log(), atol=1e-12, rtol=1e-9)
    for far in (1e4, -1e4):
        y = torch.tensor(far, requires_grad=True)
        value = lco.log_cosh_loss(y)
        value.backward()
        assert value.item() == pytest.approx(1e4 - math.log(2)) and y.grad.item() == math.copysign(1, far)
    assert torch.tensor(1e4).cosh().log().isinf()


@pytest.mark.parametrize("loss", ["mse", "lch"])
def test_dense_is_the_expectation_of_sampled(loss):
    """With A known everywhere, the dense loss is E over a ~ pi_old of the loss of the sampled token."""
    z, old, advantages = random(4, V), random(4, V, seed=1), random(4, V, seed=2)
    whole, _ = dense(z, old, advantages, loss, beta=0.5)
    each = [sampled(z, old, torch.full((4,), a), advantages[:, a], loss, beta=0.5) for a in range(V)]
    torch.testing.assert_close(whole, (old.softmax(-1) * torch.stack(each, -1)).sum(-1))


@pytest.mark.parametrize("loss", ["kld", "lch"])
@pytest.mark.parametrize("rows", [V - 3, V, V + 3])
def test_embeddings_that_are_padded_differently(loss, rows, monkeypatch):
    """Judges with more or fewer rows than the policy: the same A of the tokens that all know, the lowest of others."""
    hidden, policy, judge, ids = random(4, 5), random(V, 5, seed=1), random(V + 3, 5, seed=2), torch.arange(4)
    monkeypatch.setattr(lco, "states", lambda *_: ((hidden, policy), (hidden, policy)))
    columns = {"advantages": random(4, seed=3), "beta": torch.ones(4), "scale": torch.ones(4), "completion_ids": ids}
    micro = {"mask": torch.ones(4, 1, dtype=torch.bool), "reward_hidden": hidden[:, None]}
    micro |= {name: x[:, None] for name, x in columns.items()}
    found, _ = lco.dense_objective(None, {"reward": judge[:rows]}, micro, lco.Args(loss=loss, beta=2.0))
    size = min(rows, V)
    Z = (hidden @ judge[:rows].T).log_softmax(-1)[:, :size]
    Z = torch.cat([Z, Z.amin(-1, keepdim=True).expand(-1, V - size)], -1)
    A, z = columns["advantages"][:, None] + Z - Z.gather(-1, ids[:, None]), hidden @ policy.T
    if loss == "kld":
        expected = lco.kld_loss(z.log_softmax(-1), lco.target_logprobs(z, A, torch.full((4, 1), 1.0), "exp")).sum()
    else:
        expected = (z.softmax(-1) * lco.log_cosh_loss(A)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- convexity -------------------------------------------------------------------------------------------------------


def least_eigenvalues(loss_of):
    """The smallest eigenvalue of the Hessian in the logits of one state, at 40 random points near and far."""
    points = [scale * random(V, seed=100 + i) for i in range(20) for scale in (0.5, 3.0)]
    hessians = [hessian(lambda z, i=i: loss_of(z, i), point) for i, point in enumerate(points)]
    return torch.linalg.eigvalsh(torch.stack(hessians))[:, 0]


@pytest.mark.parametrize("loss, target", [("kld", "exp"), ("kld", "linear"), ("mse", "exp"), ("lch", "exp")])
@pytest.mark.parametrize("everywhere", [True, False])
def test_lco_is_convex(loss, target, everywhere):
    """The Hessian of every LCO loss in the logits of a state has no negative eigenvalue."""

    def loss_of(z, i):
        old, advantages, ids = random(1, V, seed=i), 2 * random(1, V, seed=1000 + i), torch.tensor([i % V])
        a = advantages[:, i % V]
        if everywhere or loss == "kld":
            A = advantages if everywhere else one_hot(ids) * a[:, None]
            return dense(z[None], old, A, loss, target=target)[0].sum()
        return sampled(z[None], old, ids, a, loss).sum()

    assert least_eigenvalues(loss_of).min() > -1e-9


@pytest.mark.parametrize("loss", ["ppo", "reinforce"])
def test_ppo_is_not_convex(loss):
    """PPO-1 curves downwards in the logits at some points; REINFORCE does for every negative advantage."""

    def loss_of(z, i):
        old, a = random(V, seed=i).log_softmax(-1), random(1, seed=1000 + i)
        chosen = [i % V]
        return ppo_baseline.policy_loss(z.log_softmax(-1)[chosen], old[chosen], a, loss, 0.2)[0]

    eigenvalues = least_eigenvalues(loss_of)
    assert eigenvalues.min() < -0.05
    if loss == "reinforce":
        negative = torch.tensor([random(1, seed=1000 + i).item() < 0 for i in range(40)])
        assert (eigenvalues[negative] < -1e-6).all() and (eigenvalues[~negative] > -1e-9).all()


# ---- one noisy advantage per state --------------------------------------------------------------------------------


def chosen_target(p, advantage, target="exp", beta=1.0, scale=1.0):
    """What becomes of a token of probability p when it is sampled with this advantage."""
    old = torch.tensor([[p, *[(1 - p) / (V - 1)] * (V - 1)]], dtype=torch.float64).log()
    A = one_hot([0], advantage)
    return lco.target_logprobs(old, A, lco.scaled_beta(A, beta, scale), target)[0, 0].exp().item()


def test_exp_target_is_biased():
    """At p = 0.99 and A = +-1 the targets are .9963 and .9733, mean .985: entropy grows; smaller beta is worse."""
    up, down = chosen_target(0.99, 1.0), chosen_target(0.99, -1.0)
    assert (round(up, 4), round(down, 4), round((up + down) / 2, 3)) == (0.9963, 0.9733, 0.985)
    bias = [0.99 - (chosen_target(0.99, 1.0, beta=b) + chosen_target(0.99, -1.0, beta=b)) / 2 for b in (0.3, 1.0, 3.0)]
    assert bias[0] > bias[1] > bias[2] > 0


@pytest.mark.parametrize("p", [0.2, 0.5, 0.99])
def test_linear_target_is_unbiased(p):
    """Where nothing is clipped, the mean of the targets over A = +-1 is pi_old: noise in A asks for nothing."""
    up, down = (chosen_target(p, a, "linear", beta=2.0) for a in (1.0, -1.0))
    assert (up + down) / 2 == pytest.approx(p, abs=1e-12)
    assert up == pytest.approx(p + p * (1 - p) / 2)


# ---- switches --------------------------------------------------------------------------------------------------------


def test_negative_beta_scale():
    """beta is multiplied where A < 0, and only there: 100 leaves 1 % of the step away from a bad token."""
    advantages = torch.tensor([-2.0, -1e-9, 0.0, 2.0])
    assert lco.scaled_beta(advantages, 0.5, 100.0).tolist() == [50.0, 50.0, 0.5, 0.5]
    assert chosen_target(0.5, -1.0, scale=100.0) == pytest.approx(1 / (1 + math.exp(0.01)))
    assert chosen_target(0.5, 1.0, scale=100.0) == pytest.approx(1 / (1 + math.exp(-1)))


def test_negative_beta_scale_of_the_linear_target():
    """The same for --target linear: the step away from a bad token is 1 % of what it was."""
    step = 0.5 - chosen_target(0.5, -1.0, "linear", beta=2.0)
    assert 0.5 - chosen_target(0.5, -1.0, "linear", beta=2.0, scale=100.0) == pytest.approx(step / 100)


# ---- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_metrics_by_enumeration(loss):
    """lco/target_kl = KL(pi_old || pi*), policy/kl_old = KL(pi_old || pi), entropy and ratio gap, enumerated."""
    z, old, advantages = random(4, V), random(4, V, seed=1), random(4, V, seed=2)
    losses, metrics = dense(z, old, advantages, loss, beta=2.0)
    p, q, goal = z.softmax(-1), old.softmax(-1), (old + advantages / 2).softmax(-1)
    assert losses.shape == (4,)
    torch.testing.assert_close(metrics["lco/target_kl"], (q * (q / goal).log()).sum())
    torch.testing.assert_close(metrics["policy/kl_old"], (q * (q / p).log()).sum())
    torch.testing.assert_close(metrics["policy/entropy"], -(p * p.log()).sum())
    torch.testing.assert_close(metrics["policy/ratio_gap"], (q * (p / q - 1).abs()).sum())


def test_metrics_of_a_target_with_zeros():
    """A clipped linear target gives finite numbers to log, and a finite gradient."""
    z, old, advantages = random(4, V).requires_grad_(), random(4, V, seed=1), 5 * random(4, V, seed=2)
    losses, metrics = dense(z, old, advantages, target="linear", beta=0.5)
    losses.sum().backward()
    assert (lco.target_logprobs(old, advantages, 0.5, "linear") == -torch.inf).any()
    assert all(m.isfinite().all() for m in metrics.values()) and z.grad.isfinite().all()

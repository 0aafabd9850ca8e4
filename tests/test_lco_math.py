"""The mathematics of LCO against enumeration over a tiny vocabulary."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.functional import hessian

import lco
import ppo_baseline

Args = functools.partial(lco.Args, loss="kld", negative_beta_scale=1.0)  # the equations

V = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(a, value=1.0):
    return value * torch.nn.functional.one_hot(torch.as_tensor(a), V).double()


def kl(p, q):
    """KL of log-probabilities, a state."""
    return (p.exp() * (p - q)).sum(-1)


def sampled(logits, old_logits, ids, advantages, args):
    """sampled_loss of the tokens `ids` as a function of all logits."""
    z, old = (x.gather(-1, ids[:, None])[:, 0] for x in (logits, old_logits))
    return lco.sampled_loss(z, old, advantages, args)[0]


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
    losses, _ = lco.vocabulary_loss(z, old, advantages, Args(loss="kld", target=target, beta=4.0))
    goal = lco.target_logprobs(old, advantages, 4.0, target)
    torch.testing.assert_close(losses, kl(goal, z.log_softmax(-1)))
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    torch.testing.assert_close(gradient, z.detach().softmax(-1) - goal.exp())


@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
@pytest.mark.parametrize("moving", [False, True])
def test_zero_at_the_target(loss, moving):
    """At z* = z_old + A / beta loss and gradient are 0; with the authors' moving target neither is, anywhere."""
    args = Args(loss=loss, beta=0.5, moving_target=moving)
    old, advantages, ids = random(4, V), random(4, V, seed=1), torch.tensor([0, 3, 1, 1])
    z = (old + advantages / 0.5).requires_grad_()
    dense = lco.vocabulary_loss(z, old, advantages, args)[0]
    (gradient,) = torch.autograd.grad(dense.sum(), z)
    assert (dense.abs().amax() < 1e-12) == (gradient.abs().amax() < 1e-12) == (not moving)
    if moving:
        assert gradient.norm(dim=-1).min() > 0.01
    if loss == "kld":
        if moving:
            torch.testing.assert_close(gradient, z.detach().softmax(-1) - (z.detach() + advantages / 0.5).softmax(-1))
        return
    a = advantages.gather(-1, ids[:, None])[:, 0]
    one = sampled(z, old, ids, a, args)
    (gradient,) = torch.autograd.grad(one.sum(), z)
    if moving:  # the gap is -A / beta at any z: never nearer to a target
        slope = {"mse": -2 * a / 0.5, "lch": (-a / 0.5).tanh()}[loss]
        torch.testing.assert_close(gradient.gather(-1, ids[:, None])[:, 0], slope)
    else:
        assert one.abs().amax() < 1e-12 and gradient.abs().amax() < 1e-12


@pytest.mark.parametrize("loss, slope", [("mse", lambda x: 2 * x), ("lch", torch.tanh)])
def test_sampled_gradient(loss, slope):
    """LCO-4, LCO-5: gradient 2 gap and tanh(gap) in the sampled logit, towards z*, and none in any other."""
    args = Args(loss=loss, beta=2.0)
    z, old, ids, a = random(3, V).requires_grad_(), random(3, V, seed=1), torch.tensor([4, 0, 2]), random(3, seed=2)
    (gradient,) = torch.autograd.grad(sampled(z, old, ids, a, args).sum(), z)
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
    z, old, advantages, args = random(4, V), random(4, V, seed=1), random(4, V, seed=2), Args(loss=loss, beta=0.5)
    dense, _ = lco.vocabulary_loss(z, old, advantages, args)
    each = [sampled(z, old, torch.full((4,), a), advantages[:, a], args) for a in range(V)]
    torch.testing.assert_close(dense, (old.softmax(-1) * torch.stack(each, -1)).sum(-1))


# ---- convexity -------------------------------------------------------------------------------------------------------


def least_eigenvalues(loss_of):
    """The smallest eigenvalue of the Hessian in the logits of one state, at 40 random points near and far."""
    points = [scale * random(V, seed=100 + i) for i in range(20) for scale in (0.5, 3.0)]
    hessians = [hessian(lambda z, i=i: loss_of(z, i), point) for i, point in enumerate(points)]
    return torch.linalg.eigvalsh(torch.stack(hessians))[:, 0]


@pytest.mark.parametrize(
    "args",
    [
        Args(loss="kld"),
        Args(loss="kld", target="linear"),
        Args(loss="kld", fill="balanced"),
        Args(loss="mse"),
        Args(loss="lch"),
    ],
    ids=lambda a: f"{a.loss}-{a.target}-{a.fill}",
)
@pytest.mark.parametrize("dense", [True, False])
def test_lco_is_convex(args, dense):
    """The Hessian of every LCO loss in the logits of a state has no negative eigenvalue."""

    def loss_of(z, i):
        old, advantages, ids = random(1, V, seed=i), 2 * random(1, V, seed=1000 + i), torch.tensor([i % V])
        a = advantages[:, i % V]
        if dense:
            return lco.vocabulary_loss(z[None], old, advantages, args)[0].sum()
        if args.loss == "kld":
            return lco.vocabulary_loss(z[None], old, lco.fill_advantages(a, ids, old, args.fill), args)[0].sum()
        return sampled(z[None], old, ids, a, args).sum()

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


# ---- one noisy advantage a state ----------------------------------------------------------------------------------


def chosen_target(p, advantage, target="exp", fill="zero", beta=1.0, scale=1.0):
    """What becomes of a token of probability p when it is sampled with this advantage."""
    old = torch.tensor([[p, *[(1 - p) / (V - 1)] * (V - 1)]], dtype=torch.float64).log()
    args = Args(beta=beta, negative_beta_scale=scale)
    dense = lco.fill_advantages(torch.tensor([advantage]).double(), torch.tensor([0]), old, fill)
    return lco.target_logprobs(old, dense, lco.scaled_beta(dense, args), target)[0, 0].exp().item()


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


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("advantage", [1.0, -0.7])
def test_balanced_fill(p, advantage):
    """`balanced` sets E_pi_old[A] = 0 with one value on all other tokens, -p A / (1 - p).

    The two fills do not ask for the same policy: balanced(A) is zero(A / (1 - p)), the more so the likelier the token.
    """
    old = torch.tensor([[p, *[(1 - p) / (V - 1)] * (V - 1)]], dtype=torch.float64).log()
    a, ids = torch.tensor([advantage]).double(), torch.tensor([0])
    zero, balanced = (lco.fill_advantages(a, ids, old, fill) for fill in ("zero", "balanced"))
    torch.testing.assert_close(zero, one_hot([0], advantage))
    torch.testing.assert_close(balanced, torch.tensor([[advantage, *[-p * advantage / (1 - p)] * (V - 1)]]).double())
    assert (old.exp() * balanced).sum().item() == pytest.approx(0, abs=1e-12)

    def goal(dense):
        return lco.target_logprobs(old, dense, 1.0, "exp")

    torch.testing.assert_close(goal(balanced), goal(one_hot([0], advantage / (1 - p))))
    assert kl(goal(balanced), goal(zero)).item() > 1e-4


def test_balanced_fill_at_certainty():
    """Where a good token has all the probability already there is nothing to ask for: finite, and no loss."""
    old = torch.tensor([[200.0, 0, 0, 0, 0]])
    dense = lco.fill_advantages(torch.tensor([1.0]), torch.tensor([0]), old, "balanced")
    losses, metrics = lco.vocabulary_loss(old.clone(), old, dense, Args())
    assert dense.isfinite().all() and losses.item() == pytest.approx(0, abs=1e-6)
    assert all(m.isfinite().all() for m in metrics.values())


def test_fill_keeps_each_row_to_itself():
    """The sampled entry of each state, and no other, carries its advantage."""
    ids, a = torch.tensor([2, 0, 2]), torch.tensor([1.0, -2.0, 3.0]).double()
    dense = lco.fill_advantages(a, ids, random(3, V), "zero")
    torch.testing.assert_close(dense, one_hot(ids) * a[:, None])


def test_negative_beta_scale():
    """beta is multiplied where A < 0, and only there: 100 leaves 1 % of the step away from a bad token."""
    advantages = torch.tensor([-2.0, -1e-9, 0.0, 2.0])
    args = Args(beta=0.5, negative_beta_scale=100.0)
    assert lco.scaled_beta(advantages, args).tolist() == [50.0, 50.0, 0.5, 0.5]
    z, old = torch.zeros(4), torch.ones(4)
    gap = lco.sampled_loss(z, old, advantages, replace(args, loss="mse"))[1]["lco/gap"]
    torch.testing.assert_close(gap, torch.tensor([1 - 2 / 50, 1.0, 1.0, 1 + 4.0]))
    assert chosen_target(0.5, -1.0, scale=100.0) == pytest.approx(1 / (1 + math.exp(0.01)))
    assert chosen_target(0.5, 1.0, scale=100.0) == pytest.approx(1 / (1 + math.exp(-1)))


def test_negative_beta_scale_of_the_linear_target():
    """The same for --target linear: the step away from a bad token is 1 % of what it was."""
    step = 0.5 - chosen_target(0.5, -1.0, "linear", beta=2.0)
    assert 0.5 - chosen_target(0.5, -1.0, "linear", beta=2.0, scale=100.0) == pytest.approx(step / 100)


def test_old_topk():
    """The authors' code: the top k old logits through fp16, the rest -100, so practically probability 0."""
    z, old, advantages = random(3, V).float(), random(3, V, seed=1).float(), random(3, V, seed=2).float()
    losses, metrics = lco.vocabulary_loss(z, old, advantages, Args(old_topk=2))
    kept = old >= old.topk(2).values[:, -1:]
    cut = old.half().float().masked_fill(~kept, -100.0)
    expected, exact = (lco.vocabulary_loss(z, o, advantages, Args())[0] for o in (cut, old))
    torch.testing.assert_close(losses, expected)
    assert ((losses - exact).abs() > 0.05).all()
    # what is logged of the policy is exact all the same
    torch.testing.assert_close(metrics["policy/kl_old"], kl(old.log_softmax(-1), z.log_softmax(-1)))


def test_signed_token_mean():
    """--token_mean signed: the mean over tokens with A > 0 plus the mean over the others, once divided by N."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    batch = {"mask": mask, "rewards": torch.tensor([[1.0], [0], [0], [1]]) * (mask.cumsum(1) == 1)}
    lco.estimate_advantages(batch, Args(token_mean="signed", samples_per_prompt=2))
    per_token, weight, up = random(4, 4), batch["token_weight"], mask & (batch["advantages"] > 0)
    assert up.sum() == 7 and mask.sum() == 10
    expected = per_token[up].mean() + per_token[mask & ~up].mean()
    torch.testing.assert_close((per_token * weight).sum() / mask.sum(), expected)
    assert (weight[~mask] == 0).all()
    lco.estimate_advantages(batch, Args(samples_per_prompt=2))
    assert torch.equal(batch["token_weight"], mask.float())


def test_signed_token_mean_of_one_sign():
    """With no token on one side its mean is 0, not a division by 0."""
    batch = {"mask": torch.ones(2, 3, dtype=torch.bool), "rewards": torch.zeros(2, 3)}
    lco.estimate_advantages(batch, Args(token_mean="signed", samples_per_prompt=2))
    assert torch.equal(batch["token_weight"], torch.ones(2, 3))


# ---- what is logged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kld", "mse", "lch"])
def test_metrics_by_enumeration(loss):
    """lco/target_kl = KL(pi_old || pi*), policy/kl_old = KL(pi_old || pi), entropy and ratio gap, enumerated."""
    z, old, advantages = random(4, V), random(4, V, seed=1), random(4, V, seed=2)
    losses, metrics = lco.vocabulary_loss(z, old, advantages, Args(loss=loss, beta=2.0))
    p, q, goal = z.softmax(-1), old.softmax(-1), (old + advantages / 2).softmax(-1)
    assert losses.shape == (4,)
    torch.testing.assert_close(metrics["lco/target_kl"], (q * (q / goal).log()).sum(-1))
    torch.testing.assert_close(metrics["policy/kl_old"], (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(metrics["policy/entropy"], -(p * p.log()).sum(-1))
    torch.testing.assert_close(metrics["policy/ratio_gap"], (q * (p / q - 1).abs()).sum(-1))


def test_metrics_of_a_target_with_zeros():
    """A clipped linear target gives finite numbers to log, and a finite gradient."""
    z, old, advantages = random(4, V).requires_grad_(), random(4, V, seed=1), 5 * random(4, V, seed=2)
    args = Args(target="linear", beta=0.5)
    losses, metrics = lco.vocabulary_loss(z, old, advantages, args)
    losses.sum().backward()
    assert (lco.target_logprobs(old, advantages, 0.5, "linear") == -torch.inf).any()
    assert all(m.isfinite().all() for m in metrics.values()) and z.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chosen_logits(temperature):
    """The logits of the sampled tokens without a vocabulary: a column each of hidden @ W.T / temperature."""
    hidden, weight, ids = random(6, 3), random(V, 3, seed=1), torch.tensor([0, 4, 2, 2, 1, 3])
    chosen = lco.chosen_logits(hidden, weight, ids, Args(temperature=temperature))
    whole = (hidden @ weight.T / temperature)[torch.arange(6), ids]
    torch.testing.assert_close(chosen, whole.float())

"""Solutions of docs/ppo_baseline.md: python docs/solutions/solve_ppo_baseline.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import ppo_baseline  # noqa: E402


def exercise_1() -> None:
    """1. There is none where the clipped loss is the larger one: A > 0 beyond 1 + eps, A < 0 below 1 - eps."""
    for A in (0.5, -0.5):
        for ratio in (0.7, 1.0, 1.3):
            logprob = torch.tensor(ratio).log().requires_grad_()
            loss, _ = ppo_baseline.policy_loss(logprob, torch.tensor(0.0), torch.tensor(A), "ppo", 0.2)
            (gradient,) = torch.autograd.grad(loss, logprob)
            print(f"   A {A:+}, r {ratio}: gradient {gradient:+.2f}")
            assert (gradient == 0) == ((A > 0 and ratio == 1.3) or (A < 0 and ratio == 0.7))


def exercise_2() -> None:
    """2. The samples are fixed when the gradient is taken, so that of k1 is E[grad log pi] = grad sum pi = 0. That of
    k2 is E[log(pi/ref) grad log pi], which is the gradient of the KL."""
    z = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    ref = torch.tensor([0.0, 0.5, 0.1]).log_softmax(-1)
    found = {}
    for name in ("k1", "k2"):
        each = ppo_baseline.kl_estimate(z.log_softmax(-1), ref, name)  # of each token that may be sampled
        (found[name],) = torch.autograd.grad((z.softmax(-1).detach() * each).sum(), z)
    logp = z.log_softmax(-1)
    (true,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), z)
    print(f"   k1 {found['k1'].tolist()}\n   k2 {found['k2'].tolist()}\n   KL {true.tolist()}")
    assert found["k1"].abs().max() < 1e-6 and torch.allclose(found["k2"], true, atol=1e-6)


def exercise_3() -> None:
    """3. With gamma = lambda = 1 the values of the recursion telescope: sum of r - V(s_t). With lambda = 0 nothing is
    left of the recursion but delta_t."""
    rewards, values = torch.tensor([[0.1, 0.0, 1.0]]), torch.tensor([[0.4, 0.5, 0.8]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    whole, _ = ppo_baseline.gae(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    one, _ = ppo_baseline.gae(rewards, values, mask, 1.0, 0.0)
    delta = rewards + torch.tensor([[0.5, 0.8, 0.0]]) - values
    print(f"   lambda 1: {whole.tolist()}, lambda 0: {one.tolist()}")
    assert torch.allclose(whole, to_go - values) and torch.allclose(one, delta)


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

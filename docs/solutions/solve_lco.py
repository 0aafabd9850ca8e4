"""Solutions of docs/lco.md: python docs/solutions/solve_lco.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import lco  # noqa: E402


def exercise_1() -> None:
    """1. Insert pi* into the objective: log(pi*/pi_old) = A/beta - log Z, so E[A] - beta E[A/beta - log Z] = beta log
    Z. Any other policy loses beta KL(pi || pi*), because the objective is beta log Z - beta KL(pi || pi*)."""
    generator, beta = torch.Generator().manual_seed(0), 0.7
    old = torch.randn(6, generator=generator).log_softmax(-1)
    A = torch.randn(6, generator=generator)

    def value(logp):
        return (logp.exp() * (A - beta * (logp - old))).sum(-1)

    best = value(lco.target_logprobs(old, A, beta, "exp"))
    log_z = (old.exp() * (A / beta).exp()).sum().log()
    others = value(torch.randn(1000, 6, generator=generator).log_softmax(-1))
    print(f"   value at pi* {best:.4f}, beta log Z {beta * log_z:.4f}, best of 1000 policies {others.max():.4f}")
    assert torch.isclose(best, beta * log_z) and (others < best).all()


def exercise_2() -> None:
    """2. The target is not linear in A, so the mean of the two is not p. The bias falls as 1/beta^2; the linear target
    has none, as long as nothing is clipped at 0."""
    old = torch.tensor([0.99, 0.01]).log()
    means = {}
    for target, beta in (("exp", 1.0), ("exp", 10.0), ("linear", 1.0)):
        both = [lco.target_logprobs(old, torch.tensor([A, 0.0]), beta, target).exp()[0].item() for A in (1.0, -1.0)]
        means[target, beta] = sum(both) / 2
        print(f"   {target}, beta {beta:4}: targets {both[0]:.4f} and {both[1]:.4f}, mean {means[target, beta]:.4f}")
    assert abs(means["exp", 1.0] - 0.985) < 5e-4 and abs(means["exp", 10.0] - 0.99) < 1e-4
    assert abs(means["linear", 1.0] - 0.99) < 1e-6


def exercise_3() -> None:
    """3. The fixed target is reached: z moves by A / beta, and 0.38 becomes 0.50. With the moving target the gap is
    always -A / beta and so is the gradient, which never gets smaller: the token becomes certain."""
    old = torch.tensor([0.61, 0.38, 0.01]).log()
    ends = {}
    for moving in (False, True):
        z = old.clone().requires_grad_()
        for _ in range(200):
            gap = lco.target_gap(z[1], z[1].detach() if moving else old[1], torch.tensor(0.5), 1.0)
            (gradient,) = torch.autograd.grad(lco.square_loss(gap), z)
            z = (z - 0.1 * gradient).detach().requires_grad_()
        ends[moving] = z.softmax(-1)[1].item()
    print(f"   fixed target {ends[False]:.4f}, moving target {ends[True]:.4f}")
    assert abs(ends[False] - 0.5026) < 1e-3 and ends[True] > 0.9999


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

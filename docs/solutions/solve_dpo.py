"""Solutions of docs/dpo.md: python docs/solutions/solve_dpo.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import dpo  # noqa: E402


def exercise_1() -> None:
    """1. At the start pi = pi_ref, so that m = 0 for every pair: the loss is log 2, no margin is above 0, and the
    gradient is -beta sigma(0) = -.05 for the better answer, +.05 for the worse one."""
    better, worse = torch.tensor([-3.0, -70.0], requires_grad=True), torch.tensor([-9.0, -20.0], requires_grad=True)
    loss, metrics = dpo.dpo_loss(better, worse, better.detach(), worse.detach(), 0.1, 0.0)
    up, down = torch.autograd.grad(loss, (better, worse))
    print(f"   loss {loss / 2:.4f}, better {up.tolist()}, worse {down.tolist()}")
    assert torch.isclose(loss / 2, torch.tensor(2.0).log()) and metrics["dpo/accuracy"] == 0
    assert torch.allclose(up, torch.full((2,), -0.05)) and torch.allclose(down, -up)


def exercise_2() -> None:
    """2. The derivative is -(1 - s) sigma(-m) + s sigma(m); it is 0 where sigma(m) / sigma(-m) = e^m = (1 - s) / s, m
    = log 9."""
    m, zero = torch.tensor(0.0, requires_grad=True), torch.tensor(0.0)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(dpo.dpo_loss(m, zero, zero, zero, 1.0, 0.1)[0], m)
        m = (m - gradient).detach().requires_grad_()
    print(f"   margin {m.item():.4f}, log 9 = {torch.tensor(9.0).log():.4f}")
    assert torch.isclose(m, torch.tensor(9.0).log(), atol=1e-3)


def exercise_3() -> None:
    """3. The two answers share most of their features, so that pushing the margin up pulls both logits down, l more
    than w: the unseen answer o is the one that gains. The NLL of w pulls it up; from a coefficient of about .006
    on, w does not fall."""
    features, start = torch.tensor([[1.0, 0.5], [1.0, 0.9], [0.0, 0.0]]), torch.zeros(2)

    def after_a_step(nll: float):
        theta = start.clone().requires_grad_()
        logp, ref = (features @ theta).log_softmax(-1), (features @ start).log_softmax(-1)
        loss = dpo.dpo_loss(logp[:1], logp[1:2], ref[:1], ref[1:2], 0.1, 0.0)[0] - nll * logp[0]
        (gradient,) = torch.autograd.grad(loss, theta)
        return (features @ (theta - 0.5 * gradient)).softmax(-1).detach() - ref.exp()

    changes = after_a_step(0.0)
    least = next(n / 10_000 for n in range(10_000) if after_a_step(n / 10_000)[0] >= 0)
    print(f"   changes of w, l, o: {changes.tolist()}; an NLL of {least} holds w")
    assert changes[0] < 0 and changes[1] < changes[0] and changes[2] > 0 and 0 < least < 0.1


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

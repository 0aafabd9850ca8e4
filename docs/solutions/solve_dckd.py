"""Solutions of docs/dckd.md: python docs/solutions/solve_dckd.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import dckd  # noqa: E402


def forward_kl(z, teacher_z):
    zero = torch.zeros(len(z))
    return dckd.dckd_loss(z, teacher_z, zero.long(), zero, zero + 1, 0.0, 1.0)[0]


def exercise_1() -> None:
    """1. The Hessian is diag(pi) - pi pi^T, the covariance of a one-hot token under pi, which has no negative
    eigenvalue. It does not depend on the teacher, so that the loss is convex whatever the teacher is."""
    generator = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(1, 5, generator=generator, requires_grad=True), torch.randn(1, 5, generator=generator)
    (gradient,) = torch.autograd.grad(forward_kl(z, teacher), z)
    hessian = torch.autograd.functional.hessian(lambda x: forward_kl(x[None], teacher), z[0].detach())
    pi = z[0].softmax(-1).detach()
    print(f"   smallest eigenvalue of the Hessian {torch.linalg.eigvalsh(hessian)[0]:.1e}")
    assert torch.allclose(gradient[0], pi - teacher[0].softmax(-1), atol=1e-6)
    assert (
        torch.allclose(hessian, pi.diag() - pi[:, None] * pi, atol=1e-6) and torch.linalg.eigvalsh(hessian)[0] > -1e-6
    )


def exercise_2() -> None:
    """2. The sharp student is nearer by both, and by reverse KL its lead is much larger. Forward KL punishes a student
    that gives little to what the teacher does; reverse KL punishes one that does what the teacher rarely does."""
    teacher = torch.tensor([[0.07, 0.88, 0.05]]).log()
    found = {}
    for name, p in (("sharp", [0.01, 0.98, 0.01]), ("broad", [0.20, 0.60, 0.20])):
        student = torch.tensor([p]).log()
        found[name] = forward_kl(student, teacher).item(), forward_kl(teacher, student).item()
        print(f"   {name}: forward {found[name][0]:.4f}, reverse {found[name][1]:.4f}")
    assert found["sharp"][0] < found["broad"][0] and found["sharp"][1] < found["broad"][1]
    assert found["sharp"][1] < 0.6 * found["sharp"][0]  # leaving something out is cheap in reverse
    assert found["broad"][1] > found["broad"][0]  # and doing too much is dear


def exercise_3() -> None:
    """3. Shared log-probabilities are divided by the same sum, so that their differences stay."""
    logp = torch.tensor([[0.1, 1.2, -0.3, 0.5, 0.0]]).log_softmax(-1)
    shared, cut = dckd.within(logp, 3)
    print(f"   shared {shared.exp().tolist()}, cut {cut.tolist()}")
    assert torch.allclose(shared.diff(), logp[:, :3].diff()) and torch.allclose(shared.exp().sum(-1), torch.ones(1))
    assert torch.allclose(cut, logp[:, 3:].exp().sum(-1))


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

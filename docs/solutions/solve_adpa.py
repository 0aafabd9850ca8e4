"""Solutions of docs/adpa.md: python docs/solutions/solve_adpa.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import adpa  # noqa: E402

STUDENT, REF, TEACHER = (torch.tensor([p]).log() for p in ([0.56, 0.43, 0.01], [0.61, 0.38, 0.01], [0.07, 0.88, 0.05]))


def exercise_1() -> None:
    """1. E_pi[A + c] = E_pi[A] + c, so that A - E_pi[A] stays. With a top k the tokens outside keep A = 0, and c is
    added to some tokens only: their pull against the rest changes."""
    A, z = adpa.advantages(TEACHER, REF, 0), STUDENT.clone().requires_grad_()
    pi = STUDENT.exp()
    (gradient,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), A).sum(), z)
    (shifted,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), A + 3).sum(), z)
    print(f"   minus the gradient {(-gradient).tolist()}")
    assert torch.allclose(-gradient, pi * (A - (pi * A).sum()), atol=1e-6) and torch.allclose(
        gradient, shifted, atol=1e-5
    )
    kept, more = adpa.advantages(TEACHER, REF, 2), adpa.advantages(TEACHER + 3, REF, 2)  # + 3 in every known token
    (one,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), kept).sum(), z)
    (two,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), more).sum(), z)
    assert not torch.allclose(one, two, atol=1e-3)


def exercise_2() -> None:
    """2. ADPA-2 first goes to `2`, which the student knows well, and only much later to `3`, whose A is the largest.
    So few steps are a protection, and no guarantee. ADPA-3 ends at q = (.06, .90, .04) and stays there."""
    A, ends = adpa.advantages(TEACHER, REF, 0), {}
    for name in ("adpa", "kl"):
        z = STUDENT.clone()
        for step in range(20_000):
            if name == "adpa":  # the gradients by hand: see ADPA-2 and ADPA-3
                z = z + z.softmax(-1) * (A - (z.softmax(-1) * A).sum())
            else:
                z = z - (z.softmax(-1) - (STUDENT + A).softmax(-1))
            if step == 19:
                ends[name, 20] = z.softmax(-1)[0]
        ends[name] = z.softmax(-1)[0]
    for name, p in ends.items():
        print(f"   {name}: {[round(x, 4) for x in p.tolist()]}")
    assert ends["adpa", 20][1] > 0.9 and ends["adpa"][2] > 0.99
    assert torch.allclose(ends["kl"], torch.tensor([0.0579, 0.8971, 0.0450]), atol=1e-4)


def exercise_3() -> None:
    """3. pi_ref exp(lambda A) = pi_ref^(1 - lambda) pi_dpo^lambda. For lambda 2 it is pi_dpo^2 / pi_ref: what both
    find equally likely keeps its weight before Z, and loses to every token whose likelihood rose."""
    A = adpa.advantages(TEACHER, REF, 0)

    def reverse(other):
        return (STUDENT.exp() * (STUDENT - other)).sum(-1)

    assert torch.allclose(adpa.opd_loss(STUDENT, REF, A, 1.0), reverse(TEACHER), atol=1e-6)
    assert torch.allclose(adpa.opd_loss(STUDENT, REF, A, 0.0), reverse(REF), atol=1e-6)
    ref, teacher = (torch.tensor([p]).log() for p in ([0.5, 0.3, 0.2], [0.3, 0.5, 0.2]))
    target = (ref + 2 * adpa.advantages(teacher, ref, 0)).log_softmax(-1)
    print(f"   lambda 2 of (.5, .3, .2) and (.3, .5, .2): {target.exp().tolist()}")
    assert target[0, 2].exp() < 0.2 and target[0, 1].exp() > 0.5


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

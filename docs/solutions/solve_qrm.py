"""Solutions of docs/qrm.md: python docs/solutions/solve_qrm.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import qrm  # noqa: E402


def loss_of(chosen, rejected):
    return qrm.pair_loss(chosen, rejected, 0.2, 2.0)[0]


def exercise_1() -> None:
    """1. 2.1269, 0.6931, 0.1269, slope -0.1762. Half of the pull is left at beta delta = margin, delta = 10. Without
    the margin the loss would start at 0.6931 with the slope -0.1, and pairs would be settled ten units of delta
    earlier."""
    delta = torch.tensor([[0.0], [10.0], [20.0]], requires_grad=True)
    losses = torch.stack([loss_of(d, torch.zeros(1)) for d in delta])
    (slope,) = torch.autograd.grad(losses.sum(), delta)
    print(f"   losses {losses.tolist()}, slopes {slope[:, 0].tolist()}")
    assert torch.allclose(losses, torch.tensor([2.1269, 0.6931, 0.1269]), atol=1e-4) and abs(slope[0] + 0.1762) < 1e-4


def exercise_2() -> None:
    """2. The sum of phi(s') - phi(s) over an answer is phi(end) - phi(start) = 0: the mean of the scores stays. Two
    tokens a, b of one state lead to different states; phi is free there, so a phi that is high after b makes b the
    better one. QRM-3 has the last score alone, so it loses phi before the last token, unless that is 0."""
    Z, other = torch.tensor([[-0.2, -0.1, -0.3]]), torch.tensor([[-0.9, -0.1, -0.3]])  # the answers differ in a token
    after_good, after_bad = torch.tensor([0.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 0.0])  # phi of the states
    mask = torch.ones(1, 3, dtype=torch.bool)
    shaped = [Z + after_good.diff(), other + after_bad.diff()]
    before = loss_of(*(qrm.answer_score(x, mask, "qrm") for x in (Z, other)))
    after = loss_of(*(qrm.answer_score(x, mask, "qrm") for x in shaped))
    print(f"   loss {before:.4f} and {after:.4f}; first tokens {Z[0, 0]:.1f} > {other[0, 0]:.1f}, "
          f"then {shaped[0][0, 0]:.1f} < {shaped[1][0, 0]:.1f}")  # fmt: skip
    assert torch.isclose(before, after) and Z[0, 0] > other[0, 0] and shaped[0][0, 0] < shaped[1][0, 0]


def exercise_3() -> None:
    """3. exp Z is a softmax. The potential of exercise 2 adds phi(s') to each token, which the softmax would have to
    carry: after it the sum over tokens is 1 only if sum_a exp(Z + phi(s') - phi(s)) = 1, which fixes phi(s) by the
    phi(s') after it. After EOS phi is 0, so it is 0 one token earlier, and so on to the start: there is no other."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    Z = logits.log_softmax(-1)
    print(f"   sums {Z.exp().sum(-1).tolist()}")
    assert torch.allclose(Z.exp().sum(-1), torch.ones(4))
    assert torch.allclose((logits + torch.arange(4.0)[:, None]).log_softmax(-1), Z, atol=1e-6)


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

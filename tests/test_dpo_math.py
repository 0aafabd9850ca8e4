"""DPO and SFT: closed forms, the sides of a batch, what a step divides by."""

import math

import common
import lm
import dpo
import pytest
from conftest import FixedStates, random

import torch


def case(lengths, sides, vocabulary=50, width=6):
    """(models, batch): rows of `lengths`, the sides in turn; models give fixed states."""
    rows = [lengths[i : i + len(sides)] for i in range(0, len(lengths), len(sides))]
    ids = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(9)).tolist()
    rows = [
        {"prompt_ids": [1]} | {f"{s}_ids": ids[r * len(sides) + i][:n] for i, (s, n) in enumerate(zip(sides, row))}
        for r, row in enumerate(rows)
    ]
    batch = dpo.make_batch(rows, sides, 0, "cpu")
    B, T = batch["mask"].shape
    named = {
        name: FixedStates(random(B, T + 1, width, seed=seed), random(vocabulary, width, seed=seed + 1))
        for name, seed in (("policy", 3), ("ref", 5))
    }
    return torch.nn.ModuleDict(named), batch


def answer_logprob(model, batch, b, temperature) -> float:
    z = model.hidden[b].detach() @ model.weight.detach().T / temperature
    n = int(batch["mask"][b].sum())
    return sum(z[t].log_softmax(-1)[batch["completion_ids"][b, t]].item() for t in range(n))


def test_dpo_by_hand():
    """DPO-1 of two pairs from their log-ratios; the gradient pushes the pair apart; at the start it is log 2 a pair."""
    better, worse = torch.tensor([-3.0, -1.0], requires_grad=True), torch.tensor([-3.0, -2.0], requires_grad=True)
    ref_better, ref_worse = torch.tensor([-4.0, -1.0]), torch.tensor([-2.0, -1.0])
    loss, sums = dpo.dpo_loss(better, worse, ref_better, ref_worse, 0.5, 0.0)
    margins = [0.5 * (1.0 - -1.0), 0.5 * (0.0 - -1.0)]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins))
    assert sums["dpo/margin"].item() == pytest.approx(sum(margins)) and sums["dpo/accuracy"] == 2
    loss.backward()
    expected = torch.tensor([-0.5 / (1 + math.exp(m)) for m in margins])  # -beta sigmoid(-m)
    torch.testing.assert_close(better.grad, expected)
    torch.testing.assert_close(worse.grad, -expected)
    start, _ = dpo.dpo_loss(ref_better, ref_worse, ref_better, ref_worse, 0.5, 0.2)
    assert start.item() == pytest.approx(2 * math.log(2))


def test_label_smoothing():
    """The mean of the loss over pairs of which a share is turned round; its optimum is where sigmoid(m) = 1 - s."""
    better, worse, zero = random(5), random(5, seed=1), torch.zeros(5)
    right, _ = dpo.dpo_loss(better, worse, zero, zero, 0.7, 0.0)
    turned, _ = dpo.dpo_loss(worse, better, zero, zero, 0.7, 0.0)
    smooth, _ = dpo.dpo_loss(better, worse, zero, zero, 0.7, 0.1)
    torch.testing.assert_close(smooth, 0.9 * right + 0.1 * turned)
    margin = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    dpo.dpo_loss(margin, zero[:1], zero[:1], zero[:1], 1.0, 0.1)[0].backward()
    assert margin.grad.abs() < 1e-6


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_objective_from_the_equation(loss):
    """objective() is DPO-1 plus nll times the NLL of the better answers, from each token; or that NLL alone."""
    sides = ("chosen", "rejected") if loss == "dpo" else ("chosen",)
    models, batch = case([5, 2, 4, 3], sides)
    args = dpo.Args(loss=loss, beta=0.3, nll=0.5, temperature=0.7)
    counts = {"pairs": 7.0, "chosen": 11.0, "rejected": 13.0}  # of a step of which this is a part
    pi, ref = ([answer_logprob(models[m], batch, b, 0.7) for b in range(4)] for m in ("policy", "ref"))
    if loss == "dpo":
        margins = [0.3 * (pi[i] - ref[i] - pi[i + 1] + ref[i + 1]) for i in (0, 2)]
        expected = sum(math.log(1 + math.exp(-m)) for m in margins) / 7 - 0.5 * (pi[0] + pi[2]) / 11
    else:
        expected = -sum(pi) / 11
    value, metrics = dpo.objective(models, batch, counts, args)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss/nll"].item() == pytest.approx(-sum(pi[:: len(sides)]) / 11, rel=1e-5)
    value.backward()
    gradient = models["policy"].hidden.grad[:, : batch["mask"].shape[1]]
    assert (gradient[~batch["mask"]] == 0).all() and (gradient[batch["mask"]] != 0).any(-1).all()
    assert models["ref"].hidden.grad is None


def test_sides_of_a_batch():
    """Answers of a row stand together, and each side is marked; a step counts their tokens apart."""
    models, batch = case([5, 2, 4, 3], ("chosen", "rejected"))
    assert batch["chosen"].tolist() == [True, False, True, False] and (batch["rejected"] == ~batch["chosen"]).all()
    assert batch["mask"].sum(1).tolist() == [5, 2, 4, 3]
    optimizer = torch.optim.SGD(models["policy"].parameters(), lr=0.0)
    metrics = dpo.update(models, optimizer, batch, dpo.Args(micro_batch=4))
    assert metrics["length/chosen"] == 4.5 and metrics["length/rejected"] == 2.5
    assert metrics["loss/dpo"] == metrics["loss/total"] and metrics["grad_norm"] > 0


def test_pairs_stay_together():
    """micro_batches(together=2) sorts by length, or by prompt where two pairs share one; it never parts neighbours."""
    answers = [[2] * n for n in (9, 1, 2, 2, 5, 7, 3, 1)]
    for prompts, expected in ("abcdefgh", [[2, 3, 6, 7], [4, 5, 0, 1]]), ("aabbbbaa", [[0, 1, 6, 7], [2, 3, 4, 5]]):
        prompts = [[ord(letter)] * 5 for letter in prompts]
        batch = common.make_batch(prompts, answers, 0, "cpu") | {"row": torch.arange(8)}
        pieces = [micro["row"].tolist() for micro in lm.micro_batches(batch, list(range(8)), 4, together=2)]
        assert pieces == expected

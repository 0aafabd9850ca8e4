"""DCKD: closed forms, enumeration, chunks against dense, padded vocabularies, the order of rows."""

import math
from functools import partial

import lm
import dckd
import pytest
from conftest import FixedStates, random

import torch

H, V = 6, 2**16  # 1 MiB holds the logits of 4 tokens


def case(lengths, vocabulary=V, teacher_vocabulary=None):
    """(models, batch) for dckd.objective: rows of `lengths`, chosen and rejected in turn."""
    ids = torch.randint(vocabulary // 2, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(9))
    ids = [row[:n] for row, n in zip(ids.tolist(), lengths)]
    rows = [{"prompt_ids": [1], "chosen_ids": a, "rejected_ids": b} for a, b in zip(ids[0::2], ids[1::2])]
    batch = dckd.make_batch(rows, ("chosen", "rejected"), 0, "cpu")
    B, T = batch["mask"].shape
    policy = FixedStates(random(B, T + 1, H, seed=3), random(vocabulary, H, seed=4))
    teacher = FixedStates(random(B, T + 1, H + 2, seed=1), random(teacher_vocabulary or vocabulary, H + 2, seed=2))
    return torch.nn.ModuleDict({"policy": policy, "teacher": teacher.requires_grad_(False)}), batch


def counts_of(batch) -> dict[str, float]:
    return {side: batch["mask"][batch[side]].sum().item() for side in ("chosen", "rejected")}


def whole_step(models, batch, args):
    """The loss of a step that is this micro-batch alone, and its means."""
    return dckd.objective(models, batch, counts_of(batch), args)


def one(*logits, n=1.0):
    """dckd_loss() of tokens that are all in better answers, and all in worse ones: {name: sum / n}."""
    N = len(logits[0])
    weights = torch.full((2, N), 1 / n, dtype=logits[0].dtype)
    return dckd.dckd_loss(*logits, torch.zeros(N, dtype=torch.long), *weights, 1.0, 1.0)[1]


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_kl_by_enumeration():
    """sum_a q log(q/p), at least 0, 0 for equal distributions; its gradient in the logits is p - q."""
    z, teacher = random(7, 5).double().requires_grad_(), random(7, 5, seed=1).double()
    p, q = z.detach().softmax(-1), teacher.softmax(-1)
    expected = sum(q[i, a].item() * math.log(q[i, a] / p[i, a]) for i in range(7) for a in range(5))
    parts = one(z, teacher)
    assert parts["kl/rejected"].item() == pytest.approx(expected) and parts["kl/chosen"].item() > 0
    (gradient,) = torch.autograd.grad(parts["kl/rejected"], z)
    torch.testing.assert_close(gradient, p - q)
    assert abs(one(z, z)["kl/chosen"].item()) < 1e-12


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.3, 0.0), (0.0, 0.0)], ids=["dckd", "kd", "sft"])
def test_objective_from_the_equation(weights):
    """objective() is DCKD-1 token by token: NLL and KL on the better answers, KL alone on the worse ones."""
    args = dckd.Args(chosen_weight=weights[0], rejected_weight=weights[1], temperature=0.7)
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    terms = {"nll": [], "w": [], "l": []}
    for b, t in batch["mask"].nonzero().tolist():
        z, q = (models[m].hidden[b, t].detach() @ models[m].weight.detach().T / 0.7 for m in ("policy", "teacher"))
        q = q.softmax(-1)
        terms["w" if b % 2 == 0 else "l"].append((q * (q.log() - z.log_softmax(-1))).sum().item())
        if b % 2 == 0:
            terms["nll"].append(-z.log_softmax(-1)[batch["completion_ids"][b, t]].item())
    mean = {k: sum(x) / len(x) for k, x in terms.items()}
    loss, means = whole_step(models, batch, args)
    assert loss.item() == pytest.approx(mean["nll"] + weights[0] * mean["w"] + weights[1] * mean["l"], rel=1e-5)
    assert means["kl/chosen"].item() == pytest.approx(mean["w"], rel=1e-4)
    assert means["kl/rejected"].item() == pytest.approx(mean["l"], rel=1e-4)
    loss.backward()
    gradient, mask = models["policy"].hidden.grad[:, : batch["mask"].shape[1]], batch["mask"]
    assert (gradient[~mask] == 0).all() and (gradient[mask & batch["chosen"][:, None]] != 0).any(-1).all()
    worse = gradient[mask & batch["rejected"][:, None]]
    assert (worse != 0).any(-1).all() if weights[1] else (worse == 0).all()
    assert models["teacher"].hidden.grad is None


def test_objective_in_chunks(monkeypatch):
    """The same loss, metrics and gradients in pieces of 4 tokens as with all logits at once, fp32."""
    results = []
    for mib in (1, 64):
        with monkeypatch.context() as patch:
            patch.setattr(lm, "over_vocabulary", partial(lm.over_vocabulary, chunk_mib=mib))
            models, batch = case([5, 2, 4, 3])
            value, means = whole_step(models, batch, dckd.Args())
            value.backward()
        results.append((value.detach(), {k: x.detach() for k, x in means.items()}, models["policy"]))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-5, rtol=1e-5)
    for name in ("hidden", "weight"):
        pieces, whole = (getattr(r[2], name).grad for r in results)
        assert whole.norm() > 0 and (pieces - whole).norm() < 1e-5 * whole.norm()


def test_micro_batches_add_up():
    """The shares of the pairs of a step sum to the loss of the step, whose counts are those of all pairs."""
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    whole, means = whole_step(models, batch, dckd.Args())
    parts = []
    for rows in ([0, 1], [2, 3]):
        some = {n: FixedStates(m.hidden.detach()[rows], m.weight.detach()) for n, m in models.items()}
        micro = {k: v[rows] for k, v in batch.items()}
        parts.append(dckd.objective(torch.nn.ModuleDict(some), micro, counts_of(batch), dckd.Args()))
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
    for name, mean in means.items():
        assert sum(x[name].item() for _, x in parts) == pytest.approx(mean.item(), rel=1e-5, abs=1e-6)


def test_row_order_and_fully_masked_rows_change_nothing():
    """Rows in another order give the same sums; a row without a single unmasked token adds nothing."""
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    before, _ = whole_step(models, batch, dckd.Args())
    order = [3, 1, 2, 0]
    moved = {n: FixedStates(m.hidden.detach()[order], m.weight.detach()) for n, m in models.items()}
    after, _ = whole_step(torch.nn.ModuleDict(moved), {k: v[order] for k, v in batch.items()}, dckd.Args())
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    batch["mask"][3] = False
    masked, means = whole_step(models, batch, dckd.Args())
    masked.backward()
    assert math.isfinite(masked.item()) and (models["policy"].hidden.grad[3] == 0).all()
    assert means["kl/rejected"].item() > 0


@pytest.mark.parametrize("grown", ["policy", "teacher"])
def test_padded_vocabularies(grown):
    """Rows beyond the vocabulary that both models share change no KL, whatever they hold; what was cut is logged."""
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    _, before = whole_step(models, batch, dckd.Args())
    assert before["kl/outside"] == 0
    old = models[grown]
    junk = 2 * random(14, old.weight.shape[1], seed=8)
    models[grown] = FixedStates(old.hidden.detach(), torch.cat([old.weight.detach(), junk]))
    _, after = whole_step(models, batch, dckd.Args())
    for name in ("kl/chosen", "kl/rejected"):
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-4)
    assert 0.01 < after["kl/outside"].item() < 1
    assert (after["loss/nll"] > before["loss/nll"] + 1e-3) == (grown == "policy")  # NLL is over all of its own rows


def test_within():
    """Renormalised over the first entries; the mass of the rest beside it."""
    logp = random(4, 10).log_softmax(-1)
    inside, outside = dckd.within(logp, 7)
    torch.testing.assert_close(inside.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(outside, logp[:, 7:].exp().sum(-1))
    assert dckd.within(logp, 10)[0] is logp

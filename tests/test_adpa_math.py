"""ADPA: what follows from the advantage, gradients in closed form, on-policy distillation by enumeration, states."""

import itertools
import json
import math
import shutil

import adpa
import common
import lm
import pytest
from conftest import FixedStates, random, read_metrics, run_here

import torch

H, V = 6, 2**16  # 1 MiB holds the logits of 4 tokens
NAMES = ("policy", "ref", "teacher", "ref_teacher")


def teachers(n=8, v=30):
    """log pi_dpo, log pi_ref of n states, in double precision."""
    return (random(n, v, seed=s).double().log_softmax(-1) for s in (1, 2))


class Frozen(FixedStates):
    """A model that is evaluated on the student's answers alone: every second row."""

    def final_hidden(self, input_ids, attention_mask, position_ids):
        return self.hidden[1::2, : input_ids.shape[1]]


def case(lengths, vocabulary=V, widths=(H, H, H + 2, H + 4)):
    """(models, batch) for adpa.objective: rows of `lengths`, chosen answers and states in turn."""
    ids = torch.randint(vocabulary // 2, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(9))
    ids = [row[:n] for row, n in zip(ids.tolist(), lengths)]
    rows = [{"prompt_ids": [1], "chosen_ids": a, "states_ids": b} for a, b in zip(ids[0::2], ids[1::2])]
    batch = adpa.make_batch(rows, ("chosen", "states"), 0, "cpu")
    B, T = batch["mask"].shape
    models = {
        name: (Frozen if i else FixedStates)(random(B, T + 1, widths[i], seed=9 + i), random(vocabulary, widths[i], seed=20 + i))
        for i, name in enumerate(NAMES)
    }  # fmt: skip
    models = torch.nn.ModuleDict(models).requires_grad_(False)
    models["policy"].requires_grad_(True)
    return models, batch


def whole_step(models, batch, args):
    """The loss of a step that is this micro-batch alone, and its means."""
    counts = {side: batch["mask"][batch[side]].sum().item() for side in ("chosen", "states")}
    return adpa.objective(models, batch, counts, args)


# ---- the advantage ---------------------------------------------------------------------------------------------------


def test_what_follows_from_the_advantage():
    """E_ref[exp A] = 1, E_dpo[A] = KL(dpo || ref) >= 0, E_ref[A] <= 0; two equal teachers: A = 0."""
    dpo, ref = teachers()
    A = adpa.advantages(dpo, ref, 0)
    torch.testing.assert_close((ref.exp() * A.exp()).sum(-1), torch.ones(8, dtype=torch.double))
    kl = (dpo.exp() * (dpo - ref)).sum(-1)
    torch.testing.assert_close((dpo.exp() * A).sum(-1), kl)
    assert (kl > 0).all() and ((ref.exp() * A).sum(-1) < 0).all()
    assert (adpa.advantages(dpo, dpo, 0) == 0).all()


def test_top_k_of_all_is_the_whole():
    dpo, ref = teachers()
    whole = adpa.advantages(dpo, ref, 0)
    for k in (30, 50):
        assert torch.equal(adpa.advantages(dpo, ref, k), whole)
    some = adpa.advantages(dpo, ref, 4)
    top = dpo.topk(4).indices
    assert torch.equal(some.gather(-1, top), whole.gather(-1, top)) and (some != 0).sum() == 4 * 8


def test_gradient_of_adpa():
    """-pi (A - E_pi[A]) in the logits; a constant of the state changes nothing; no advantage, no gradient."""
    z = random(8, 30).double().requires_grad_()
    A = random(8, 30, seed=5).double()
    (gradient,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), A).sum(), z)
    p = z.detach().softmax(-1)
    torch.testing.assert_close(gradient, -p * (A - (p * A).sum(-1, keepdim=True)))
    moved = A + random(8, 1, seed=6).double()
    (same,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), moved).sum(), z)
    torch.testing.assert_close(same, gradient)
    (none,) = torch.autograd.grad(adpa.adpa_loss(z.log_softmax(-1), torch.zeros_like(A)).sum(), z)
    assert (none == 0).all()


def test_kl_objective_is_the_optimum():
    """ADPA-3: its minimum maximises E_pi[A] - beta KL(pi || pi'); there it is 0, and the gradient is pi - q."""
    start, A, beta = random(8, 30).double().log_softmax(-1), random(8, 30, seed=5).double(), 0.7
    target = (start + A / beta).log_softmax(-1)
    assert adpa.kl_loss(target, start, A, beta).abs().max() < 1e-12
    goal = lambda logp: (logp.exp() * (A - beta * (logp - start))).sum(-1)  # noqa: E731
    for seed in range(5):
        other = (target + 0.1 * random(8, 30, seed=30 + seed)).log_softmax(-1)
        assert (goal(other) < goal(target)).all()
    z = random(8, 30, seed=7).double().requires_grad_()
    (gradient,) = torch.autograd.grad(adpa.kl_loss(z.log_softmax(-1), start, A, beta).sum(), z)
    torch.testing.assert_close(gradient, z.detach().softmax(-1) - target.exp())


# ---- on-policy distillation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_opd_by_enumeration(scale):
    """ADPA-4: E_pi[log pi - log pi_ref - lambda A] + log Z, token by token; lambda = 1 is the reverse KL to pi_dpo."""
    (dpo, ref), z = teachers(4, 6), random(4, 6, seed=3).double().requires_grad_()
    logp, A = z.log_softmax(-1), adpa.advantages(dpo, ref, 0)
    loss = adpa.opd_loss(logp, ref, A, scale)
    for s in range(4):
        log_z = math.log(sum(math.exp(ref[s, a] + scale * A[s, a]) for a in range(6)))
        terms = [logp[s, a].exp().item() * (logp[s, a] - ref[s, a] - scale * A[s, a]).item() for a in range(6)]
        assert loss[s].item() == pytest.approx(sum(terms) + log_z, abs=1e-12)
    definition = (logp.exp() * (logp - ref - scale * A)).sum()  # log Z is a constant: the same gradient
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss.sum(), definition)))
    other = {0.0: ref, 1.0: dpo}.get(scale)
    if other is not None:
        torch.testing.assert_close(loss, (logp.exp() * (logp - other)).sum(-1))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_opd_vanishes_at_its_optimum(scale):
    """At pi = pi_ref exp(lambda A) / Z loss and gradient are 0; anywhere else the loss is larger."""
    dpo, ref = teachers()
    A = adpa.advantages(dpo, ref, 0)
    z = (ref + scale * A + random(8, 1, seed=4)).requires_grad_()  # logits have any constant
    loss = adpa.opd_loss(z.log_softmax(-1), ref, A, scale)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    for seed in range(5):
        moved = (z.detach() + 0.1 * random(8, 30, seed=30 + seed)).log_softmax(-1)
        assert (adpa.opd_loss(moved, ref, A, scale) > 0).all()


def test_opd_is_the_kl_of_whole_answers():
    """The expected sum of ADPA-4 over the student's own states is KL(pi || pi_dpo) of whole answers (all enumerated)."""
    v, T = 3, 3  # 27 answers; distributions depend on the prefix
    prefixes = [p for n in range(T) for p in itertools.product(range(v), repeat=n)]
    logits = {p: random(3, v, seed=i).double().log_softmax(-1) for i, p in enumerate(prefixes)}  # pi, pi_dpo, pi_ref
    whole = steps = 0.0
    for answer in itertools.product(range(v), repeat=T):
        path = [logits[answer[:t]] for t in range(T)]
        log_pi, log_dpo = (sum(z[m, a] for z, a in zip(path, answer)) for m in (0, 1))
        whole += log_pi.exp() * (log_pi - log_dpo)
        per_state = [adpa.opd_loss(z[:1], z[2:], z[1:2] - z[2:], 1.0)[0] for z in path]
        steps += log_pi.exp() * sum(per_state)
    torch.testing.assert_close(steps, whole)


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["adpa", "kl", "opd"])
def test_objective_from_the_equations(objective):
    """objective() is NLL on the better answers and gamma times the teachers' term on the states, token by token."""
    args = adpa.Args(objective=objective, gamma=2.5, nll=0.3, beta=0.5, opd_lambda=1.5, temperature=0.7, adv_topk=20)
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    nll, term = [], []
    for b, t in batch["mask"].nonzero().tolist():
        logps = {n: (m.hidden[b, t] @ m.weight.T / 0.7).log_softmax(-1).detach().clone() for n, m in models.items()}
        z = logps["policy"]
        if b % 2 == 0:
            nll.append(-z[batch["completion_ids"][b, t]].item())
            continue
        A = logps["teacher"] - logps["ref_teacher"]
        if objective != "opd":  # which is over the whole vocabulary
            A[logps["teacher"].argsort(descending=True)[20:]] = 0
        kl = (logps["ref"] + A / 0.5).softmax(-1)
        opd = (logps["ref_teacher"] + 1.5 * A).log_softmax(-1)
        terms = {"adpa": -(z.exp() * A), "kl": kl * (kl.log() - z), "opd": z.exp() * (z - opd)}
        term.append(terms[objective].sum().item())
    loss, means = whole_step(models, batch, args)
    assert loss.item() == pytest.approx(0.3 * sum(nll) / len(nll) + 2.5 * sum(term) / len(term), rel=1e-4)
    assert means["loss/nll"].item() == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    loss.backward()
    gradient = models["policy"].hidden.grad[:, : batch["mask"].shape[1]]
    assert (gradient[~batch["mask"]] == 0).all() and (gradient[batch["mask"]] != 0).any(-1).all()
    assert all(models[name].hidden.grad is None for name in NAMES[1:])


@pytest.mark.parametrize("objective", ["adpa", "kl", "opd"])
def test_objective_in_chunks(objective, monkeypatch):
    """The same loss, metrics and gradients in pieces of 4 tokens as with all logits at once, fp32."""
    args, results, whole = adpa.Args(objective=objective), [], lm.over_vocabulary
    for mib in (1, 64):
        with monkeypatch.context() as patch:
            patch.setattr(lm, "over_vocabulary", lambda *a, mib=mib: whole(*a[:4], chunk_mib=mib))
            models, batch = case([6, 7, 4, 3])
            value, means = whole_step(models, batch, args)
            value.backward()
        results.append((value.detach(), {k: x.detach() for k, x in means.items()}, models["policy"]))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-5, rtol=1e-5)
    for name in ("hidden", "weight"):
        pieces, dense = (getattr(r[2], name).grad for r in results)
        assert dense.norm() > 0 and (pieces - dense).norm() < 1e-5 * dense.norm()


def test_equal_teachers_give_no_gradient():
    models, batch = case([5, 2, 4, 3], vocabulary=50, widths=(H, H, H + 2, H + 2))
    models["ref_teacher"] = models["teacher"]
    loss, means = whole_step(models, batch, adpa.Args())
    loss.backward()
    gradient = models["policy"].hidden.grad
    assert means["adpa/advantage"] == means["kl/teachers"] == 0
    assert (gradient[1::2] == 0).all() and (gradient[0::2] != 0).any()


@pytest.mark.parametrize("grown", ["student", "teachers"])
def test_padded_vocabularies(grown):
    """Rows that the models do not share change neither A nor E_pi[A], whatever they hold."""
    args = adpa.Args(adv_topk=0)
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    _, before = whole_step(models, batch, args)
    for name in {"student": NAMES[:2], "teachers": NAMES[2:]}[grown]:
        old = models[name]
        junk = 2 * random(14, old.weight.shape[1], seed=40)
        models[name] = type(old)(old.hidden.detach(), torch.cat([old.weight.detach(), junk]))
        models[name].requires_grad_(name == "policy")
    _, after = whole_step(models, batch, args)
    for name in ("loss/teacher", "adpa/advantage", "kl/teachers", "kl/start", "adpa/gap"):
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-4), name
    assert before["kl/outside"] == 0 < after["kl/outside"]


def test_fully_masked_rows_change_nothing():
    models, batch = case([5, 2, 4, 3], vocabulary=50)
    batch["mask"][3] = False
    masked, means = whole_step(models, batch, adpa.Args())
    masked.backward()
    assert math.isfinite(masked.item()) and (models["policy"].hidden.grad[3] == 0).all()
    assert means["adpa/advantage"].item() != 0


# ---- runs ------------------------------------------------------------------------------------------------------------

TINY = dict(steps=4, prompts_per_step=4, micro_batch=4, max_prompt=24, max_new_tokens=24, test_rows=4)
TINY |= dict(eval_every=4, lr=1e-3, teacher="builtin-aligned", ref_teacher="builtin-small")


@pytest.fixture(scope="module")
def base(tiny_model, few_pairs) -> dict:
    return TINY | dict(model=tiny_model, dataset=few_pairs)


def states_of(run) -> dict[str, list]:
    return {f.name: [json.loads(x) for x in f.read_text().splitlines()] for f in sorted((run / "states").iterdir())}


def test_states_are_the_students_answers(base, out):
    """Greedy answers of the starting student to the prompts that the run uses, once each."""
    run = run_here(adpa, **base, out=out)
    (answers,) = states_of(run).values()
    pairs, _, _, tokenizer = adpa.prepare(adpa.Args(**base))
    policy = lm.load_model(base["model"], device=torch.device("cpu"), trainable=False)
    settings = dict(max_new_tokens=24, stop_ids=lm.stop_ids(policy, tokenizer), pad_id=tokenizer.pad_token_id)
    expected = lm.generate(policy, [pairs[i]["prompt_ids"] for i, _ in answers], **settings)
    assert [ids for _, ids in answers] == expected
    assert sorted(i for i, _ in answers) == list(range(12))  # 4 steps of 4 pairs see all 12
    assert read_metrics(run)[1]["kl/start"] == pytest.approx(0, abs=1e-6) and read_metrics(run)[2]["kl/start"] > 0


def test_refresh(base, out, tmp_path):
    """--refresh_every 2: new answers at steps 0 and 2, of the student as it is then; a resumed run has the same."""
    settings = base | dict(refresh_every=2, state_temperature=1.0, lr=1e-2, save_every=1)
    run = run_here(adpa, **settings, out=out)
    states = states_of(run)
    assert list(states) == ["step-000000.jsonl", "step-000002.jsonl"]
    first, second = ({i: tuple(ids) for i, ids in x} for x in states.values())
    assert all(len(x) <= 8 for x in (first, second))
    assert any(first[i] != second[i] for i in first.keys() & second.keys())
    parts = tmp_path / "parts"
    for stop in (3, None):
        run_here(adpa, stop, **settings, out=str(parts), resume=True)
    assert read_metrics(parts) == read_metrics(run) and states_of(parts) == states


def test_lost_states(base, tmp_path):
    """A resumed run without its states is refused."""
    run = run_here(adpa, 2, **base, out=str(tmp_path / "run"))
    shutil.rmtree(run / "states")
    with pytest.raises(common.BadInput, match="step-000000.jsonl is missing"):
        run_here(adpa, **base, out=str(run), resume=True)


def test_opd_imitates_its_teacher(base, out):
    """On fresh states the reverse KL to the teacher falls; no better answer is needed for that."""
    settings = dict(objective="opd", gamma=1.0, nll=0.0, refresh_every=1, state_temperature=1.0, model="builtin-small")
    settings |= dict(steps=12, lr=1e-3, prompts_per_step=12, micro_batch=24, eval_every=100)
    run = run_here(adpa, **base | settings, out=out)
    lines = read_metrics(run)
    assert lines[-1]["loss/teacher"] < 0.5 * lines[1]["loss/teacher"]
    assert len(states_of(run)) == 12 and lines[1]["loss/total"] == lines[1]["loss/teacher"]


def test_reference_teacher_is_known(base):
    """An empty --ref_teacher is what the config of the teacher names; a teacher that names none needs it."""
    args = adpa.Args(**base | dict(ref_teacher=""))
    adpa.prepare(args)
    assert args.ref_teacher == "builtin", "args.json and --resume know what it is"
    assert adpa.reference_teacher(adpa.Args(**base)) == "builtin-small"
    with pytest.raises(common.BadInput, match="--ref_teacher is empty, and builtin does not name"):
        adpa.prepare(adpa.Args(**base | dict(ref_teacher="", teacher="builtin")))

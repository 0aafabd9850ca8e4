"""ADPA: what follows from the advantage, gradients in closed form, switches, chunks, caches, states."""

import json
import math
import shutil

import adpa
import common
import pytest
from conftest import FixedStates, random, read_metrics, run_here

import torch

H, V = 6, 2**16  # 1 MiB holds the logits of 4 tokens
FULL = adpa.Args(adv_topk=0)


def teachers(n=8, v=30):
    """log pi_dpo, log pi_ref of n states, in double precision."""
    return (random(n, v, seed=s).double().log_softmax(-1) for s in (1, 2))


def case(lengths, vocabulary=V, widths=(H, H, H + 2, H + 4), teacher_vocabulary=None):
    """(models, heads, micro-batch) for adpa.objective: rows of `lengths`, chosen answers and states in turn."""
    B, T = len(lengths), max(lengths)
    ids = torch.randint(vocabulary // 2, (B, T), generator=torch.Generator().manual_seed(9)).tolist()
    micro = common.make_batch([[1]] * B, [row[:n] for row, n in zip(ids, lengths)], 0, "cpu")
    micro["side"], heads = torch.arange(B) % 2, {}
    for i, name in enumerate(("start", "teacher", "ref_teacher")):
        rows = vocabulary if name == "start" else teacher_vocabulary or vocabulary
        micro[f"{name}_hidden"] = random(B, T, widths[i + 1], seed=10 + i)
        heads[name] = random(rows, widths[i + 1], seed=20 + i)
    policy = FixedStates(random(B, T + 1, H, seed=3), random(vocabulary, H, seed=4))
    return torch.nn.ModuleDict({"policy": policy}), heads, micro


def weighted(models, heads, micro, args):
    """The loss of a step that is this micro-batch alone, and its means."""
    counts = adpa.count(micro, args)
    loss, sums = adpa.objective(models, heads, micro, counts, args)
    return loss, {k: x / counts[what] for what, each in sums.items() if what in counts for k, x in each.items()}


# ---- the advantage ---------------------------------------------------------------------------------------------------


def test_what_follows_from_the_advantage():
    """E_ref[exp A] = 1, E_dpo[A] = KL(dpo || ref) >= 0, E_ref[A] <= 0; two equal teachers: A = 0."""
    dpo, ref = teachers()
    A = adpa.advantages(dpo, ref, FULL, 30)
    torch.testing.assert_close((ref.exp() * A.exp()).sum(-1), torch.ones(8, dtype=torch.double))
    kl = (dpo.exp() * (dpo - ref)).sum(-1)
    torch.testing.assert_close((dpo.exp() * A).sum(-1), kl)
    assert (kl > 0).all() and ((ref.exp() * A).sum(-1) < 0).all()
    assert (adpa.advantages(dpo, dpo, FULL, 30) == 0).all()


def test_gradient_of_the_linear_loss():
    """-pi (A - E_pi[A]) in the logits; a constant of the state changes nothing; no advantage, no gradient."""
    z = random(8, 30).double().requires_grad_()
    A = random(8, 30, seed=5).double()
    (gradient,) = torch.autograd.grad(adpa.linear_loss(z.log_softmax(-1), A).sum(), z)
    p = z.detach().softmax(-1)
    torch.testing.assert_close(gradient, -p * (A - (p * A).sum(-1, keepdim=True)))
    moved = A + random(8, 1, seed=6).double()
    (same,) = torch.autograd.grad(adpa.linear_loss(z.log_softmax(-1), moved).sum(), z)
    torch.testing.assert_close(same, gradient)
    (none,) = torch.autograd.grad(adpa.linear_loss(z.log_softmax(-1), torch.zeros_like(A)).sum(), z)
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


def test_top_k_of_all_is_the_whole():
    dpo, ref = teachers()
    whole = adpa.advantages(dpo, ref, FULL, 30)
    for k in (30, 50):
        assert torch.equal(adpa.advantages(dpo, ref, adpa.Args(adv_topk=k), 30), whole)
    some = adpa.advantages(dpo, ref, adpa.Args(adv_topk=4), 30)
    top = dpo.topk(4).indices
    assert torch.equal(some.gather(-1, top), whole.gather(-1, top)) and (some != 0).sum() == 4 * 8


def test_switches_of_the_authors_code():
    """--adv_clip 0 1: nothing is discouraged; --ref_topk: pi_ref is at least its k-th; --advantage dpo: no pi_ref."""
    dpo, ref = teachers()
    A = adpa.advantages(dpo, ref, FULL, 30)
    clipped = adpa.advantages(dpo, ref, adpa.Args(adv_topk=0, adv_clip=[0.0, 1.0]), 30)
    assert torch.equal(clipped, A.clamp(0, 1)) and (clipped == 0).any() and (clipped == 1).any()
    biased = adpa.advantages(dpo, ref, adpa.Args(adv_topk=0, ref_topk=5), 30)
    known = torch.zeros_like(A, dtype=torch.bool).scatter(-1, ref.topk(5).indices, True)
    assert torch.equal(biased[known], A[known]) and (biased[~known] < A[~known]).all()
    alone = adpa.advantages(dpo, ref, adpa.Args(adv_topk=0, advantage="dpo"), 30)
    assert torch.equal(alone, dpo)


def test_buckets_keep_the_tail_out_of_the_top():
    """With a cache of k tokens and a large bucket for the rest, --adv_topk k is about the tokens."""
    dpo, ref = (torch.zeros(4, 30).log_softmax(-1), random(4, 30).log_softmax(-1))
    top = dpo.topk(3).indices
    small = adpa.advantages(adpa.buckets(dpo, top), adpa.buckets(ref, top), adpa.Args(adv_topk=3), entries=3)
    assert (small[:, 3] == 0).all()
    torch.testing.assert_close(small[:, :3], (dpo - ref).gather(-1, top))


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["linear", "kl"])
def test_objective_from_the_equations(objective):
    """objective() is NLL on the better answers and gamma times ADPA-2 or ADPA-3 on the states, token by token."""
    args = adpa.Args(objective=objective, gamma=2.5, beta=0.5, temperature=0.7, adv_topk=20)
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50)
    nll, term = [], []
    for b, t in micro["mask"].nonzero().tolist():
        z = (models["policy"].hidden[b, t].detach() @ models["policy"].weight.detach().T / 0.7).log_softmax(-1)
        said = {n: (micro[f"{n}_hidden"][b, t] @ w.T / 0.7).log_softmax(-1) for n, w in heads.items()}
        if b % 2 == 0:
            nll.append(-z[micro["completion_ids"][b, t]].item())
            continue
        A = said["teacher"] - said["ref_teacher"]
        A[said["teacher"].argsort(descending=True)[20:]] = 0
        q = (said["start"] + A / 0.5).softmax(-1)
        term.append((-(z.exp() * A).sum() if objective == "linear" else (q * (q.log() - z)).sum()).item())
    loss, means = weighted(models, heads, micro, args)
    assert loss.item() == pytest.approx(sum(nll) / len(nll) + 2.5 * sum(term) / len(term), rel=1e-4)
    loss.backward()
    gradient = models["policy"].hidden.grad[:, : micro["mask"].shape[1]]
    assert (gradient[~micro["mask"]] == 0).all() and (gradient[micro["mask"]] != 0).any(-1).all()


@pytest.mark.parametrize("objective", ["linear", "kl"])
def test_objective_in_chunks(objective, monkeypatch):
    """The same loss, metrics and gradients in pieces of 4 tokens as with all logits at once, fp32."""
    args, results, whole = adpa.Args(objective=objective), [], common.over_vocabulary
    for mib in (1, 64):
        with monkeypatch.context() as patch:
            patch.setattr(common, "over_vocabulary", lambda *a, mib=mib: whole(*a[:4], chunk_mib=mib))
            models, heads, micro = case([6, 7, 4, 3])
            value, means = weighted(models, heads, micro, args)
            value.backward()
        results.append((value.detach(), {k: x.detach() for k, x in means.items()}, models["policy"]))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-5, rtol=1e-5)
    for name in ("hidden", "weight"):
        pieces, whole = (getattr(r[2], name).grad for r in results)
        assert whole.norm() > 0 and (pieces - whole).norm() < 1e-5 * whole.norm()


def test_equal_teachers_give_no_gradient():
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50, widths=(H, H, H + 2, H + 2))
    heads["ref_teacher"], micro["ref_teacher_hidden"] = heads["teacher"], micro["teacher_hidden"]
    loss, means = weighted(models, heads, micro, adpa.Args())
    loss.backward()
    gradient = models["policy"].hidden.grad
    assert means["adpa/advantage"] == means["kl/teachers"] == 0
    assert (gradient[1::2] == 0).all() and (gradient[0::2] != 0).any()


@pytest.mark.parametrize("grown", ["student", "teachers"])
def test_padded_vocabularies(grown):
    """Rows that the models do not share change neither A nor E_pi[A], whatever they hold."""
    args = adpa.Args(adv_topk=0)
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50)
    _, before = weighted(models, heads, micro, args)
    grow = lambda w, seed: torch.cat([w.detach(), 2 * random(14, w.shape[1], seed=seed)])  # noqa: E731
    if grown == "student":
        policy = FixedStates(models["policy"].hidden.detach(), grow(models["policy"].weight, 40))
        models, heads = torch.nn.ModuleDict({"policy": policy}), heads | {"start": grow(heads["start"], 41)}
    else:
        heads |= {name: grow(heads[name], 42) for name in ("teacher", "ref_teacher")}
    _, after = weighted(models, heads, micro, args)
    for name in ("loss/teacher", "adpa/advantage", "kl/teachers", "kl/start", "adpa/gap"):
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-4), name
    assert before["kl/outside"] == 0 < after["kl/outside"]


def test_row_order_and_fully_masked_rows_change_nothing():
    args = adpa.Args()
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50)
    before, _ = weighted(models, heads, micro, args)
    order = [3, 1, 2, 0]
    policy = FixedStates(models["policy"].hidden.detach()[order], models["policy"].weight.detach())
    moved = {k: v[order] for k, v in micro.items()}
    after, _ = weighted(torch.nn.ModuleDict({"policy": policy}), heads, moved, args)
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    micro["mask"][3] = False
    masked, _ = weighted(models, heads, micro, args)
    masked.backward()
    assert math.isfinite(masked.item()) and (models["policy"].hidden.grad[3] == 0).all()
    micro["mask"][1] = False
    _, sums = adpa.objective(models, heads, micro, adpa.count(micro, args), args)
    assert sums["states"]["adpa/advantage"].item() == 0


# ---- runs ------------------------------------------------------------------------------------------------------------

TINY = dict(steps=4, prompts_per_step=4, micro_batch=4, max_prompt=24, max_new_tokens=24, test_rows=5)
TINY |= dict(builtin_pairs=12, eval_every=4, lr=1e-3, teacher="builtin-small", ref_teacher="builtin")


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    return TINY | dict(model=tiny_model)


def states_of(run) -> dict[str, list]:
    return {f.name: [json.loads(x) for x in f.read_text().splitlines()] for f in sorted((run / "states").iterdir())}


def test_states_are_the_students_answers(base, out):
    """Greedy answers of the starting student to the prompts that the run uses, once each."""
    run = run_here(adpa, **base, out=out)
    (answers,) = states_of(run).values()
    args = adpa.Args(**base)
    pairs, _, _, tokenizer = adpa.prepare(args)
    policy = common.load_model(base["model"], device=torch.device("cpu"), trainable=False)
    settings = dict(max_new_tokens=24, stop_ids=common.stop_ids(policy, tokenizer), pad_id=tokenizer.pad_token_id)
    expected = common.generate(policy, [pairs[i]["prompt_ids"] for i, _ in answers], **settings)
    assert [ids for _, ids in answers] == expected
    assert sorted(i for i, _ in answers) == list(range(12))  # 4 steps of 4 pairs see all 12
    assert read_metrics(run)[1]["kl/start"] == pytest.approx(0, abs=1e-6) and read_metrics(run)[2]["kl/start"] > 0


def test_refresh(base, out, tmp_path):
    """--refresh_every 2: new answers at steps 0 and 2, of the student as it is then; a resumed run has the same."""
    settings = base | dict(refresh_every=2, state_temperature=1.0, lr=1e-2, save_every=1)
    run = run_here(adpa, **settings, out=out)
    states = states_of(run)
    assert list(states) == ["step-000000.jsonl", "step-000002.jsonl"]
    first, second = (dict(map(tuple, ((i, tuple(ids)) for i, ids in x))) for x in states.values())
    assert all(len(x) <= 8 for x in (first, second))
    assert any(first[i] != second[i] for i in first.keys() & second.keys())
    parts = tmp_path / "parts"
    for stop in (3, None):
        run_here(adpa, stop, **settings, out=str(parts), resume=True)
    assert read_metrics(parts) == read_metrics(run) and states_of(parts) == states


def test_lost_states(base, tmp_path):
    """A resumed run without its states says so."""
    run = run_here(adpa, 2, **base, out=str(tmp_path / "run"))
    shutil.rmtree(run / "states")
    with pytest.raises(common.BadInput, match="step-000000.jsonl is missing"):
        run_here(adpa, **base, out=str(run), resume=True)


def test_off_policy_states(base, out):
    """--states rejected: the answers of the data, and none is generated."""
    run = run_here(adpa, **base, out=out, states="rejected")
    assert not (run / "states").exists() and read_metrics(run)[1]["adpa/advantage"] != 0


@pytest.mark.parametrize("objective", ["linear", "kl"])
def test_caches(objective, base, tmp_path):
    """Hidden states from the disk: the teachers themselves, to 1e-5. Top k with --adv_topk k: exact for ADPA-2 too."""
    settings = base | dict(adv_topk=5, objective=objective)
    runs = {"none": {}, "hidden": dict(cache="hidden"), "topk": dict(cache="topk", cache_topk=5)}
    lines = {k: read_metrics(run_here(adpa, **settings | x, out=str(tmp_path / k))) for k, x in runs.items()}
    for name in ("hidden", "topk") if objective == "linear" else ("hidden",):
        for a, b in zip(lines["none"], lines[name]):
            keys = [k for k in a if k.split("/")[0] in ("loss", "grad_norm") or k == "adpa/advantage"]
            assert len(keys) in (0, 5) and all(b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-6) for k in keys), name
    assert all(math.isfinite(x) for line in lines["topk"] for x in line.values())


def test_reference_teacher_must_be_the_start(base, tmp_path, capsys):
    """A teacher that says what it was aligned from is only compared with that."""
    settings = base | dict(teacher=base["model"], ref_teacher="", stage="teacher", dpo_steps=1, sft_steps=1)
    adpa.run_stages(adpa.Args(**settings, out=str(tmp_path / "teacher")))
    known = dict(teacher=str(tmp_path / "teacher" / "dpo" / "model"))
    right = str(tmp_path / "teacher" / "ref" / "model")
    adpa.prepare(adpa.Args(**base | known | dict(ref_teacher=right)))
    adpa.prepare(adpa.Args(**base | known | dict(ref_teacher=str(shutil.copytree(right, tmp_path / "copy")))))
    assert "does not say what it was aligned from" not in capsys.readouterr().out
    with pytest.raises(common.BadInput) as error:
        adpa.prepare(adpa.Args(**base | known | dict(ref_teacher="builtin")))
    assert f"--ref_teacher builtin (weights {common.fingerprint('builtin')}) is not what" in str(error.value)
    assert right in str(error.value)
    adpa.prepare(adpa.Args(**base))
    assert "does not say what it was aligned from" in capsys.readouterr().out

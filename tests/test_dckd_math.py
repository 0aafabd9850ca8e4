"""DCKD: closed forms, enumeration, chunks against dense, padded vocabularies, caches."""

import math
from functools import partial

import common
import dckd
import pytest
from conftest import FixedStates, random, read_metrics, run_here

import torch

H, V = 6, 2**16  # 1 MiB holds the logits of 4 tokens


def case(lengths, vocabulary=V, width=H, teacher_vocabulary=None):
    """(models, heads, micro-batch) for dckd.objective: rows of `lengths`, chosen and rejected in turn."""
    B, T = len(lengths), max(lengths)
    ids = torch.randint(vocabulary // 2, (B, T), generator=torch.Generator().manual_seed(9)).tolist()
    micro = common.make_batch([[1]] * B, [row[:n] for row, n in zip(ids, lengths)], 0, "cpu")
    micro["side"] = torch.arange(B) % 2
    micro["teacher_hidden"] = random(B, T, width + 2, seed=1)
    heads = {"teacher": random(teacher_vocabulary or vocabulary, width + 2, seed=2)}
    policy = FixedStates(random(B, T + 1, width, seed=3), random(vocabulary, width, seed=4))
    return torch.nn.ModuleDict({"policy": policy}), heads, micro


def weighted(models, heads, micro, args):
    """The loss of a step that is this micro-batch alone, and its means."""
    counts = dckd.count(micro, args)
    loss, sums = dckd.objective(models, heads, micro, counts, args)
    return loss, {k: x / counts[what] for what, each in sums.items() if what in counts for k, x in each.items()}


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_forward_kl_by_enumeration():
    """DCKD-1: sum_a q log(q/p), at least 0, 0 for equal distributions; its gradient in the logits is p - q."""
    z, teacher = random(7, 5).requires_grad_(), random(7, 5, seed=1).log_softmax(-1)
    kl = dckd.forward_kl(teacher, z.log_softmax(-1))
    p, q = z.detach().double().softmax(-1), teacher.double().exp()
    expected = [sum(q[i, a] * math.log(q[i, a] / p[i, a]) for a in range(5)) for i in range(7)]
    torch.testing.assert_close(kl.detach().double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(gradient.double(), p - q, rtol=1e-5, atol=1e-6)
    assert (kl > 0).all() and dckd.forward_kl(teacher, teacher).abs().max() < 1e-6


def test_dpo_by_hand():
    """DPO-1 of two pairs from their summed log-ratios; padding does not count; the gradient pushes the pair apart."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 9.0], [-0.5, -0.5], [-1.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.5, -2.5], [-2.0, 7.0], [-0.5, -0.5], [-0.5, -0.5]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    loss, metrics = dckd.dpo_loss(logprobs, ref, mask, 0.5)
    margins = [0.5 * (1.0 - -1.0), 0.5 * (0.0 - -1.0)]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins))
    assert metrics["dpo/margin"].item() == pytest.approx(sum(margins)) and metrics["dpo/accuracy"] == 2
    loss.backward()
    assert (logprobs.grad[0::2] < 0).all() and logprobs.grad[1].tolist()[0] > 0 and logprobs.grad[1, 1] == 0
    start, _ = dckd.dpo_loss(ref, ref, mask, 0.5)
    assert start.item() == pytest.approx(2 * math.log(2))


def test_weights():
    """Which terms each loss adds up: DCKD-1 and its special cases."""
    args = partial(dckd.Args, a_w=0.3, a_l=0.7)
    assert dckd.weights(args(loss="dckd")) == {"loss/nll": 1.0, "kl/chosen": 0.3, "kl/rejected": 0.7}
    assert dckd.weights(args(loss="kd")) == {"loss/nll": 1.0, "kl/chosen": 0.3}
    assert dckd.weights(args(loss="sft")) == {"loss/nll": 1.0}
    assert [dckd.sides(args(loss=x)) for x in ("kd", "sft")] == [("chosen",)] * 2


def test_objective_from_the_equation():
    """objective() is DCKD-1 token by token: NLL and KL on the better answers, KL alone on the worse ones."""
    args = dckd.Args(a_w=0.3, a_l=0.7, temperature=0.7)
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50)
    terms = {"nll": [], "w": [], "l": []}
    for b, t in micro["mask"].nonzero().tolist():
        z = models["policy"].hidden[b, t].detach() @ models["policy"].weight.detach().T / 0.7
        q = (micro["teacher_hidden"][b, t] @ heads["teacher"].T / 0.7).softmax(-1)
        kl = (q * (q.log() - z.log_softmax(-1))).sum().item()
        terms["w" if b % 2 == 0 else "l"].append(kl)
        if b % 2 == 0:
            terms["nll"].append(-z.log_softmax(-1)[micro["completion_ids"][b, t]].item())
    mean = {k: sum(x) / len(x) for k, x in terms.items()}
    loss, means = weighted(models, heads, micro, args)
    assert loss.item() == pytest.approx(mean["nll"] + 0.3 * mean["w"] + 0.7 * mean["l"], rel=1e-5)
    assert means["kl/chosen"].item() == pytest.approx(mean["w"], rel=1e-4)
    loss.backward()
    gradient = models["policy"].hidden.grad[:, : micro["mask"].shape[1]]
    assert (gradient[~micro["mask"]] == 0).all() and (gradient[micro["mask"]] != 0).any(-1).all()


@pytest.mark.parametrize("loss", ["dckd", "sft"])
def test_objective_in_chunks(loss, monkeypatch):
    """The same loss, metrics and gradients in pieces of 4 tokens as with all logits at once, fp32."""
    args, results = dckd.Args(loss=loss), []
    for mib in (1, 64):
        with monkeypatch.context() as patch:
            patch.setattr(common, "over_vocabulary", partial(common.over_vocabulary, chunk_mib=mib))
            models, heads, micro = case([5, 2, 4, 3])
            value, means = weighted(models, heads if loss == "dckd" else {}, micro, args)
            value.backward()
        results.append((value.detach(), {k: x.detach() for k, x in means.items()}, models["policy"]))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-5, rtol=1e-5)
    for name in ("hidden", "weight"):
        pieces, whole = (getattr(r[2], name).grad for r in results)
        assert whole.norm() > 0 and (pieces - whole).norm() < 1e-5 * whole.norm()


def test_row_order_and_fully_masked_rows_change_nothing():
    """Rows in another order give the same sums; a row without a single unmasked token adds nothing."""
    args = dckd.Args()
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50)
    before, _ = weighted(models, heads, micro, args)
    order = [3, 1, 2, 0]
    moved = {k: v[order] for k, v in micro.items()}
    policy = FixedStates(models["policy"].hidden.detach()[order], models["policy"].weight.detach())
    after, _ = weighted(torch.nn.ModuleDict({"policy": policy}), heads, moved, args)
    assert after.item() == pytest.approx(before.item(), rel=1e-5)
    micro["mask"][3] = False
    masked, means = weighted(models, heads, micro, args)
    masked.backward()
    assert math.isfinite(masked.item()) and (models["policy"].hidden.grad[3] == 0).all()
    micro["mask"][1] = False  # not one token of the side is left in this micro-batch
    _, sums = dckd.objective(models, heads, micro, dckd.count(micro, args), args)
    assert sums["rejected"]["kl/rejected"].item() == 0


@pytest.mark.parametrize("grown", ["student", "teacher"])
def test_padded_vocabularies(grown):
    """Rows beyond the vocabulary that both models share change no KL, whatever they hold; what was cut is logged."""
    args = dckd.Args()
    models, heads, micro = case([5, 2, 4, 3], vocabulary=50)
    _, before = weighted(models, heads, micro, args)
    assert before["kl/outside"] == 0
    policy, junk = models["policy"], 2 * random(14, H, seed=8)
    if grown == "student":
        models = torch.nn.ModuleDict({"policy": FixedStates(policy.hidden.detach(), torch.cat([policy.weight, junk]))})
    else:
        heads = {"teacher": torch.cat([heads["teacher"], 2 * random(14, H + 2, seed=8)])}
    _, after = weighted(models, heads, micro, args)
    for name in ("kl/chosen", "kl/rejected"):
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-4)
    assert 0.01 < after["kl/outside"].item() < 1
    assert (after["loss/nll"] > before["loss/nll"] + 1e-3) == (grown == "student")  # NLL is over all of its own rows


def test_within():
    """Renormalised over the first entries; the mass of the rest beside it."""
    logp = random(4, 10).log_softmax(-1)
    inside, outside = dckd.within(logp, 7)
    torch.testing.assert_close(inside.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(outside, logp[:, 7:].exp().sum(-1))
    assert dckd.within(logp, 10)[0] is logp


def test_buckets():
    """Top entries and the rest in one: they sum to 1, and a KL of buckets is at most that of the whole."""
    p, q = random(20, 30).log_softmax(-1), random(20, 30, seed=1).log_softmax(-1)
    top = q.topk(5).indices
    small_p, small_q = dckd.buckets(p, top), dckd.buckets(q, top)
    assert small_p.shape == (20, 6)
    torch.testing.assert_close(small_p.exp().sum(-1), torch.ones(20))
    part, whole = dckd.forward_kl(small_q, small_p), dckd.forward_kl(q, p)
    assert (part < whole).all() and (part > 0).all()
    almost = q.topk(29).indices
    torch.testing.assert_close(dckd.forward_kl(dckd.buckets(q, almost), dckd.buckets(p, almost)), whole)


# ---- caches ----------------------------------------------------------------------------------------------------------

TINY = dict(steps=3, prompts_per_step=4, micro_batch=4, max_prompt=24, max_new_tokens=24, test_rows=5)
TINY |= dict(builtin_pairs=10, eval_every=2, lr=1e-3)


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    return TINY | dict(model=tiny_model, teacher="builtin")


def close(a, b, relative):
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        assert all(x[k] == pytest.approx(y[k], rel=relative, abs=1e-6) for k in x if not k.startswith("eval"))


def test_cache_is_the_teacher(base, tmp_path):
    """Hidden states from the disk give the run of the teacher itself, to 1e-5; a second run finds them there."""
    live = read_metrics(run_here(dckd, **base, out=str(tmp_path / "live")))
    settings = base | dict(cache="hidden", cache_dir=str(tmp_path / "cache"))
    made = read_metrics(run_here(dckd, **settings, out=str(tmp_path / "made")))
    close(live, made, 1e-5)
    load, asked = common.load_model, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_model", lambda name, **k: asked.append(name) or load(name, **k))
        found = read_metrics(run_here(dckd, **settings, out=str(tmp_path / "found")))
    assert asked == [base["model"]] and found == made  # the teacher is not even loaded


def test_topk_cache(base, tmp_path, capsys):
    """The likeliest tokens and one bucket for the rest: less KL than there is, as reported when the cache is made."""
    live = read_metrics(run_here(dckd, **base, out=str(tmp_path / "live")))
    settings = base | dict(cache="topk", cache_topk=2)
    top = read_metrics(run_here(dckd, **settings, out=str(tmp_path / "top")))
    text = capsys.readouterr().out
    for name in ("kl/chosen", "kl/rejected"):
        assert f"--cache topk: {name} of the first pairs is -" in text and "% off" in text
        assert 0.3 * live[1][name] < top[1][name] < live[1][name]
    assert live[1]["kl/outside"] == 0 < top[1]["kl/outside"] < 0.5
    fine = base | dict(cache="topk", cache_topk=15)  # all but one of 16: that one is the bucket
    close(live, read_metrics(run_here(dckd, **fine, out=str(tmp_path / "fine"))), 1e-4)


def test_interrupted_cache_goes_on(base, tmp_path, monkeypatch):
    """Blocks that are there are not computed again."""
    monkeypatch.setattr(common.RowCache, "BLOCK", 8)
    settings = base | dict(cache="hidden", cache_dir=str(tmp_path / "cache"))
    whole = read_metrics(run_here(dckd, **settings, out=str(tmp_path / "whole")))
    blocks = sorted((tmp_path / "cache").glob("rows-*"))
    assert len(blocks) == 3
    (tmp_path / "cache" / "shared.safetensors").unlink()
    blocks[1].unlink()
    times = [b.stat().st_mtime_ns for b in (blocks[0], blocks[2])]
    assert read_metrics(run_here(dckd, **settings, out=str(tmp_path / "again"))) == whole
    assert times == [b.stat().st_mtime_ns for b in (blocks[0], blocks[2])] and blocks[1].exists()


@pytest.mark.parametrize("changes, name", [(dict(seed=1), "data"), (dict(cache="topk"), "kind"), ("other", "teacher")])
def test_stale_cache(changes, name, base, tmp_path):
    """A cache of other data, of another kind or of another teacher is refused, and says what differs."""
    settings = base | dict(cache="hidden", cache_dir=str(tmp_path / "cache"), steps=1, cache_topk=4)
    run_here(dckd, **settings, out=str(tmp_path / "one"))
    changes = dict(teacher="builtin-small") if changes == "other" else changes
    with pytest.raises(common.BadInput) as error:
        run_here(dckd, **settings | changes, out=str(tmp_path / "two"))
    message = str(error.value)
    assert f"the cache {tmp_path / 'cache'} is stale: its {name} is" in message and "that of this run" in message


def test_fingerprint_is_of_the_weights(tiny_model, tmp_path):
    """A copy elsewhere has the same; one other weight has another."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    tensors = load_file(f"{tiny_model}/model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (copy / name).write_bytes((common.Path(tiny_model) / name).read_bytes())
    assert common.fingerprint(str(copy)) == common.fingerprint(tiny_model)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert common.fingerprint(str(copy)) != common.fingerprint(tiny_model)


def test_pairs_stay_together():
    """micro_batches(together=2) sorts by length, or by prompt where two pairs share one; it never parts neighbours."""
    answers = [[2] * n for n in (9, 1, 2, 2, 5, 7, 3, 1)]
    for prompts, expected in ("abcdefgh", [[2, 3, 6, 7], [4, 5, 0, 1]]), ("aabbbbaa", [[0, 1, 6, 7], [2, 3, 4, 5]]):
        prompts = [[ord(letter)] * 5 for letter in prompts]
        batch = common.make_batch(prompts, answers, 0, "cpu") | {"row": torch.arange(8)}
        pieces = [micro["row"].tolist() for micro in common.micro_batches(batch, list(range(8)), 4, together=2)]
        assert pieces == expected

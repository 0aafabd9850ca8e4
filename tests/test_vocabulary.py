"""Losses over the vocabulary in chunks: the same numbers and gradients as with all logits at once, in less memory."""

from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import lm
import lco
from conftest import FixedStates, random

MIB = 2**20
N, H, V = 11, 6, 2**16  # 1 MiB holds the logits of 4 tokens: pieces of 4, 4 and 3


def lco_case(lengths, hidden_width, vocabulary, advantage="group"):
    """(policy, heads, micro-batch) for an objective: completions of these lengths, prompts of one token."""
    B, T = len(lengths), max(lengths)
    names = ("old", "reward", "reward_ref") if advantage == "token" else ("old",)
    hiddens = {f"{name}_hidden": random(B, T, hidden_width, seed=10 + i) for i, name in enumerate(names)}
    heads = {name: random(vocabulary, hidden_width, seed=20 + i) for i, name in enumerate(names)}
    ids = (hiddens["old_hidden"] @ heads["old"].T).argmax(-1).tolist()  # likely tokens: rare ones have no gradient
    micro = common.make_batch([[1]] * B, [row[:n] for row, n in zip(ids, lengths)], 0, "cpu") | hiddens
    micro["advantages"] = random(B, T, seed=3) * micro["mask"]
    micro["scale"] = 0.5 * micro["mask"]
    moved = micro["old_hidden"] + 0.3 * random(B, T, hidden_width, seed=5)
    hidden = torch.cat([moved, torch.zeros(B, 1, hidden_width)], 1)
    policy = FixedStates(hidden, heads["old"] + 0.1 * random(vocabulary, hidden_width, seed=6))
    return policy, heads, micro


def objective(policy, heads, micro, args):
    """The objective that update() takes, with beta as train() sets it."""
    micro = micro | {"beta": lco.scaled_beta(micro["advantages"], args.beta, args.negative_beta_scale)}
    sampled = lco.kld_objective if args.loss == "kld" else lco.sampled_objective
    return (lco.dense_objective if "reward" in heads else sampled)(policy, heads, micro, args)


def chunked(monkeypatch, mib):
    monkeypatch.setattr(lm, "over_vocabulary", partial(lm.over_vocabulary, chunk_mib=mib))


# ---- over_vocabulary ----------------------------------------------------------------------------------------------


def test_chunk_rows():
    """chunk_mib bounds the fp32 logits of a piece; every token is seen once, in order; at least one token a piece."""
    hidden, weight, column, seen = random(N, H), random(V, H), torch.arange(N), []

    def fn(logits, column):
        seen.append(column.tolist())
        return logits[:, 0], column

    for mib, sizes in ((1, [4, 4, 3]), (2, [8, 3]), (64, [11]), (0, [1] * 11)):
        seen.clear()
        with torch.no_grad():
            first, back = lm.over_vocabulary(fn, [(hidden, weight)], [column], chunk_mib=mib)
        assert [len(s) for s in seen] == sizes
        assert back.tolist() == list(range(N)) == sum(seen, [])
        torch.testing.assert_close(first, hidden @ weight[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(temperature):
    """Log-probabilities and entropies, and the gradients in the hidden states and W, equal the dense ones."""
    ids, gradients, values = torch.arange(N) * 5000, [], []
    for mib in (1, None):
        hidden, weight = random(N, H).requires_grad_(), random(V, H, seed=1).requires_grad_()
        if mib:
            logprobs, entropy = lm.token_logprobs(hidden, weight, ids, temperature, chunk_mib=mib)
        else:
            dense = (hidden @ weight.T / temperature).log_softmax(-1)
            logprobs, entropy = dense[torch.arange(N), ids], -(dense.exp() * dense).sum(-1)
        assert logprobs.shape == entropy.shape == (N,)
        assert not entropy.requires_grad or mib is None
        gradients.append(torch.autograd.grad((logprobs * random(N, seed=2)).sum(), (hidden, weight)))
        values.append((logprobs.detach(), entropy.detach()))
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)


def test_several_heads_and_scalars():
    """One tensor of logits a head, of its own width; scalars are summed over the pieces; gradients reach every head."""
    results = []
    for mib in (1, 64):
        leaves = [random(N, H), random(V, H, seed=1), random(N, 3, seed=2), random(V, 3, seed=3)]
        a, A, b, B = (x.requires_grad_() for x in leaves)
        weight = random(N, seed=4)

        def fn(x, y, weight):
            p, q = x.log_softmax(-1), y.log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            return (kl * weight).sum(), {"kl": kl, "n": torch.tensor(float(len(kl)))}

        loss, metrics = lm.over_vocabulary(fn, [(a, A), (b, B)], [weight], 0.8, mib)
        assert metrics["n"] == N and metrics["kl"].shape == (N,)
        results.append((loss.detach(), metrics["kl"].detach(), *torch.autograd.grad(loss, leaves)))
    p, q = ((h @ w.T / 0.8).log_softmax(-1) for h, w in ((a, A), (b, B)))
    torch.testing.assert_close(results[0][1], (p.exp() * (p - q)).sum(-1).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_gradients_are_taken_on_the_way_forward():
    """fn sees each token once, backward included; a frozen W gets nothing, values beside the loss have no graph."""
    hidden, weight, seen = random(N, H).requires_grad_(), random(V, H, seed=1), []

    def fn(logits, ids):
        seen.extend(ids.tolist())
        nll = -logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        return nll.square().sum(), nll

    loss, nll = lm.over_vocabulary(fn, [(hidden, weight)], [torch.arange(N)], 0.7, chunk_mib=1)
    (3 * loss).backward()
    assert seen == list(range(N)) and not nll.requires_grad and weight.grad is None
    found, hidden.grad = hidden.grad, None
    (3 * fn(hidden @ weight.T / 0.7, torch.arange(N))[0]).backward()
    assert (found - hidden.grad).norm() < 1e-5 * found.norm()


def test_the_scale_of_a_loss_is_not_rounded():
    """In bfloat16 a loss times 0.3 has the gradient times 0.3, not times the bfloat16 next to it (0.2 % more)."""
    gradients = []
    for scale in (1.0, 0.3):
        hidden = random(N, H).bfloat16().requires_grad_()
        heads = [(hidden, random(50, H, seed=1).bfloat16().requires_grad_())]
        loss, _ = lm.over_vocabulary(lambda z: (z.log_softmax(-1)[:, 0].sum(), {}), heads, [])
        (scale * loss).backward()
        gradients.append([x.grad for x in heads[0]])
    for whole, scaled in zip(*gradients):
        assert scaled.dtype == torch.bfloat16 and torch.equal(scaled, (0.3 * whole.float()).bfloat16())


def test_no_grad_keeps_nothing():
    """Under no_grad: the same values, no graph."""
    hidden, weight, ids = random(N, H).requires_grad_(), random(V, H, seed=1).requires_grad_(), torch.arange(N)
    with_graph = lm.token_logprobs(hidden, weight, ids, chunk_mib=1)[0]
    with torch.no_grad():
        without = lm.token_logprobs(hidden, weight, ids, chunk_mib=1)[0]
    assert with_graph.requires_grad and not without.requires_grad
    assert torch.equal(with_graph.detach(), without)


# ---- the losses of lco.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.7),
        dict(target="linear", beta=2.0),
        dict(advantage="token"),
        dict(advantage="token", loss="lch"),
    ],
    ids=str,
)
def test_lco_objective_in_chunks(monkeypatch, settings):
    """objective() gives the same loss, metrics and gradients (hidden states and W) in pieces of 4 tokens as at once."""
    args, results = lco.Args(**dict(negative_beta_scale=1.0) | settings), []
    for mib in (1, 64):
        with monkeypatch.context() as patch:
            chunked(patch, mib)
            policy, heads, micro = lco_case([5, 2, 4], H, V, args.advantage)
            loss, metrics = objective(policy, heads, micro, args)
            loss.backward()
        results.append((loss.detach(), metrics, policy.hidden.grad, policy.weight.grad))
    torch.testing.assert_close(results[0][:2], results[1][:2], atol=1e-5, rtol=1e-4)
    for pieces, whole in zip(results[0][2:], results[1][2:]):
        assert whole.norm() > 0 and (pieces - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("settings", [dict(), dict(loss="mse"), dict(loss="lch"), dict(advantage="token")], ids=str)
def test_lco_objective_from_the_equations(settings):
    """The sum of LCO-3, -4, -5 over the unmasked tokens, at the sampling temperature; scores are taken without one."""
    args = lco.Args(**settings, negative_beta_scale=1.0, beta=0.5, temperature=0.7)
    policy, heads, micro = lco_case([5, 2, 4], H, 50, args.advantage)
    mask = micro["mask"]
    expected = 0.0
    for b, t in mask.nonzero().tolist():
        z = policy.hidden[b, t].detach() @ policy.weight.detach().T / 0.7
        old = {name: micro[f"{name}_hidden"][b, t] @ head.T / 0.7 for name, head in heads.items()}
        chosen = micro["completion_ids"][b, t]
        if args.advantage == "token":
            scores = (0.7 * old["reward"]).log_softmax(-1) - (0.7 * old["reward_ref"]).log_softmax(-1)
            advantages = micro["advantages"][b, t] + 0.5 * (scores - scores[chosen])
        else:
            advantages = torch.zeros(50).scatter(0, chosen, micro["advantages"][b, t])
        goal = old["old"] + advantages / 0.5
        gap = (z - goal)[chosen]
        p, q = goal.log_softmax(-1), z.log_softmax(-1)
        value = {"kld": (p.exp() * (p - q)).sum(), "mse": gap**2, "lch": gap.double().cosh().log().float()}[args.loss]
        expected += value
    loss, metrics = objective(policy, heads, micro, args)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-4, rtol=1e-5)
    loss.backward()
    assert (policy.hidden.grad[:, :-1][~mask] == 0).all() and (policy.hidden.grad[:, :-1][mask] != 0).any(-1).all()


@pytest.mark.parametrize("loss", ["mse", "lch"])
def test_sampled_losses_need_no_vocabulary(monkeypatch, loss):
    """LCO-MSE and LCO-LCH with sampled advantages never project onto the vocabulary."""
    policy, heads, micro = lco_case([5, 2, 4], H, 50)
    monkeypatch.setattr(lm, "over_vocabulary", None)
    objective(policy, heads, micro, lco.Args(loss=loss))[0].backward()
    used = set(micro["completion_ids"][micro["mask"]].tolist())
    assert {i for i, g in enumerate(policy.weight.grad) if g.any()} == used


# ---- memory ----------------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """The most bytes that the outputs of operations hold at once, and the largest of these tensors."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {k: (ref, size) for k, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("settings", [dict(), dict(advantage="token"), dict(target="linear")], ids=str)
def test_memory_is_bounded_by_the_chunk(monkeypatch, settings):
    """Forward and backward of 8 times as many tokens than fit a chunk hold less than a quarter of what they do at once.

    Counted exactly from the operations; benchmarks/memory.py measures it at full size.
    """
    args, peaks = lco.Args(**settings), {}
    for mib in (1, 64):
        with monkeypatch.context() as patch:
            chunked(patch, mib)
            policy, heads, micro = lco_case([64] * 4, 4, 8192, args.advantage)  # 8 MiB of logits
            with PeakMemory() as memory:
                objective(policy, heads, micro, args)[0].backward()
        peaks[mib] = memory
    assert peaks[64].largest >= 8 * MIB
    assert peaks[1].largest <= 1 * MIB
    assert peaks[1].peak < 0.25 * peaks[64].peak

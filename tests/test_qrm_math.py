"""The mathematics of Q-RM: losses by hand, which token a score belongs to, standardised rewards, advantages."""

import math
from dataclasses import replace

import check
import common
import lm
import ppo_baseline
import pytest
import qrm

import torch

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_to_mask(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def rows(*values):
    """Rows of unequal length as [B, T] and their mask; the padding is full of large numbers."""
    mask = lengths_to_mask([len(row) for row in values])
    known = torch.tensor(sum(values, []), dtype=torch.float64)
    return torch.full(mask.shape, 1e3).double().masked_scatter(mask, known), mask


# ---- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta, loss", [(0.0, 2.1269), (10.0, 0.6931), (20.0, 0.1269), (-10.0, 4.0181)])
def test_qrm_1(delta, loss):
    """-log sigmoid(0.2 delta - 2) at the paper's constants; the gradient is -0.2 sigmoid(2 - 0.2 delta)."""
    chosen, rejected = torch.tensor([delta + 1.5]).double().requires_grad_(), torch.tensor([1.5]).double()
    args = qrm.Args()
    value, metrics = qrm.pair_loss(chosen, rejected, args.beta, args.margin)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=5e-5)
    slope = -0.2 / (1 + math.exp(0.2 * delta - 2))
    assert chosen.grad.item() == pytest.approx(slope)
    assert delta != 0 or slope == pytest.approx(-0.176, abs=5e-4)
    assert (
        metrics["reward_model/pair_accuracy"].item() == (delta > 0) and metrics["reward_model/margin"].item() == delta
    )


def test_pair_loss_is_a_sum_over_pairs():
    """QRM-3 is the same function without a margin: -log sigmoid(beta delta), summed."""
    chosen, rejected = random(7), random(7, seed=1)
    for beta in (1.0, 0.1):
        value, metrics = qrm.pair_loss(chosen, rejected, beta, 0.0)
        assert value.item() == pytest.approx(sum(math.log1p(math.exp(-beta * d)) for d in (chosen - rejected).tolist()))
    assert metrics["reward_model/pair_accuracy"].item() == sum(c > r for c, r in zip(chosen, rejected))
    assert metrics["reward_model/margin"].item() == pytest.approx((chosen - rejected).sum().item())
    assert qrm.pair_loss(chosen + 5, rejected + 5, 0.2, 2.0)[0] == pytest.approx(
        qrm.pair_loss(chosen, rejected, 0.2, 2.0)[0]
    )


@pytest.mark.parametrize(
    "how, expected", [("mean", [2.0, -4.0, 0.5]), ("last", [6.0, -4.0, -1.0]), ("sum", [6.0, -4.0, 1.0])]
)
def test_answer_scores(how, expected):
    """What lies in the padding never counts."""
    scores, mask = rows([1.0, -1.0, 6.0], [-4.0], [2.0, -1.0])
    assert lm.answer_scores(scores, mask, how).tolist() == expected


# ---- which token a score belongs to ----------------------------------------------------------------------------------

PROMPTS, ANSWERS = [[3, 4, 5], [6, 7, 8, 9, 10], [4]], [[5, 6, 7, 8, 2], [8, 2], [9, 10, 11, 2]]


def batch_of(prompts=PROMPTS, answers=ANSWERS) -> dict:
    return common.make_batch(prompts, answers, 0, CPU)


def load(folder, head, **options):
    """{"reward": model} with a head that is not 0, and for dpo the model that it is compared with."""
    models = {"reward": lm.load_model(folder, head="scalar" if head == "scalar" else "lm", device=CPU, **options)}
    if head == "scalar":
        torch.manual_seed(0)
        torch.nn.init.normal_(lm.scalar_head(models["reward"]).weight, std=0.1)
    if head == "dpo":
        models["reward_ref"] = lm.load_model(folder, device=CPU)
        with torch.no_grad():
            for i, parameter in enumerate(models["reward"].parameters()):
                parameter.mul_(1 + 0.3 * math.sin(i + 1))
    return models


@torch.no_grad()
def score(models, batch, objective="qrm"):
    return lm.token_scores(models["reward"], batch, models.get("reward_ref") if objective == "dpo" else None)


@pytest.mark.parametrize("folder", ["tiny_model", "gpt2_model", "qwen_model"])
@pytest.mark.parametrize("head", ["scalar", "lm", "dpo"])
def test_scores_of_rows_without_padding(head, folder, request):
    """Against the models' own logits of one row: a scalar head at the token, log-probabilities at the state before."""
    models = load(request.getfixturevalue(folder), head)
    scores = score(models, batch_of(), "dpo" if head == "dpo" else "qrm")
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        ids, n = torch.tensor([prompt + answer]), len(answer)
        with torch.no_grad():
            logits = {name: model(ids).logits[0] for name, model in models.items()}
        if head == "scalar":
            expected = logits["reward"][len(prompt) :, 0]
        else:
            at = range(len(prompt) - 1, len(prompt) + n - 1)
            logp = {name: x.log_softmax(-1)[list(at), answer] for name, x in logits.items()}
            expected = logp["reward"] - (logp["reward_ref"] if head == "dpo" else 0)
        torch.testing.assert_close(scores[b, :n], expected, atol=1e-5, rtol=1e-5)
        assert (scores[b, n:] == 0).all()
    assert scores[batch_of()["mask"]].std() > 1e-3


@pytest.mark.parametrize("head", ["scalar", "lm"])
def test_another_token_changes_its_own_score_and_later_ones(head, tiny_model):
    """Never an earlier one: token t is changed, and scores 0 .. t-1 are equal to the last bit."""
    models, answer = load(tiny_model, head), [5, 6, 7, 8, 9, 2]
    before = score(models, batch_of([[3, 4]], [answer]))[0]
    for t in range(len(answer)):
        after = score(models, batch_of([[3, 4]], [[*answer[:t], 12, *answer[t + 1 :]]]))[0]
        changed = (after - before).abs()
        assert (changed[:t] < 1e-6).all() and (changed[t:] > 1e-6).all(), t


def blind(model):
    """The model without attention and MLPs: what it says at a token depends on that token alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()


def test_a_planted_token_moves_its_own_score_alone(tiny_model):
    """A scalar head that knows one token, as it stands, gives that very position another score, and no other one."""
    models, answer = load(tiny_model, "scalar"), [5, 6, 7, 8, 9, 2]
    blind(models["reward"])
    before = score(models, batch_of([[3, 4]], [answer]))[0]
    for t in range(len(answer)):
        after = score(models, batch_of([[3, 4]], [[*answer[:t], 12, *answer[t + 1 :]]]))[0]
        assert [u for u in range(len(answer)) if abs(after[u] - before[u]) > 1e-6] == [t]
    other_prompt = score(models, batch_of([[3, 12]], [answer]))[0]
    torch.testing.assert_close(other_prompt, before)


def test_lm_scores_of_a_blind_model(tiny_model):
    """With --head lm the changed token has another log-probability, and so has the next one, whose state it is."""
    models, answer = load(tiny_model, "lm"), [5, 6, 7, 8, 9, 2]
    blind(models["reward"])
    before = score(models, batch_of([[3, 4]], [answer]))[0]
    after = score(models, batch_of([[3, 4]], [[5, 6, 12, 8, 9, 2]]))[0]
    assert [u for u in range(len(answer)) if abs(after[u] - before[u]) > 1e-6] == [2, 3]


def test_the_end_of_the_sequence_counts_once(tiny_model):
    """encode_completion puts EOS behind the answer; the mean is over the text's tokens and that one."""
    tokenizer = lm.load_tokenizer(tiny_model)
    ids = common.encode_completion(tokenizer, "22+8=30")
    assert len(ids) == 8 and ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    batch = common.make_batch([[3], [3]], [ids, [5] * 12], tokenizer.eos_token_id, CPU)  # padded with EOS
    scores = torch.zeros(batch["mask"].shape).masked_fill(batch["completion_ids"] == tokenizer.eos_token_id, 8.0)
    assert qrm.answer_score(scores, batch["mask"], "qrm").tolist() == [1.0, 0.0]
    models = load(tiny_model, "scalar")
    blind(models["reward"])
    scores = score(models, batch)
    with torch.no_grad():
        own = models["reward"](torch.tensor([ids])).logits[0, :, 0]
    answers = qrm.answer_score(scores, batch["mask"], "qrm")
    assert answers[0].item() == pytest.approx(own.mean().item(), abs=1e-6)


@pytest.mark.parametrize("folder", ["tiny_model", "gpt2_model"])
@pytest.mark.parametrize("head", ["scalar", "lm", "dpo"])
def test_padding_and_batch_size_change_no_score(head, folder, request):
    models, objective = load(request.getfixturevalue(folder), head), "dpo" if head == "dpo" else "qrm"
    assert check.padding_error(lambda batch: score(models, batch, objective), batch_of()) < 1e-5


# ---- from pairs to the loss ------------------------------------------------------------------------------------------


def pairs_of(tiny_model, objective="qrm", head="scalar"):
    """Three pairs: (models, batch, args)."""
    tokenizer = lm.load_tokenizer(tiny_model)
    texts = [("7+5=", "12", "2=1"), ("1+2+3=", "3+3=6", "6"), ("4+4=", "8", "1+1+1=3")]
    made, _ = common.encode_pairs(tokenizer, [dict(zip(("prompt", "chosen", "rejected"), t)) for t in texts], 24, 24)
    models = torch.nn.ModuleDict(load(tiny_model, head))
    return models, qrm.make_batch(made, tokenizer, CPU), qrm.Args(objective=objective, head=head, micro_batch=2)


@pytest.mark.parametrize("objective", ["qrm", "orm"])
def test_pair_objective(objective, tiny_model):
    """Chosen answers are the first rows: QRM-1 on means, QRM-3 on last tokens, summed over pairs."""
    models, batch, args = pairs_of(tiny_model, objective)
    scores, mask = score(models, batch).double(), batch["mask"]
    last = mask.sum(1) - 1
    answers = {"qrm": (scores * mask).sum(1) / mask.sum(1), "orm": scores[torch.arange(6), last]}[objective]
    beta, margin = {"qrm": (0.2, 2.0), "orm": (1.0, 0.0)}[objective]
    delta = answers[:3] - answers[3:]
    expected = -torch.nn.functional.logsigmoid(beta * delta - margin).sum()
    loss, metrics = qrm.pair_objective(models["reward"], batch, args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["reward_model/margin"].item() == pytest.approx(delta.sum().item(), rel=1e-4)


def test_lm_head_adds_cross_entropy_on_the_chosen_answer(tiny_model):
    models, batch, args = pairs_of(tiny_model, head="lm")
    answers = qrm.answer_score(score(models, batch), batch["mask"], "qrm")
    both, alone = (
        qrm.pair_objective(models["reward"], batch, replace(args, ce_weight=w))[0].item() for w in (0.5, 0.0)
    )
    assert both - alone == pytest.approx(-0.5 * answers[:3].sum().item(), rel=1e-5) and both - alone > 0.1


@pytest.mark.parametrize("objective", ["qrm", "orm"])
def test_gradients_ignore_micro_batches(objective, tiny_model):
    """The mean over pairs, and one step of SGD on it, for any micro-batch size."""
    found = []
    for size in (6, 1, 2, 4, 8):
        models, batch, args = pairs_of(tiny_model, objective)
        optimizer = torch.optim.SGD(models.parameters(), lr=1.0)
        metrics = qrm.update(models, optimizer, batch, replace(args, micro_batch=size, max_grad_norm=1e9))
        found.append((metrics, torch.cat([p.detach().flatten() for p in models.parameters()])))
    for metrics, weights in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(weights, found[0][1], atol=1e-5, rtol=1e-4)


# ---- advantages ------------------------------------------------------------------------------------------------------


def standard(values):
    """A list standardised by hand."""
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    return [(x - mean) / deviation for x in values]


def scored(critic=True) -> dict:
    mask = lengths_to_mask([3, 1, 2])
    batch = {"mask": mask, "rewards": random(3, 3) * mask}
    return batch | ({"values": random(3, 3, seed=1) * mask} if critic else {})


def test_advantage_token():
    """QRM-2: A_t = Z_t - V_t, nothing is summed over the future, nothing whitened; the critic regresses on Z."""
    batch = scored()
    ppo_baseline.estimate_advantages(batch, ppo_baseline.Args(advantage="token"))
    torch.testing.assert_close(batch["advantages"], batch["rewards"] - batch["values"])
    torch.testing.assert_close(batch["returns"], batch["rewards"])
    plain = scored(critic=False)
    ppo_baseline.estimate_advantages(plain, ppo_baseline.Args(advantage="token"))
    assert torch.equal(plain["advantages"], plain["rewards"])


def test_advantage_return():
    """`return`: the discounted reward to go of each token, whitened over all tokens, without a baseline."""
    batch = scored(critic=False)
    ppo_baseline.estimate_advantages(batch, ppo_baseline.Args(advantage="return", gamma=0.9))
    r, flat = batch["rewards"].tolist(), []
    for b, length in enumerate([3, 1, 2]):
        flat += [sum(0.9 ** (u - t) * r[b][u] for u in range(t, length)) for t in range(length)]
    assert batch["advantages"][batch["mask"]].tolist() == pytest.approx(standard(flat), abs=1e-6)
    assert (batch["advantages"][~batch["mask"]] == 0).all() and "returns" not in batch

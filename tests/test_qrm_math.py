"""The mathematics of Q-RM: losses by hand, which token a score belongs to, standardised rewards, advantages."""

import math
from dataclasses import replace

import check
import common
import ppo_baseline
import pytest
import qrm

import torch

CPU = torch.device("cpu")
OBJECTIVES = ("qrm", "orm", "step_prm", "dpo")


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
    """QRM-3 and QRM-5 are the same function without a margin: -log sigmoid(beta delta), summed."""
    chosen, rejected = random(7), random(7, seed=1)
    for beta in (1.0, 0.1):
        value, metrics = qrm.pair_loss(chosen, rejected, beta, 0.0)
        assert value.item() == pytest.approx(sum(math.log1p(math.exp(-beta * d)) for d in (chosen - rejected).tolist()))
    assert metrics["reward_model/pair_accuracy"].item() == sum(c > r for c, r in zip(chosen, rejected))
    assert metrics["reward_model/margin"].item() == pytest.approx((chosen - rejected).sum().item())
    assert qrm.pair_loss(chosen + 5, rejected + 5, 0.2, 2.0)[0] == pytest.approx(
        qrm.pair_loss(chosen, rejected, 0.2, 2.0)[0]
    )


def test_step_loss():
    """QRM-4: log 2 at 0; right steps are pushed up and wrong ones down; accuracy is the sign."""
    scores = torch.tensor([0.0, 0.0, 2.0, -1.0, 3.0]).double().requires_grad_()
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]).double()
    value, metrics = qrm.step_loss(scores, labels)
    value.backward()
    expected = 2 * math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3))
    assert value.item() == pytest.approx(expected)
    torch.testing.assert_close(scores.grad, scores.detach().sigmoid() - labels)
    assert metrics["reward_model/step_accuracy"].item() == 3  # 0 is not > 0: the second, third and fourth


@pytest.mark.parametrize("objective, expected", [
    ("qrm", [2.0, -4.0, 0.5]), ("orm", [6.0, -4.0, -1.0]), ("dpo", [6.0, -4.0, 1.0]), ("step_prm", [1.0, -4.0, -1.0]),
])  # fmt: skip
def test_sequence_score(objective, expected):
    """Mean over tokens, last token, sum, least at the ends of steps; what lies in the padding never counts."""
    scores, mask = rows([1.0, -1.0, 6.0], [-4.0], [2.0, -1.0])
    ends = torch.tensor([[True, False, True], [True, False, False], [False, True, False]])
    assert qrm.sequence_score(scores, mask, ends, objective).tolist() == expected


def test_policy_loss_is_that_of_the_trunk():
    new, old, advantages = random(20) - 2, random(20, seed=1) - 2, random(20, seed=2)
    for loss in ("ppo", "reinforce"):
        (a, metrics_a), (b, metrics_b) = (s.policy_loss(new, old, advantages, loss, 0.2) for s in (qrm, ppo_baseline))
        assert a == b and metrics_a == metrics_b


# ---- which token a score belongs to ----------------------------------------------------------------------------------

PROMPTS, ANSWERS = [[3, 4, 5], [6, 7, 8, 9, 10], [4]], [[5, 6, 7, 8, 2], [8, 2], [9, 10, 11, 2]]


def batch_of(prompts=PROMPTS, answers=ANSWERS) -> dict:
    return common.make_batch(prompts, answers, 0, CPU)


def load(folder, head, **options):
    """{"reward": model} with a head that is not 0, and for dpo the model that it is compared with."""
    models = {"reward": common.load_model(folder, head="scalar" if head == "scalar" else "lm", device=CPU, **options)}
    qrm.randomise(models["reward"])
    if head == "dpo":
        models["reward_ref"] = common.load_model(folder, device=CPU)
        with torch.no_grad():
            for i, parameter in enumerate(models["reward"].parameters()):
                parameter.mul_(1 + 0.3 * math.sin(i + 1))
    return models


@torch.no_grad()
def score(models, batch, objective="qrm"):
    return qrm.token_scores(models, batch, objective)


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
    tokenizer = common.load_tokenizer(tiny_model)
    ids = common.encode_completion(tokenizer, "22+8=30")
    assert len(ids) == 8 and ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    batch = common.make_batch([[3], [3]], [ids, [5] * 12], tokenizer.eos_token_id, CPU)  # padded with EOS
    scores = torch.zeros(batch["mask"].shape).masked_fill(batch["completion_ids"] == tokenizer.eos_token_id, 8.0)
    assert qrm.sequence_score(scores, batch["mask"], batch["mask"], "qrm").tolist() == [1.0, 0.0]
    models = load(tiny_model, "scalar")
    blind(models["reward"])
    scores = score(models, batch)
    with torch.no_grad():
        own = models["reward"](torch.tensor([ids])).logits[0, :, 0]
    answers = qrm.sequence_score(scores, batch["mask"], batch["mask"], "qrm")
    assert answers[0].item() == pytest.approx(own.mean().item(), abs=1e-6)


@pytest.mark.parametrize("folder", ["tiny_model", "gpt2_model"])
@pytest.mark.parametrize("head", ["scalar", "lm", "dpo"])
def test_padding_and_batch_size_change_no_score(head, folder, request):
    models, objective = load(request.getfixturevalue(folder), head), "dpo" if head == "dpo" else "qrm"
    assert check.padding_error(lambda batch: score(models, batch, objective), batch_of()) < 1e-5


def test_dpo_with_adapters_compares_with_the_model_below_them(tiny_model):
    """LoRA needs no copy: fresh adapters give 0 everywhere, moved ones the log-ratio to the plain model."""
    models = load(tiny_model, "lm", lora_rank=2)
    assert score(models, batch_of(), "dpo").abs().max() < 1e-6
    with torch.no_grad():
        for parameter in common.trainable_parameters(models["reward"]):
            parameter.add_(0.3)
    plain = {"reward": common.load_model(tiny_model, device=CPU)}
    ratio = score(models, batch_of(), "qrm") - score(plain, batch_of(), "qrm")
    assert ratio.abs().max() > 0.01
    torch.testing.assert_close(score(models, batch_of(), "dpo"), ratio, atol=1e-5, rtol=1e-5)


# ---- from answers to the loss ----------------------------------------------------------------------------------------

STEP_LABELS = [[True, False], [False], [True]]


def answers_of(tiny_model, objective):
    """Three pairs as `prepare_reward` hands them on: (rows, sides, batch, args)."""
    tokenizer = common.load_tokenizer(tiny_model)
    texts = [("7+5=", "12", "2=1"), ("1+2+3=", "3+3=6", "6"), ("4+4=", "8", "1+1+1=3")]
    made = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
    made, _ = common.encode_pairs(tokenizer, made, 24, 24)
    for row in made:
        for side in ("chosen", "rejected"):
            row[f"{side}_labels"] = [len(x) > 1 for x in row[side].split("=")]
    head = {"dpo": "lm"}.get(objective, "scalar")
    args = qrm.Args(objective=objective, head=head, step_separator="=", micro_batch=2, stage="reward")
    return made, ("chosen", "rejected"), qrm.answer_batch(made, ("chosen", "rejected"), tokenizer, args, CPU), args


def test_answer_batch(tiny_model):
    """Chosen answers first, then rejected ones; labels lie on the tokens that end their steps, the last one on EOS."""
    made, _, batch, _ = answers_of(tiny_model, "step_prm")
    tokenizer = common.load_tokenizer(tiny_model)
    texts = [row[side] for side in ("chosen", "rejected") for row in made]
    assert common.decode(tokenizer, batch["completion_ids"].tolist()) == texts
    assert batch["step_ends"].sum(1).tolist() == [len(text.split("=")) for text in texts]
    for b, text in enumerate(texts):
        ends = batch["step_ends"][b].nonzero()[:, 0].tolist()
        assert ends == [i for i, c in enumerate(text) if c == "="] + [len(text)]
        assert batch["step_labels"][b, ends].tolist() == [float(len(x) > 1) for x in text.split("=")]
    assert (batch["step_labels"][~batch["step_ends"]] == 0).all()


def test_find_steps_and_step_mask(gpt2_model, letter_tokenizer):
    """A step ends at a token that contains the separator, and at the last token, of whatever kind; never twice."""
    ids = letter_tokenizer("a=b=")["input_ids"]
    eos = letter_tokenizer.eos_token_id
    completions = [[*ids, eos], ids, ids[:3], ids[:1], [eos]]
    expected = [[1, 3, 4], [1, 3], [1, 2], [0], [0]]
    assert qrm.find_steps(completions, letter_tokenizer, "=") == expected
    mask = lengths_to_mask([5, 4, 3, 1, 1])
    ends = qrm.step_mask(completions, letter_tokenizer, "=", mask)
    assert ends.dtype == torch.bool and [row.nonzero()[:, 0].tolist() for row in ends] == expected
    assert qrm.find_steps(completions, letter_tokenizer, "\n") == [[4], [3], [2], [0], [0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reward_objective(objective, tiny_model):
    """The loss of each objective from scores that are known: the equation, answer by answer."""
    made, _, batch, args = answers_of(tiny_model, objective)
    models = load(tiny_model, {"dpo": "dpo"}.get(objective, "scalar"))
    scores = score(models, batch, objective).double()
    loss, metrics = qrm.reward_objective(models, batch, args)
    n, lengths, total = len(made), batch["mask"].sum(1), 0.0
    if objective == "step_prm":
        for z, label in zip(scores[batch["step_ends"]].tolist(), batch["step_labels"][batch["step_ends"]].tolist()):
            total += math.log1p(math.exp(-z if label else z))
    else:
        means = [scores[b, : lengths[b]].mean().item() for b in range(2 * n)]
        sums = [scores[b, : lengths[b]].sum().item() for b in range(2 * n)]
        lasts = [scores[b, lengths[b] - 1].item() for b in range(2 * n)]
        for i in range(n):
            x = {"qrm": 0.2 * (means[i] - means[n + i]) - 2, "orm": lasts[i] - lasts[n + i]}
            x["dpo"] = 0.1 * (sums[i] - sums[n + i])
            total += math.log1p(math.exp(-x[objective]))
    assert loss.item() == pytest.approx(total, rel=1e-5) == metrics["loss/reward_model"].item()


def test_lm_head_adds_cross_entropy_on_the_chosen_answer(tiny_model):
    """--head lm: beside QRM-1, minus the mean log-probability of the chosen answer, with --ce_weight."""
    made, _, batch, args = answers_of(tiny_model, "qrm")
    models = load(tiny_model, "lm")
    scores = score(models, batch)
    answers = qrm.sequence_score(scores, batch["mask"], batch["step_ends"], "qrm")
    alone = qrm.reward_objective(models, batch, replace(args, head="lm", ce_weight=0.0))[0].item()
    both = qrm.reward_objective(models, batch, replace(args, head="lm", ce_weight=0.5))[0].item()
    assert alone == pytest.approx(qrm.pair_loss(*answers.chunk(2), 0.2, 2.0)[0].item(), rel=1e-6)
    assert both - alone == pytest.approx(-0.5 * answers[: len(made)].sum().item(), rel=1e-5)
    assert both - alone > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_ignore_micro_batches(objective, tiny_model):
    """The mean over pairs (or over labelled steps, of which pairs have unequal numbers) for any micro-batch size."""
    made, _, batch, args = answers_of(tiny_model, objective)
    models = torch.nn.ModuleDict(load(tiny_model, {"dpo": "dpo"}.get(objective, "scalar")))
    if "reward_ref" in models:
        models["reward_ref"].requires_grad_(False)
    counts = []

    def backward(size):
        sums, count = qrm.accumulate_reward(models, batch, len(made), replace(args, micro_batch=size))
        counts.append((count, sums["loss/reward_model"]))

    ok, detail = common.check_micro_batches(backward, models, [6, 1, 2, 4, 8], 1e-4)
    assert ok, detail
    assert counts[0][0] == (batch["step_ends"].sum().item() if objective == "step_prm" else 3)
    assert all(c[1] == pytest.approx(counts[0][1], rel=1e-5) and c[0] == counts[0][0] for c in counts)
    backward(2)
    gradient = torch.cat([p.grad.flatten() for p in common.trainable_parameters(models) if p.grad is not None])
    models.zero_grad(set_to_none=True)
    (qrm.reward_objective(models, batch, args)[0] / counts[0][0]).backward()
    whole = torch.cat([p.grad.flatten() for p in common.trainable_parameters(models) if p.grad is not None])
    torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-4)


# ---- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, lengths, finished, picked",
    [
        ([1, 0], [5, 9], [True, True], (0, 1)),
        ([0, 1, 0, 1], [3, 9, 8, 4], [True] * 4, (1, 2)),  # the closest lengths: 9 and 8 (or 4 and 3, which come later)
        ([0, 1, 0, 1], [3, 9, 6, 4], [True] * 4, (3, 0)),
        ([0, 1, 0, 1], [3, 9, 6, 4], [False, True, True, True], (3, 2)),  # a cut answer is not taken
        ([0.5, 1, 0, 0.9], [5, 5, 9, 5], [True] * 4, (1, 2)),  # best and worst, however far apart in length
        ([1, 1, 1], [3, 4, 5], [True] * 3, None),
        ([1, 1, 0], [3, 4, 5], [True, True, False], None),  # the only wrong one was cut
        ([1, 0], [3, 4], [False, False], None),
        ([1, 0], [3, 4], [True, False], None),
    ],
)
def test_pick_pair(scores, lengths, finished, picked):
    assert qrm.pick_pair(scores, lengths, finished) == picked


# ---- rewards of tokens -----------------------------------------------------------------------------------------------


def standard(values, center=True):
    """A list standardised by hand."""
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5
    return [(x - mean * center) / deviation for x in values]


@pytest.mark.parametrize("center", [True, False])
def test_standardise(center):
    """Mean 0 and variance 1 over the tokens asked for; off centre only the scale changes, and 0 stays 0."""
    scores, mask = rows([1.0, 2.0, 6.0], [-4.0], [0.0, 5.0])
    out = qrm.standardise(scores, mask, center)
    assert out.dtype == torch.float32 and (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], torch.tensor(standard([1.0, 2.0, 6.0, -4.0, 0.0, 5.0], center)))
    assert out[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert center == (abs(out[mask].mean().item()) < 1e-6) and (center or out[2, 0] == 0)
    torch.testing.assert_close(qrm.standardise(3 * scores + 7, mask, True), qrm.standardise(scores, mask, True))
    flat = qrm.standardise(torch.full((2, 3), 4.0), torch.ones(2, 3).bool(), True)
    assert flat.abs().max() < 1e-3  # nothing to tell: no signal, and no nan


def rewards_of(**changes):
    scores, mask = rows([1.0, 2.0, 6.0], [-4.0], [0.0, 5.0])
    ends = torch.tensor([[False, True, True], [True, False, False], [False, True, False]])
    return qrm.model_rewards({"mask": mask, "scores": scores, "step_ends": ends}, qrm.Args(**changes))


def assert_rows(found, expected):
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert sum(found, []) == pytest.approx(sum(expected, []), abs=1e-6)


def test_rewards_of_each_model():
    """Standardised over what a model scores: all tokens, last tokens, ends of steps; 0 for all other tokens."""
    tokens, lasts, ends = (standard(x) for x in ([1.0, 2, 6, -4, 0, 5], [6.0, -4, 5], [2.0, 6, -4, 5]))
    every = [tokens[:3], [tokens[3]], tokens[4:]]
    assert_rows(rewards_of(reward="qrm"), every)
    assert_rows(rewards_of(reward="dpo"), every)
    assert_rows(rewards_of(reward="orm"), [[0, 0, lasts[0]], [lasts[1]], [0, lasts[2]]])
    assert_rows(rewards_of(reward="orm", orm_credit="broadcast"), [[lasts[0]] * 3, [lasts[1]], [lasts[2]] * 2])
    assert_rows(rewards_of(reward="step_prm"), [[0, ends[0], ends[1]], [ends[2]], [0, ends[3]]])
    off = standard([1.0, 2, 6, -4, 0, 5], center=False)
    assert_rows(rewards_of(reward="qrm", center=False), [off[:3], [off[3]], off[4:]])


def test_eos_reward_mean():
    """--eos_reward mean: the last token gets the mean of its completion, itself included."""
    t = standard([1.0, 2, 6, -4, 0, 5])
    expected = [[t[0], t[1], sum(t[:3]) / 3], [t[3]], [t[4], (t[4] + t[5]) / 2]]
    assert_rows(rewards_of(reward="qrm", eos_reward="mean"), expected)


def test_abs_is_no_kl():
    """--kl_estimator abs: |log pi - log ref| is subtracted, so that any distance costs, in both directions."""
    log_ratio = torch.tensor([[0.5, -0.5, 0.0]])
    assert qrm.kl_estimate(log_ratio, torch.zeros(1, 3), "abs").tolist() == [[0.5, 0.5, 0.0]]
    for estimator in ("k1", "k2", "k3"):
        theirs = ppo_baseline.kl_estimate(log_ratio, torch.zeros(1, 3), estimator)
        assert torch.equal(qrm.kl_estimate(log_ratio, torch.zeros(1, 3), estimator), theirs)
    batch = {"mask": lengths_to_mask([3, 2]), "old_logprobs": random(2, 3), "ref_logprobs": random(2, 3, seed=1)}
    given = [[0.1, 0.2, 0.3], [0.4, 0.5]]
    args = qrm.Args(kl_coef=0.3, kl_estimator="abs", missing_eos_penalty=1.0)
    found = qrm.token_rewards(given, batch, [True, False], args)
    kl = (batch["old_logprobs"] - batch["ref_logprobs"]).abs()
    expected = torch.tensor([[0.1, 0.2, 0.3], [0.4, -0.5, 0.0]]) - 0.3 * kl * batch["mask"]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


# ---- advantages ------------------------------------------------------------------------------------------------------


def scored(critic=True) -> dict:
    mask = lengths_to_mask([3, 1, 2])
    batch = {"mask": mask, "rewards": random(3, 3) * mask}
    return batch | ({"values": random(3, 3, seed=1) * mask} if critic else {})


@pytest.mark.parametrize("weight", [1.0, 0.01, 0.0])
def test_advantage_token(weight):
    """QRM-2: A_t = Z_t - w V_t, nothing is summed over the future, nothing whitened; the critic regresses on Z."""
    batch = scored()
    qrm.estimate_advantages(batch, qrm.Args(advantage="token", value_baseline_weight=weight))
    torch.testing.assert_close(batch["advantages"], batch["rewards"] - weight * batch["values"])
    torch.testing.assert_close(batch["returns"], batch["rewards"])
    plain = scored(critic=False)
    qrm.estimate_advantages(plain, qrm.Args(advantage="token"))
    assert torch.equal(plain["advantages"], plain["rewards"])


def test_advantage_return():
    """`return`: the discounted reward to go of each token, whitened over all tokens, without a baseline."""
    batch = scored(critic=False)
    qrm.estimate_advantages(batch, qrm.Args(advantage="return", gamma=0.9))
    r, flat = batch["rewards"].tolist(), []
    for b, length in enumerate([3, 1, 2]):
        flat += [sum(0.9 ** (u - t) * r[b][u] for u in range(t, length)) for t in range(length)]
    assert batch["advantages"][batch["mask"]].tolist() == pytest.approx(standard(flat), abs=1e-6)
    assert (batch["advantages"][~batch["mask"]] == 0).all() and "returns" not in batch


def test_advantage_gae():
    """`gae` is the trunk's; without a critic V is 0, and with lambda 1 what is left is `return`."""
    args = qrm.Args(advantage="gae", gamma=0.9, lam=0.8)
    batch, trunk = scored(), scored()
    qrm.estimate_advantages(batch, args)
    ppo_baseline.estimate_advantages(trunk, ppo_baseline.Args(advantage="gae", gamma=0.9, lam=0.8))
    assert torch.equal(batch["advantages"], trunk["advantages"]) and torch.equal(batch["returns"], trunk["returns"])
    alone, to_go = scored(critic=False), scored(critic=False)
    qrm.estimate_advantages(alone, qrm.Args(advantage="gae", gamma=0.9, lam=1.0))
    qrm.estimate_advantages(to_go, qrm.Args(advantage="return", gamma=0.9))
    torch.testing.assert_close(alone["advantages"], to_go["advantages"])


def test_advantage_reward_and_group():
    batch, trunk = scored(), scored()
    for advantage in ("reward", "group"):
        qrm.estimate_advantages(batch, qrm.Args(advantage=advantage, samples_per_prompt=3))
        ppo_baseline.estimate_advantages(trunk, ppo_baseline.Args(advantage=advantage, samples_per_prompt=3))
        assert torch.equal(batch["advantages"], trunk["advantages"])


@pytest.mark.parametrize("reward, loss, advantage, critic", [
    ("qrm", "ppo", "token", True), ("qrm", "reinforce", "token", False), ("dpo", "ppo", "token", True),
    ("orm", "ppo", "gae", True), ("orm", "reinforce", "return", False), ("step_prm", "ppo", "gae", True),
    ("rule", "ppo", "gae", True), ("rule", "reinforce", "return", False),
])  # fmt: skip
def test_auto(reward, loss, advantage, critic):
    """--advantage auto, decided by the reward and the loss; --no_critic leaves the critic out."""
    args = qrm.settled(qrm.Args(reward=reward, loss=loss))
    assert args.advantage == advantage and qrm.has_critic(args) == critic
    assert not qrm.has_critic(qrm.settled(qrm.Args(reward=reward, loss=loss, critic=False)))
    assert qrm.settled(qrm.Args(reward=reward, loss=loss, advantage="group")).advantage == "group"

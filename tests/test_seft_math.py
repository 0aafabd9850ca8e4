"""SEFT's parts against closed forms, enumeration and brute force."""

import math
from types import SimpleNamespace

import common
import lm
import pytest
import seft
import tasks
from conftest import random

import torch

DEVICE = torch.device("cpu")
ARGS = SimpleNamespace(temperature=1.0, micro_batch=3, ask="==", then="", labels=["++", "+=", "=+"], max_growth=2.0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return lm.load_model(tiny_model, device=DEVICE)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return lm.load_tokenizer(tiny_model)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_weighted_nll_is_its_sum():
    """SEFT-3 by hand: label tokens six times, the rest once, nothing in the padding."""
    logprobs = -random(2, 4).abs()
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    is_label = torch.tensor([[True, True, False, False], [False] * 4])
    loss, metrics = seft.weighted_nll(logprobs, mask, is_label, 6.0)
    label = -(logprobs[0, 0] + logprobs[0, 1])
    rest = -(logprobs[0, 2] + logprobs[1].sum())
    torch.testing.assert_close(loss, 6 * label + rest)
    torch.testing.assert_close(metrics["loss/label"], label)
    torch.testing.assert_close(metrics["loss/nll"], rest)


def test_gradient_of_label_tokens_is_weighted():
    logprobs = (-random(1, 3).abs()).requires_grad_()
    is_label = torch.tensor([[True, False, False]])
    mask = torch.tensor([[True, True, False]])
    seft.weighted_nll(logprobs, mask, is_label, 4.0)[0].backward()
    assert logprobs.grad.tolist() == [[-4.0, -1.0, 0.0]]


def test_the_step_divides_by_the_weights_of_all_tokens(tiny_model):
    """update(): the weighted mean, its parts as means of their own tokens."""
    model = lm.load_model(tiny_model, device=DEVICE)
    args = SimpleNamespace(**vars(ARGS), label_weight=5.0, max_grad_norm=1.0, stage="evolve")
    rows = [dict(prompt_ids=[1, 5], completion_ids=[14, 14, 6, 2], label_tokens=2)]
    rows += [dict(prompt_ids=[1, 7, 8], completion_ids=[9, 2])]
    batch = seft.make_step(rows, 0, DEVICE)
    assert batch["is_label"].tolist() == [[True, True, False, False], [False] * 4]
    logprobs = lm.policy_logprobs(model, batch, args.temperature)[0].detach()
    label, rest = -logprobs[0, :2].sum(), -(logprobs[0, 2:].sum() + logprobs[1, :2].sum())
    models = torch.nn.ModuleDict({"policy": model})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = seft.update(models, optimizer, batch, 0.1, args)
    assert metrics["loss/total"] == pytest.approx(((5 * label + rest) / (5 * 2 + 4)).item(), rel=1e-5)
    assert metrics["loss/label"] == pytest.approx(label.item() / 2, rel=1e-5)
    assert metrics["loss/nll"] == pytest.approx(rest.item() / 4, rel=1e-5)
    assert metrics["length/mean"] == 2 and metrics["lr"] == optimizer.param_groups[0]["lr"] == 0.1


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_need_forgets_a_habit_of_copying():
    """R0 likes to repeat what it reads by c nats: the need does not move. A swapped pair gets the label No."""
    for habit in (0.0, 3.0):
        up, stay, keep, down = -1.0, -2.0 + habit, -0.5 + habit, -3.0
        assert seft.need(up, stay, keep, down) == 3.5
        swapped = seft.need(down, keep, stay, up)  # the annotator took the one for the other
        assert swapped == -3.5 and seft.labels_of([swapped], [swapped, 3.5]) == [seft.NO]


def test_labels_of_needs():
    """SEFT-2: No up to 0, Minor up to the median of the positive needs, Major above."""
    all_needs = [-1.0, 0.0, 0.1, 0.2, 0.3, 5.0]
    names = [seft.NAMES[label] for label in seft.labels_of([*all_needs, 0.25, 0.26], all_needs)]
    assert names == ["no", "no", "minor", "minor", "major", "major", "minor", "major"]
    assert seft.labels_of([-1.0, 1.0], [-1.0, -2.0]) == [seft.NO, seft.MAJOR]


def test_decide():
    chances = [[0.2, 0.3, 0.5], [0.35, 0.05, 0.6], [0.1, 0.0, 0.9]]
    assert [seft.decide(c, 0.55) for c in chances] == [seft.MINOR, seft.NO, seft.NO]
    assert [seft.decide(c, 1.0) for c in chances] == [seft.MINOR, seft.MAJOR, seft.MAJOR]


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_is_the_best(seed):
    """No other threshold gives better answers; where keeping does not pay, nothing is kept."""
    rng = tasks.generator(seed, "thresholds")
    chances = [round(x, 1) for x in rng.random(12).tolist()]  # with ties
    kept, revised = (rng.integers(0, 2, 12).astype(float).tolist() for _ in range(2))

    def quality(t):
        return sum(k if c > t else r for c, k, r in zip(chances, kept, revised))

    t = seft.best_threshold(chances, kept, revised)
    assert quality(t) == max(quality(abs(other)) for other in [0.0, 1.0, *chances, *(c - 1e-6 for c in chances)])
    assert seft.best_threshold(chances, kept, [1.0] * 12) == 1.0


def test_a_threshold_that_keeps_all():
    t = seft.best_threshold([0.2, 0.6], [1.0, 1.0], [0.0, 0.0])
    assert 0 <= t < 0.2


def test_label_chances_are_a_distribution(model, tokenizer):
    """judge() = softmax of the three strings' log-probabilities, from a forward pass over each."""
    data, sampling = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(policy=model)
    answers = [answer_of(row={"prompt": x}, text=y) for x, y in (("7+15=", "12"), ("3+4+5=", "7+5=12"))]
    seft.judge(sampling, answers, data, ARGS)
    for a in answers:
        assert sum(a.chances) == pytest.approx(1, abs=1e-12) and min(a.chances) > 0
        ids, totals = common.encode_prompt(tokenizer, a.row["prompt"] + a.text + "=="), []
        for label in seft.label_ids(tokenizer, ARGS):
            with torch.no_grad():
                logp = model(torch.tensor([ids + label])).logits[0].log_softmax(-1)
            totals.append(sum(logp[len(ids) + i - 1, x].item() for i, x in enumerate(label)))
        assert a.chances == pytest.approx([math.exp(t) / sum(map(math.exp, totals)) for t in totals], rel=1e-4)
        assert a.label == (seft.MAJOR if totals[0] > totals[1] else seft.MINOR)


def test_greedy_is_what_greedy_decoding_writes(model, tokenizer):
    """likelihoods(): an answer is greedy exactly where the sampler writes it; sums and means are of its tokens."""
    prompts = [common.encode_prompt(tokenizer, text) for text in ("7+15=", "12+3=", "1+1=")]
    written = lm.generate(model, prompts, max_new_tokens=6, stop_ids=[2], pad_id=0)
    other = [[*ids[:-1], 3 + (ids[-1] == 3)] for ids in written]
    scores = seft.likelihoods(model, list(zip(prompts * 2, written + other)), 0, ARGS)
    assert [s["greedy"] for s in scores] == [True] * 3 + [False] * 3
    assert all(s["mean"] * len(ids) == pytest.approx(s["sum"]) for s, ids in zip(scores, written + other))


def answer_of(**changes) -> seft.Answer:
    about = dict(number=0, row={}, ids=[5] * 6, text="", ended=True, before=None)
    return seft.Answer(**about | changes)


# ---- revisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, ended, why",
    [
        ("22+8=30", True, None),
        ("22+8=30", False, "unfinished"),
        ("++22=30", True, "echo"),
        ("22=+8=30", True, "echo"),
        ("22==30", True, "echo"),
        ("", True, "malformed"),
        ("22+8", True, "malformed"),
        ("22+8=30=30=30=30", True, "long"),
    ],
)
def test_faults(text, ended, why, model, tokenizer):
    """What is not fit to learn from is named; what is fit is not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [2] * ended
    data = SimpleNamespace(task=tasks.load_task("chains"), tokenizer=tokenizer)
    sampling = lm.Sampling(model, tokenizer, 24, 24, 1.0, 8)
    assert seft.fault_of(ids or [5], [5] * 6, sampling, data, ARGS) == why


def test_rows_of_the_reviser(tokenizer):
    """Major and Minor are followed by y_h, No by the end alone; what R0 would keep is a row of its own."""
    pairs = [
        dict(prompt="7+15=", chosen="22", rejected="12", label=label, keep_chosen=label == 0) for label in range(3)
    ]
    pairs = [p | {"chosen_ids": common.encode_completion(tokenizer, p["chosen"])} for p in pairs]
    data = SimpleNamespace(tokenizer=tokenizer)
    rows = seft.reviser_rows(data, pairs, ARGS)
    shown = [tokenizer.decode(r["prompt_ids"]) + tokenizer.decode(r["completion_ids"]) for r in rows]
    assert shown == [
        "<bos>7+15=12==++22<eos>",
        "<bos>7+15=22===+<eos>",
        "<bos>7+15=12==+=22<eos>",
        "<bos>7+15=12===+<eos>",
    ]
    again = SimpleNamespace(**vars(ARGS) | {"then": "{prompt}"})
    rows = seft.reviser_rows(data, pairs[1:], again)
    assert tokenizer.decode(rows[0]["completion_ids"]) == "+=7+15=22<eos>" and rows[0]["label_tokens"] == 2
    assert tokenizer.decode(rows[1]["completion_ids"]) == "=+<eos>"
    plain = seft.reviser_rows(data, [{k: p[k] for k in p if k != "label"} for p in pairs[:1]], ARGS)
    assert tokenizer.decode(plain[0]["completion_ids"]) == "22<eos>" and plain[0]["label_tokens"] == 0


def test_auc():
    """The share of (positive, negative) in the right order, ties counted half."""
    scores, positive = [0.1, 0.4, 0.4, 0.8, 0.8], [False, True, False, True, False]
    pairs = [(p, n) for p, a in zip(scores, positive) for n, b in zip(scores, positive) if a and not b]
    exact = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    sides = [[s for s, p in zip(scores, positive) if p == kind] for kind in (True, False)]
    assert seft.auc(*sides) == pytest.approx(exact)
    assert seft.auc([1.0], []) is seft.auc([], [1.0]) is None


def test_what_a_reviser_reads(tokenizer):
    """Text goes on after the prompt; messages get the answer as a turn of the assistant, then --ask.

    R writes the label and the question; R0, which has no label, has read the question already; No ends the text.
    """
    args = SimpleNamespace(**vars(ARGS) | {"then": "{prompt}"})
    for prompt in ("7+15=", [{"role": "user", "content": "7+15="}]):
        ids = [seft.reviser_ids(tokenizer, prompt, "12", label, args) for label in (None, seft.MINOR, seft.NO)]
        assert [tokenizer.decode(x[:n]) for x, n in ids] == ["<bos>7+15=12==7+15="] + ["<bos>7+15=12=="] * 2
        assert [tokenizer.decode(x[n:]) for x, n in ids] == ["", "+=7+15=", "=+"]


def test_round_metrics():
    """Fix, damage, keep rates and AUC from their definitions, on answers whose fate is known."""
    chances = {seft.NO: [0.0, 0.1, 0.9], seft.MAJOR: [0.8, 0.1, 0.1], seft.MINOR: [0.1, 0.8, 0.1]}
    fates = [  # before, after, label, fault
        (1.0, 1.0, seft.NO, None),
        (1.0, 1.0, seft.MINOR, None),
        (1.0, 0.0, seft.MAJOR, None),
        (0.0, 1.0, seft.MAJOR, None),
        (0.0, 0.0, seft.NO, None),
        (0.0, None, seft.MAJOR, "echo"),
    ]
    answers = []
    for before, after, label, fault in fates:
        target = [1, 2] if label == seft.NO else [1, 3, 4]
        fate = dict(before=before, after=after, label=label, fault=fault, ids=[1, 2], target=target)
        answers.append(answer_of(**fate, chances=chances[label], threshold=0.5))
    m = seft.revision_metrics(answers)
    expected = {"revise/fix": 1 / 3, "revise/damage": 1 / 3, "revise/keep_right": 1 / 3, "revise/keep_wrong": 1 / 3}
    expected |= {"revise/before": 1 / 2, "revise/after": 3 / 5, "drop/echo": 1 / 6, "drop/long": 0, "revise/no": 1 / 3}
    expected |= {"revise/before_no": 1 / 2, "revise/same_minor": 0, "revise/threshold": 0.5}
    expected |= {"revise/length_ratio": (2 * 1 + 3 * 1.5) / 5, "revise/auc": 0.5}
    for name, value in expected.items():
        assert m[name] == pytest.approx(value), name

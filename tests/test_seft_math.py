"""SEFT's parts against closed forms, enumeration and brute force."""

import itertools
import math
from types import SimpleNamespace

import common
import pytest
import seft
import tasks
from conftest import random

import torch

DEVICE = torch.device("cpu")
ARGS = SimpleNamespace(temperature=1.0, micro_batch=3, ask="==", then="", labels=["++", "+=", "=+"], max_growth=2.0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return common.load_model(tiny_model, device=DEVICE)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return common.load_tokenizer(tiny_model)


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


def test_the_step_divides_by_the_weights_of_all_tokens(model, tokenizer):
    """accumulate(): the weighted mean, its parts as means of their own tokens."""
    args = SimpleNamespace(**vars(ARGS), label_weight=5.0)
    rows = [dict(prompt_ids=[1, 5], completion_ids=[14, 14, 6, 2], label_tokens=2)]
    rows += [dict(prompt_ids=[1, 7, 8], completion_ids=[9, 2])]
    batch = seft.make_step(rows, 0, DEVICE)
    assert batch["is_label"].tolist() == [[True, True, False, False], [False] * 4]
    metrics = seft.accumulate({"policy": model}, batch, args)
    model.zero_grad()
    logprobs = common.policy_logprobs(model, batch, args.temperature)[0]
    label, rest = -logprobs[0, :2].sum(), -(logprobs[0, 2:].sum() + logprobs[1, :2].sum())
    assert metrics["loss/total"] == pytest.approx(((5 * label + rest) / (5 * 2 + 4)).item(), rel=1e-5)
    assert metrics["loss/label"] == pytest.approx(label.item() / 2, rel=1e-5)
    assert metrics["loss/nll"] == pytest.approx(rest.item() / 4, rel=1e-5)
    assert metrics["length/mean"] == 2


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_contrast_forgets_a_habit_of_copying():
    """R0 likes to repeat what it reads by c nats: the gap of a pair falls by c, its contrast does not move."""
    for habit in (0.0, 3.0):
        up, stay, keep, down = -1.0, -2.0 + habit, -0.5 + habit, -3.0
        assert seft.need(up, stay, keep, down, "gap") == 1.0 - habit
        assert seft.need(up, stay, keep, down, "contrast") == 3.5
        swapped = seft.need(down, keep, stay, up, "contrast")  # the annotator took the one for the other
        assert swapped == -3.5 and seft.label_of(swapped, seft.cuts([swapped, 3.5], "contrast")) == seft.NO
    assert seft.need(-1.0, 0.0, 0.0, 0.0, "hardness") == 1.0


def test_labels_of_gaps():
    """SEFT-2: No up to 0, Minor up to the median of the positive gaps, Major above."""
    gaps = [-1.0, 0.0, 0.1, 0.2, 0.3, 5.0]
    limits = seft.cuts(gaps, "gap")
    assert limits == (0.0, 0.25)
    assert [seft.NAMES[seft.label_of(g, limits)] for g in gaps] == ["no", "no", "minor", "minor", "major", "major"]
    assert seft.cuts([-1.0, -2.0], "gap") == (0.0, 0.0)
    hard = seft.cuts([0.1, 0.2, 3.0], "hardness")
    assert [seft.NAMES[seft.label_of(v, hard)] for v in (0.0, 0.2, 3.0)] == ["minor", "minor", "major"]


def test_decide():
    chances = [[0.2, 0.3, 0.5], [0.35, 0.05, 0.6], [0.1, 0.0, 0.9]]
    assert seft.decide(chances, 0.55, True) == [seft.MINOR, seft.NO, seft.NO]
    assert seft.decide(chances, 0.55, False) == [seft.MINOR, seft.MAJOR, seft.MAJOR]


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
    asked = [common.encode_prompt(tokenizer, text) for text in ("7+15=12==", "3+4+5=7+5=12==")]
    chances = seft.judge(model, tokenizer, asked, ARGS)
    assert all(sum(c) == pytest.approx(1, abs=1e-12) and min(c) > 0 for c in chances)
    for ids, c in zip(asked, chances):
        totals = []
        for label in seft.label_ids(tokenizer, ARGS):
            with torch.no_grad():
                logp = model(torch.tensor([ids + label])).logits[0].log_softmax(-1)
            totals.append(sum(logp[len(ids) + i - 1, x].item() for i, x in enumerate(label)))
        exact = [math.exp(t) / sum(map(math.exp, totals)) for t in totals]
        assert c == pytest.approx(exact, rel=1e-4)


def test_greedy_is_what_greedy_decoding_writes(model, tokenizer):
    """likelihoods(): an answer is greedy exactly where the sampler writes it; sums and means are of its tokens."""
    prompts = [common.encode_prompt(tokenizer, text) for text in ("7+15=", "12+3=", "1+1=")]
    written = common.generate(model, prompts, max_new_tokens=6, stop_ids=[2], pad_id=0)
    other = [[*ids[:-1], 3 + (ids[-1] == 3)] for ids in written]
    scores = seft.likelihoods(model, list(zip(prompts * 2, written + other)), 0, ARGS)
    assert [s["greedy"] for s in scores] == [True] * 3 + [False] * 3
    assert all(s["mean"] * len(ids) == pytest.approx(s["sum"]) for s, ids in zip(scores, written + other))


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
    data = SimpleNamespace(task=tasks.load_task("chains"))
    item = {"answer_ids": [5] * 6}
    sampling = common.Sampling(model, tokenizer, 24, 24, 1.0, 8)
    assert seft.fault(ids or [5], item, sampling, data, ARGS) == why


def test_rows_of_the_reviser(tokenizer):
    """Major and Minor are followed by y_h, No by the end alone; what R0 would keep is a row of its own."""
    pairs = [
        dict(prompt="7+15=", chosen="22", rejected="12", label=label, keep_chosen=label == 0) for label in range(3)
    ]
    pairs = [p | {"chosen_ids": common.encode_completion(tokenizer, p["chosen"])} for p in pairs]
    data = SimpleNamespace(tokenizer=tokenizer)
    rows = seft.rows_for_reviser(data, pairs, ARGS)
    shown = [tokenizer.decode(r["prompt_ids"]) + tokenizer.decode(r["completion_ids"]) for r in rows]
    assert shown == [
        "<bos>7+15=12==++22<eos>",
        "<bos>7+15=22===+<eos>",
        "<bos>7+15=12==+=22<eos>",
        "<bos>7+15=12===+<eos>",
    ]
    again = SimpleNamespace(**vars(ARGS) | {"then": "{prompt}"})
    rows = seft.rows_for_reviser(data, pairs[1:], again)
    assert tokenizer.decode(rows[0]["completion_ids"]) == "+=7+15=22<eos>" and rows[0]["label_tokens"] == 2
    assert tokenizer.decode(rows[1]["completion_ids"]) == "=+<eos>"
    plain = seft.rows_for_reviser(data, [{k: p[k] for k in p if k != "label"} for p in pairs[:1]], ARGS)
    assert tokenizer.decode(plain[0]["completion_ids"]) == "22<eos>" and "label_tokens" not in plain[0]


def test_edit_distance():
    """Against the recursive definition, on all strings of up to 3 letters over 2."""

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = [list(w) for n in range(4) for w in itertools.product([1, 2], repeat=n)]
    assert all(seft.edit_distance(a, b) == slow(a, b) for a in words for b in words)


def test_auc():
    """The share of (positive, negative) in the right order, ties counted half."""
    scores, positive = [0.1, 0.4, 0.4, 0.8, 0.8], [False, True, False, True, False]
    pairs = [(p, n) for p, a in zip(scores, positive) for n, b in zip(scores, positive) if a and not b]
    exact = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    assert seft.auc(scores, positive) == pytest.approx(exact)
    assert seft.auc([1.0], [True]) is None


def test_orders_have_the_same_rows():
    """Each epoch is sorted by likelihood; every order has every row as often."""
    rows = [{"likelihood": -float(x), "id": x} for x in (3, 1, 2, 2, 3, 1, 1)]
    epochs = [0, 0, 0, 1, 1, 1, 2]
    easy, hard = (seft.arrange(rows, order, epochs) for order in ("easy_to_hard", "hard_to_easy"))
    assert [r["id"] for r in easy] == [1, 2, 3, 1, 2, 3, 1] and [r["id"] for r in hard] == [3, 2, 1, 3, 2, 1, 1]
    assert seft.arrange(rows, "shuffled", epochs) is rows


def test_prompts_are_asked_with_their_answers(tokenizer):
    """Text goes on after the prompt; messages get the answer as a turn of the assistant, then the question."""
    ids = seft.revise_ids(tokenizer, "7+15=", "12", ARGS)
    assert tokenizer.decode(ids) == "<bos>7+15=12=="
    ids = seft.revise_ids(tokenizer, [{"role": "user", "content": "7+15="}], "12", ARGS)
    assert tokenizer.decode(ids) == "<bos>7+15=12=="


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
    items = []
    for before, after, label, fault in fates:
        revised = [1, 2] if label == seft.NO else [1, 3, 4]
        item = dict(before=before, after=after, label=label, fault=fault, answer_ids=[1, 2], completion_ids=revised)
        items.append(item | {"chances": chances[label]})
    m = seft.revision_metrics(items, 0.5, SimpleNamespace(revise="adaptive"))
    expected = {"revise/fix": 1 / 3, "revise/damage": 1 / 3, "revise/keep_right": 1 / 3, "revise/keep_wrong": 1 / 3}
    expected |= {"revise/before": 1 / 2, "revise/after": 3 / 5, "drop/echo": 1 / 6, "drop/long": 0, "revise/no": 1 / 3}
    expected |= {"revise/before_no": 1 / 2, "revise/distance_major": 2, "revise/same_minor": 0, "revise/threshold": 0.5}
    expected |= {"revise/length_ratio": (2 * 1 + 3 * 1.5) / 5, "revise/auc": 0.5}
    for name, value in expected.items():
        assert m[name] == pytest.approx(value), name

"""SEFT: self-evolution fine-tuning. A reviser that first judges, then revises, lifts a policy through its own answers.

Chen et al. 2024, "Self-Evolution Fine-Tuning for Policy Optimization" (Findings of EMNLP 2024, arXiv:2406.10813). Only
its abstract and introduction could be read, and there is no public code, so this is a reconstruction: [P] read in the
paper, [T] told by third parties, [I] inferred here. x is a prompt, (y_l, y_h) the worse and the better answer of a
preference pair, pi the policy. A reviser is a language model that reads x and an answer: R0, a preliminary one, writes
a better answer; R, the adaptive one, writes a label (Major, Minor, No: how much must be revised), then the answer.

--stage reviser, from preference pairs:
    warm-up    L = -log R0(y_h | x, y_l)                                                                [T]    (SEFT-1)
    labels     gap(a -> b) = mean log R0(b | x, a) - mean log R0(a | x, a), means over tokens
               need = gap(y_l -> y_h) - gap(y_h -> y_l)                                                 [I]    (SEFT-2)
               No where need <= 0, Minor up to the median of the positive needs, else Major             [I]
               by an R0 that learnt from other pairs [T]: there are two, one for each half of them      [I]
               also No: a y_h that R0, asked to revise it, writes again greedily, token by token        [I]
    reviser    L = -w log R(label | x, y) - log R(y_h | x, y, label); after No only EOS follows         [T]    (SEFT-3)
               w = --label_weight; R goes on from the second R0 [I]
--stage evolve, from prompts without answers, in rounds:
    revision   y0 ~ pi(. | x);  y* = y0 where R(No | x, y0) > t, else what R writes after the           [P]
               likelier of Major and Minor; t is the best one on some graded answers                    [I]
    evolution  L = -log pi(y* | x)                                                                      [P]    (SEFT-4)

    a pair       x  What is 7+15?    y_l  It is 12.    y_h  It is 22.      need = 3.1: Major
    R reads      What is 7+15? | It is 12. | Does the answer above need a revision? If it does, revise it.
    R learns     [Major Revise] It is 22.                                  the label counts w times, the answer once
    a round      x  What is 8+9?     y0  It is 7.      R(Major, Minor, No | x, y0) = .92, .05, .03
    R writes     [Major Revise] It is 17.                                  so y* = It is 17., and pi learns x -> y*

--revise always and never are the controls: never No, and y* = y0. Others are patches in benchmarks/departures.

What differs from the paper, each for a reason
    1. [I] above: the rule of the labels, how No is found among good answers, the threshold t.
    2. Labels are three fixed strings that are scored, never decoded, so that nothing but a label can result.
    3. Means are over all tokens of a step, on all ranks; a label's tokens count w times in the sum and in the count.

Run
    python seft.py --out runs/reviser                                                    # this laptop, offline
    python seft.py --out runs/policy --stage evolve --reviser runs/reviser/model
    python evaluate.py --model runs/policy/model
    python seft.py --model MODEL --dataset PAIRS --out runs/reviser                                     # 1 GPU
    torchrun --nproc_per_node=8 seft.py --stage evolve --model MODEL --dataset PAIRS --prompts PROMPTS \\
        --reviser runs/reviser/model                                                                    # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 seft.py ...   # 2 nodes
More in docs/seft.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

import contextlib
import itertools
import json
import math
import statistics
import zlib

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import common  # before torch: it sets how OpenMP threads wait
import lm
import tasks

import numpy as np
import torch

from common import arg, require


@dataclass
class Args:
    # model and data
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    prompts: str = arg("", "the unannotated prompts: a Hub name or file; empty: made by --task")
    task: tasks.Name = arg("auto", "what the data are; auto: their columns decide")
    test_dataset: str = arg("", "the held-out rows; empty: the test split of the Hub, or the last rows of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    builtin_pairs: int = arg(2000, "the number of built-in preference pairs", at_least=1)
    unannotated: int = arg(2000, "the largest number of unannotated prompts, for all rounds together", at_least=1)
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # reviser
    stage: Literal["reviser", "evolve"] = arg("reviser", "what is trained: the reviser, or with it the policy")
    ask: str = arg("Does the answer above need a revision? If it does, revise it.", "what follows an answer to revise")
    labels: list[str] = arg(["[Major Revise]\n", "[Minor Revise]\n", "[No Revise]\n"], "what a reviser writes first")
    then: str = arg("", "what stands between a label and a revision; {prompt} in it is the question again")
    label_weight: float = arg(6.0, "the weight of a label's tokens, which are few", at_least=0)
    warmup_reviser_steps: int = arg(200, "the number of optimizer steps of R0, for each half of the pairs", at_least=1)
    reviser_steps: int = arg(400, "the number of optimizer steps of the adaptive reviser", at_least=1)
    reviser_lr: float = arg(1e-4, "the learning rate of the revisers; falls linearly to 0", at_least=0)
    # revision
    reviser: str = arg("", "the reviser of --stage evolve; or the model that becomes one, empty: --model")
    revise: Literal["adaptive", "always", "never"] = arg("adaptive", "unless the label is No; each answer; no answer")
    keep_threshold: str = arg("auto", "R(No) above which an answer stays; auto: the best for --calibration answers")
    calibration: int = arg(256, "the number of graded answers per round that decide --keep_threshold auto", at_least=1)
    max_growth: float = arg(4.0, "revisions of more than so many times their answer are dropped; 0: none", at_least=0)
    external_model: str = arg("", "the model that answers in the place of the policy in the last --external_rounds")
    external_rounds: int = arg(0, "the number of last rounds that revise answers of --external_model", at_least=0)
    # method
    rounds: int = arg(2, "the number of times that the policy answers new prompts", at_least=1)
    pair_share: float = arg(0.0, "the share of better answers of pairs in the policy's data", at_least=0, at_most=1)
    # optimisation
    steps: int = arg(200, "the number of optimizer steps of the policy, over all rounds", at_least=1)
    prompts_per_step: int = arg(64, "prompts per step, over all ranks", at_least=1)
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    lr: float = arg(1e-5, "the learning rate of the policy; falls linearly to 0", at_least=0)
    warmup_steps: int = arg(0, "the number of first steps in which learning rates rise linearly", at_least=0)
    max_grad_norm: float = arg(1.0, "the norm to which gradients are clipped", at_least=1e-6)
    lora_rank: int = arg(16, "the rank of LoRA adapters, trained instead of all weights; 0: all weights", at_least=0)
    # run
    out: str = arg("", "the run folder; empty: runs/<script>-<time>")
    resume: bool = arg(False, "continue from the newest checkpoint in --out (from the start if there is none)")
    seed: int = arg(0, "the seed of data order, sampling and new weights", at_least=0)
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "where the run takes place")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "the dtype of the computation; auto: bfloat16 on CUDA")
    activation_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, more time")
    rollout_rows: int = arg(256, "sequences that each rank generates at once", at_least=1)
    eval_every: int = arg(20, "steps between evaluations; there is one before and one after training", at_least=1)
    save_every: int = arg(50, "steps between checkpoints; there is one after the last step", at_least=1)
    wandb: bool = arg(False, "also log to Weights & Biases")


# What the bare command changes. No answer of a built-in task has ++, +=, =+ or == in it. These models know little but
# the form of a question, so they read it again before they write a revision.
BUILTIN = dict(
    ask="==", then="{prompt}", labels=["++", "+=", "=+"], lora_rank=0, max_prompt=24, max_new_tokens=24, micro_batch=64,
    warmup_reviser_steps=100, reviser_steps=300, reviser_lr=1e-3, steps=60, lr=2e-4, warmup_steps=4, eval_every=200,
)  # fmt: skip
MAJOR, MINOR, NO = 0, 1, 2  # in the order of --labels
NAMES = ("major", "minor", "no")


# ---- the method ------------------------------------------------------------------------------------------------------


def weighted_nll(logprobs, mask, is_label, label_weight: float):
    """SEFT-3; without label tokens also SEFT-1 and SEFT-4. All [B, T]; returns sums over tokens, in nats."""
    nll = -logprobs * mask
    label = (nll * is_label).sum()
    rest = nll.sum() - label
    return label_weight * label + rest, {"loss/label": label.detach(), "loss/nll": rest.detach()}


def need(up: float, stay: float, keep: float, down: float) -> float:
    """SEFT-2: how much y_l needs a revision, from the mean log-probabilities per token that R0 gives y_l -> y_h (up),
    y_l -> y_l (stay), y_h -> y_h (keep) and y_h -> y_l (down). Its habit of copying cancels."""
    return (up - stay) - (down - keep)


def labels_of(needs: list[float], all_needs: list[float]) -> list[int]:
    """SEFT-2: No up to 0, Minor up to the median of all positive needs, Major above."""
    median = statistics.median([x for x in all_needs if x > 0] or [0.0])
    return [NO if x <= 0 else MINOR if x <= median else MAJOR for x in needs]


def decide(chances: list[float], threshold: float) -> int:
    """The label from the chances of Major, Minor and No: No above the threshold (never at 1), else the likelier one."""
    return NO if chances[NO] > threshold else MAJOR if chances[MAJOR] > chances[MINOR] else MINOR


def best_threshold(chances: list[float], kept: list[float], revised: list[float]) -> float:
    """The t under which answers are best, if those with a chance of No above t stay as they are (quality `kept`), and
    the others are revised (quality `revised`). 1: none stays, unless keeping is really better."""
    edges = sorted({0.0, *chances}, reverse=True)
    thresholds = [1.0, *((high + low) / 2 for high, low in itertools.pairwise(edges))]
    return max(thresholds, key=lambda t: round(sum(k - r for c, k, r in zip(chances, kept, revised) if c > t), 9))


@dataclass
class Answer:
    """An unannotated prompt of a round, on its way from the answer y0 to y*, from which the policy learns."""

    number: int  # of the prompt in its round
    row: dict  # the prompt with its `prompt_ids`, and what a grader may need
    ids: list[int]  # y0, EOS included
    text: str  # y0 without special tokens
    ended: bool  # y0 has an EOS; without one it is not kept
    before: float | None  # the grade of y0; None where nothing can grade it
    chances: list[float] | None = None  # R(Major), R(Minor), R(No | x, y0)
    label: int | None = None  # MAJOR, MINOR or NO
    revision: list[int] | None = None  # what the reviser wrote under the label
    fault: str | None = None  # why y* is not fit to learn from; None when it is
    after: float | None = None  # the grade of y*

    @property
    def target(self) -> list[int]:
        """y*: with the label No the tokens of y0 themselves."""
        return self.ids if self.label == NO else self.revision


def make_step(rows, pad_id: int, device) -> dict:
    """This rank's share of the rows of a step as a batch; `is_label` [B, T] where a label's tokens are."""
    share = len(rows) // common.world()
    rows = rows[common.rank() * share : (common.rank() + 1) * share]
    batch = common.make_batch([r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows], pad_id, device)
    count = torch.tensor([row.get("label_tokens", 0) for row in rows], device=device)
    batch["is_label"] = torch.arange(batch["mask"].shape[1], device=device) < count[:, None]
    return batch


def update(models, optimizer, batch, rate: float, args) -> dict[str, float]:
    """One optimizer step of the model that --stage trains; returns global means.

    The weights of all tokens are counted first and divided by once; labels and the rest are also logged apart.
    """
    device, model = batch["mask"].device, models["reviser" if args.stage == "reviser" else "policy"]
    labels, tokens = (batch["is_label"] & batch["mask"]).sum(), batch["mask"].sum()
    counts = common.all_sum({"label": labels, "rest": tokens - labels, "rows": len(batch["mask"])}, device)
    whole, sums = args.label_weight * counts["label"] + counts["rest"], {}
    pieces = lm.micro_batches(batch, list(range(len(batch["mask"]))), args.micro_batch)
    for micro in lm.accumulate_over(model, pieces):
        logprobs, entropy = lm.policy_logprobs(model, micro, args.temperature)
        loss, metrics = weighted_nll(logprobs, micro["mask"], micro["is_label"], args.label_weight)
        (loss * common.world() / whole).backward()  # FSDP averages over ranks
        metrics |= {"loss/total": loss.detach(), "policy/entropy": (entropy * ~micro["is_label"]).sum()}
        sums = {k: sums.get(k, 0.0) + v.double() for k, v in metrics.items()}
    sums = common.all_sum(sums, device)
    norm = torch.nn.utils.clip_grad_norm_(lm.trainable_parameters(model), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **sums})
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    over = {"loss/total": whole, "loss/label": counts["label"]}
    means = {name: x / over.get(name, counts["rest"]) for name, x in sums.items() if over.get(name, 1)}
    return means | {"length/mean": counts["rest"] / counts["rows"], "grad_norm": norm.item(), "lr": rate}


# ---- the stages ------------------------------------------------------------------------------------------------------


def train_reviser(args) -> None:
    """An R0 for each half of the pairs, labels of each half by the R0 of the other one, then R on all pairs."""
    data, device = prepare(args), common.local_device(args.device)
    firsts = [0, args.warmup_reviser_steps, 2 * args.warmup_reviser_steps]  # of R0 on half 1, of R0 on half 0, of R
    args = replace(args, steps=firsts[2] + args.reviser_steps)
    run = common.Run(args, __file__)
    models, writers, optimizer = build(args, data.tokenizer, device)
    at_start = [p.detach().clone() for p in lm.trainable_parameters(models)]

    for step in run.steps(models, optimizer, lambda: evaluate_reviser(writers["reviser"], data, args)):
        phase = sum(step >= first for first in firsts) - 1
        first, end = firsts[phase], [*firsts, args.steps][phase + 1]
        metrics = {}

        # ---- 1. a new phase: the R0 that is now trained scores the other half; R goes on from the second one
        if phase and step == first:
            score_pairs(models["reviser"], 2 - phase, data, args, run.path)
            optimizer.state.clear()
        if phase == 1 and step == first:
            with torch.no_grad():
                for parameter, value in zip(lm.trainable_parameters(models), at_start):
                    parameter.copy_(value)
        if step in (first, run.start):
            pairs = data.pairs if phase == 2 else [p for p in data.pairs if p["half"] == 1 - phase]
            labels = label_pairs(data, run.path) if phase == 2 else {}
            rows = tasks.walk(reviser_rows(data, pairs, args))  # a new permutation in each epoch
            metrics |= labels if step == first else {}

        # ---- 2. one optimizer step
        batch = make_step(rows(args.seed, step - first, args.prompts_per_step), data.tokenizer.pad_token_id, device)
        rise, fall = (step - first + 1) / (args.warmup_steps + 1), 1 - (step - first) / (end - first)
        metrics |= update(models, optimizer, batch, args.reviser_lr * min(1, rise) * fall, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics, evaluate=step + 1 == end)
    run.finish(models["reviser"], data.tokenizer)
    common.say(f"next: the arguments of this run with --stage evolve --reviser {run.path / 'model'} and another --out")


def evolve(args) -> None:
    """In rounds: the policy answers new prompts, the reviser judges and revises, the policy learns the result."""
    data, device = prepare(args), common.local_device(args.device)
    run = common.Run(args, __file__)
    models, writers, optimizer = build(args, data.tokenizer, device)
    better = tasks.walk([row | {"completion_ids": row["chosen_ids"]} for row in data.pairs])
    span, of_pairs = args.steps // args.rounds, round(args.pair_share * args.prompts_per_step)

    for step in run.steps(models, optimizer, lambda: evaluate_policy(models, writers["policy"], data, args)):
        first = step - step % span  # of this round
        metrics, shown = {}, []

        # ---- 1. a new round: y0 of each prompt, its label, y*; what is unfit to learn from is left out
        if step in (first, run.start):
            answers, threshold = make_round(writers, data, first, args, run.path)
            fit = [a.row | {"completion_ids": a.target} for a in answers if not a.fault]
            require(bool(fit), f"round {first // span}: all {len(answers)} answers were dropped: see {run.path}/rounds")
            own = tasks.walk(fit)
            if step == first:
                metrics |= revision_metrics(answers, threshold)
                shown = [sample_of(a, f"round {first // span}", data.tokenizer) for a in answers[:12]]
            run.lap("revise")

        # ---- 2. one optimizer step on revised answers, and on better answers of pairs
        rows = own(args.seed + first, step - first, args.prompts_per_step - of_pairs)
        batch = make_step(rows + better(args.seed, step, of_pairs), data.tokenizer.pad_token_id, device)
        rise, fall = (step + 1) / (args.warmup_steps + 1), 1 - step / args.steps
        metrics |= update(models, optimizer, batch, args.lr * min(1, rise) * fall, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics, shown, evaluate=(step + 1) % span == 0)
    run.finish(models["policy"], data.tokenizer)


def train(args) -> None:
    (evolve if args.stage == "evolve" else train_reviser)(args)


# ---- what a reviser reads and writes ---------------------------------------------------------------------------------


def reviser_ids(tokenizer, prompt, answer: str, args) -> tuple[list[int], list[int]]:
    """What a reviser reads before its label (question, answer, --ask) and between label and revision (--then)."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    then = tokenizer(args.then.replace("{prompt}", question), add_special_tokens=False)["input_ids"]
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": args.ask}]
    return common.encode_prompt(tokenizer, prompt + (answer + args.ask if question is prompt else turns)), then


def label_ids(tokenizer, args) -> list[list[int]]:
    return [tokenizer(label, add_special_tokens=False)["input_ids"] for label in args.labels]


def reviser_rows(data, pairs: list[dict], args) -> list[dict]:
    """SEFT-1: (x, y_l) -> y_h; with labels SEFT-3: (x, y_l) -> label, y_h or No alone; and some (x, y_h) -> No."""
    rows, labels, end = [], label_ids(data.tokenizer, args), [data.tokenizer.eos_token_id]
    for pair in pairs:
        reads, then = reviser_ids(data.tokenizer, pair["prompt"], pair["rejected"], args)
        if "label" not in pair:
            rows.append({"prompt_ids": reads + then, "completion_ids": pair["chosen_ids"]})
            continue
        label = labels[pair["label"]]
        rest = end if pair["label"] == NO else then + pair["chosen_ids"]
        rows.append({"prompt_ids": reads, "completion_ids": label + rest, "label_tokens": len(label)})
        if pair["keep_chosen"]:
            reads, _ = reviser_ids(data.tokenizer, pair["prompt"], pair["chosen"], args)
            rows.append({"prompt_ids": reads, "completion_ids": labels[NO] + end, "label_tokens": len(labels[NO])})
    return rows


@torch.no_grad()
def over_answers(fn, models, sequences, pad_id: int, args) -> list[tuple]:
    """fn(*logits [n, V], ids [n]) -> tensors [n], of the models on the tokens of answers; one tuple for each
    (prompt ids, answer ids). Models come as functions of no argument, whose context is the model; all of their weights
    have to be gathered, because ranks may bring different numbers of sequences."""
    rows = []
    for i in range(0, len(sequences), args.micro_batch):
        prompts, answers = map(list, zip(*sequences[i : i + args.micro_batch]))
        heads = []
        for context in models:
            with context() as model:
                batch = common.make_batch(prompts, answers, pad_id, next(model.parameters()).device)
                heads.append((lm.completion_hidden(model, batch)[batch["mask"]], lm.head_weight(model)))
        flat = lm.over_vocabulary(fn, heads, [batch["completion_ids"][batch["mask"]]], args.temperature)
        rows += zip(*(x.split(list(map(len, answers))) for x in flat))
    return rows


def likelihoods(model, sequences, pad_id: int, args) -> list[dict]:
    """{sum, mean, greedy} of each (prompt ids, answer ids): log-probabilities of all tokens of the answer, and whether
    each of them is the likeliest one, so that greedy decoding would write this answer."""

    def score(logits, ids):
        return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0], logits.argmax(-1) == ids

    with lm.gathered(model):
        rows = over_answers(score, [lambda: contextlib.nullcontext(model)], sequences, pad_id, args)
    return [{"sum": x.sum().item(), "mean": x.sum().item() / len(x), "greedy": bool(y.all())} for x, y in rows]


def judge(reviser, answers: list[Answer], data, args) -> None:
    """Give answers the chances of the three labels (fixed strings, normalised over the three), and Major or Minor."""
    reads = [reviser_ids(data.tokenizer, a.row["prompt"], a.text, args)[0] for a in answers]
    sequences = [(ids, label) for ids in reads for label in label_ids(data.tokenizer, args)]
    scores = [s["sum"] for s in likelihoods(reviser.policy, sequences, data.tokenizer.pad_token_id, args)]
    for a, chances in zip(answers, torch.tensor(scores, dtype=torch.float64).reshape(-1, 3).softmax(-1).tolist()):
        a.chances, a.label = chances, decide(chances, 1.0)


def score_pairs(reviser, half: int, data, args, folder: Path) -> None:
    """SEFT-2, by the R0 of a half: needs of the pairs of the other half and, by that of half 0, of held-out pairs."""
    everything = data.pairs + data.test_pairs
    new = [i for i, p in enumerate(everything) if (p["half"] != half if i < len(data.pairs) else half == 0)]
    mine, sequences = new[common.rank() :: common.world()], []
    for pair in (everything[i] for i in mine):
        for side in ("rejected", "chosen"):
            reads, then = reviser_ids(data.tokenizer, pair["prompt"], pair[side], args)
            sequences += [(reads + then, pair["chosen_ids"]), (reads + then, pair["rejected_ids"])]
    scores, found = likelihoods(reviser, sequences, data.tokenizer.pad_token_id, args), []
    for i, up, stay, keep, down in zip(mine, scores[0::4], scores[1::4], scores[2::4], scores[3::4]):
        value = need(up["mean"], stay["mean"], keep["mean"], down["mean"])
        found.append({"pair": i, "half": half, "need": value, "keep_chosen": keep["greedy"]})
    found = sorted(common.gather(found), key=lambda line: line["pair"])
    if common.rank() == 0:
        common.write_whole(folder / f"needs-{half}.jsonl", "".join(json.dumps(line) + "\n" for line in found))
    common.from_rank_0(None)  # the others read it only when it is there


def label_pairs(data, folder: Path) -> dict[str, float]:
    """Give all pairs a `label` (SEFT-2) and `keep_chosen`; returns the share of each, and the quality of its y_l."""
    lines = [json.loads(s) for half in (0, 1) for s in (folder / f"needs-{half}.jsonl").read_text().splitlines()]
    everything, n = data.pairs + data.test_pairs, len(data.pairs)
    labels = labels_of([line["need"] for line in lines], [line["need"] for line in lines if line["pair"] < n])
    for line, label in zip(lines, labels):
        everything[line["pair"]] |= {"label": label, "keep_chosen": line["keep_chosen"]}
    metrics = {f"label/{name}": sum(p["label"] == i for p in data.pairs) / n for i, name in enumerate(NAMES)}
    metrics["label/keep_chosen"] = sum(p["keep_chosen"] for p in data.pairs) / n
    grades = data.grade([p["rejected"] for p in data.pairs], data.pairs)
    for i, name in enumerate(NAMES):
        metrics[f"label/quality_{name}"] = mean(g for g, p in zip(grades, data.pairs) if p["label"] == i)
    return metrics


# ---- revision --------------------------------------------------------------------------------------------------------


def make_round(writers, data, first: int, args, folder: Path) -> tuple[list[Answer], float | None]:
    """The answers and the threshold of the round that begins at step `first`, the same on all ranks.

    Kept in folder/rounds, because a resumed run cannot sample from the policy of an earlier step.
    """
    number, each = first // (args.steps // args.rounds), len(data.prompts) // args.rounds
    file = folder / "rounds" / f"round-{number}.json"
    if not common.from_rank_0(file.exists()):
        mine = list(range(common.rank(), each, common.world()))
        rows = [data.prompts[number * each + i] for i in mine]
        writer = writers["external" if number >= args.rounds - args.external_rounds else "policy"]
        noise = common.uniforms(args.seed, common.TRAIN, first, mine, args.max_new_tokens) if mine else None
        ids = writer.complete([writer.encode(row) for row in rows], 1, noise)
        ends, texts = lm.stop_ids(writer.policy, writer.tokenizer), common.decode(writer.tokenizer, ids)
        ended = [answer[-1] in ends for answer in ids]
        if writer.tokenizer is not data.tokenizer:  # an external model may have another one
            ids = [common.encode_completion(data.tokenizer, text, row["prompt"]) for row, text in zip(rows, texts)]
        answers = [Answer(*one) for one in zip(mine, rows, ids, texts, ended, data.grade(texts, rows))]
        answers, threshold = revise(writers.get("reviser"), answers, data, args)
        answers = sorted(common.gather(list(map(vars, answers))), key=lambda a: a["number"])
        if common.rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            common.write_whole(file, json.dumps({"threshold": threshold, "answers": answers}))
        common.from_rank_0(None)  # the others read it only when it is there
    made = common.stored(file, "answers", list)
    return [Answer(**a) for a in made["answers"]], made["threshold"]


def revise(reviser, answers: list[Answer], data, args) -> tuple[list[Answer], float | None]:
    """The answers with their labels and y*, and the threshold t (None: --revise does not use one)."""
    threshold = None
    if args.revise == "never":
        for a in answers:
            a.label = NO
    else:
        judge(reviser, answers, data, args)
        if args.revise == "adaptive":
            threshold = find_threshold(reviser, answers, data, args)
            for a in answers:
                a.label = decide(a.chances, threshold if a.ended else 1.0)
        write_revisions(reviser, [a for a in answers if a.label != NO], data, args)
    for a in answers:
        if a.label == NO:
            a.fault, a.after = None if a.ended else "unfinished", a.before
    return answers, threshold


def write_revisions(reviser, answers: list[Answer], data, args) -> None:
    """Give answers that have none a revision under their label (None: R0 has no labels), its fault and its grade."""
    answers, labels, prompts = [a for a in answers if a.revision is None], label_ids(data.tokenizer, args), []
    for a in answers:
        reads, then = reviser_ids(data.tokenizer, a.row["prompt"], a.text, args)
        prompts.append(reads + ([] if a.label is None else labels[a.label]) + then)
    revised = reviser.complete(prompts, 1, None)  # greedily
    grades = data.grade(common.decode(data.tokenizer, revised), [a.row for a in answers])
    for a, ids, grade in zip(answers, revised, grades):
        a.revision, a.after, a.fault = ids, grade, fault_of(ids, a.ids, reviser, data, args)


def fault_of(revision: list[int], answer: list[int], reviser, data, args) -> str | None:
    """Why a revision is not fit to learn from; None when it is."""
    text = common.decode(data.tokenizer, [revision])[0]
    if revision[-1] not in lm.stop_ids(reviser.policy, data.tokenizer):
        return "unfinished"
    if any(mark.strip() in text for mark in [*args.labels, args.ask]):
        return "echo"
    if args.max_growth and len(revision) > args.max_growth * len(answer):
        return "long"
    answered = bool(text.strip()) and (not data.task.answered or data.task.answered([text])[0])
    return None if answered else "malformed"


def find_threshold(reviser, answers: list[Answer], data, args) -> float:
    """The t of --keep_threshold; the same on all ranks."""
    if args.keep_threshold != "auto":
        return float(args.keep_threshold)
    graded = any(common.gather([a.before is not None for a in answers]))
    require(graded, "--keep_threshold auto: nothing can grade these answers; expected a number from 0 to 1")
    some = [a for a in answers if a.number < args.calibration and a.ended and a.before is not None]
    write_revisions(reviser, some, data, args)
    known = common.gather([(a.chances[NO], a.before, 0.0 if a.fault else a.after) for a in some])
    return best_threshold(*zip(*known)) if known else 1.0


def mean(values) -> float | None:
    """Of those that are known; None where none is."""
    values = [x for x in values if x is not None]
    return statistics.mean(values) if values else None


def auc(scores: list[float], positive: list[bool]) -> float | None:
    """The chance that a positive one has the larger score, ties counted half; None when one kind is missing."""
    pos, neg = (np.array([s for s, p in zip(scores, positive) if p == kind]) for kind in (True, False))
    larger = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)
    return float(larger.mean()) if larger.size else None


def revision_metrics(answers: list[Answer], threshold: float | None) -> dict[str, float | None]:
    """What a round did to the answers, over all prompts of the round."""
    fit = [a for a in answers if not a.fault]
    out = {f"drop/{why}": mean(a.fault == why for a in answers) for why in ("unfinished", "echo", "long", "malformed")}
    out |= {"revise/threshold": threshold, "revise/before": mean(a.before for a in answers)}
    out["revise/after"] = mean(a.after for a in fit)
    out["revise/length_ratio"] = mean(len(a.target) / len(a.ids) for a in fit)
    for label, name in enumerate(NAMES):
        mine = [a for a in fit if a.label == label]
        out[f"revise/{name}"] = mean(a.label == label for a in answers)
        out[f"revise/before_{name}"] = mean(a.before for a in mine)
        if label != NO:
            out[f"revise/same_{name}"] = mean(a.target == a.ids for a in mine)
    if all(a.before in (0.0, 1.0) for a in answers):
        right, wrong = ([a for a in answers if a.before == kind] for kind in (1.0, 0.0))
        out["revise/fix"] = mean(not a.fault and a.after == 1.0 for a in wrong)
        out["revise/damage"] = mean(not a.fault and a.after == 0.0 for a in right)
        out["revise/keep_right"] = mean(a.label == NO for a in right)
        out["revise/keep_wrong"] = mean(a.label == NO for a in wrong)
        if answers[0].chances:
            out["revise/auc"] = auc([a.chances[NO] for a in answers], [a.before == 1.0 for a in answers])
    return out


def sample_of(a: Answer, kind: str, tokenizer) -> dict:
    """A row of samples.jsonl."""
    label, text = "" if a.label is None else NAMES[a.label].capitalize(), common.decode(tokenizer, [a.target])[0]
    about = {"kind": f"{kind} {label}".strip(), "prompt": a.row["prompt"], "answer": a.text, "label": label}
    return about | {"chances": a.chances, "completion": text, "dropped": a.fault, "reward": a.after or 0.0}


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate_policy(models, policy, data, args):
    """Held-out accuracy or reward where something grades, and KL(pi || its start), exact over the vocabulary."""
    graded = data.task.correct or data.task.reward
    metrics, samples = policy.evaluate(data.task, args.seed) if data.task.test and graded else ({}, [])
    rows = (data.task.test or data.prompts)[: 64 * common.world()]
    mine = list(range(common.rank(), len(rows), common.world()))
    noise = common.uniforms(args.seed, common.EVAL, 0, mine, args.max_new_tokens) if mine else None
    prompts = [policy.encode(rows[i]) for i in mine]
    sequences = list(zip(prompts, policy.complete(prompts, 1, noise)))

    def kl(logits, start_logits, ids):
        logp, start_logp = logits.log_softmax(-1), start_logits.log_softmax(-1)
        return ((logp.exp() * (logp - start_logp)).sum(-1),)

    both = [lambda: contextlib.nullcontext(models["policy"]), lambda: lm.reference(models)]
    with lm.gathered(*(models[name] for name in ("policy", "ref") if name in models)):
        found = over_answers(kl, both, sequences, data.tokenizer.pad_token_id, args)
    sums = {"kl": sum(x.sum().item() for (x,) in found), "tokens": sum(len(x) for (x,) in found)}
    sums = common.all_sum(sums, next(models["policy"].parameters()).device)
    return metrics | {"kl/start": sums["kl"] / sums["tokens"]}, samples


def evaluate_reviser(reviser, data, args):
    """On held-out pairs: NLL of y_h given y_l; loss, accuracy and AUC of labels; what revising every answer does."""
    mine, labels = data.test_pairs[common.rank() :: common.world()], label_ids(data.tokenizer, args)
    sides = [(pair, side) for side in ("rejected", "chosen") for pair in mine]
    grades = data.grade([pair[side] for pair, side in sides], [pair for pair, _ in sides])
    answers = [Answer(0, p, p[f"{side}_ids"], p[side], True, grade) for (p, side), grade in zip(sides, grades)]
    labelled = "label" in data.test_pairs[0]  # before there are labels the reviser is R0
    if labelled:
        judge(reviser, answers, data, args)
    write_revisions(reviser, answers, data, args)
    sequences = []
    for pair in [p for p in mine if not labelled or p["label"] != NO]:
        reads, then = reviser_ids(data.tokenizer, pair["prompt"], pair["rejected"], args)
        sequences.append((reads + (labels[pair["label"]] if labelled else []) + then, pair["chosen_ids"]))
    scores = likelihoods(reviser.policy, sequences, data.tokenizer.pad_token_id, args)
    nll = common.gather([(-score["sum"], len(answer)) for score, (_, answer) in zip(scores, sequences)])
    metrics = {"eval/nll": sum(x for x, _ in nll) / max(1, sum(n for _, n in nll))}
    worse, better = common.gather(answers[: len(mine)]), common.gather(answers[len(mine) :])
    if labelled:
        kinds = [False] * len(worse) + [True] * len(better)
        metrics["eval/label_auc"] = auc([a.chances[NO] for a in worse + better], kinds)
        metrics["eval/label_accuracy"] = mean(a.chances.index(max(a.chances)) == a.row["label"] for a in worse)
        metrics["eval/label_loss"] = mean(-math.log(max(a.chances[a.row["label"]], 1e-30)) for a in worse)
    if data.task.correct:
        metrics["eval/fix"] = mean(a.after for a in worse + better if a.before == 0.0)
        metrics["eval/damage"] = mean(1 - a.after for a in worse + better if a.before == 1.0)
    return metrics, [sample_of(a, "revision", data.tokenizer) for a in answers[: min(8, len(mine))]]


# ---- data and models -------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Encoded pairs, prompts without answers, and the task that grades answers where it can."""

    tokenizer: object
    task: tasks.Task
    pairs: list[dict]  # each with the half, 0 or 1, to which its prompt belongs
    test_pairs: list[dict]
    prompts: list[dict]

    def grade(self, texts: list[str], rows: list[dict]) -> list[float | None]:
        """1 and 0 for right and wrong, or a user's reward, or None where nothing can grade these rows."""
        task = self.task  # rows of a file need an `answer`, a number or LaTeX, for words, gsm8k and math
        known = task.name in ("chains", "strings") or not task.correct or all("answer" in row for row in rows)
        if not rows or not known or not (task.correct or task.reward):
            return [None] * len(rows)
        if task.correct:
            return list(map(float, task.correct(texts, rows)))
        ids = [common.encode_completion(self.tokenizer, text, row["prompt"]) for row, text in zip(rows, texts)]
        rows = [row | {"completion_ids": answer} for row, answer in zip(rows, ids)]
        given = task.reward([row["prompt"] for row in rows], texts, rows)
        return [float(sum(x) if isinstance(x, list) else x) for x in given]


def load_data(args, tokenizer) -> Data:
    """Pairs, unannotated prompts and the task. No prompt is twice among them, in the pairs or in the test set."""
    name = args.task if args.task != "auto" or args.prompts or args.dataset else "chains"
    if name in ("chains", "strings", "words") or args.prompts:
        held_out = args.test_rows, args.test_dataset
        task = tasks.load_task(name, args.prompts, args.reward_file, *held_out, graded=False)
    else:
        task = tasks.Task("pairs", None, [], tasks.load_reward(args.reward_file) if args.reward_file else None)
    parts = [], []
    if args.dataset:
        parts = tasks.split_pairs(tasks.load_pairs(args.dataset), args.test_rows, "test_rows")
    elif task.pairs:
        parts = task.pairs(args.builtin_pairs, args.seed), task.pairs(args.test_rows, 0, held_out=True)
    limits = args.max_prompt, args.max_new_tokens
    parts = [common.encode_pairs(tokenizer, rows, *limits) if rows else ([], "no pairs") for rows in parts]
    (pairs, note), (test, test_note) = parts
    for pair in pairs:
        pair["half"] = zlib.crc32(json.dumps(pair["prompt"]).encode()) % 2
    if args.stage == "reviser":
        require(bool(pairs), "--dataset is empty: --stage reviser needs preference pairs")
        require(len({p["half"] for p in pairs}) == 2, f"{len(pairs)} pairs: expected enough prompts for two halves")
    common.say(f"training: {note}; held out: {test_note}")
    task = replace(task, test=task.test or test)
    prompts = load_prompts(args, task, pairs + test, tokenizer) if args.stage == "evolve" else []
    return Data(tokenizer, task, pairs, test, prompts)


def load_prompts(args, task, pairs: list[dict], tokenizer) -> list[dict]:
    """Unannotated prompts with their ids, none of them twice, none of a pair, of the test set or too long."""
    seen = {json.dumps(row["prompt"]) for row in [*pairs, *task.test]}
    found, known, long, changes = [], 0, 0, Counter()
    for row in task.unannotated(2 * args.unannotated, args.seed) if task.unannotated else task.train:
        key, ids = json.dumps(row["prompt"]), common.encode_prompt(tokenizer, row["prompt"], changes)
        if key in seen:
            known += 1
        elif len(ids) > args.max_prompt:
            long += 1
        elif len(found) < args.unannotated:
            found.append(row | {"prompt_ids": ids})
        seen.add(key)
    left_out = f"{known} seen before or elsewhere, {long} too long{common.changed(changes)}"
    common.say(f"{len(found)} unannotated prompts; left out: {left_out}")
    least = max(args.rounds, common.world())
    require(len(found) >= least, f"--prompts {args.prompts or task.name}: {len(found)} new prompts, expected {least}")
    return found


def prepare(args) -> Data:
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    world, n = common.world(), args.prompts_per_step
    require(n % world == 0, f"--prompts_per_step {n} does not divide among {world} ranks")
    micro = min(args.micro_batch, n // world)
    require(n // world % micro == 0, f"--micro_batch {micro} does not divide the {n // world} rows of a rank in a step")
    require(len(args.labels) == 3, f"--labels takes three strings (major, minor, no), found {len(args.labels)}")
    if args.stage == "evolve":
        t, last = args.keep_threshold, args.external_rounds
        known = t == "auto" or (t.replace(".", "", 1).isdigit() and float(t) <= 1)
        require(known, f"--keep_threshold {t!r}: expected auto or a number from 0 to 1")
        require(args.steps % args.rounds == 0, f"--steps {args.steps} does not divide into --rounds {args.rounds}")
        require(last == 0 or args.external_model, "--external_rounds needs --external_model")
        require(last <= args.rounds, f"--external_rounds {last} of --rounds {args.rounds}")
        require(args.reviser or args.revise == "never", f"--reviser is empty: --revise {args.revise} needs one")
    tokenizer = lm.load_tokenizer(args.model)
    lm.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    labels, ask = label_ids(tokenizer, args), tokenizer(args.ask)["input_ids"]
    for text, ids in zip([*args.labels, args.ask], [*labels, ask]):
        known = ids and tokenizer.unk_token_id not in ids
        require(known, f"--labels and --ask: the tokenizer of {args.model} cannot write {text!r}")
    for a, b in itertools.permutations(range(3), 2):
        begins = labels[a] == labels[b][: len(labels[a])]
        require(not begins, f"--labels: {args.labels[b]!r} begins with {args.labels[a]!r}, expected three that differ")
    if args.stage == "reviser" or args.revise != "never":  # a reviser reads a prompt, maybe twice, and two answers
        longest = args.max_prompt * (1 + ("{prompt}" in args.then)) + 2 * args.max_new_tokens
        longest += len(ask) + len(tokenizer(args.then)["input_ids"]) + max(map(len, labels))
        name = args.reviser or args.model
        lm.same_tokenizer(args.model, tokenizer, name, lm.load_tokenizer(name))
        lm.fits_context(name, longest)
    data = load_data(args, tokenizer)
    require(data.pairs or not args.pair_share, "--pair_share needs --dataset, the pairs")
    return data


def build(args, tokenizer, device):
    """The models by name; their samplers; the optimizer of the one that is trained, the reviser or the policy."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    if args.stage == "reviser":
        models = torch.nn.ModuleDict({"reviser": lm.load_model(args.reviser or args.model, **trained)})
    else:
        models = torch.nn.ModuleDict({"policy": lm.load_model(args.model, **trained)})
        frozen = {"reviser": args.reviser} if args.revise != "never" else {}
        frozen |= {} if args.lora_rank else {"ref": args.model}  # with LoRA, the policy without its adapters
        frozen |= {"external": args.external_model} if args.external_rounds else {}
        for name, path in frozen.items():
            models[name] = lm.load_model(path, trainable=False, **shared)
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    writers = {name: lm.Sampling(model, tokenizer, *limits) for name, model in models.items()}
    if "external" in writers:
        writers["external"].tokenizer = lm.load_tokenizer(args.external_model)
    return models, writers, torch.optim.Adam(lm.trainable_parameters(models), lr=args.lr, fused=True)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: train(args), args.device)

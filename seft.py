"""SEFT: self-evolution fine-tuning. A reviser that first judges, then revises, lifts a policy through its own answers.

Chen et al. 2024, "Self-Evolution Fine-Tuning for Policy Optimization" (Findings of EMNLP 2024, arXiv:2406.10813). Only
its abstract and introduction could be read, and there is no public code, so this is a reconstruction: [P] read in the
paper, [T] reported by third parties, [I] inferred here. x is a prompt, (y_l, y_h) the worse and the better answer of a
preference pair, pi the policy. A reviser is a language model that reads x and an answer: R0, a preliminary one, writes
a better answer; R, the adaptive one, a label before it (Major, Minor, No: how much must be revised).

--stage reviser: preference pairs -> R
    R0         L = -log R0(y_h | x, y_l), for two R0, each on one half of the pairs [I]                 [T]    (SEFT-1)
    labels     gap(a -> b) = mean log R0(b | x, a) - mean log R0(a | x, a), means over tokens
               need = gap(y_l -> y_h) - gap(y_h -> y_l), by the R0 of the other half                    [I]    (SEFT-2)
               No where need <= 0, Minor up to the median of the positive needs, else Major             [I]
               also No: a y_h that R0, asked to revise it, writes again greedily, token by token        [I]
    R          L = -w log R(label | x, y) - log R(y_h | x, y, label); after No only EOS follows         [T]    (SEFT-3)
    e.g.       x  What is 7+15?    y_l  It is 12.    y_h  It is 22.      need = 3.1, above the median: Major
    R reads    What is 7+15? | It is 12. | Does the answer above need a revision? If it does, revise it.
    R learns   [Major Revise] It is 22.           each token of the label counts w = --label_weight times, others once
--stage evolve: R and unannotated prompts -> pi, in rounds
    revision   y0 ~ pi(. | x);  y* = y0 where R(No | x, y0) > t, else what R writes after the           [P]
               likelier of Major and Minor; t is the best one on some graded answers                    [I]
    pi         L = -log pi(y* | x)                                                                      [P]    (SEFT-4)
    e.g.       x  What is 8+9?     y0  It is 7.      R(Major, Minor, No | x, y0) = .92, .05, .03
    R writes   [Major Revise] It is 17.                       so y* = It is 17.; pi learns What is 8+9? It is 17.
    --revise always and never are the controls: never No, and y* = y0. Others are patches in benchmarks/departures.

What differs from the paper, besides all that is marked [I]
    1. Labels are three fixed strings that are scored, never decoded, so that nothing but a label can result.
    2. Means are over all tokens of a step, on all ranks; a label's tokens count w times in the sum and in the count.

Run
    python seft.py --out runs/reviser                                                    # this laptop, offline
    python seft.py --out runs/policy --stage evolve --reviser runs/reviser/model
    python seft.py --model MODEL --dataset PAIRS --prompts FILE --out runs/reviser                      # 1 GPU
    torchrun --nproc_per_node=8 seft.py --stage evolve --model MODEL --dataset PAIRS --prompts FILE ...    # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 seft.py ...   # 2 nodes
More in docs/seft.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

import contextlib
import itertools
import json
import math
import statistics
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import common  # before torch: it sets how OpenMP threads wait
import lm
import tasks

import torch

from common import arg, require


@dataclass
class Args:
    # model and data
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    prompts: str = arg("", "the unannotated prompts: a Hub name or file; empty: made by --task")
    task: str = arg("auto", "the task: built-in, a kind of data (auto: by its columns), or gym:NAME of reasoning-gym")
    test_dataset: str = arg("", "held-out prompts; empty: a Hub test split, or the last of --prompts, or of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    builtin_pairs: int = arg(2000, "the number of built-in preference pairs", at_least=1)
    unannotated: int = arg(2000, "the largest number of unannotated prompts, for all rounds together", at_least=1)
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # reviser and revision
    stage: Literal["reviser", "evolve"] = arg("reviser", "what is trained: the reviser, or with it the policy")
    ask: str = arg("Does the answer above need a revision? If it does, revise it.", "what follows an answer to revise")
    labels: list[str] = arg(["[Major Revise]\n", "[Minor Revise]\n", "[No Revise]\n"], "what a reviser writes first")
    then: str = arg("", "what stands between a label and a revision; {prompt} in it is the question again")
    label_weight: float = arg(6.0, "the weight of a label's tokens, which are few", at_least=0)
    warmup_reviser_steps: int = arg(200, "the number of optimizer steps of R0, for each half of the pairs", at_least=1)
    reviser_steps: int = arg(400, "the number of optimizer steps of the adaptive reviser", at_least=1)
    reviser_lr: float = arg(1e-4, "the learning rate of the revisers; falls linearly to 0", at_least=0)
    reviser: str = arg("", "the reviser of --stage evolve; or the model that becomes one, empty: --model")
    revise: Literal["adaptive", "always", "never"] = arg("adaptive", "unless the label is No; each answer; no answer")
    keep_threshold: str = arg("auto", "R(No) above which an answer stays; auto: the best for --calibration answers")
    calibration: int = arg(256, "the number of graded answers per round that decide --keep_threshold auto", at_least=1)
    max_growth: float = arg(4.0, "revisions of more than so many times their answer are dropped; 0: none", at_least=0)
    external_model: str = arg("", "the model that answers in the place of the policy in the last --external_rounds")
    external_rounds: int = arg(0, "the number of last rounds that revise answers of --external_model", at_least=0)
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
    keep: Literal["last", "best", "all"] = arg("last", "checkpoints that stay; best: also the best one, as model/")
    track: Literal["none", "wandb", "trackio", "tensorboard"] = arg("none", "a tracker that gets metrics and samples")
    push_to_hub: str = arg("", "the Hub repository that gets model/ at the end; private if it is new")


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
    """The threshold t of the best mean quality, if answers with a chance of No above t are left alone (quality `kept`)
    and the others are revised (quality `revised`). It is 1, and none stays, unless keeping some is strictly better."""
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
    threshold: float | None = None  # t; None: --revise does not use one
    label: int | None = None  # MAJOR, MINOR or NO
    target: list[int] | None = None  # y*: what the reviser wrote under the label; with the label No y0 itself
    fault: str | None = None  # why y* is not fit to learn from; None when it is
    after: float | None = None  # the grade of y*


def make_step(rows, pad_id: int, device) -> dict:
    """This rank's share of the rows of a step as a batch; `is_label` [B, T] where a label's tokens are."""
    rows = rows[common.rank() :: common.world()]
    batch = common.make_batch([r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows], pad_id, device)
    count = torch.tensor([row.get("label_tokens", 0) for row in rows], device=device)
    batch["is_label"] = torch.arange(batch["mask"].shape[1], device=device) < count[:, None]
    return batch


def update(models, optimizer, batch, rate: float, args) -> dict[str, float]:
    """One optimizer step of the model that --stage trains; returns global means."""
    mask, model = batch["mask"], models["reviser" if args.stage == "reviser" else "policy"]
    labels = (batch["is_label"] & mask).sum()
    counts = {"loss/label": labels, "loss/nll": mask.sum() - labels, "rows": len(mask)}
    counts, sums = common.all_sum(counts, mask.device), {}  # counted first, divided by once
    counts["policy/entropy"] = counts["loss/nll"]
    counts["loss/total"] = args.label_weight * counts["loss/label"] + counts["loss/nll"]
    pieces = lm.micro_batches(batch, list(range(len(mask))), args.micro_batch)
    for micro in lm.accumulate_over(model, pieces):
        logprobs, entropy = lm.policy_logprobs(model, micro, args.temperature)
        loss, metrics = weighted_nll(logprobs, micro["mask"], micro["is_label"], args.label_weight)
        (loss * common.world() / counts["loss/total"]).backward()  # FSDP averages over ranks
        metrics |= {"loss/total": loss.detach(), "policy/entropy": (entropy * ~micro["is_label"]).sum()}
        sums = {k: sums.get(k, 0.0) + v.double() for k, v in metrics.items()}
    sums = common.all_sum(sums, mask.device)
    norm = torch.nn.utils.clip_grad_norm_(lm.trainable_parameters(model), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **sums})
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: x / counts[name] for name, x in sums.items() if counts[name]}
    return means | {"length/mean": counts["loss/nll"] / counts["rows"], "grad_norm": norm.item(), "lr": rate}


# ---- the stages ------------------------------------------------------------------------------------------------------


def train_reviser(args) -> None:
    """An R0 on each half of the pairs, labels of each half by the R0 of the other one, then R on all pairs."""
    data, device = prepare(args), common.local_device(args.device)
    warmup = args.warmup_reviser_steps
    args = replace(args, steps=2 * warmup + args.reviser_steps)
    run = common.Run(args, __file__)
    models, writers, optimizer = build(args, data.tokenizer, device)
    at_start = [p.detach().clone() for p in lm.trainable_parameters(models)]

    for step in run.steps(models, optimizer, lambda: evaluate_reviser(writers["reviser"], data, args)):
        phase = min(step // warmup, 2)  # R0 on half 0, R0 on half 1, R
        first, end = phase * warmup, args.steps if phase == 2 else (phase + 1) * warmup
        at, metrics = step - first, {}

        # ---- 1. a new phase: the R0 of the last one scores the other half; R goes on from the second R0
        if phase and step == first:
            half = phase - 1
            common.kept(run.path / f"needs-{half}.jsonl", score_pairs, models["reviser"], half, data, args)
            optimizer.state.clear()
        if phase == 1 and step == first:
            for parameter, value in zip(lm.trainable_parameters(models), at_start):
                parameter.detach().copy_(value)
        if step in (first, run.start):
            pairs = data.pairs if phase == 2 else [p for p in data.pairs if p["half"] == phase]
            labels = label_pairs(data, run.path) if phase == 2 else {}
            rows = tasks.walk(reviser_rows(data, pairs, args))  # a new permutation in each epoch
            metrics |= labels if step == first else {}

        # ---- 2. one optimizer step
        batch = make_step(rows(args.seed, at, args.prompts_per_step), data.tokenizer.pad_token_id, device)
        rate = args.reviser_lr * min(1, (at + 1) / (args.warmup_steps + 1)) * (1 - at / (end - first))
        metrics |= update(models, optimizer, batch, rate, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics, evaluate=step + 1 == end)
    use = f"the arguments of this run with --stage evolve --reviser {run.path / 'model'} and another --out"
    use += ", and --prompts FILE" * (data.task.name == "pairs")
    use += ", and --keep_threshold 0.5" * (not data.task.correct and not data.task.reward)
    run.finish(models["reviser"], data.tokenizer, then=use)


def evolve(args) -> None:
    """In rounds: the policy answers new prompts, the reviser judges and revises, the policy learns the result."""
    data, device = prepare(args), common.local_device(args.device)
    run = common.Run(args, __file__)
    models, writers, optimizer = build(args, data.tokenizer, device)
    better = tasks.walk([row | {"completion_ids": row["chosen_ids"]} for row in data.pairs])
    span, of_pairs = args.steps // args.rounds, round(args.pair_share * args.prompts_per_step)

    for step in run.steps(models, optimizer, lambda: evaluate_policy(models, writers["policy"], data, args)):
        number, first = step // span, step - step % span  # of this round, and of its steps
        metrics, shown = {}, []

        # ---- 1. a new round: y0 of each prompt, its label, y*; what is unfit to learn from is left out
        if step in (first, run.start):
            file = run.path / "rounds" / f"round-{number}.jsonl"
            answers = common.kept(file, make_round, writers, data, number, first, args)
            answers = sorted((Answer(**a) for a in answers), key=lambda a: a.number)
            fit = [a.row | {"completion_ids": a.target} for a in answers if not a.fault]
            require(bool(fit), f"round {number}: all {len(answers)} answers were dropped: see {file}")
            own = tasks.walk(fit)
            if step == first:
                metrics |= revision_metrics(answers)
                shown = [sample_of(a, f"round {number}", data.tokenizer) for a in answers[:12]]
            run.lap("revise")

        # ---- 2. one optimizer step on revised answers, and on better answers of pairs
        rows = own(args.seed + first, step - first, args.prompts_per_step - of_pairs)
        batch = make_step(rows + better(args.seed, step, of_pairs), data.tokenizer.pad_token_id, device)
        rate = args.lr * min(1, (step + 1) / (args.warmup_steps + 1)) * (1 - step / args.steps)
        metrics |= update(models, optimizer, batch, rate, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics, shown, evaluate=(step + 1) % span == 0)
    run.finish(models["policy"], data.tokenizer)


def train(args) -> None:
    (evolve if args.stage == "evolve" else train_reviser)(args)


# ---- what a reviser reads and writes ---------------------------------------------------------------------------------


def label_ids(tokenizer, args) -> list[list[int]]:
    return [tokenizer(label, add_special_tokens=False)["input_ids"] for label in args.labels]


def reviser_ids(tokenizer, prompt, answer: str, label: int | None, args) -> tuple[list[int], int]:
    """All ids before a revision, and how many of them the reviser only reads: question, answer and --ask. It writes the
    others itself: the label, and --then unless the label is No. R0 has no label, and only reads."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": args.ask}]
    reads = common.encode_prompt(tokenizer, prompt + (answer + args.ask if question is prompt else turns))
    then = "" if label == NO else args.then.replace("{prompt}", question)
    then = tokenizer(then, add_special_tokens=False)["input_ids"]
    ids = reads + ([] if label is None else label_ids(tokenizer, args)[label]) + then
    return ids, len(ids) if label is None else len(reads)


def reviser_rows(data, pairs: list[dict], args) -> list[dict]:
    """SEFT-1: (x, y_l) -> y_h; with labels SEFT-3: (x, y_l) -> label, y_h or No alone; and some (x, y_h) -> No."""
    rows, end = [], [data.tokenizer.eos_token_id]
    lengths = {None: 0} | {i: len(ids) for i, ids in enumerate(label_ids(data.tokenizer, args))}
    for pair in pairs:
        examples = [("rejected", pair.get("label"))] + [("chosen", NO)] * pair.get("keep_chosen", False)
        for side, label in examples:
            ids, n = reviser_ids(data.tokenizer, pair["prompt"], pair[side], label, args)
            rest = end if label == NO else pair["chosen_ids"]
            rows.append({"prompt_ids": ids[:n], "completion_ids": ids[n:] + rest, "label_tokens": lengths[label]})
    return rows


@torch.no_grad()
def over_answers(fn, models, sequences, pad_id: int, args) -> list[tuple]:
    """fn(*logits [n, V], ids [n]) -> tensors [n] on the tokens of answers; a tuple for each (prompt ids, answer ids).
    models: functions that return a context with a gathered model, as ranks may have different numbers of sequences."""
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
    """For each (prompt ids, answer ids): sum and mean of log-probabilities; greedy: does greedy decoding write it?"""

    def score(logits, ids):
        return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0], logits.argmax(-1) == ids

    with lm.gathered(model):
        rows = over_answers(score, [lambda: contextlib.nullcontext(model)], sequences, pad_id, args)
    return [{"sum": x.sum().item(), "mean": x.sum().item() / len(x), "greedy": bool(y.all())} for x, y in rows]


def score_pairs(reviser, half: int, data, args) -> list[dict]:
    """SEFT-2, by the R0 of a half: the needs of this rank's share of the pairs of the other half."""
    everything = data.pairs + data.test_pairs
    mine = [i for i, pair in enumerate(everything) if pair["half"] != half][common.rank() :: common.world()]
    sequences = []
    for pair in (everything[i] for i in mine):
        for side in ("rejected", "chosen"):
            ids, _ = reviser_ids(data.tokenizer, pair["prompt"], pair[side], None, args)
            sequences += [(ids, pair["chosen_ids"]), (ids, pair["rejected_ids"])]
    scores, found = likelihoods(reviser, sequences, data.tokenizer.pad_token_id, args), []
    for i, up, stay, keep, down in zip(mine, scores[0::4], scores[1::4], scores[2::4], scores[3::4]):
        value = need(up["mean"], stay["mean"], keep["mean"], down["mean"])
        found.append({"pair": i, "half": half, "need": value, "keep_chosen": keep["greedy"]})
    return found


def label_pairs(data, folder: Path) -> dict[str, float]:
    """Give all pairs a `label` (SEFT-2) and `keep_chosen`; returns the share of each, and the quality of its y_l."""
    lines = [json.loads(s) for half in (0, 1) for s in (folder / f"needs-{half}.jsonl").read_text().splitlines()]
    everything, n = data.pairs + data.test_pairs, len(data.pairs)
    labels = labels_of([line["need"] for line in lines], [line["need"] for line in lines if line["pair"] < n])
    for line, label in zip(lines, labels):
        everything[line["pair"]] |= {"label": label, "keep_chosen": line["keep_chosen"]}
    grades = data.grade([p["rejected"] for p in data.pairs], data.pairs)
    metrics = {"label/keep_chosen": mean(p["keep_chosen"] for p in data.pairs)}
    for i, name in enumerate(NAMES):
        metrics[f"label/{name}"] = mean(p["label"] == i for p in data.pairs)
        metrics[f"label/quality_{name}"] = mean(g for g, p in zip(grades, data.pairs) if p["label"] == i)
    return metrics


def make_round(writers, data, number: int, first: int, args) -> list[dict]:
    """This rank's answers of the round that begins at step `first`: y0, its label, y*."""
    each = len(data.prompts) // args.rounds
    mine = list(range(common.rank(), each, common.world()))
    rows = [data.prompts[number * each + i] for i in mine]
    writer = writers["external" if number >= args.rounds - args.external_rounds else "policy"]
    noise = common.uniforms(args.seed, common.TRAIN, first, mine, args.max_new_tokens) if mine else None
    ids = writer.complete([writer.encode(row) for row in rows], 1, noise)
    ends, texts = lm.stop_ids(writer.policy, writer.tokenizer), common.decode(writer.tokenizer, ids)
    ended = [answer[-1] in ends for answer in ids]
    if writer.tokenizer is not data.tokenizer:  # an external model may have another one
        ids = [common.encode_completion(data.tokenizer, text, row["prompt"]) for row, text in zip(rows, texts)]
        unknown = data.tokenizer.unk_token_id  # may be the EOS that ends an answer
        whole = [len(x) <= args.max_new_tokens and unknown not in x[:-1] for x in ids]
        ended = [a and b for a, b in zip(ended, whole)]
        ids = [x[: args.max_new_tokens] for x in ids]
    answers = [Answer(*one) for one in zip(mine, rows, ids, texts, ended, data.grade(texts, rows))]
    revise(writers.get("reviser"), answers, data, args)
    return list(map(vars, answers))


def revise(reviser, answers: list[Answer], data, args) -> None:
    """Give answers their labels and y*."""
    if args.revise != "never":
        judge(reviser, answers, data, args)
    t = find_threshold(reviser, answers, data, args) if args.revise == "adaptive" else None
    for a in answers:
        a.threshold = t
        keep = args.revise == "adaptive" and a.ended and decide(a.chances, t) == NO  # what has no end is revised
        if keep or args.revise == "never":
            a.label, a.target, a.after = NO, a.ids, a.before
            a.fault = None if a.ended else "unfinished"
    if args.revise != "never":
        write_revisions(reviser, answers, data, args)


def judge(reviser, answers: list[Answer], data, args) -> None:
    """Give answers the chances of the three labels (fixed strings, normalised over the three), and Major or Minor."""
    before = [reviser_ids(data.tokenizer, a.row["prompt"], a.text, NO, args) for a in answers]
    sequences = [(ids[:n], label) for ids, n in before for label in label_ids(data.tokenizer, args)]
    scores = [s["sum"] for s in likelihoods(reviser.policy, sequences, data.tokenizer.pad_token_id, args)]
    for a, chances in zip(answers, torch.tensor(scores, dtype=torch.float64).reshape(-1, 3).softmax(-1).tolist()):
        a.chances, a.label = chances, decide(chances, 1.0)


def find_threshold(reviser, answers: list[Answer], data, args) -> float:
    """The t of --keep_threshold; the same on all ranks."""
    if args.keep_threshold != "auto":
        return float(args.keep_threshold)
    some = [a for a in answers if a.number < args.calibration and a.ended and a.before is not None]
    write_revisions(reviser, some, data, args)
    known = common.gather([(a.chances[NO], a.before, None if a.fault else a.after) for a in some])
    worst = min([0.0, *(x for row in known for x in row[1:] if x is not None)])  # what a dropped revision counts as
    known = [(chance, before, worst if after is None else after) for chance, before, after in known]
    return best_threshold(*zip(*known)) if known else 1.0


def write_revisions(reviser, answers: list[Answer], data, args) -> None:
    """Give answers that have no y* a revision under their label (None: R0 has no labels), its fault and its grade."""
    answers = [a for a in answers if a.target is None]
    prompts = [reviser_ids(data.tokenizer, a.row["prompt"], a.text, a.label, args)[0] for a in answers]
    revised = reviser.complete(prompts, 1, None)  # greedily
    grades = data.grade(common.decode(data.tokenizer, revised), [a.row for a in answers])
    for a, ids, grade in zip(answers, revised, grades):
        a.target, a.after, a.fault = ids, grade, fault_of(ids, a.ids, reviser, data, args)


def fault_of(revision: list[int], answer: list[int], reviser, data, args) -> str | None:
    """Why a revision is not fit to learn from; None when it is."""
    text = common.decode(data.tokenizer, [revision])[0]
    if revision[-1] not in lm.stop_ids(reviser.policy, data.tokenizer):
        return "unfinished"
    if any(mark.strip() and mark.strip() in text for mark in [*args.labels, args.ask]):
        return "echo"
    if args.max_growth and len(revision) > args.max_growth * len(answer):
        return "long"
    answered = bool(text.strip()) and (not data.task.answered or data.task.answered([text])[0])
    return None if answered else "malformed"


def mean(values) -> float | None:
    """The mean of the values that are known; None if none is."""
    values = [x for x in values if x is not None]
    return statistics.mean(values) if values else None


def auc(positive: list[float], negative: list[float]) -> float | None:
    """The chance that a positive score is above a negative one, ties counted half; None when one kind is missing."""
    negative = sorted(negative)
    larger = sum(bisect_left(negative, x) + bisect_right(negative, x) for x in positive) / 2
    return larger / (len(positive) * len(negative)) if positive and negative else None


def revision_metrics(answers: list[Answer]) -> dict[str, float | None]:
    """What a round did to the answers, over all prompts of the round."""
    fit = [a for a in answers if not a.fault]
    out = {f"drop/{why}": mean(a.fault == why for a in answers) for why in ("unfinished", "echo", "long", "malformed")}
    out |= {"revise/threshold": answers[0].threshold, "revise/before": mean(a.before for a in answers)}
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
            out["revise/auc"] = auc([a.chances[NO] for a in right], [a.chances[NO] for a in wrong])
    return out


def sample_of(a: Answer, kind: str, tokenizer) -> dict:
    """A row of samples.jsonl."""
    label, text = "" if a.label is None else NAMES[a.label].capitalize(), common.decode(tokenizer, [a.target])[0]
    about = {"kind": kind, "prompt": a.row["prompt"], "answer": a.text, "before": a.before, "label": label}
    about |= {"chances": a.chances, "threshold": a.threshold}
    return about | {"completion": text, "dropped": a.fault, "reward": a.after}


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate_policy(models, policy, data, args):
    """Held-out accuracy or reward if there is a grader, and KL(pi || its start), exact over the vocabulary."""
    graded = data.task.correct or data.task.reward
    metrics, samples = policy.evaluate(data.task, args.seed) if data.task.test and graded else ({}, [])
    rows = (data.task.test or data.prompts)[:64]
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
    found = common.gather([(x.sum().item(), len(x)) for (x,) in found])
    return metrics | {"kl/start": sum(x for x, _ in found) / sum(n for _, n in found)}, samples


def evaluate_reviser(reviser, data, args):
    """On held-out pairs: NLL of y_h given y_l; loss, accuracy and AUC of labels; what revising every answer does."""
    mine, labelled = data.test_pairs[common.rank() :: common.world()], "label" in data.test_pairs[0]  # else: R0
    sides = [(pair, side) for side in ("rejected", "chosen") for pair in mine]
    grades = data.grade([pair[side] for pair, side in sides], [pair for pair, _ in sides])
    answers = [Answer(0, p, p[f"{side}_ids"], p[side], True, grade) for (p, side), grade in zip(sides, grades)]
    if labelled:
        judge(reviser, answers, data, args)
    write_revisions(reviser, answers, data, args)
    revised = [p for p in mine if p.get("label") != NO]
    before = [reviser_ids(data.tokenizer, p["prompt"], p["rejected"], p.get("label"), args)[0] for p in revised]
    sequences = list(zip(before, [p["chosen_ids"] for p in revised]))
    scores = likelihoods(reviser.policy, sequences, data.tokenizer.pad_token_id, args)
    nll = common.gather([(-score["sum"], len(answer)) for score, (_, answer) in zip(scores, sequences)])
    metrics = {"eval/nll": sum(x for x, _ in nll) / max(1, sum(n for _, n in nll))}
    worse, better = common.gather(answers[: len(mine)]), common.gather(answers[len(mine) :])
    if labelled:
        metrics["eval/label_auc"] = auc([a.chances[NO] for a in better], [a.chances[NO] for a in worse])
        metrics["eval/label_accuracy"] = mean(a.chances.index(max(a.chances)) == a.row["label"] for a in worse)
        metrics["eval/label_loss"] = mean(-math.log(max(a.chances[a.row["label"]], 1e-30)) for a in worse)
    if data.task.correct:
        metrics["eval/fix"] = mean(a.after for a in worse + better if a.before == 0.0)
        metrics["eval/damage"] = mean(1 - a.after for a in worse + better if a.before == 1.0)
    return metrics, [sample_of(a, "revision", data.tokenizer) for a in answers[: min(8, len(mine))]]


# ---- data and models -------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Encoded pairs, prompts without answers, and the task that grades answers if it can."""

    tokenizer: object
    task: tasks.Task
    pairs: list[dict]  # each with the half, 0 or 1, to which its prompt belongs
    test_pairs: list[dict]
    prompts: list[dict]

    def grade(self, texts: list[str], rows: list[dict]) -> list[float | None]:
        """1 and 0 for right and wrong, or a user's reward, or None if these rows have no grader."""
        task = self.task
        if task.correct:  # a pair from a file may lack what the grader reads
            column, kind = task.reads
            known = [isinstance(row.get(column), kind) for row in rows]
            right = iter(task.correct(list(itertools.compress(texts, known)), list(itertools.compress(rows, known))))
            return [float(next(right)) if there else None for there in known]
        if not task.reward or not rows:
            return [None] * len(rows)
        ids = [common.encode_completion(self.tokenizer, text, row["prompt"]) for row, text in zip(rows, texts)]
        rows = [row | {"completion_ids": answer} for row, answer in zip(rows, ids)]
        given = task.reward([row["prompt"] for row in rows], texts, rows)
        return [float(sum(x) if isinstance(x, list) else x) for x in given]


def load_data(args, tokenizer) -> Data:
    """Pairs, unannotated prompts and the task. No unannotated prompt is repeated, or in the pairs or the test set."""
    if args.prompts or args.test_dataset or not args.dataset or args.task != "auto":
        source = args.task, args.prompts, args.reward_file, args.test_rows, args.test_dataset
        task = tasks.load_task(*source, graded=False, train=args.stage == "evolve")
    else:
        task = tasks.Task("pairs", None, [], tasks.load_reward(args.reward_file) if args.reward_file else None)
    pairs, test = [], []
    if args.dataset:
        pairs, test = tasks.split_pairs(tasks.load_pairs(args.dataset), args.test_rows, "test_rows")
        pairs = tasks.apart(pairs, task.held_out)
        require(bool(pairs), f"{args.dataset}: its training prompts are all held-out ones of the task {task.name}")
    elif task.pairs:
        pairs, test = task.pairs(args.builtin_pairs, args.seed), task.pairs(args.test_rows, 0, held_out=True)
    if pairs:
        limits = args.max_prompt, args.max_new_tokens
        (pairs, note), (test, test_note) = (common.encode_pairs(tokenizer, rows, *limits) for rows in (pairs, test))
        common.say(f"training: {note}; held out: {test_note}")
    for pair in pairs + test:
        pair["half"] = 1 - zlib.crc32(json.dumps(pair["prompt"]).encode()) % 2  # all pairs of a prompt are in one half
        for side in ("chosen", "rejected"):  # as answers of a policy are read: without an end that the text may bring
            pair[side] = common.decode(tokenizer, [pair[f"{side}_ids"]])[0]
        for name in ("label", "keep_chosen"):  # of SEFT-2, and not of a user's file
            pair.pop(name, None)
        if task.name in ("gsm8k", "math"):
            pair["answer"] = tasks.reference(task.name, pair, args.dataset)
    test = [pair | {"half": 0} for pair in test]  # scored by the second R0, from which R goes on
    twice = task.correct and args.reward_file
    require(not twice, f"--reward_file: the task {task.name} has a grader of its own; expected one of both")
    fitted = replace(task, train=[], test=task.test or test, note="")
    fitted = tasks.fit_prompts(fitted, tokenizer, args.max_prompt)  # load_prompts() tells of what is trained on
    task = replace(task, test=fitted.test, note=f"{len(fitted.test)} held-out prompts{fitted.note}")
    prompts = load_prompts(args, task, pairs + test, tokenizer) if args.stage == "evolve" else []
    return Data(tokenizer, task, pairs, test, prompts)


def load_prompts(args, task, pairs: list[dict], tokenizer) -> list[dict]:
    """Unannotated prompts with their ids; none is repeated, in a pair, in the test set or too long."""
    rows = task.unannotated(2 * args.unannotated, args.seed) if task.unannotated else task.train
    seen, new, changes = {tasks.asked(row["prompt"]) for row in [*pairs, *task.held_out]}, [], Counter()
    for row in rows:
        if tasks.asked(row["prompt"]) not in seen:
            new.append(row | {"prompt_ids": common.encode_prompt(tokenizer, row["prompt"], changes)})
        seen.add(tasks.asked(row["prompt"]))
    short = [row for row in new if len(row["prompt_ids"]) <= args.max_prompt]
    found = short[: args.unannotated]
    left_out = f"{len(rows) - len(new)} seen before or elsewhere, {len(new) - len(short)} too long"
    common.say(f"{len(found)} unannotated prompts; left out: {left_out}{common.changed(changes)}; {task.note}")
    require(len(found) >= args.rounds, f"--prompts: {len(found)} new prompts, expected {args.rounds} or more")
    return found


def prepare(args) -> Data:
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    world, n = common.world(), args.prompts_per_step
    require(n % world == 0, f"--prompts_per_step {n} does not divide among {world} ranks")
    require(len(args.labels) == 3, f"--labels takes three strings (major, minor, no), found {len(args.labels)}")
    require(args.stage == "evolve" or args.keep != "best", "--keep best: --stage reviser trains three models")
    if args.stage == "evolve":
        t = args.keep_threshold
        known = t == "auto" or (t.replace(".", "", 1).isdigit() and float(t) <= 1)
        require(known, f"--keep_threshold {t!r}: expected auto or a number from 0 to 1")
        require(args.steps % args.rounds == 0, f"--steps {args.steps} does not divide into --rounds {args.rounds}")
        both = bool(args.external_rounds) == bool(args.external_model)
        require(both, "--external_model and --external_rounds go together: give both, or none of them")
        if args.external_model:
            lm.fits_context(args.external_model, args.max_prompt + args.max_new_tokens)
        require(args.reviser or args.revise == "never", f"--reviser is empty: --revise {args.revise} needs one")
    tokenizer = lm.load_tokenizer(args.model)
    lm.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    if args.stage == "reviser" or args.revise != "never":  # a reviser reads a prompt, maybe twice, and two answers
        labels, ask = label_ids(tokenizer, args), tokenizer(args.ask, add_special_tokens=False)["input_ids"]
        unknown = [t for t, ids in zip([*args.labels, args.ask], [*labels, ask]) if tokenizer.unk_token_id in ids]
        require(not unknown, f"--labels and --ask: the tokenizer of {args.model} cannot write {unknown}")
        for a, b in itertools.pairwise(sorted(labels)):
            require(a != b[: len(a)], f"--labels {args.labels}: one of them begins another; expected three that differ")
        name, longest = args.reviser or args.model, 2 * args.max_new_tokens
        longest += args.max_prompt * (1 + ("{prompt}" in args.then))
        longest += len(ask) + len(tokenizer(args.then)["input_ids"]) + max(map(len, labels))
        lm.same_tokenizer(args.model, tokenizer, name, lm.load_tokenizer(name))
        lm.fits_context(name, longest)
        file = Path(name).parent / "args.json"  # of the run that trained it
        known = common.stored(file)["args"] if args.stage == "evolve" and file.is_file() else {}
        for key in ("ask", "labels", "then"):
            found = f"--{key} {getattr(args, key)!r}: {name} was trained with {known.get(key)!r}"
            require(known.get(key, getattr(args, key)) == getattr(args, key), f"{found}; expected the same")
    some = not args.pair_share or round(args.pair_share * n)
    require(some, f"--pair_share {args.pair_share}: that is no pair of --prompts_per_step {n}; expected more, or 0")
    data = load_data(args, tokenizer)
    for prompt in (row["prompt"] for row in [*data.pairs, *data.test_pairs, *data.prompts]):
        found = f"{getattr(prompt, 'where', 'a prompt')}: the last message is not the user's"
        asked = isinstance(prompt, str) or prompt[-1]["role"] == "user"
        require(asked, f"{found}; expected one, as whole answers are revised")
    graded = data.task.correct or data.task.reward or args.revise != "adaptive" or args.keep_threshold != "auto"
    found = "--keep_threshold auto: nothing can grade these answers"
    require(graded or args.stage == "reviser", f"{found}; expected a number from 0 to 1")
    unneeded = args.stage == "evolve" and not args.pair_share
    require(data.pairs or unneeded, "--dataset is empty: --stage reviser and --pair_share need preference pairs")
    halves = len({pair["half"] for pair in data.pairs})
    require(args.stage == "evolve" or halves == 2, f"{len(data.pairs)} pairs: expected prompts for two halves")
    return data


def build(args, tokenizer, device):
    """The models by name; their samplers; the optimizer of the one that is trained, the reviser or the policy."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    name, path = ("policy", args.model) if args.stage == "evolve" else ("reviser", args.reviser or args.model)
    models = torch.nn.ModuleDict({name: lm.load_model(path, **shared, **trained)})
    if args.stage == "evolve":
        frozen = {"reviser": args.reviser} if args.revise != "never" else {}
        frozen |= {} if args.lora_rank else {"ref": args.model}  # with LoRA, the policy without its adapters
        frozen |= {"external": args.external_model} if args.external_rounds else {}
        models.update({name: lm.load_model(path, **shared, trainable=False) for name, path in frozen.items()})
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    writers = {name: lm.Sampling(model, tokenizer, *limits) for name, model in models.items()}
    if "external" in writers:
        writers["external"].tokenizer = lm.load_tokenizer(args.external_model)
    return models, writers, torch.optim.Adam(lm.trainable_parameters(models), lr=args.lr, fused=True)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: train(args), args.device)

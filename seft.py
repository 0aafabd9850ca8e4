"""SEFT: self-evolution fine-tuning. A reviser that first judges, then revises, lifts a policy through its own answers.

Chen et al. 2024, "Self-Evolution Fine-Tuning for Policy Optimization" (Findings of EMNLP 2024, arXiv:2406.10813). Only
its abstract and introduction could be read, and there is no public code, so this is a reconstruction: [P] read in the
paper, [T] told by third parties, [I] inferred here. x: a prompt, (y_l, y_h): the worse and the better answer of a pair.

    warm-up    L = -log R0(y_h | x, y_l)                                                                [T]    (SEFT-1)
    labels     gap(a -> b) = mean log R0(b | x, a) - mean log R0(a | x, a)
               need = gap(y_l -> y_h) - gap(y_h -> y_l):  No <= 0 < Minor <= median < Major             [I]    (SEFT-2)
               by an R0 that learnt from other pairs [T], here those of the other half [I]; also No: a y_h
               that R0 itself would keep                                                                [I]
    reviser    L = -w log R(label | x, y) - log R(y_h | x, y, label);  nothing follows No               [T]    (SEFT-3)
    revision   y* = y0 where R(No | x, y0) > t, else what R writes under the likelier of Major, Minor   [P], t [I]
    evolution  L = -log pi(y* | x), y0 ~ pi(. | x) for unannotated x, in rounds                         [P]    (SEFT-4)

    --revise adaptive        the method
             always, plain   never No: the same reviser; a reviser that has no labels (SEFT-1 on all pairs)
             never           y* = y0, the policy's own samples
             direct          no y0: the reviser answers x itself
             gold            the task's own answers

What differs from the paper, each for a reason
    1. [I] above: the rule of the labels, how No is found among good answers, the threshold t, the order of the data;
       that R goes on from R0 (--from_warmup).
    2. Labels are three fixed strings that are scored, never decoded: what is no label cannot come out.
    3. Means are over all tokens of a step, on all ranks; label tokens count label_weight times in both parts of it.

Run
    python seft.py                                                                       # this laptop, offline
    python seft.py --model MODEL --dataset PAIRS --prompts PROMPTS                       # 1 GPU, both stages
    torchrun --nproc_per_node=8 seft.py --stage reviser --model MODEL --dataset PAIRS --out runs/reviser       # 8 GPUs
    torchrun --nproc_per_node=8 seft.py --stage evolve --model MODEL --dataset PAIRS --prompts PROMPTS \\
        --reviser runs/reviser/adaptive/model
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 seft.py ...     # 2 nodes
More in docs/seft.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

import contextlib
import json
import statistics
import time
import zlib

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import common  # before torch: it sets how OpenMP threads wait
import tasks

import numpy as np
import torch

from common import arg, require


@dataclass
class Args:
    # model and data
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    prompts: str = arg(
        "", "the unannotated prompts: a Hub name or file; empty: made by --task (chains, strings or words)"
    )
    task: tasks.Name = arg("auto", "what the data are; auto: their columns decide")
    test_dataset: str = arg("", "the held-out rows; empty: the test split of the Hub, or the last rows of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    builtin_pairs: int = arg(2000, "the number of built-in preference pairs", at_least=1)
    builtin_flip: float = arg(
        0.0,
        "the share of the built-in pairs whose answers are swapped, as by careless annotators",
        at_least=0, at_most=1,
    )
    unannotated: int = arg(
        2000, "the number of unannotated prompts, at most; each round takes its share of them", at_least=1
    )
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # reviser
    stage: Literal["all", "reviser", "warmup", "adaptive", "evolve"] = arg(
        "all", "all: reviser, then evolve; reviser: warmup of both halves, then adaptive; evolve: of the policy"
    )
    reviser_model: str = arg("", "the model that becomes a reviser; empty: --model")
    ask: str = arg(
        "Does the answer above need a revision? If it does, revise it.",
        "what follows an answer that is to be revised: a turn of the user, or the end of a prompt that is text",
    )
    labels: list[str] = arg(
        ["[Major Revise]\n", "[Minor Revise]\n", "[No Revise]\n"],
        "the three strings that begin what a reviser writes, with what separates them from the rest",
    )
    then: str = arg("", "what stands between a label and a revision; {prompt} in it is the question again")
    fold: Literal[-1, 0, 1] = arg(-1, "the half of the pairs that --stage warmup trains R0 on; -1: all")
    judges: list[str] = arg([], "of --stage adaptive: the R0 of each half, whose scores give the labels")
    from_warmup: bool = arg(True, "the adaptive reviser goes on from the R0 of the first half; False: starts as R0 did")
    label_rule: Literal["contrast", "gap", "hardness"] = arg(
        "contrast",
        "contrast (SEFT-2): R0's gap from y_l less that from y_h, so that its habit of copying cancels; gap: the "
        "first one alone; hardness: -log R0(y_h | x, y_l), Minor up to its median, Major above",
    )
    label_weight: float = arg(6.0, "the weight of a label's tokens, which are few", at_least=0)
    warmup_reviser_steps: int = arg(200, "the number of optimizer steps of R0, for each half of the pairs", at_least=1)
    reviser_steps: int = arg(400, "the number of optimizer steps of the adaptive reviser", at_least=1)
    reviser_lr: float = arg(1e-4, "the learning rate of the revisers; falls linearly to 0", at_least=0)
    # revision
    reviser: str = arg("", "the reviser of --stage evolve")
    revise: Literal["adaptive", "always", "plain", "never", "direct", "gold"] = arg(
        "adaptive", "how answers are revised: adaptive, or by a control"
    )
    keep_threshold: str = arg(
        "auto",
        "an answer is kept where R(No) is above it: a number; pairs: parts the held-out pairs best; auto: the "
        "best of the first --calibration answers of a round, if they can be graded, else as pairs",
    )
    calibration: int = arg(
        256, "the number of the policy's answers per round that --keep_threshold auto looks at", at_least=1
    )
    revise_temperature: float = arg(0.0, "the temperature of the revisions; 0: greedy", at_least=0)
    max_growth: float = arg(
        4.0, "a revision of more than this many times the tokens of its answer is dropped; 0: kept", at_least=0
    )
    gold_slip: float = arg(
        0.0,
        "the share of mistakes in the built-in answers of --revise gold; makes policies to start from",
        at_least=0, at_most=1,
    )
    external_model: str = arg(
        "", "the model whose answers are revised instead of the policy's own, in the last --external_rounds"
    )
    external_rounds: int = arg(
        0, "the last rounds, in which the answers of --external_model are revised; their number", at_least=0
    )
    # method
    rounds: int = arg(2, "the number of times that the policy answers anew", at_least=1)
    order: Literal["easy_to_hard", "hard_to_easy", "shuffled"] = arg(
        "shuffled", "the order of the rows; easy is what the policy itself finds likely"
    )
    pair_share: float = arg(
        0.0, "the share of the better answers of the pairs in the policy's data, against drift", at_least=0, at_most=1
    )
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


# What the bare command changes. No answer of a built-in task has ++, +=, =+ or == in it.
BUILTIN = dict(
    ask="==", then="{prompt}", labels=["++", "+=", "=+"], lora_rank=0, max_prompt=24, max_new_tokens=24, micro_batch=64,
    warmup_reviser_steps=100, reviser_steps=300, reviser_lr=1e-3, steps=60, lr=2e-4, warmup_steps=4, eval_every=200,
)  # fmt: skip
MAJOR, MINOR, NO = 0, 1, 2  # in the order of --labels
NAMES = ("major", "minor", "no")
REVISION = 2  # a stream of noise beside common.TRAIN and common.EVAL


# ---- the method ------------------------------------------------------------------------------------------------------


def weighted_nll(logprobs, mask, is_label, label_weight: float):
    """SEFT-3; without label tokens also SEFT-1 and SEFT-4. All [B, T]; returns sums over tokens, in nats."""
    nll = -logprobs * mask
    label = (nll * is_label).sum()
    rest = nll.sum() - label
    return label_weight * label + rest, {"loss/label": label.detach(), "loss/nll": rest.detach()}


def need(up: float, stay: float, keep: float, down: float, rule: str) -> float:
    """SEFT-2: how much a pair speaks for a revision, from what R0 says of y_l -> y_h (up), y_l -> y_l (stay),
    y_h -> y_h (keep) and y_h -> y_l (down), each a mean log-probability in nats a token."""
    return {"gap": up - stay, "contrast": (up - stay) - (down - keep), "hardness": -up}[rule]


def cuts(values: list[float], rule: str) -> tuple[float, float]:
    """SEFT-2: No is up to the first, Minor up to the second, Major above. hardness: never No."""
    if rule == "hardness":
        return float("-inf"), statistics.median(values)
    positive = [x for x in values if x > 0]
    return 0.0, statistics.median(positive) if positive else 0.0


def label_of(value: float, limits: tuple[float, float]) -> int:
    return NO if value <= limits[0] else MINOR if value <= limits[1] else MAJOR


def decide(chances, threshold: float, may_keep: bool) -> list[int]:
    """Labels from the chances [n, 3] of Major, Minor and No: No above the threshold, else the likelier of the two."""
    return [NO if may_keep and c[NO] > threshold else MAJOR if c[MAJOR] > c[MINOR] else MINOR for c in chances]


def best_threshold(chances: list[float], kept: list[float], revised: list[float]) -> float:
    """The t under which answers are best, if those with a chance of No above t stay as they are (quality `kept`), and
    the others are revised (quality `revised`). 1: none stays, unless keeping is really better."""
    order = sorted(range(len(chances)), key=lambda i: -chances[i])
    best, threshold, gain = 0.0, 1.0, 0.0
    for place, i in enumerate(order):
        gain += kept[i] - revised[i]
        below = chances[order[place + 1]] if place + 1 < len(order) else 0.0
        if gain > best + 1e-9 and below < chances[i]:
            best, threshold = gain, (chances[i] + below) / 2
    return threshold


def arrange(rows: list[dict], order: str, epochs: list[int]) -> list[dict]:
    """The same rows in the order of training: by the likelihood of y* inside each epoch, or as they are."""
    if order == "shuffled":
        return rows
    sign = -1 if order == "easy_to_hard" else 1
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (epochs[i], sign * rows[i]["likelihood"], i))]


def auc(scores: list[float], positive: list[bool]) -> float | None:
    """The chance that a positive one has the larger score; None when one kind is missing."""
    pos, neg = (np.array([s for s, p in zip(scores, positive) if bool(p) == kind]) for kind in (True, False))
    if not len(pos) or not len(neg):
        return None
    both = np.sort(neg)
    return float((np.searchsorted(both, pos) + np.searchsorted(both, pos, "right")).mean() / 2 / len(neg))


def edit_distance(a: list, b: list) -> int:
    """Insertions, deletions and replacements between two sequences (Levenshtein), a row of the table at a time."""
    steps, row = np.arange(len(b) + 1), np.arange(len(b) + 1)
    b = np.array(b)
    for i, x in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != x))
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return int(row[-1])


# ---- models and batches to losses ------------------------------------------------------------------------------------


def make_step(rows, pad_id: int, device) -> dict:
    """This rank's share of the rows of a step as a batch; `is_label` [B, T] where a label's tokens are."""
    share = len(rows) // common.world()
    rows = rows[common.rank() * share : (common.rank() + 1) * share]
    batch = common.make_batch([r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows], pad_id, device)
    count = torch.tensor([row.get("label_tokens", 0) for row in rows], device=device)
    batch["is_label"] = torch.arange(batch["mask"].shape[1], device=device) < count[:, None]
    return batch


def objective(models, micro, args) -> dict[str, torch.Tensor]:
    """Sums over a micro-batch: what is optimised, and what is logged."""
    logprobs, entropy = common.policy_logprobs(models["policy"], micro, args.temperature)
    loss, metrics = weighted_nll(logprobs, micro["mask"], micro["is_label"], args.label_weight)
    entropy = (entropy * ~micro["is_label"]).sum()
    return {"loss/total": loss, "policy/entropy": entropy} | metrics


def accumulate(models, batch, args) -> dict[str, float]:
    """Gradients of the loss over this step on all ranks; returns it and the metrics, global means.

    The weights of all tokens are counted first and divided by once; labels and the rest are also logged apart.
    """
    device, labels = batch["mask"].device, (batch["is_label"] & batch["mask"]).sum()
    counts = {"label": labels, "rest": batch["mask"].sum() - labels, "rows": len(batch["mask"])}
    counts = common.all_sum(counts, device)
    whole = args.label_weight * counts["label"] + counts["rest"]
    sums = {}
    pieces = common.micro_batches(batch, list(range(len(batch["mask"]))), args.micro_batch)
    for micro in common.accumulate_over(models, pieces):
        parts = objective(models, micro, args)
        (parts["loss/total"] / whole * common.world()).backward()  # FSDP averages over ranks
        for name, x in parts.items():
            sums[name] = sums.get(name, 0.0) + x.detach().double()
    sums = common.all_sum(sums, device)
    metrics = {"loss/total": sums["loss/total"] / whole, "length/mean": counts["rest"] / counts["rows"]}
    metrics |= {name: sums[name] / counts["rest"] for name in ("loss/nll", "policy/entropy")}
    return metrics | ({"loss/label": sums["loss/label"] / counts["label"]} if counts["label"] else {})


def update(models, optimizer, batch, args) -> dict[str, float]:
    """One optimizer step."""
    metrics = accumulate(models, batch, args)
    norm = torch.nn.utils.clip_grad_norm_(common.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **metrics})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics | {"grad_norm": norm.item()}


@torch.no_grad()
def likelihoods(model, sequences, pad_id: int, args) -> list[dict]:
    """{sum, mean, greedy} of each (prompt ids, answer ids): log-probabilities of all tokens of the answer, and whether
    each of them is the likeliest one, so that greedy decoding would write this answer. Ranks may bring unequal numbers.
    """
    device, scores = next(model.parameters()).device, []

    def fn(logits, ids):
        logp = logits.log_softmax(-1)
        return logp.gather(-1, ids[:, None])[:, 0], logits.argmax(-1) == ids

    with common.gathered(model):
        for i in range(0, len(sequences), args.micro_batch):
            batch = common.make_batch(*map(list, zip(*sequences[i : i + args.micro_batch])), pad_id, device)
            mask = batch["mask"]
            pair = common.completion_hidden(model, batch)[mask], common.head_weight(model)
            flat = common.over_vocabulary(fn, [pair], [batch["completion_ids"][mask]], args.temperature)
            lengths = mask.sum(1).tolist()
            for logp, same in zip(*(x.split(lengths) for x in flat)):
                total = logp.sum().item()
                scores.append({"sum": total, "mean": total / len(logp), "greedy": bool(same.all())})
    return scores


def revise_ids(tokenizer, prompt, answer: str, args) -> list[int]:
    """The prompt of a reviser: question, answer, and what asks for the revision."""
    if isinstance(prompt, str):
        return common.encode_prompt(tokenizer, prompt + answer + args.ask)
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": args.ask}]
    return common.encode_prompt(tokenizer, prompt + turns)


def then_ids(tokenizer, prompt, args) -> list[int]:
    """What a reviser reads after the label, before it writes a revision."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return tokenizer(args.then.replace("{prompt}", question), add_special_tokens=False)["input_ids"]


def label_ids(tokenizer, args) -> list[list[int]]:
    return [tokenizer(label, add_special_tokens=False)["input_ids"] for label in args.labels]


def judge(reviser, tokenizer, asked: list[list[int]], args) -> list[list[float]]:
    """The chances of the three labels for each prompt of a reviser: as fixed strings, normalised over the three."""
    labels = label_ids(tokenizer, args)
    sequences = [(ids, label) for ids in asked for label in labels]
    scores = [s["sum"] for s in likelihoods(reviser, sequences, tokenizer.pad_token_id, args)]
    return torch.tensor(scores, dtype=torch.float64).reshape(-1, 3).softmax(-1).tolist()


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Encoded pairs, prompts without answers, and the task that grades answers where somebody can."""

    tokenizer: object
    task: tasks.Task
    pairs: list[dict]
    test_pairs: list[dict]
    prompts: list[dict]

    def grade(self, texts: list[str], rows: list[dict]) -> list[float | None]:
        """1 and 0 for right and wrong, or a user's reward, or None where nobody can say.

        Pairs of a file can be graded by words, gsm8k and math if they bring an `answer`, the number or the LaTeX.
        """
        known = self.task.name in ("chains", "strings") or not self.task.correct or all("answer" in r for r in rows)
        if not texts or not known or not self.graded():
            return [None] * len(texts)
        if self.task.correct:
            return [float(right) for right in self.task.correct(texts, rows)]
        ids = [common.encode_completion(self.tokenizer, text, row["prompt"]) for row, text in zip(rows, texts)]
        rows = [row | {"completion_ids": answer} for row, answer in zip(rows, ids)]
        given = self.task.reward([row["prompt"] for row in rows], texts, rows)
        return [float(sum(x)) if isinstance(x, list) else float(x) for x in given]

    def graded(self) -> bool:
        return self.task.correct is not None or self.task.reward is not None


def fold_of(row: dict) -> int:
    """The half of the pairs that a prompt belongs to, with all its pairs."""
    return zlib.crc32(json.dumps(row["prompt"]).encode()) % 2


def load_data(args, tokenizer) -> Data:
    """Pairs, unannotated prompts and the task. No prompt is twice among them, in the pairs or in the test set."""
    name = args.task if args.task != "auto" or args.prompts or args.dataset else "chains"
    made = name in ("chains", "strings", "words")
    if made or args.prompts:
        source = dict(test_rows=args.test_rows, test_dataset=args.test_dataset, graded=False)
        task = tasks.load_task(name, args.prompts, args.reward_file, args.seed, **source)
    else:
        reward = tasks.load_reward(args.reward_file) if args.reward_file else None
        task = tasks.Task("pairs", None, [], reward)
    if args.dataset:
        pairs, test = tasks.split_pairs(tasks.load_pairs(args.dataset), args.test_rows, "test_rows")
    elif task.pairs:
        pairs, test = task.pairs(args.builtin_pairs, args.seed), task.pairs(args.test_rows, 0, held_out=True)
        for i, row in enumerate(pairs):
            if tasks.generator(args.seed, "flip", i).random() < args.builtin_flip:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    else:
        require(args.stage == "evolve", f"--dataset is empty: --stage {args.stage} needs preference pairs")
        pairs, test = [], []
    note = test_note = "no pairs"
    if pairs:
        pairs, note = common.encode_pairs(tokenizer, pairs, args.max_prompt, args.max_new_tokens)
        test, test_note = common.encode_pairs(tokenizer, test, args.max_prompt, args.max_new_tokens)
    task = replace(task, test=task.test or test)
    common.say(f"training: {note}; held out: {test_note}")
    prompts = load_prompts(args, task, pairs + test, tokenizer) if args.stage == "evolve" else []
    return Data(tokenizer, task, pairs, test, prompts)


def load_prompts(args, task, pairs: list[dict], tokenizer) -> list[dict]:
    """Unannotated prompts with their ids, none of them twice, none of a pair, of the test set or too long."""
    seen = {json.dumps(row["prompt"]) for row in [*pairs, *task.test]}
    found, known, long, changes = [], 0, 0, Counter()
    rows = task.unannotated(2 * args.unannotated, args.seed) if task.unannotated else task.train
    for row in rows:
        key = json.dumps(row["prompt"])
        ids = common.encode_prompt(tokenizer, row["prompt"], changes)
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


def rows_for_reviser(data: Data, pairs: list[dict], args) -> list[dict]:
    """SEFT-1: (x, y_l) -> y_h; with labels SEFT-3: (x, y_l) -> label, y_h or No alone; and some (x, y_h) -> No."""
    rows, labels, end = [], label_ids(data.tokenizer, args), [data.tokenizer.eos_token_id]
    for pair in pairs:
        asked = revise_ids(data.tokenizer, pair["prompt"], pair["rejected"], args)
        then = then_ids(data.tokenizer, pair["prompt"], args)
        if "label" not in pair:
            rows.append({"prompt_ids": asked + then, "completion_ids": pair["chosen_ids"]})
            continue
        label = labels[pair["label"]]
        rest = end if pair["label"] == NO else then + pair["chosen_ids"]
        rows.append({"prompt_ids": asked, "completion_ids": label + rest, "label_tokens": len(label)})
        if pair["keep_chosen"]:
            asked = revise_ids(data.tokenizer, pair["prompt"], pair["chosen"], args)
            rows.append({"prompt_ids": asked, "completion_ids": labels[NO] + end, "label_tokens": len(labels[NO])})
    return rows


def label_pairs(data: Data, args, folder: Path, device) -> dict[str, float]:
    """Give all pairs a `label` (SEFT-2) and `keep_chosen`, by the R0 that did not see them; kept in labels.jsonl."""
    file, everything = folder / "labels.jsonl", data.pairs + data.test_pairs
    if not common.from_rank_0(file.exists()):
        found = []
        for fold, name in enumerate(args.judges):
            options = dict(dtype=args.dtype, device=device)
            judging = common.load_model(name, trainable=False, **options)
            new = [i for i, p in enumerate(data.pairs) if fold_of(p) != fold]
            new += range(len(data.pairs), len(everything)) if fold == 0 else []  # held-out pairs are new to both
            mine = new[common.rank() :: common.world()]
            sequences = []
            for pair in (everything[i] for i in mine):
                asked = [revise_ids(data.tokenizer, pair["prompt"], pair[s], args) for s in ("rejected", "chosen")]
                asked = [ids + then_ids(data.tokenizer, pair["prompt"], args) for ids in asked]
                better, worse = pair["chosen_ids"], pair["rejected_ids"]
                sequences += [(asked[0], better), (asked[0], worse), (asked[1], better), (asked[1], worse)]
            said = likelihoods(judging, sequences, data.tokenizer.pad_token_id, args)
            for i, up, stay, keep, down in zip(mine, said[0::4], said[1::4], said[2::4], said[3::4]):
                value = need(up["mean"], stay["mean"], keep["mean"], down["mean"], args.label_rule)
                found.append({"pair": i, "judge": fold, "value": value, "keep_chosen": keep["greedy"]})
        found = sorted(common.gather(found), key=lambda line: line["pair"])
        limits = cuts([line["value"] for line in found[: len(data.pairs)]], args.label_rule)
        lines = [line | {"label": label_of(line["value"], limits)} for line in found]
        if common.rank() == 0:
            common.write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
        common.from_rank_0(None)  # the others read it only when it is there
    for line in map(json.loads, file.read_text().splitlines()):
        everything[line["pair"]] |= {"label": line["label"], "keep_chosen": line["keep_chosen"]}
    n = len(data.pairs)
    metrics = {f"label/{name}": sum(p["label"] == i for p in data.pairs) / n for i, name in enumerate(NAMES)}
    metrics["label/keep_chosen"] = sum(p["keep_chosen"] for p in data.pairs) / n
    grades = data.grade([p["rejected"] for p in data.pairs], data.pairs)
    for i, name in enumerate(NAMES):
        of_label = [g for g, p in zip(grades, data.pairs) if p["label"] == i and g is not None]
        metrics[f"label/quality_{name}"] = statistics.mean(of_label) if of_label else None
    return metrics


# ---- revision --------------------------------------------------------------------------------------------------------


def write(sampling, asked, labels, then, args, noise=None) -> list[list[int]]:
    """What a reviser writes after its prompt, a label (None: no label) and what stands between."""
    strings = label_ids(sampling.tokenizer, args)
    prompts = [[*ids, *(strings[k] if k is not None else []), *rest] for ids, k, rest in zip(asked, labels, then)]
    return replace(sampling, temperature=args.revise_temperature or 1.0).complete(prompts, 1, noise)


def texts_of(tokenizer, completion_ids: list[list[int]]) -> list[str]:
    """Of no completions (a rank may have none) no texts: the tokenizer itself would make one of an empty list."""
    return common.decode(tokenizer, completion_ids) if completion_ids else []


def fault(revision: list[int], item: dict, sampling, data: Data, args) -> str | None:
    """Why a revision is not fit to learn from; None when it is."""
    text = common.decode(sampling.tokenizer, [revision])[0]
    if revision[-1] not in common.stop_ids(sampling.policy, sampling.tokenizer):
        return "unfinished"
    if any(mark.strip() in text for mark in [*args.labels, args.ask]):
        return "echo"
    if args.max_growth and item["answer_ids"] and len(revision) > args.max_growth * len(item["answer_ids"]):
        return "long"
    answered = bool(text.strip()) and (not data.task.answered or data.task.answered([text])[0])
    return None if answered else "malformed"


def answer(samplings, rows: list[dict], numbers: list[int], first: int, data: Data, args) -> list[dict]:
    """y0 of each prompt: the policy's own answer or, in the last rounds, that of the external model."""
    span = args.steps // args.rounds
    source = samplings["external" if first // span >= args.rounds - args.external_rounds else "policy"]
    items = [{"number": n, "row": row, "prompt_ids": row["prompt_ids"]} for n, row in zip(numbers, rows)]
    if args.revise in ("direct", "gold") or not items:
        return [item | {"answer_ids": []} for item in items]
    noise = common.uniforms(args.seed, common.TRAIN, first, numbers, args.max_new_tokens)
    completions = source.complete([source.encode(row) for row in rows], 1, noise)
    ends = set(common.stop_ids(source.policy, source.tokenizer))
    texts = common.decode(source.tokenizer, completions)
    for item, ids, text, grade in zip(items, completions, texts, data.grade(texts, rows)):
        ended = ids[-1] in ends
        if source is not samplings["policy"]:  # it may have another tokenizer
            ids = common.encode_completion(data.tokenizer, text, item["row"]["prompt"])
        item |= {"answer_ids": ids, "answer": text, "before": grade, "ended": ended}
    return items


def calibrate(reviser, items: list[dict], first: int, data: Data, args) -> float:
    """The threshold t of --keep_threshold; the same on all ranks."""
    if args.keep_threshold not in ("auto", "pairs"):
        return float(args.keep_threshold)
    if args.keep_threshold == "auto" and data.graded():
        known = [i for i in items if i["number"] < args.calibration and i["ended"]]
        revise_all(reviser, known, first, data, args)
        known = common.gather([(i["chances"][NO], i["before"], i["after"] or 0.0) for i in known])
        return best_threshold(*map(list, zip(*known))) if known else 1.0
    require(bool(data.test_pairs), "--keep_threshold: there is neither a grader nor a pair, so give a number")
    mine = data.test_pairs[common.rank() :: common.world()]
    asked = [revise_ids(data.tokenizer, p["prompt"], p[s], args) for p in mine for s in ("chosen", "rejected")]
    chances = [c[NO] for c in judge(reviser.policy, data.tokenizer, asked, args)]
    known = common.gather([(c, float(i % 2 == 0), float(i % 2 == 1)) for i, c in enumerate(chances)])
    return best_threshold(*map(list, zip(*known)))


def revise_all(reviser, items: list[dict], first: int, data: Data, args) -> None:
    """Give items that have none a revision under their `label` (`revised_ids`), its `fault`, and its grade `after`."""
    items = [item for item in items if "revised_ids" not in item]
    labels, numbers = [item["label"] for item in items], [item["number"] for item in items]
    sampled = args.revise_temperature and items
    noise = common.uniforms(args.seed, REVISION, first, numbers, args.max_new_tokens) if sampled else None
    then = [item["then"] for item in items]
    revised = write(reviser, [item["asked"] for item in items], labels, then, args, noise)
    grades = data.grade(texts_of(data.tokenizer, revised), [item["row"] for item in items])
    for item, ids, grade in zip(items, revised, grades):
        wrong = fault(ids, item, reviser, data, args)
        item |= {"revised_ids": ids, "fault": wrong, "after": None if wrong else grade}


def revise(samplings, rows: list[dict], numbers: list[int], first: int, data: Data, args):
    """(items, threshold): x, y0, label and y* (`completion_ids`, none where it is dropped) of this rank's prompts."""
    items, threshold = answer(samplings, rows, numbers, first, data, args), None
    if args.revise == "gold":
        texts = data.task.gold(rows, args.seed, args.gold_slip)
        revised = [common.encode_completion(data.tokenizer, t, row["prompt"]) for t, row in zip(texts, rows)]
        for item, ids, grade in zip(items, revised, data.grade(texts, rows)):
            item |= {"label": None, "revised_ids": ids, "fault": None, "after": grade}
    elif args.revise == "never":
        for item in items:
            item["label"] = NO
    else:
        reviser = samplings["reviser"]
        for item in items:
            item |= {"asked": item["prompt_ids"], "then": [], "label": None}
            if args.revise != "direct":
                prompt = item["row"]["prompt"]
                item["asked"] = revise_ids(data.tokenizer, prompt, item["answer"], args)
                item["then"] = then_ids(data.tokenizer, prompt, args)
        if args.revise in ("adaptive", "always"):
            chances = judge(reviser.policy, data.tokenizer, [item["asked"] for item in items], args)
            for item, c, label in zip(items, chances, decide(chances, 1.0, may_keep=False)):
                item |= {"chances": c, "label": label}
        if args.revise == "adaptive":
            threshold = calibrate(reviser, items, first, data, args)
            for item, label in zip(items, decide([i["chances"] for i in items], threshold, may_keep=True)):
                item["label"] = label if item["ended"] else item["label"]  # what has no end cannot be kept
        revise_all(reviser, [item for item in items if item["label"] != NO], first, data, args)
    for item in items:
        if item["label"] == NO:
            item |= {"after": item["before"], "fault": None if item["ended"] else "unfinished"}
        item["completion_ids"] = item["answer_ids"] if item["label"] == NO else item["revised_ids"]
    return items, threshold


def revision_metrics(items: list[dict], threshold: float | None, args) -> dict[str, float | None]:
    """What a round did to the answers of the policy, over all prompts of the round."""
    share = lambda some, of: len(some) / len(of) if of else None  # noqa: E731
    mean = lambda values: statistics.mean(values) if values else None  # noqa: E731
    used = [i for i in items if not i["fault"]]
    out = {f"drop/{why}": share([i for i in items if i["fault"] == why], items)
           for why in ("unfinished", "echo", "long", "malformed")}  # fmt: skip
    out |= {"revise/threshold": threshold, "revise/after": mean([i["after"] for i in used if i["after"] is not None])}
    if args.revise in ("direct", "gold"):
        return out
    out["revise/length_ratio"] = mean([len(i["completion_ids"]) / len(i["answer_ids"]) for i in used])
    out["revise/before"] = mean([i["before"] for i in items if i["before"] is not None])
    for label, name in enumerate(NAMES):
        mine = [i for i in used if i["label"] == label]
        out[f"revise/{name}"] = share([i for i in items if i["label"] == label], items)
        out[f"revise/before_{name}"] = mean([i["before"] for i in mine if i["before"] is not None])
        if label != NO:
            out[f"revise/same_{name}"] = share([i for i in mine if i["completion_ids"] == i["answer_ids"]], mine)
            distances = [edit_distance(i["answer_ids"], i["completion_ids"]) for i in mine]
            out[f"revise/distance_{name}"] = mean(distances)
    if all(i["before"] in (0.0, 1.0) for i in items):
        right, wrong = ([i for i in items if i["before"] == kind] for kind in (1.0, 0.0))
        out["revise/fix"] = share([i for i in wrong if i["after"] == 1.0], wrong)
        out["revise/damage"] = share([i for i in right if not i["fault"] and i["after"] == 0.0], right)
        out["revise/keep_right"] = share([i for i in right if i["label"] == NO], right)
        out["revise/keep_wrong"] = share([i for i in wrong if i["label"] == NO], wrong)
        if "chances" in items[0]:
            out["revise/auc"] = auc([i["chances"][NO] for i in items], [i["before"] == 1.0 for i in items])
    return out


def evolve(samplings, data: Data, first: int, args, folder: Path):
    """The round that begins at step `first`: (rows to learn from, metrics, samples), the same on all ranks.

    Kept in folder/rounds, for a resumed run cannot ask the policy of an earlier step again.
    """
    number, each = first // (args.steps // args.rounds), len(data.prompts) // args.rounds
    file = folder / "rounds" / f"round-{number}.json"
    if not common.from_rank_0(file.exists()):
        mine = range(common.rank(), each, common.world())
        rows = [data.prompts[number * each + i] for i in mine]
        items, threshold = revise(samplings, rows, list(mine), first, data, args)
        used = [i for i in items if not i["fault"]]
        if args.order != "shuffled":
            sequences = [(i["prompt_ids"], i["completion_ids"]) for i in used]
            scores = likelihoods(samplings["policy"].policy, sequences, data.tokenizer.pad_token_id, args)
            for item, score in zip(used, scores):
                item["likelihood"] = score["mean"]
        for item in items:
            text = common.decode(data.tokenizer, [item["completion_ids"]])[0]
            item |= {"prompt": item.pop("row")["prompt"], "revised": text, "asked": None, "then": None}
        items = sorted(common.gather(items), key=lambda item: item["number"])
        made = {"metrics": revision_metrics(items, threshold, args), "items": items}
        if common.rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            common.write_whole(file, json.dumps(made))
        common.from_rank_0(None)  # the others read it only when it is there
    made = json.loads(file.read_text())
    rows = [item for item in made["items"] if not item["fault"]]
    require(bool(rows), f"round {number}: all {each} answers were dropped ({made['metrics']}): see {file}")
    words = {None: "", MAJOR: "Major", MINOR: "Minor", NO: "No"}
    samples = [
        {"kind": f"round {number} {words[i['label']]}".strip(), "prompt": i["prompt"], "answer": i.get("answer"),
         "label": words[i["label"]], "chances": i.get("chances"), "completion": i["revised"], "dropped": i["fault"],
         "reward": i["after"] or 0.0}
        for i in made["items"][:12]
    ]  # fmt: skip
    return rows, made["metrics"], samples


def schedule(rows: list[dict], first: int, args) -> list[dict]:
    """All own rows of a round in the order of training; each order has the same rows as often."""
    span, n = args.steps // args.rounds, own_rows(args)
    shuffled = [row for s in range(span) for row in tasks.walk(rows)(args.seed + first, s, n)]
    return arrange(shuffled, args.order, [i // len(rows) for i in range(len(shuffled))])


def own_rows(args) -> int:
    """Rows of a step that are the policy's own answers, revised; the others are better answers of the pairs."""
    return args.prompts_per_step - round(args.pair_share * args.prompts_per_step)


# ---- the run ---------------------------------------------------------------------------------------------------------


def is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def check_combinations(args) -> None:
    """Values that are legal alone and not together."""
    known = args.keep_threshold in ("auto", "pairs") or is_share(args.keep_threshold)
    require(known, f"--keep_threshold {args.keep_threshold!r}: expected auto, pairs or a number from 0 to 1")
    world, n = common.world(), args.prompts_per_step
    require(n % world == 0, f"--prompts_per_step {n} does not divide among {world} ranks")
    require(args.steps % args.rounds == 0, f"--steps {args.steps} does not divide into --rounds {args.rounds}")
    micro = min(args.micro_batch, n // world)
    require(n // world % micro == 0, f"--micro_batch {micro} does not divide the {n // world} rows of a rank in a step")
    require(len(args.labels) == 3, f"--labels takes three strings (major, minor, no), found {len(args.labels)}")
    require(not args.gold_slip or args.revise == "gold", "--gold_slip is of --revise gold")
    require(not args.external_rounds or args.external_model, "--external_rounds needs --external_model")
    require(args.external_rounds <= args.rounds, f"--external_rounds {args.external_rounds} of --rounds {args.rounds}")
    if args.stage == "adaptive":
        require(len(args.judges) == 2, f"--judges takes the R0 of fold 0 and of fold 1, found {len(args.judges)}")


def settled(args):
    """What is trained, and how long: a reviser in its stages, else the policy."""
    if args.stage not in ("warmup", "adaptive"):
        return args
    steps = args.warmup_reviser_steps if args.stage == "warmup" else args.reviser_steps
    goes_on = args.stage == "adaptive" and args.from_warmup and args.judges
    model = args.judges[0] if goes_on else args.reviser_model or args.model
    return replace(args, model=model, steps=steps, lr=args.reviser_lr, rounds=1)


def needs_reviser(args) -> bool:
    return args.stage == "evolve" and args.revise not in ("never", "gold")


def prepare(args) -> Data:
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    check_combinations(args)
    tokenizer = common.load_tokenizer(args.model)
    common.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    strings = label_ids(tokenizer, args)
    for text, ids in zip([*args.labels, args.ask], [*strings, tokenizer(args.ask)["input_ids"]]):
        known = ids and tokenizer.unk_token_id not in ids
        require(known, f"--labels and --ask: the tokenizer of {args.model} cannot write {text!r}")
    for a, b in ((a, b) for a in range(3) for b in range(3) if a != b):
        begins = strings[a] == strings[b][: len(strings[a])]
        require(not begins, f"--labels: {args.labels[b]!r} begins with {args.labels[a]!r}, expected three that differ")
    longest = args.max_prompt * (1 + ("{prompt}" in args.then)) + 2 * args.max_new_tokens
    longest += len(tokenizer(args.ask + args.then)["input_ids"]) + max(map(len, strings))
    revisers = [args.reviser] if args.stage == "evolve" else [args.reviser_model or args.model]
    for name in filter(None, {*revisers, *args.judges}):
        common.same_tokenizer(args.model, tokenizer, name, common.load_tokenizer(name))
        config = common.load_config(name).get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or longest
        require(
            longest <= limit,
            f"--max_prompt and --max_new_tokens: a reviser reads a prompt, an answer and --ask and writes a label and "
            f"an answer, up to {longest} tokens, and {name} has {limit} positions",
        )
    data = load_data(args, tokenizer)
    if args.revise == "gold":
        require(data.task.gold is not None, f"--revise gold: --task {data.task.name} has no answers of its own")
    require(data.pairs or not args.pair_share, "--pair_share needs --dataset, the pairs")
    return data


def build(args, device):
    """The models by name, and the optimizer of the one that is trained: `policy`, also where it becomes a reviser."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": common.load_model(args.model, **trained)})
    if args.stage == "evolve" and not args.lora_rank:  # with LoRA, the policy without its adapters is the start
        models["start"] = common.load_model(args.model, trainable=False, **shared)
    if needs_reviser(args):
        models["reviser"] = common.load_model(args.reviser, trainable=False, **shared)
    if args.stage == "evolve" and args.external_rounds:
        models["external"] = common.load_model(args.external_model, trainable=False, **shared)
    return models, torch.optim.Adam(common.trainable_parameters(models["policy"]), lr=args.lr, fused=True)


def samplings_of(models, tokenizer, args) -> dict[str, common.Sampling]:
    """Who writes, by name: the policy, the reviser, the external model."""
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    writers = {name: common.Sampling(m, tokenizer, *limits) for name, m in models.items() if name != "start"}
    if "external" in writers:
        own = common.load_tokenizer(args.external_model)
        writers["external"] = replace(writers["external"], tokenizer=own)
    return writers


def plan(args) -> list:
    """The runs of a stage in order, each this script with its own --stage and --out."""
    home, runs, reviser = Path(args.out), [], args.reviser
    if args.stage in ("reviser", "all") and args.revise not in ("never", "gold"):
        folder = home / "reviser" if args.stage == "all" else home
        if args.revise == "plain":
            runs = [replace(args, stage="warmup", fold=-1, out=str(folder / "plain"))]
        else:
            halves = [str(folder / f"warmup-{fold}") for fold in (0, 1)]
            runs = [replace(args, stage="warmup", fold=fold, out=half) for fold, half in enumerate(halves)]
            judges = [f"{half}/model" for half in halves]
            runs.append(replace(args, stage="adaptive", judges=judges, out=str(folder / "adaptive")))
        reviser = str(Path(runs[-1].out) / "model")
    if args.stage == "all":
        runs.append(replace(args, stage="evolve", reviser=reviser, out=str(home / "policy")))
    return [settled(one) for one in runs or [args]]


def run_stages(args) -> None:
    """All runs of --stage, each in a folder of its own below --out; with --resume, those that have ended are left."""
    several = args.stage in ("all", "reviser")
    if several:
        require(not args.reviser, f"--stage {args.stage} makes its own: --reviser goes with --stage evolve")
        require(not args.resume or args.out, "--resume needs --out, the folder of the run to go on with")
        prepare(
            replace(args, stage="evolve" if args.stage == "all" else "warmup")
        )  # refused before the first run starts
        args = replace(args, out=common.from_rank_0(args.out or f"runs/seft-{time.strftime('%Y%m%d-%H%M%S')}"))
    for one in plan(args):
        newest = common.latest_checkpoint(Path(one.out)) if args.resume else None
        if several and newest and newest[0] == one.steps and (Path(one.out) / "model").exists():
            common.say(f"{one.out} has ended")
            continue
        train(one)
        if common.stop_requested(common.local_device(args.device)):
            break


@torch.no_grad()
def evaluate(models, samplings, data: Data, args):
    """Held-out metrics and samples: of a reviser on pairs, of the policy on prompts."""
    if args.stage != "evolve":
        return evaluate_reviser(samplings["policy"], data, args)
    policy, device = samplings["policy"], next(models["policy"].parameters()).device
    if data.graded() and data.task.test:
        metrics, samples = policy.evaluate(data.task, args.seed)
    else:
        rows = data.prompts[:4]
        texts = common.decode(data.tokenizer, policy.complete([row["prompt_ids"] for row in rows], 1, None))
        metrics, samples = {}, [{"kind": "prompt", "completion": text, "reward": 0.0} for text in texts]
        samples = [sample | {"prompt": row["prompt"]} for sample, row in zip(samples, rows)]
    rows = (data.task.test or data.prompts)[: 64 * common.world()]
    mine = list(range(common.rank(), len(rows), common.world()))
    noise = common.uniforms(args.seed, common.EVAL, 0, mine, args.max_new_tokens) if mine else None
    prompts = [policy.encode(rows[i]) for i in mine]
    sums = kl_sums(models, list(zip(prompts, policy.complete(prompts, 1, noise))), data.tokenizer.pad_token_id, args)
    sums = common.all_sum(sums, device)
    return metrics | {"kl/start": sums["kl"] / sums["tokens"]}, samples


def kl_sums(models, sequences, pad_id: int, args) -> dict[str, float]:
    """KL(pi || its start), summed over the tokens of these answers of pi, exact over the vocabulary; and the tokens."""
    policy, sums = models["policy"], {"kl": 0.0, "tokens": 0.0}
    start, apart = (models["start"], contextlib.nullcontext) if "start" in models else (policy, common.adapters_off)

    def fn(logits, start_logits):
        logp, start_logp = logits.log_softmax(-1), start_logits.log_softmax(-1)
        return (logp.exp() * (logp - start_logp)).sum()

    with common.gathered(*([policy] if start is policy else [policy, start])):
        for i in range(0, len(sequences), args.micro_batch):
            some = list(map(list, zip(*sequences[i : i + args.micro_batch])))
            batch = common.make_batch(*some, pad_id, next(policy.parameters()).device)
            mask = batch["mask"]
            hidden = common.completion_hidden(policy, batch)[mask]
            with apart(start) if start is policy else apart():
                before = common.completion_hidden(start, batch)[mask]
            heads = [(hidden, common.head_weight(policy)), (before, common.head_weight(start))]
            sums["kl"] += common.over_vocabulary(fn, heads, [], args.temperature).item()
            sums["tokens"] += len(hidden)
    return sums


def evaluate_reviser(sampling, data: Data, args):
    """On held-out pairs: NLL of y_h, label loss, accuracy and AUC (y_h against y_l), and what always revising does."""
    tokenizer, labels = data.tokenizer, label_ids(data.tokenizer, args)
    mine, adaptive = data.test_pairs[common.rank() :: common.world()], args.stage == "adaptive"
    asked = [revise_ids(tokenizer, p["prompt"], p[side], args) for side in ("rejected", "chosen") for p in mine]
    told = [None] * len(asked)
    found = [{} for _ in mine]
    if adaptive:
        chances = judge(sampling.policy, tokenizer, asked, args)
        told = decide(chances, 1.0, may_keep=False)
        for line, pair, low, high in zip(found, mine, chances, chances[len(mine) :]):
            line |= {"low": low[NO], "high": high[NO], "loss": -float(np.log(max(low[pair["label"]], 1e-30)))}
            line["right"] = float(low.index(max(low)) == pair["label"])
    then = [then_ids(tokenizer, pair["prompt"], args) for pair in mine]
    sequences = [
        (ids + (labels[pair["label"]] if adaptive else []) + rest, pair["chosen_ids"])
        for ids, rest, pair in zip(asked, then, mine)
        if not adaptive or pair["label"] != NO
    ]
    scores = likelihoods(sampling.policy, sequences, tokenizer.pad_token_id, args)
    nll = [(-score["sum"], len(answer)) for score, (_, answer) in zip(scores, sequences)]
    texts = texts_of(tokenizer, write(sampling, asked, told, then * 2, args))
    before = data.grade([p["rejected"] for p in mine] + [p["chosen"] for p in mine], [*mine, *mine])
    for i, (was, now) in enumerate(zip(before, data.grade(texts, [*mine, *mine]))):
        found[i % len(mine)][("low", "high")[i // len(mine)] + "_change"] = (was, now)
    found, nll = common.gather(found), common.gather(nll)
    metrics = {"eval/nll": sum(x for x, _ in nll) / max(1, sum(n for _, n in nll))}
    if adaptive:
        scores = [x["low"] for x in found] + [x["high"] for x in found]
        metrics["eval/label_auc"] = auc(scores, [False] * len(found) + [True] * len(found))
        metrics["eval/label_accuracy"] = statistics.mean(x["right"] for x in found)
        metrics["eval/label_loss"] = statistics.mean(x["loss"] for x in found)
    if data.task.correct:
        changes = [x[name] for x in found for name in ("low_change", "high_change")]
        wrong, right = ([now for was, now in changes if was == kind] for kind in (0.0, 1.0))
        metrics["eval/fix"] = statistics.mean(wrong) if wrong else None
        metrics["eval/damage"] = 1 - statistics.mean(right) if right else None
    samples = [
        {"kind": "revision", "prompt": pair["prompt"], "answer": pair["rejected"], "label": label, "completion": text}
        for pair, label, text in list(zip(mine, told, texts))[:8]
    ]
    samples = [sample | {"reward": 0.0} for sample in samples]  # the report has a column of rewards
    return metrics, samples


def train(args) -> None:
    """One run."""
    args, device = settled(args), common.local_device(args.device)
    data = prepare(args)
    require(args.reviser or not needs_reviser(args), f"--reviser is empty: --revise {args.revise} needs one")
    run = common.Run(args, __file__)
    told = label_pairs(data, args, run.path, device) if args.stage == "adaptive" else {}
    models, optimizer = build(args, device)
    samplings = samplings_of(models, data.tokenizer, args)
    mine = [p for p in data.pairs if args.stage == "adaptive" or args.fold in (-1, fold_of(p))]
    require(bool(mine) or args.stage == "evolve", f"--fold {args.fold}: none of the {len(data.pairs)} pairs is in it")
    for_reviser = tasks.walk(rows_for_reviser(data, mine, args)) if args.stage != "evolve" else None
    preferred = tasks.walk([row | {"completion_ids": row["chosen_ids"]} for row in data.pairs])
    span, own = args.steps // args.rounds, own_rows(args)

    def held_out():
        metrics, samples = evaluate(models, samplings, data, args)
        return (told if run.step < 0 else {}) | metrics, samples

    for step in run.steps(models, optimizer, held_out):
        metrics, first = {}, step - step % span

        # ---- 1. a new round: the policy answers prompts, the reviser revises, what is left is put in order
        if args.stage == "evolve" and step in (first, run.start):
            revised, of_round, examples = evolve(samplings, data, first, args, run.path)
            arranged = schedule(revised, first, args)
            if step == first:
                metrics |= of_round
                run.samples(step + 1, examples)
            run.lap("revise")

        # ---- 2. the answers of this step
        if args.stage == "evolve":
            rows = arranged[(step - first) * own :][:own] + preferred(args.seed, step, args.prompts_per_step - own)
        else:
            rows = for_reviser(args.seed, step, args.prompts_per_step)
        batch = make_step(rows, data.tokenizer.pad_token_id, device)

        # ---- 3. one optimizer step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1)) * (1 - step / args.steps)
        metrics |= update(models, optimizer, batch, args)
        run.lap("update")

        # ---- 4. log; evaluate and save when it is time
        run.end_step(metrics | {"lr": optimizer.param_groups[0]["lr"]}, evaluate=(step + 1) % span == 0)
    run.finish(models["policy"], data.tokenizer)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: run_stages(args), args.device)

"""DCKD: dual-constrained knowledge distillation. A preference-aligned teacher distilled into a small student.

Gao et al. 2025, "Advantage-Guided Distillation for Preference Alignment in Small Language Models" (ICLR 2025,
arXiv:2502.17927). Preference training does little for a small model. So align a large one, and let the small one
imitate it on both answers of each pair: on the worse one, the teacher says what should follow a bad beginning.

    L = NLL(y_w) + a_w mean_{t in y_w} KL(pi_dpo || pi) + a_l mean_{t in y_l} KL(pi_dpo || pi)                  (DCKD-1)

    --loss dckd   DCKD-1
    --loss kd     DCKD-1 with a_l = 0: plain distillation on the better answers
    --loss sft    NLL(y_w) alone
    --loss dpo    -log sigmoid(beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)]), pi_ref the start of pi         (DPO-1)

KL is forward, over the whole vocabulary, without a temperature of its own. --stage teacher makes the teacher with the
same loop: SFT gives pi_ref, DPO of it gives pi_dpo. adpa.py goes on from here: docs/diffs/dckd--adpa.diff.

What differs from the paper, each for a reason
    1. Means are over all tokens of a step, on all ranks, not over sequences first: the micro-batch changes nothing.
    2. Teacher scores are exact: final hidden states and the LM head, on the fly or cached (--cache topk: authors' way).
    3. Vocabularies of different padded size are cut to the shared rows before the softmax, and what was cut is logged.

Run
    python dckd.py                                                                       # this laptop, offline
    python dckd.py --stage teacher --teacher BIG --dataset PAIRS --out runs/teacher                     # 1 GPU
    torchrun --nproc_per_node=8 dckd.py --model SMALL --teacher runs/teacher/dpo/model --dataset PAIRS  # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dckd.py ...  # 2 nodes
More in docs/dckd.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

from dataclasses import dataclass, replace
from typing import Literal

import contextlib
import hashlib
import json
import time
from pathlib import Path

import common  # before torch: it sets how OpenMP threads wait
import tasks

import torch
import torch.nn.functional as F

from common import arg, require


@dataclass
class Args:
    # model and data
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    teacher: str = arg("", "the aligned teacher pi_dpo; with --stage teacher or all: the model that becomes it")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    task: tasks.Name = arg("auto", "what the data are; auto: their columns decide")
    test_dataset: str = arg("", "the held-out rows; empty: the test split of the Hub, or the last rows of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    builtin_pairs: int = arg(2000, "the number of built-in preference pairs", at_least=1)
    builtin_slip: float = arg(
        0.6, "the share of carries that the writer of the built-in pairs forgets", at_least=0, at_most=1
    )
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # teacher
    stage: Literal["student", "teacher", "all"] = arg(
        "student", "student: train --model by --loss; teacher: SFT, then DPO, of --teacher; all: both"
    )
    sft_steps: int = arg(0, "the steps of the teacher's SFT; 0: --teacher is an SFT model already", at_least=0)
    sft_lr: float = arg(1e-5, "the learning rate of the teacher's SFT", at_least=0)
    dpo_steps: int = arg(200, "the steps of the teacher's DPO", at_least=1)
    dpo_lr: float = arg(5e-7, "the learning rate of the teacher's DPO", at_least=0)
    dpo_beta: float = arg(0.1, "the beta of DPO (recipe of DCKD's authors: 0.01)", at_least=1e-6)
    dpo_nll: float = arg(
        0.0, "the coefficient of NLL(y_w) beside DPO-1, which keeps the better answers likely; 0: plain DPO", at_least=0
    )
    # teacher scores
    cache: Literal["none", "hidden", "topk"] = arg(
        "none",
        "where teacher scores come from: none: computed in each step; hidden: final hidden states on disk, exact; "
        "topk: the likeliest tokens on disk",
    )
    cache_topk: int = arg(50, "the number of tokens that --cache topk keeps; the rest is one bucket", at_least=1)
    cache_dir: str = arg("", "the folder of the cache, which runs may share; empty: in the run folder")
    # method
    loss: Literal["dckd", "kd", "sft", "dpo"] = arg("dckd", "DCKD-1, its better answers alone, NLL alone, or DPO-1")
    a_w: float = arg(
        0.1,
        "the coefficient of the KL on the better answers (authors' recipe: 0.1; best in the paper: 0.2)",
        at_least=0,
    )
    a_l: float = arg(
        0.1, "the coefficient of the KL on the worse answers (authors' recipe: 0.1; best in the paper: 0.2)", at_least=0
    )
    # optimisation
    steps: int = arg(200, "the number of optimizer steps", at_least=1)
    prompts_per_step: int = arg(64, "prompts per step, over all ranks", at_least=1)
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    lr: float = arg(1e-5, "the learning rate of the policy; falls linearly to 0", at_least=0)
    warmup_steps: int = arg(0, "the number of first steps in which learning rates rise linearly", at_least=0)
    max_grad_norm: float = arg(1.0, "the norm to which gradients are clipped", at_least=1e-6)
    lora_rank: int = arg(0, "the rank of LoRA adapters, trained instead of all weights; 0: all weights", at_least=0)
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


# What the bare command changes: a small model takes large steps, and it is aligned and distilled in one go.
BUILTIN = dict(
    model="builtin-small", teacher="builtin", stage="all", dpo_steps=100, dpo_lr=2e-4, dpo_beta=0.3, dpo_nll=2.0,
    steps=80, lr=5e-4, warmup_steps=4, prompts_per_step=32, max_prompt=24, max_new_tokens=24, micro_batch=64,
    cache_topk=8,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def weights(args) -> dict[str, float]:
    """DCKD-1: what the loss is a sum of, each of them a mean over the tokens of its side (or over pairs)."""
    return {
        "dckd": {"loss/nll": 1.0, "kl/chosen": args.a_w, "kl/rejected": args.a_l},
        "kd": {"loss/nll": 1.0, "kl/chosen": args.a_w},
        "sft": {"loss/nll": 1.0},
        "dpo": {"loss/dpo": 1.0, "loss/nll": args.dpo_nll},
    }[args.loss]


def sides(args) -> tuple[str, ...]:
    """The answers of a pair that the loss looks at; a batch has them in this order, pair by pair."""
    return {"dckd": ("chosen", "rejected"), "dpo": ("chosen", "rejected")}.get(args.loss, ("chosen",))


def scored_sides(args) -> tuple[str, ...]:
    """Those of which the teachers are asked."""
    return sides(args) if args.loss in ("dckd", "kd") else ()


def teachers(args) -> dict[str, str]:
    """The frozen models that are asked, by name."""
    return {"teacher": args.teacher} if scored_sides(args) else {}


def forward_kl(teacher_logp, logp):
    """KL(pi_dpo || pi) of each state [N], nats, from log-probabilities [N, V] (DCKD-1); gradient in z: pi - pi_dpo."""
    return (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)


# same in: dckd.py adpa.py
def weigh(sums, counts, args):
    """The loss of these sums, {what: {name: sum}}: weights(args) times means, each over what it is counted by."""
    factors = weights(args)
    return sum(factors[name] * x / counts[what] for what in sums for name, x in sums[what].items() if name in factors)


# same in: dckd.py adpa.py
def dpo_loss(logprobs, ref_logprobs, mask, beta: float):
    """DPO-1 (Rafailov et al. 2023): rows 2i and 2i+1 are the better and the worse answer. All [B, T]; returns sums."""
    rewards = beta * ((logprobs - ref_logprobs) * mask).sum(1)  # [B], the implicit reward of a whole answer
    margin = rewards[0::2] - rewards[1::2]
    loss = -F.logsigmoid(margin).sum()
    return loss, {"dpo/accuracy": (margin > 0).sum(), "dpo/margin": margin.detach().sum()}


# same in: dckd.py adpa.py
def within(logp, size: int):
    """Log-probabilities among the first `size` entries [N, size], and the mass [N] that was outside."""
    if logp.shape[-1] == size:
        return logp, torch.zeros_like(logp[:, 0])
    inside = logp[:, :size].logsumexp(-1, keepdim=True)
    return logp[:, :size] - inside, 1 - inside[:, 0].detach().exp()


# same in: dckd.py adpa.py
def buckets(logp, top):
    """Log-probabilities [N, k + 1] of the entries `top` [N, k], and of all others together."""
    tail = logp.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, top), tail], -1)


# ---- models and batches to losses ------------------------------------------------------------------------------------


# same in: dckd.py adpa.py
def make_step(rows, args, pad_id: int, device) -> dict:
    """This rank's share of the pairs of a step as a batch: for each, its answers in the order of sides(args).

    `side` [B] says which one a sequence is, `number` [B] where a cache has it.
    """
    share = len(rows) // common.world()
    rows = rows[common.rank() * share : (common.rank() + 1) * share]
    both = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in sides(args)]
    batch = common.make_batch(*map(list, zip(*both)), pad_id, device)
    scored = scored_sides(args)
    place = [scored.index(side) if side in scored else 0 for side in sides(args)]
    number = [row.get("number", 0) * len(scored) + i for row in rows for i in place]
    batch["side"] = torch.arange(len(place), device=device).repeat(len(rows))
    batch["number"] = torch.tensor(number, device=device)
    return batch


@torch.no_grad()
def score(models, heads, cache, batch, args) -> None:
    """Add what the frozen models say of each token to a batch, [B, T, ...], and their LM heads [V, H] to `heads`.

    Of a teacher only final hidden states are kept: with its head, its exact logits are rebuilt inside the loss, a chunk
    at a time. A cache holds the same, or (topk) log-probabilities of a few entries.
    """
    wanted = [side in scored_sides(args) for side in sides(args)]
    rows = [b for b, side in enumerate(batch["side"].tolist()) if wanted[side]]
    columns = {}
    if rows:
        part = common.take(batch, rows)
        if cache:
            columns = read_cache(cache, part, args)
        else:
            columns = common.map_rows(lambda micro: ask(models, heads, micro, args), part, args.micro_batch)
        for name, x in columns.items():
            columns[name] = x.new_zeros(*batch["mask"].shape, *x.shape[2:])
            columns[name][rows, : x.shape[1]] = x
    if args.loss == "dpo":
        ref = common.map_rows(lambda micro: {"ref": start_logprobs(models, micro, args)}, batch, args.micro_batch)
        columns["ref_logprobs"] = ref["ref"]
    batch |= columns


# same in: dckd.py adpa.py
def start_logprobs(models, micro, args):
    """Log-probabilities [B, T] of the model that the policy started from."""
    if "start" in models:
        return common.policy_logprobs(models["start"], micro, args.temperature)[0]
    with common.adapters_off(models["policy"]):  # LoRA
        return common.policy_logprobs(models["policy"], micro, args.temperature)[0]


# same in: dckd.py adpa.py
def ask(models, heads, micro, args) -> dict[str, torch.Tensor]:
    """Final hidden states [B, T, H] of the frozen models on a micro-batch; their heads are copied when first seen."""
    columns = {}
    for name in teachers(args):
        columns[f"{name}_hidden"] = common.completion_hidden(models[name], micro)
        if name not in heads:
            heads[name] = common.head_weight(models[name]).clone()
    return columns


def teacher_sums(models, heads, micro, counts, args):
    """The loss, and what it adds up and what is logged: {side: {name: sum over the tokens of that side}}."""
    mask = micro["mask"]
    hidden, weight = common.completion_hidden(models["policy"], micro)[mask], common.head_weight(models["policy"])
    chosen = (micro["side"] == 0)[:, None].expand_as(mask)[mask]
    columns, pairs = [micro["completion_ids"][mask], chosen], [(hidden, weight)]
    if "top" in micro:
        columns += [micro["top"][mask], micro["teacher_top"][mask]]
    elif teachers(args):
        pairs.append((micro["teacher_hidden"][mask], heads["teacher"]))
    size = min(w.shape[0] for _, w in pairs)

    def sums(logits, *rest):
        said, (ids, chosen, *top) = rest[: len(pairs) - 1], rest[len(pairs) - 1 :]
        logp = logits.log_softmax(-1)
        nll = -logp.gather(-1, ids[:, None])[:, 0]
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        out = {"chosen": {"loss/nll": nll[chosen].sum(), "policy/entropy": entropy[chosen].sum()}}
        if top:
            kl = forward_kl(top[1], buckets(logp, top[0]))
            outside = top[1][:, top[0].shape[1]].exp()
        elif said:
            (logp, cut), (teacher_logp, teacher_cut) = within(logp, size), within(said[0].log_softmax(-1), size)
            kl, outside = forward_kl(teacher_logp, logp), cut + teacher_cut
        if top or said:
            out["chosen"] |= {"kl/chosen": kl[chosen].sum(), "kl/outside": outside[chosen].sum()}
            out["rejected"] = {"kl/rejected": kl[~chosen].sum()}
        return weigh(out, counts, args), out

    return common.over_vocabulary(sums, pairs, columns, args.temperature)


# same in: dckd.py adpa.py
def objective(models, heads, micro, counts, args):
    """The loss of one micro-batch, and {what: {name: sum over it}}, `what` being a side of the pairs or `pairs`."""
    if args.loss != "dpo":
        return teacher_sums(models, heads, micro, counts, args)
    logprobs, entropy = common.policy_logprobs(models["policy"], micro, args.temperature)
    loss, metrics = dpo_loss(logprobs, micro["ref_logprobs"], micro["mask"], args.dpo_beta)
    chosen = {"loss/nll": -logprobs[0::2].sum(), "policy/entropy": entropy[0::2].sum()}
    sums = {"pairs": {"loss/dpo": loss} | metrics, "chosen": chosen}
    return weigh(sums, counts, args), sums


# same in: dckd.py adpa.py
def count(batch, args) -> dict[str, float]:
    """What means are over: the tokens of each side of the pairs of a step, and the pairs, of all ranks."""
    names, mask = sides(args), batch["mask"]
    counts = {name: mask[batch["side"] == s].sum() for s, name in enumerate(names)}
    return common.all_sum(counts | {"pairs": len(mask) // len(names)}, mask.device)


# same in: dckd.py adpa.py
def accumulate(models, heads, batch, args) -> dict[str, float]:
    """Gradients of the loss over this step on all ranks; returns it and the metrics, global means.

    Each mean has its own denominator: the tokens of a side, or the pairs. Counted first, divided by once.
    """
    counts, means = count(batch, args), {}
    together = 2 if args.loss == "dpo" else 1
    pieces = common.micro_batches(batch, list(range(len(batch["mask"]))), args.micro_batch, together)
    for micro in common.accumulate_over(models, pieces):
        loss, sums = objective(models, heads, micro, counts, args)
        (loss * common.world()).backward()  # FSDP averages over ranks
        parts = {name: x / counts[what] for what in sums for name, x in sums[what].items() if what in counts}
        for name, x in (parts | {"loss/total": loss}).items():
            means[name] = means.get(name, 0.0) + x.detach().double()
    length = {f"length/{name}": counts[name] / counts["pairs"] for name in sides(args)}
    return common.all_sum(means, batch["mask"].device) | length


# same in: dckd.py adpa.py
def update(models, heads, optimizer, batch, args) -> dict[str, float]:
    """One optimizer step."""
    metrics = accumulate(models, heads, batch, args)
    norm = torch.nn.utils.clip_grad_norm_(common.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **metrics})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics | {"grad_norm": norm.item()}


# ---- teacher scores on disk ------------------------------------------------------------------------------------------


# same in: dckd.py adpa.py
def open_cache(models, heads, rows, tokenizer, args, folder, device):
    """The cache of --cache, filled, or None. The teachers are loaded where they have to be asked."""
    cache = None
    if args.cache != "none" and teachers(args):
        rows = [row for row in rows if all(f"{side}_ids" in row for side in scored_sides(args))]
        for i, row in enumerate(rows):
            row["number"] = i
        sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in scored_sides(args)]
        digest = lambda x: hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()[:16]  # noqa: E731
        key = {name: common.fingerprint(model) for name, model in teachers(args).items()}
        key |= {"tokenizer": digest(tokenizer.get_vocab()), "data": digest(sequences), "dtype": args.dtype}
        key["kind"] = args.cache if args.cache == "hidden" else f"top {args.cache_topk} at {args.temperature}"
        cache = common.RowCache(args.cache_dir or folder / "cache", key)
    if cache is None or not cache.whole:
        for name, model in teachers(args).items():
            options = dict(dtype=args.dtype, device=device)
            models[name] = common.load_model(model, trainable=False, **options)
    if cache and not cache.whole:
        fill_cache(cache, models, rows, sequences, tokenizer.pad_token_id, args)
    if cache:
        for name in teachers(args):
            if name in models:
                del models[name]
        heads |= {name: x.to(device) for name, x in cache.shared().items()}
    return cache


# same in: dckd.py adpa.py
@torch.no_grad()
def fill_cache(cache, models, rows, sequences, pad_id: int, args) -> None:
    """Ask the teachers about every sequence once; with topk, also measure what is lost."""
    names, device = list(teachers(args)), next(models["policy"].parameters()).device
    with contextlib.ExitStack() as whole:
        heads = {}
        for name in names:
            whole.enter_context(common.gathered(models[name]))
            heads[name] = common.head_weight(models[name]).clone()
        size = min(w.shape[0] for w in [common.head_weight(models["policy"]), *heads.values()])
        require(args.cache == "hidden" or args.cache_topk < size, f"--cache_topk {args.cache_topk}: all {size} tokens")

        def compute(numbers):
            done = []
            for i in range(0, len(numbers), args.micro_batch):
                some = [sequences[n] for n in numbers[i : i + args.micro_batch]]
                micro = common.make_batch(*map(list, zip(*some)), pad_id, device)
                columns = ask(models, heads, micro, args)
                if args.cache == "topk":
                    columns = top_entries(columns, heads, micro["mask"], size, args)
                lengths = micro["mask"].sum(1).tolist()
                done += [{name: x[b, :n] for name, x in columns.items()} for b, n in enumerate(lengths)]
            return done

        cache.fill(len(sequences), compute, lambda: heads if args.cache == "hidden" else {})
    common.say(f"teacher scores of {len(sequences)} sequences are in {cache.folder}")
    if args.cache == "topk":
        lines = []
        for source, kept in ((None, heads), (cache, {})):
            probe = make_step(rows[: 8 * common.world()], args, pad_id, device)
            score(models, kept, source, probe, args)
            _, sums = objective(models, kept, probe, count(probe, args), args)
            sums = {name: x for each in sums.values() for name, x in each.items()}
            lines.append(common.all_sum({name: sums[name] for name in weights(args)}, device))
        for name in lines[0]:
            if lines[0][name] != lines[1][name]:
                found, exact = lines[1][name], lines[0][name]
                off = f"{found / exact - 1:+.2%} off ({found:.4f} for {exact:.4f})"
                common.say(f"--cache topk: {name} of the first pairs is {off}")


# same in: dckd.py adpa.py
def top_entries(columns, heads, mask, size: int, args) -> dict[str, torch.Tensor]:
    """Instead of hidden states: the likeliest tokens of the first teacher [B, T, k], and what each model says there."""

    def fn(*logits):
        logps = [x.log_softmax(-1) for x in logits]
        top = logps[0][:, :size].topk(args.cache_topk).indices
        return {"top": top} | {f"{name}_top": buckets(logp, top) for name, logp in zip(heads, logps)}

    pairs = [(columns[f"{name}_hidden"][mask], head) for name, head in heads.items()]
    flat = common.over_vocabulary(fn, pairs, [], args.temperature)
    spread = {name: x.new_zeros(*mask.shape, x.shape[1]) for name, x in flat.items()}
    for name, x in flat.items():
        spread[name][mask] = x
    return spread


# same in: dckd.py adpa.py
def read_cache(cache, batch, args) -> dict[str, torch.Tensor]:
    """What ask() or top_entries() said of these sequences, from the disk: [B, T, ...]."""
    names = [f"{name}_{'top' if args.cache == 'topk' else 'hidden'}" for name in teachers(args)]
    names += ["top"] if args.cache == "topk" else []
    columns = {}
    for b, number in enumerate(batch["number"].tolist()):
        for name, x in cache.row(number, names).items():
            if name not in columns:
                columns[name] = x.new_zeros(*batch["mask"].shape, x.shape[1])
            columns[name][b, : len(x)] = x
    return {name: x.to(batch["mask"].device) for name, x in columns.items()}


# ---- the run ---------------------------------------------------------------------------------------------------------


def check_combinations(args) -> None:
    """Values that are legal alone and not together."""
    slip = args.builtin_slip
    require(0 < slip < 1, f"--builtin_slip must be between 0 and 1, found {slip}")
    needed = bool(teachers(args)) or args.stage != "student"
    require(args.teacher or not needed, f"--teacher is empty: --stage {args.stage} --loss {args.loss} needs one")


# same in: dckd.py adpa.py
def split_step(args) -> str:
    """The derived sizes of a step in words, or an error that names what does not divide."""
    pairs, answers, world = args.prompts_per_step, len(sides(args)), common.world()
    require(pairs % world == 0, f"--prompts_per_step {pairs} does not divide among {world} ranks")
    rows, unit = pairs * answers // world, 2 if args.loss == "dpo" else 1
    micro = min(args.micro_batch, rows)
    require(rows % micro == 0, f"--micro_batch {micro} does not divide the {rows} sequences of a rank in a step")
    require(micro % unit == 0, f"--micro_batch {micro}: DPO compares two answers, so it must be even")
    return (
        f"{pairs} pairs ({', '.join(sides(args))}) = {pairs * answers} sequences a step on {world} rank(s); "
        f"{rows // micro} micro-batch(es) of {micro}"
    )


# same in: dckd.py adpa.py
def load_data(args, tokenizer):
    """(training pairs, held-out pairs, the task that grades answers or None), encoded."""
    task = None
    if not args.dataset:
        require(args.task in ("auto", "chains"), f"--task {args.task} has no built-in pairs: --dataset is needed")
        task = tasks.load_task("chains", "", args.reward_file, args.seed, args.test_rows)
        made = dict(slip=args.builtin_slip, needless=0.1, exact=False)
        train = tasks.builtin().preference_pairs(args.builtin_pairs, args.seed, **made)
        test = tasks.builtin().preference_pairs(args.test_rows, 0, held_out=True, **made)
    else:
        train, test = tasks.split_pairs(tasks.load_pairs(args.dataset), args.test_rows, "test_rows")
        if args.task != "auto":
            task = tasks.load_task(args.task, args.test_dataset, args.reward_file, args.seed, args.test_rows)
        elif args.reward_file:
            reward = tasks.load_reward(args.reward_file)
            task = tasks.Task("pairs", tasks.walk(train), test, reward)
    train, note = common.encode_pairs(tokenizer, train, args.max_prompt, args.max_new_tokens)
    test, test_note = common.encode_pairs(tokenizer, test, args.max_prompt, args.max_new_tokens)
    for i, row in enumerate(train):
        row["index"] = i
    common.say(f"{split_step(args)}\ntraining: {note}; held out: {test_note}")
    return train, test, task


def prepare(args):
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    check_combinations(args)
    tokenizer = common.load_tokenizer(args.model)
    asked = teachers(args).values() if args.stage == "student" else [args.teacher]
    for name in (args.model, *asked):
        common.fits_context(name, args.max_prompt + args.max_new_tokens)
    for name in asked:
        common.same_tokenizer(args.model, tokenizer, name, common.load_tokenizer(name))
    return *load_data(args, tokenizer), tokenizer


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": common.load_model(args.model, **trained)})
    if args.loss == "dpo" and not args.lora_rank:  # with LoRA, the policy without its adapters is the start
        models["start"] = common.load_model(args.model, trainable=False, **shared)
    return models, torch.optim.Adam(common.trainable_parameters(models["policy"]), lr=args.lr, fused=True)


# same in: dckd.py adpa.py
def plan(args) -> list:
    """The runs of a stage in order, each this script with its own --model, --loss and --out."""
    home, start, runs = Path(args.out), args.teacher, []
    if args.stage in ("teacher", "all"):
        one = replace(args, stage="student", teacher="", cache="none")
        folder = home / "teacher" if args.stage == "all" else home
        if args.sft_steps:
            sft = dict(model=start, loss="sft", steps=args.sft_steps, lr=args.sft_lr)
            runs.append(replace(one, **sft, out=str(folder / "ref")))
            start = str(folder / "ref" / "model")
        dpo = dict(model=start, loss="dpo", steps=args.dpo_steps, lr=args.dpo_lr)
        runs.append(replace(one, **dpo, out=str(folder / "dpo")))
    if args.stage == "all":
        runs.append(student_of(args, home / "student", str(folder / "dpo" / "model"), start))
    return runs or [args]


def student_of(args, out: Path, teacher: str, ref_teacher: str):
    """The arguments of the student's run after the teacher's."""
    return replace(args, stage="student", teacher=teacher, out=str(out))


# same in: dckd.py adpa.py
def run_stages(args) -> None:
    """All runs of --stage, each in a folder of its own below --out; with --resume, those that have ended are left."""
    if args.stage != "student":
        prepare(args)  # also what the last run needs is refused before the first one starts
        name = f"runs/{Path(__file__).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        args = replace(args, out=common.from_rank_0(args.out or name))
    for one in plan(args):
        newest = common.latest_checkpoint(Path(one.out)) if args.resume else None
        if args.stage != "student" and newest and newest[0] == one.steps and (Path(one.out) / "model").exists():
            common.say(f"{one.out} has ended")
            continue
        train(one)
        if common.stop_requested(common.local_device(args.device)):
            break


# same in: dckd.py adpa.py
@torch.no_grad()
def evaluate(sampling, task, pairs, args):
    """Held-out accuracy where somebody can grade; of held-out pairs, the NLL and whether the better one is likelier."""
    policy, tokenizer = sampling.policy, sampling.tokenizer
    device = next(policy.parameters()).device
    if task:
        metrics, samples = sampling.evaluate(task, args.seed)
    else:
        texts = common.decode(tokenizer, sampling.complete([row["prompt_ids"] for row in pairs[:4]], 1, None))
        metrics, samples = {}, [{"kind": "eval", "completion": text, "reward": 0.0} for text in texts]
        samples = [sample | {"prompt": row["prompt"]} for sample, row in zip(samples, pairs)]
    sums = dict.fromkeys(("n", "tokens", "nll", "right"), 0.0)
    mine = pairs[common.rank() :: common.world()]
    with common.gathered(policy):
        for i in range(0, len(mine), args.micro_batch):
            some = mine[i : i + args.micro_batch]
            answers = [row[side] for row in some for side in ("chosen_ids", "rejected_ids")]
            prompts = [row["prompt_ids"] for row in some for _ in range(2)]
            batch = common.make_batch(prompts, answers, tokenizer.pad_token_id, device)
            total = common.policy_logprobs(policy, batch, args.temperature)[0].sum(1)
            sums["n"] += len(some)
            sums["tokens"] += batch["mask"][0::2].sum().item()
            sums["nll"] -= total[0::2].sum().item()
            sums["right"] += (total[0::2] > total[1::2]).sum().item()
    sums = common.all_sum(sums, device)
    metrics |= {"eval/nll": sums["nll"] / sums["tokens"], "eval/pair_accuracy": sums["right"] / sums["n"]}
    return metrics, samples


def train(args) -> None:
    """One run."""
    device = common.local_device(args.device)
    pairs, test_pairs, task, tokenizer = prepare(args)
    run = common.Run(args, __file__)
    models, optimizer = build(args, device)
    policy = models["policy"]
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    sampling = common.Sampling(policy, tokenizer, *limits)
    heads = {}

    for step in run.steps(models, optimizer, lambda: evaluate(sampling, task, test_pairs, args)):
        if step == run.start:
            cache = open_cache(models, heads, pairs, tokenizer, args, run.path, device)

        # ---- 1. the pairs of this step
        rows = tasks.walk(pairs)(args.seed, step, args.prompts_per_step)
        batch = make_step(rows, args, tokenizer.pad_token_id, device)

        # ---- 2. what the frozen models say of each token
        score(models, heads, cache, batch, args)
        run.lap("score")

        # ---- 3. one optimizer step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1)) * (1 - step / args.steps)
        metrics = update(models, heads, optimizer, batch, args)
        run.lap("update")

        # ---- 4. log; evaluate and save when it is time
        run.end_step(metrics | {"lr": optimizer.param_groups[0]["lr"]})
    run.finish(policy, tokenizer)
    if args.loss == "dpo":
        record_start(run.path / "model", args.model)


# same in: dckd.py adpa.py
def record_start(folder: Path, model: str) -> None:
    """folder/aligned_from.json: which weights a model was aligned from; adpa.py compares its --ref_teacher with it."""
    start = {"model": model, "fingerprint": common.fingerprint(model)}
    if common.rank() == 0:
        common.write_whole(folder / "aligned_from.json", json.dumps(start) + "\n")


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: run_stages(args), args.device)

"""ADPA: advantage-guided distillation. The teacher's advantage over the vocabulary, on states that the student reached.

Gao et al. 2025, "Advantage-Guided Distillation for Preference Alignment in Small Language Models" (ICLR 2025,
arXiv:2502.17927). What preference training changed in a large model says which next tokens are better than others, in
any state. So let the small model answer by itself, and pull it, token by token, to where the aligned teacher moved:

    A(s, a) = log pi_dpo(a|s) - log pi_ref(a|s)                                                                 (ADPA-1)
    L = NLL(y_w) - gamma E_{y ~ pi'} mean_t sum_a pi(a|s_t) A(s_t, a),   s_t = (x, y_<t)                        (ADPA-2)

    --loss adpa   ADPA-2; pi' is the student at the start (ADPA+: a student that dckd.py has trained)
    --loss sft    NLL(y_w) alone
    --loss dpo    -log sigmoid(beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)]), pi_ref the start of pi         (DPO-1)

The student's stage needs no preferences, only answers to imitate. ADPA-2 is linear in pi: its optimum is the one token
with the largest A, often noise from the tail of pi_dpo. Hence --adv_topk, and the entropy in the log. --objective kl is
ours: KL(q || pi) to q = softmax(log pi' + A / beta), the optimum of E_pi[A] - beta KL(pi || pi')               (ADPA-3)

What differs from the paper, each for a reason
    1. Means are over all tokens of a step, on all ranks, not over sequences first: the micro-batch changes nothing.
    2. Teacher scores are exact: final hidden states and the LM head, on the fly or cached (--cache topk: authors' way).
    3. Vocabularies of different padded size are cut to the shared rows before the softmax, and what was cut is logged.
    4. The clamp of the authors' released code is a switch, off (--adv_clip 0 1); EOS has a score too. Outside the top
       50 of pi_ref their A is never negative (--ref_topk is a milder rule of ours); docs/adpa.md.

Run
    python adpa.py                                                                       # this laptop, offline
    python dckd.py --stage teacher --teacher BIG --dataset PAIRS --out runs/teacher                     # 1 GPU
    torchrun --nproc_per_node=8 adpa.py --model SMALL --dataset PAIRS \\
        --teacher runs/teacher/dpo/model --ref_teacher runs/teacher/ref/model                           # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 adpa.py ...  # 2 nodes
More in docs/adpa.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

from dataclasses import dataclass, replace
from typing import Literal

import contextlib
import hashlib
import json
import tempfile
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
    ref_teacher: str = arg("", "the reference teacher pi_ref: the model that pi_dpo was aligned from")
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
    loss: Literal["adpa", "sft", "dpo"] = arg("adpa", "ADPA-2, NLL alone, or DPO-1")
    gamma: float = arg(
        1.6, "the coefficient of the advantage (authors' recipe: 1.6; best in the paper: 1.5)", at_least=0
    )
    advantage: Literal["contrast", "dpo"] = arg(
        "contrast", "ADPA-1, or log pi_dpo alone, without the reference teacher"
    )
    adv_topk: int = arg(
        50,
        "the number of pi_dpo's likeliest tokens outside which A is 0 (authors' code: 50); 0: no such limit",
        at_least=0,
    )
    adv_clip: list[float] = arg(
        [], "lowest and highest A (authors' code: 0 1, so that nothing is discouraged); empty: no limits"
    )
    ref_topk: int = arg(
        0, "authors' code: 50, outside its own top pi_ref counts as its least likely there; 0: exact", at_least=0
    )
    states: Literal["student", "chosen", "rejected"] = arg(
        "student", "the answers that give the states: those of pi', or those of the data, off-policy"
    )
    state_temperature: float = arg(
        0.0, "the temperature of the student's answers; 0: greedy (authors' code)", at_least=0
    )
    refresh_every: int = arg(
        0, "the steps after which the current student answers anew, on-policy; 0: only at the start", at_least=0
    )
    objective: Literal["linear", "kl"] = arg("linear", "ADPA-2 or ADPA-3")
    beta: float = arg(1.0, "the beta of ADPA-3: the target is softmax(log pi' + A / beta)", at_least=1e-6)
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
    cache_topk=8, gamma=0.5,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def weights(args) -> dict[str, float]:
    """ADPA-2: what the loss is a sum of, each of them a mean over the tokens of its side (or over pairs)."""
    return {
        "adpa": {"loss/nll": 1.0, "loss/teacher": args.gamma},
        "sft": {"loss/nll": 1.0},
        "dpo": {"loss/dpo": 1.0, "loss/nll": args.dpo_nll},
    }[args.loss]


def sides(args) -> tuple[str, ...]:
    """The answers of a pair that the loss looks at; a batch has them in this order, pair by pair."""
    return {"adpa": ("chosen", "states"), "dpo": ("chosen", "rejected")}.get(args.loss, ("chosen",))


def scored_sides(args) -> tuple[str, ...]:
    """Those of which the teachers are asked."""
    return ("states",) if args.loss == "adpa" else ()


def teachers(args) -> dict[str, str]:
    """The frozen models that are asked, by name."""
    return {"teacher": args.teacher, "ref_teacher": args.ref_teacher} if scored_sides(args) else {}


def advantages(teacher_logp, ref_logp, args, entries: int):
    """ADPA-1, from log-probabilities of pi_dpo and pi_ref [N, V]; and the switches of the authors' code.

    Only the first `entries` are tokens (a cache of the likeliest ones has all others in one more).
    """
    if args.ref_topk:
        ref_logp = ref_logp.clamp_min(ref_logp.topk(min(args.ref_topk, ref_logp.shape[1])).values[:, -1:])
    A = teacher_logp - ref_logp if args.advantage == "contrast" else teacher_logp
    if args.adv_clip:
        A = A.clamp(*args.adv_clip)
    if 0 < args.adv_topk < A.shape[1]:
        top = teacher_logp[:, :entries].topk(args.adv_topk).indices
        A = torch.zeros_like(A).scatter(-1, top, A.gather(-1, top))
    return A


def linear_loss(logp, A):
    """ADPA-2, -E_pi[A] of each state [N], from log pi and A [N, V]; the gradient in z is -pi (A - E_pi[A])."""
    return -(logp.exp() * A).sum(-1)


def kl_loss(logp, start_logp, A, beta: float):
    """ADPA-3, KL(q || pi) of each state [N], q = softmax(log pi' + A / beta); the gradient in z is pi - q."""
    target = (start_logp + A / beta).log_softmax(-1)
    return (target.exp() * (target - logp)).sum(-1)


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
        columns |= common.map_rows(lambda micro: start_hidden(models, heads, micro), part, args.micro_batch)
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


def start_hidden(models, heads, micro):
    """Final hidden states [B, T, H] of pi', the model that the policy started from, and its head."""
    own = "start" in models
    model = models["start" if own else "policy"]
    with contextlib.nullcontext() if own else common.adapters_off(model):
        hidden = common.completion_hidden(model, micro)
        if "start" not in heads:
            heads["start"] = common.head_weight(model).clone()
    return {"start_hidden": hidden}


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
    mask, side = micro["mask"], micro["side"][:, None]
    all_hidden, weight = common.completion_hidden(models["policy"], micro), common.head_weight(models["policy"])
    chosen, states = mask & (side == 0), mask & (side == 1)
    ids = micro["completion_ids"][chosen]
    logprobs, entropy = common.token_logprobs(all_hidden[chosen], weight, ids, args.temperature)
    out = {"chosen": {"loss/nll": -logprobs.sum()}}
    if not teachers(args):
        return weigh(out, counts, args), {"chosen": out["chosen"] | {"policy/entropy": entropy.sum()}}
    columns, names = [], ["start"]
    if "top" in micro:
        columns = [micro[name][states] for name in ("top", "teacher_top", "ref_teacher_top")]
    else:
        names += teachers(args)
    pairs = [(all_hidden[states], weight)] + [(micro[f"{name}_hidden"][states], heads[name]) for name in names]
    size = min(w.shape[0] for _, w in pairs)

    def sums(logits, start_logits, *rest):
        logp, start_logp = logits.log_softmax(-1), start_logits.log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        if "top" in micro:
            top, teacher_logp, ref_logp = rest
            logp, start_logp = buckets(logp, top), buckets(start_logp, top)
            outside = teacher_logp[:, top.shape[1]].exp()
        else:
            said = [within(x, size) for x in (logp, start_logp, *(x.log_softmax(-1) for x in rest))]
            (logp, cut), (start_logp, _), (teacher_logp, teacher_cut), (ref_logp, _) = said
            outside = cut + teacher_cut
        A = advantages(teacher_logp, ref_logp, args, entries=top.shape[1] if "top" in micro else size)
        loss = linear_loss(logp, A) if args.objective == "linear" else kl_loss(logp, start_logp, A, args.beta)
        with torch.no_grad():
            p, p_dpo = logp.exp(), teacher_logp.exp()
            metrics = {
                "loss/teacher": loss,
                "adpa/advantage": (p * A).sum(-1),
                "adpa/gap": A.amax(-1) - (p * A).sum(-1),  # how far the linear optimum is
                "kl/start": (p * (logp - start_logp)).sum(-1),
                "kl/teachers": (p_dpo * (teacher_logp - ref_logp)).sum(-1),
                "kl/outside": outside,
                "policy/entropy": entropy,
            }
        out = {"states": {name: x.sum() for name, x in (metrics | {"loss/teacher": loss}).items()}}
        return weigh(out, counts, args), out

    loss, of_states = common.over_vocabulary(sums, pairs, columns, args.temperature)
    return weigh(out, counts, args) + loss, out | of_states


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


# ---- states ----------------------------------------------------------------------------------------------------------


def answer_states(sampling, pairs, step: int, args, folder: Path) -> None:
    """Give pairs `states_ids`: what the student answers at `step`, to all prompts until the next refresh.

    Kept in folder/states, for a resumed run cannot ask the student of an earlier step again.
    """
    if args.loss != "adpa" or args.states != "student":
        for row in pairs:
            row["states_ids"] = row.get(f"{args.states}_ids", [])
        return
    if step == args.steps:  # a run that has ended was resumed
        return
    span = args.refresh_every or args.steps
    first = step - step % span
    file = folder / "states" / f"step-{first:06d}.jsonl"
    if not common.from_rank_0(file.exists()):
        require(step == first, f"--resume {folder}: {file} is missing, the answers that the run went on with")
        until = range(first, min(first + span, args.steps))
        used = {row["index"] for s in until for row in tasks.walk(pairs)(args.seed, s, args.prompts_per_step)}
        mine = sorted(used)[common.rank() :: common.world()]
        noise = None
        if args.state_temperature and mine:
            noise = common.uniforms(args.seed, common.TRAIN, first, mine, args.max_new_tokens)
        prompts = [pairs[i]["prompt_ids"] for i in mine]
        answers = replace(sampling, temperature=args.state_temperature or 1.0).complete(prompts, 1, noise)
        lines = [json.dumps(line) + "\n" for line in common.gather(list(zip(mine, answers)))]
        if common.rank() == 0:
            file.parent.mkdir(exist_ok=True)
            common.write_whole(file, "".join(lines))
        common.from_rank_0(None)  # the others read it only when it is there
    for line in file.read_text().splitlines():
        index, ids = json.loads(line)
        pairs[index]["states_ids"] = ids


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
    ordered = not args.adv_clip or (len(args.adv_clip) == 2 and args.adv_clip[0] < args.adv_clip[1])
    require(ordered, f"--adv_clip takes the lowest and the highest A, found {args.adv_clip}")
    fixed = args.cache == "none" or not args.refresh_every
    require(fixed, "--refresh_every makes new states, so their scores cannot be cached: it needs --cache none")
    own = args.states == "student" or not args.refresh_every
    require(own, f"--refresh_every is about the student's own answers, not --states {args.states}")
    known = args.cache != "topk" or (args.adv_topk <= args.cache_topk and not args.ref_topk)
    require(
        known, f"--cache topk knows {args.cache_topk} tokens of pi_dpo: --adv_topk must be at most that, --ref_topk 0"
    )
    slip = args.builtin_slip
    require(0 < slip < 1, f"--builtin_slip must be between 0 and 1, found {slip}")
    needed = bool(teachers(args)) or args.stage != "student"
    require(args.teacher or not needed, f"--teacher is empty: --stage {args.stage} --loss {args.loss} needs one")
    needed = bool(teachers(args)) and args.stage == "student"
    require(args.ref_teacher or not needed, f"--ref_teacher is empty: --loss {args.loss} compares --teacher with it")


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
    if teachers(args) and args.stage == "student":
        check_reference(args.teacher, args.ref_teacher)
    return *load_data(args, tokenizer), tokenizer


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": common.load_model(args.model, **trained)})
    if args.loss in ("adpa", "dpo") and not args.lora_rank:  # with LoRA, the policy without its adapters is the start
        models["start"] = common.load_model(args.model, trainable=False, **shared)
    return models, torch.optim.Adam(common.trainable_parameters(models["policy"]), lr=args.lr, fused=True)


def check_reference(teacher: str, ref_teacher: str) -> None:
    """Raise when the teacher's folder says that it was aligned from another model than the reference teacher."""
    file = Path(common.model_path(teacher)) / "aligned_from.json"
    known = common.from_rank_0(json.loads(file.read_text()) if common.rank() == 0 and file.exists() else None)
    if known is None:
        common.say(f"{teacher} does not say what it was aligned from: is it {ref_teacher}? A is their difference")
        return
    found = common.fingerprint(ref_teacher)
    require(
        found == known["fingerprint"],
        f"--ref_teacher {ref_teacher} (weights {found}) is not what {teacher} was aligned from: {known['model']} "
        f"(weights {known['fingerprint']}); their difference would be no advantage",
    )


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
    return replace(args, stage="student", teacher=teacher, ref_teacher=ref_teacher, out=str(out))


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
            answer_states(sampling, pairs, step, args, run.path)
            cache = open_cache(models, heads, pairs, tokenizer, args, run.path, device)

        # ---- 1. the pairs of this step, and what the student answers to their prompts
        if args.refresh_every and step % args.refresh_every == 0:
            answer_states(sampling, pairs, step, args, run.path)
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

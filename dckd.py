"""DCKD: dual-constrained knowledge distillation. A preference-aligned teacher distilled into a small student.

Gao et al. 2025, "Advantage-Guided Distillation for Preference Alignment in Small Language Models" (ICLR 2025,
arXiv:2502.17927). Preference training does little for a small model. So align a large one first (dpo.py), and let the
small one imitate it on both answers of each pair: on the worse one, the teacher shows how to go on after a bad start.

    L = NLL(y_w) + a_w mean_{t in y_w} KL(pi_dpo || pi) + a_l mean_{t in y_l} KL(pi_dpo || pi)                  (DCKD-1)

y_w is the better answer, y_l the worse one, pi_dpo the teacher, a_w --chosen_weight, a_l --rejected_weight. The KL is
forward and exact, over the whole vocabulary, at --temperature like every log-probability. --rejected_weight 0 is plain
distillation (KD), with --chosen_weight 0 too it is SFT. The teacher is any model with the student's tokenizer.
adpa.py builds on this script: docs/diffs/dckd--adpa.diff.

What differs from the paper, each for a reason
    1. Means are over all tokens of a step, on all ranks, not over sequences first: the micro-batch changes nothing.
    2. The teacher is evaluated on each micro-batch, exactly; the authors store the top 50 tokens of its distribution.
    3. Vocabularies of different padded size are cut to the shared rows, and the probability that was cut is logged.

Run
    python dckd.py                                                                                # this laptop, offline
    python dpo.py --model BIG --dataset PAIRS --out runs/teacher                                      # teacher, 1 GPU
    torchrun --nproc_per_node=8 dckd.py --model SMALL --teacher runs/teacher/model --dataset PAIRS              # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dckd.py ...          # 2 nodes
More in docs/dckd.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

from dataclasses import dataclass, replace
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
    teacher: str = arg("builtin-aligned", "the aligned teacher pi_dpo: a Hub name or a folder")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    task: str = arg("auto", "the task: built-in, a kind of data (auto: by its columns), or gym:NAME of reasoning-gym")
    test_dataset: str = arg("", "held-out prompts; empty: those of the last pairs of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # method
    chosen_weight: float = arg(
        0.1, "a_w: the coefficient of the KL on the better answers (authors: 0.1; best in the paper: 0.2)", at_least=0
    )
    rejected_weight: float = arg(
        0.1, "a_l: the coefficient of the KL on the worse answers (authors: 0.1; best in the paper: 0.2)", at_least=0
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
    keep: Literal["last", "best", "all"] = arg("last", "checkpoints that stay; best: also the best one, as model/")
    track: Literal["none", "wandb", "trackio", "tensorboard"] = arg("none", "a tracker that gets metrics and samples")
    push_to_hub: str = arg("", "the Hub repository that gets model/ at the end; private if it is new")


# What the bare command changes: a small model takes large steps.
BUILTIN = dict(
    model="builtin-small", steps=80, prompts_per_step=32, max_prompt=24, max_new_tokens=24, micro_batch=64, lr=5e-4,
    warmup_steps=4,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def dckd_loss(logits, teacher_logits, ids, better, worse, chosen_weight: float, rejected_weight: float):
    """DCKD-1 of N tokens: what they add to the loss of the step, and to each of the means that are logged.

    logits [N, V] of the student and of the teacher; ids [N], the tokens; better, worse [N]: the weight of each token in
    the mean over y_w and in that over y_l, 1 / (tokens of the step) or 0. A KL has the gradient pi - pi_dpo in z.
    """
    size = min(logits.shape[1], teacher_logits.shape[1])
    full_logp = logits.log_softmax(-1)  # over all of its own rows, so that padded ones stay improbable
    nll = -(better * full_logp.gather(-1, ids[:, None])[:, 0]).sum()
    (logp, cut), (teacher_logp, teacher_cut) = within(full_logp, size), within(teacher_logits.log_softmax(-1), size)
    kl = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)  # [N], nats
    kl_chosen, kl_rejected = (better * kl).sum(), (worse * kl).sum()
    entropy = -(full_logp.detach().exp() * full_logp.detach()).sum(-1)
    return nll + chosen_weight * kl_chosen + rejected_weight * kl_rejected, {
        "loss/nll": nll,
        "kl/chosen": kl_chosen,
        "kl/rejected": kl_rejected,
        "kl/outside": (better * (cut + teacher_cut)).sum(),
        "policy/entropy": (better * entropy).sum(),
    }


# same in: dckd.py adpa.py
def within(logp, size: int):
    """Log-probabilities among the first `size` entries [N, size], and the mass [N] that was outside."""
    if logp.shape[-1] == size:
        return logp, torch.zeros_like(logp[:, 0])
    inside = logp[:, :size].logsumexp(-1, keepdim=True)
    return logp[:, :size] - inside, 1 - inside[:, 0].exp()


# ---- one optimizer step ----------------------------------------------------------------------------------------------


def objective(models, micro, counts, args):
    """What a micro-batch adds to the loss of its step, and to each metric; both are means over the step."""
    mask = micro["mask"]
    with torch.no_grad():
        teacher_hidden = lm.completion_hidden(models["teacher"], micro)[mask]  # [N, H']
    hidden = lm.completion_hidden(models["policy"], micro)[mask]  # [N, H]
    heads = [(hidden, lm.head_weight(models["policy"])), (teacher_hidden, lm.head_weight(models["teacher"]))]
    weights = [(micro[side][:, None] & mask)[mask] / counts[side] for side in ("chosen", "rejected")]  # [N]
    columns = [micro["completion_ids"][mask], *weights]

    def loss(*logits_and_columns):  # of some of the tokens: [N, V] never exists at once
        return dckd_loss(*logits_and_columns, args.chosen_weight, args.rejected_weight)

    return lm.over_vocabulary(loss, heads, columns, args.temperature)


# same in: dpo.py dckd.py adpa.py
def update(models, optimizer, batch, args) -> dict[str, float]:
    """One optimizer step; returns metrics, means over the answers of the step on all ranks."""
    mask, sides = batch["mask"], [name for name in ("chosen", "rejected", "states") if name in batch]
    counts = {"pairs": batch["chosen"].sum()} | {name: mask[batch[name]].sum() for name in sides}
    counts = common.all_sum(counts, mask.device)  # counted first, divided by once
    means = {}
    pieces = lm.micro_batches(batch, list(range(len(mask))), args.micro_batch, together=len(sides))
    for micro in lm.accumulate_over(models, pieces):
        loss, metrics = objective(models, micro, counts, args)
        (loss * common.world()).backward()  # FSDP averages over ranks
        for name, x in (metrics | {"loss/total": loss.detach()}).items():
            means[name] = means.get(name, 0.0) + x.double()
    means = common.all_sum(means, mask.device)
    norm = torch.nn.utils.clip_grad_norm_(lm.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **means})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lengths = {f"length/{side}": counts[side] / counts["pairs"] for side in sides}
    return means | lengths | {"grad_norm": norm.item()}


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(args) -> None:
    """The whole run."""
    device = common.local_device(args.device)
    pairs, test_pairs, task, tokenizer = prepare(args)
    run = common.Run(args, __file__)
    models, optimizer = build(args, device)
    policy = models["policy"]
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    sampling = lm.Sampling(policy, tokenizer, *limits)

    for step in run.steps(models, optimizer, lambda: evaluate(sampling, task, test_pairs, args)):
        # ---- 1. the pairs of this step
        rows = tasks.walk(pairs)(args.seed, step, args.prompts_per_step)
        rows = rows[common.rank() :: common.world()]
        batch = make_batch(rows, ("chosen", "rejected"), tokenizer.pad_token_id, device)

        # ---- 2. one optimizer step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1)) * (1 - step / args.steps)
        metrics = update(models, optimizer, batch, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics | {"lr": optimizer.param_groups[0]["lr"]})
    run.finish(policy, tokenizer)


# ---- what the loop needs ---------------------------------------------------------------------------------------------


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": lm.load_model(args.model, **trained)})
    models["teacher"] = lm.load_model(args.teacher, trainable=False, **shared)
    return models, torch.optim.Adam(lm.trainable_parameters(models["policy"]), lr=args.lr, fused=True)


def prepare(args):
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    even = args.micro_batch % 2 == 0
    require(even, f"--micro_batch {args.micro_batch}: the answers to a prompt stay together, so it must be even")
    tokenizer = lm.load_tokenizer(args.model)
    for name in (args.model, args.teacher):
        lm.fits_context(name, args.max_prompt + args.max_new_tokens)
    lm.same_tokenizer(args.model, tokenizer, args.teacher, lm.load_tokenizer(args.teacher))
    return *load_data(args, tokenizer, tasks.load_pairs), tokenizer


# same in: dpo.py dckd.py adpa.py
def load_data(args, tokenizer, load, trained=("chosen", "rejected")):
    """Returns encoded training rows, held-out rows, and the task that grades answers, or None.
    load: reads --dataset; trained: the columns of the answers that are trained on."""
    ranks, n = common.world(), args.prompts_per_step
    require(n % ranks == 0, f"--prompts_per_step {n} does not divide among {ranks} ranks")
    task, graded = None, ("", args.reward_file, args.test_rows, args.test_dataset)
    if not args.dataset:
        require(args.task in ("auto", "chains"), f"--task {args.task} has no built-in pairs: --dataset is needed")
        task = tasks.load_task("chains", *graded)
        train, test = tasks.builtin().slipping_pairs(args.seed, args.test_rows)
    else:
        train, test = tasks.split_pairs(load(args.dataset), args.test_rows, "test_rows")
        if args.task != "auto" or args.test_dataset:  # prompts of their own, not those of the held-out pairs
            task = tasks.load_task(args.task, *graded, train=False)
            train = tasks.apart(train, task.held_out)
            require(bool(train), f"{args.dataset}: its training prompts are all held-out ones of the task {task.name}")
        elif args.reward_file:
            task = tasks.Task("pairs", None, test, tasks.load_reward(args.reward_file))
    if task:
        twice = task.correct and args.reward_file
        require(not twice, f"--reward_file: the task {task.name} has a grader of its own; expected one of both")
        task = tasks.fit_prompts(replace(task, train=[], note=""), tokenizer, args.max_prompt)
        common.say(f"{len(task.test)} held-out prompts are graded{task.note}")
    sides = [side for side in ("chosen", "rejected") if side in test[0]]
    train, note = common.encode_pairs(tokenizer, train, args.max_prompt, args.max_new_tokens, trained)
    test, test_note = common.encode_pairs(tokenizer, test, args.max_prompt, args.max_new_tokens, sides)
    common.say(f"training: {note}; held out: {test_note}; {n} per step, {n // ranks} on each of {ranks} rank(s)")
    return train, test, task


# same in: dpo.py dckd.py adpa.py
def make_batch(rows, sides, pad_id: int, device) -> dict:
    """The batch of all answers of these rows, and for each side a bool [B] that marks its sequences."""
    answers = [row[f"{side}_ids"] for row in rows for side in sides]
    batch = common.make_batch([row["prompt_ids"] for row in rows for _ in sides], answers, pad_id, device)
    place = torch.arange(len(answers), device=device) % len(sides)
    return batch | {side: place == i for i, side in enumerate(sides)}


# same in: dpo.py dckd.py adpa.py
@torch.no_grad()
def evaluate(sampling, task, pairs, args):
    """Held-out accuracy if there is a grader; the NLL of better answers, and how often they are more likely."""
    policy, tokenizer = sampling.policy, sampling.tokenizer
    device = next(policy.parameters()).device
    sides = [side for side in ("chosen", "rejected") if side in pairs[0]]
    if task:
        metrics, samples = sampling.evaluate(task, args.seed)
    else:
        texts = common.decode(tokenizer, sampling.complete([row["prompt_ids"] for row in pairs[:4]], 1, None))
        metrics, samples = {}, [{key: row[key] for key in ("prompt", *sides)} for row in pairs[:4]]
        samples = [{"kind": "eval", "completion": text} | row for text, row in zip(texts, samples)]
    sums = dict.fromkeys(("rows", "tokens", "nll", "right"), 0.0)
    per_token = lambda micro: {"x": lm.policy_logprobs(policy, micro, args.temperature)[0]}  # noqa: E731
    with lm.gathered(policy):  # ranks may have different numbers of pairs
        if mine := pairs[common.rank() :: common.world()]:
            batch = make_batch(mine, sides, tokenizer.pad_token_id, device)
            total = lm.map_rows(per_token, batch, args.micro_batch)["x"].sum(1)
            better, tokens = total[batch["chosen"]], batch["mask"][batch["chosen"]].sum()
            sums |= {"rows": len(mine), "tokens": tokens, "nll": -better.sum()}
            sums["right"] = (better > total[batch["rejected"]]).sum() if len(sides) == 2 else 0.0
    sums = common.all_sum(sums, device)
    metrics["eval/nll"] = sums["nll"] / sums["tokens"]
    return metrics | ({"eval/pair_accuracy": sums["right"] / sums["rows"]} if len(sides) == 2 else {}), samples


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: train(args), args.device)

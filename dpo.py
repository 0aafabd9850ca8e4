"""DPO: direct preference optimization, and SFT. Aligns a model with pairs of answers; makes teachers and baselines.

Rafailov et al. 2023 (arXiv:2305.18290). The optimum of a KL-regularised reward has pi = pi_ref exp(r / beta) / Z, so
beta log pi/pi_ref is a reward, and its differences can be fitted to preferences without a reward model or samples:

    L = -log sigmoid(beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)]) + a NLL(y_w)                            (DPO-1)

y_w is the better answer, y_l the worse one, log pi(y) a sum over tokens, pi_ref the policy at the start, a is --nll.
--loss sft is NLL(y_w) alone, also from rows with a single answer. dckd.py and adpa.py build on this script. config.json
of an aligned model names the model it was aligned from.

What differs from the paper, each for a reason
    1. NLL(y_w) can be added (--nll; Pang et al. 2024): plain DPO often makes the better answers less likely too.
    2. NLL is a mean over the tokens of a step on all ranks, DPO-1 over its pairs: the micro-batch changes nothing.
    3. --label_smoothing, for preferences that are wrong in a known share of the pairs (Mitchell 2023); 0 by default.

Run
    python dpo.py                                                                                 # this laptop, offline
    python dpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset PAIRS --lora_rank 16                              # 1 GPU
    torchrun --nproc_per_node=8 dpo.py --model ... --dataset ...                                                # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 dpo.py ...           # 2 nodes
More in docs/dpo.md. Shapes: B sequences, T completion positions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import common  # before torch: it sets how OpenMP threads wait
import lm
import tasks

import torch
import torch.nn.functional as F

from common import arg, require


@dataclass
class Args:
    # model and data
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    task: str = arg("auto", "the task: built-in, a kind of data (auto: by its columns), or gym:NAME of reasoning-gym")
    test_dataset: str = arg("", "held-out prompts; empty: those of the last pairs of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # method
    loss: Literal["dpo", "sft"] = arg("dpo", "DPO-1, or the NLL of the better answers alone")
    beta: float = arg(0.1, "the beta of DPO-1 (recipe of DCKD's authors: 0.01)", at_least=1e-6)
    nll: float = arg(0.0, "the coefficient of the NLL of the better answers", at_least=0)
    label_smoothing: float = arg(0.0, "the share of pairs taken to be the wrong way round", at_least=0, at_most=0.5)
    # optimisation
    steps: int = arg(200, "the number of optimizer steps", at_least=1)
    prompts_per_step: int = arg(64, "prompts per step, over all ranks", at_least=1)
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    lr: float = arg(5e-7, "the learning rate of the policy; falls linearly to 0", at_least=0)
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
    steps=100, prompts_per_step=32, max_prompt=24, max_new_tokens=24, micro_batch=64, lr=2e-4, warmup_steps=4,
    beta=0.3, nll=2.0,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def dpo_loss(better, worse, ref_better, ref_worse, beta: float, label_smoothing: float):
    """DPO-1 of n pairs, from log-probabilities of whole answers [n] by pi and pi_ref, in nats; sums over the pairs.

    A share s = label_smoothing of the preferences is taken to be reversed: -(1 - s) log sigmoid(m) - s log sigmoid(-m).
    """
    margin = beta * ((better - ref_better) - (worse - ref_worse))  # [n], the difference of implicit rewards
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss.sum(), {"dpo/accuracy": (margin > 0).sum(), "dpo/margin": margin.detach().sum()}


# ---- one optimizer step ----------------------------------------------------------------------------------------------


def objective(models, micro, counts, args):
    """What a micro-batch adds to the loss of its step, and to each metric; both are means over the step."""
    chosen = micro["chosen"]  # [B]
    if args.loss == "dpo":
        with torch.no_grad(), lm.reference(models) as ref:
            ref_total = lm.policy_logprobs(ref, micro, args.temperature)[0].sum(1)  # [B]
    logprobs, entropy = lm.policy_logprobs(models["policy"], micro, args.temperature)  # [B, T]
    nll = -logprobs[chosen].sum() / counts["chosen"]
    metrics = {"loss/nll": nll.detach(), "policy/entropy": entropy[chosen].sum() / counts["chosen"]}
    if args.loss == "sft":
        return nll, metrics
    pairs = [x[side] for x in (logprobs.sum(1), ref_total) for side in (chosen, micro["rejected"])]  # 4 x [n]
    loss, sums = dpo_loss(*pairs, args.beta, args.label_smoothing)
    metrics |= {name: x / counts["pairs"] for name, x in (sums | {"loss/dpo": loss.detach()}).items()}
    return loss / counts["pairs"] + args.nll * nll, metrics


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
    sides = ("chosen", "rejected") if args.loss == "dpo" else ("chosen",)

    for step in run.steps(models, optimizer, lambda: evaluate(sampling, task, test_pairs, args)):
        # ---- 1. the pairs of this step
        rows = tasks.walk(pairs)(args.seed, step, args.prompts_per_step)
        rows = rows[common.rank() :: common.world()]
        batch = make_batch(rows, sides, tokenizer.pad_token_id, device)

        # ---- 2. one optimizer step
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / (args.warmup_steps + 1)) * (1 - step / args.steps)
        metrics = update(models, optimizer, batch, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics | {"lr": optimizer.param_groups[0]["lr"]})
    if args.loss == "dpo":  # adpa.py compares the model with what it was aligned from
        local = args.model not in common.BUILTIN and Path(args.model).is_dir()
        policy.config.aligned_from = str(Path(args.model).resolve()) if local else args.model
    run.finish(policy, tokenizer)


# ---- what the loop needs ---------------------------------------------------------------------------------------------


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": lm.load_model(args.model, **trained)})
    if args.loss == "dpo" and not args.lora_rank:  # with LoRA, the policy without its adapters is the reference
        models["ref"] = lm.load_model(args.model, trainable=False, **shared)
    return models, torch.optim.Adam(lm.trainable_parameters(models["policy"]), lr=args.lr, fused=True)


def prepare(args):
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    even = args.loss == "sft" or args.micro_batch % 2 == 0
    require(even, f"--micro_batch {args.micro_batch}: the answers to a prompt stay together, so it must be even")
    tokenizer = lm.load_tokenizer(args.model)
    lm.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    if args.loss == "sft":  # a rejected answer, if there is one, counts in the evaluation alone
        return *load_data(args, tokenizer, tasks.load_demonstrations, ["chosen"]), tokenizer
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

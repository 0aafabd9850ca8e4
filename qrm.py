"""Q-RM: a reward model that scores every token, learnt from preference pairs alone.

Chen et al. 2025, "Discriminative Policy Optimization for Token-Level Reward Models" (ICML, arXiv:2505.23363). A
discriminative policy phi(a|s) = softmax_a Z(s,a) is trained apart from generation. Under maximum-entropy RL its optimum
has beta log phi*(s,a) = Q*(s,a) - V*(s): Z is Q up to a scale and an offset per state. Bradley-Terry on the mean over
the tokens of an answer y gives

    L = -log sigmoid( beta (mean_t Z(s_t, a_t) over y_w - mean_t Z(s_t, a_t) over y_l) - margin )               (QRM-1)

Two heads: --head scalar, a number read at the token itself (the paper's); --head lm, Z = log phi, the log-probability
of the token, with the cross-entropy on y_w beside it (the authors' later framework), which lco.py can use densely.
--objective orm is the baseline: Bradley-Terry on the score of the last token alone (QRM-3).

RL with it is a separate step. Z of each token, standardised over the rollout, takes the place of a return:

    A_t = Z(s_t, a_t) - V(s_t)   for PPO, the critic regressing on Z;       A_t = Z(s_t, a_t)   for REINFORCE    (QRM-2)

    python ppo_baseline.py --reward_model runs/qrm/model --advantage token --kl_coef 0.1

What differs from the paper (its abstract and third-party summaries), each for a reason
    1. The margin of QRM-1 is called gamma there; here gamma is the discount, as in the other scripts.
    2. QRM-1 alone does not fix the offset per state: an LM head does (its phi sums to one), the scalar head of the
       authors' release does not, and may learn a value of the prefix instead; docs/qrm.md.
    3. The authors' released code differs by patches in benchmarks/departures, which docs/results/qrm.md lists.

Run
    python qrm.py                                                                                # this laptop, offline
    python qrm.py --model Qwen/Qwen2.5-0.5B --pairs pairs.jsonl                                                 # 1 GPU
    torchrun --nproc_per_node=8 qrm.py --model ... --pairs ...                                                 # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 qrm.py ...          # 2 nodes
More in docs/qrm.md. Shapes: B answers, T completion positions, n pairs.
"""

import shlex
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
    pairs: str = arg("", "preference pairs (prompt, chosen, rejected): a Hub name or file; empty: built-in ones")
    test_pairs: int = arg(128, "held-out pairs, the last of the file; no other pair has their prompts", at_least=1)
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    # method
    objective: Literal["qrm", "orm"] = arg("qrm", "QRM-1, on the mean over tokens, or QRM-3, on the last token")
    head: Literal["scalar", "lm"] = arg("scalar", "Z is a scalar head at the token, or the token's log-probability")
    beta: float = arg(0.2, "the beta of QRM-1 (paper: 0.2)", at_least=1e-6)
    margin: float = arg(2.0, "the margin of QRM-1 (gamma in the paper: 2)", at_least=0)
    ce_weight: float = arg(1.0, "the coefficient of the cross-entropy on the chosen answer, with --head lm", at_least=0)
    # optimisation
    epochs: int = arg(1, "passes over the pairs", at_least=1)
    pairs_per_step: int = arg(64, "pairs per optimizer step, over all ranks", at_least=1)
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    lr: float = arg(1e-5, "the learning rate; falls linearly to 0", at_least=0)
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
    eval_every: int = arg(20, "steps between evaluations; there is one before and one after training", at_least=1)
    save_every: int = arg(50, "steps between checkpoints; there is one after the last step", at_least=1)
    keep: Literal["last", "best", "all"] = arg("last", "checkpoints that stay; best: also the best one, as model/")
    track: Literal["none", "wandb", "trackio", "tensorboard"] = arg("none", "a tracker that gets metrics and samples")
    push_to_hub: str = arg("", "the Hub repository that gets model/ at the end; private if it is new")
    steps: int = arg(0, "optimizer steps; 0: --epochs times the whole steps of a pass", at_least=0)


# What the bare command changes: a small model takes large steps.
BUILTIN = dict(
    head="lm", epochs=4, pairs_per_step=32, lr=5e-4, warmup_steps=4, max_prompt=24, max_new_tokens=24, micro_batch=64,
    eval_every=10,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def pair_loss(chosen, rejected, beta: float, margin: float):
    """-log sigmoid(beta (chosen - rejected) - margin) from the scores of answers, all [n]. Returns sums over pairs.

    QRM-1: scores are means over tokens. QRM-3: scores are those of the last token, beta 1 and margin 0.
    """
    delta = chosen - rejected
    loss = -torch.nn.functional.logsigmoid(beta * delta - margin).sum()
    return loss, {"reward_model/pair_accuracy": (delta > 0).sum(), "reward_model/margin": delta.detach().sum()}


def answer_score(scores, mask, objective: str):
    """[B] from token scores [B, T]: their mean, EOS included (QRM-1), or the last one (QRM-3)."""
    return lm.answer_scores(scores, mask, {"qrm": "mean", "orm": "last"}[objective])


# ---- one optimizer step ----------------------------------------------------------------------------------------------


def pair_objective(model, micro, args):
    """The loss of n pairs, whose chosen answers are the first n rows, and metric sums."""
    scores = lm.token_scores(model, micro)
    chosen, rejected = answer_score(scores, micro["mask"], args.objective).chunk(2)
    beta, margin = (args.beta, args.margin) if args.objective == "qrm" else (1.0, 0.0)
    loss, metrics = pair_loss(chosen, rejected, beta, margin)
    if args.head == "lm":  # the mean of log phi over y_w is minus its cross-entropy
        loss = loss - args.ce_weight * chosen.sum()
    return loss, metrics | {"loss/reward_model": loss.detach()}


def update(models, optimizer, batch, args) -> dict[str, float]:
    """One optimizer step on this rank's pairs; returns global means per pair."""
    n, device = len(batch["mask"]) // 2, batch["mask"].device
    count = common.all_sum({"n": n}, device)["n"]  # counted first, divided by once
    size, sums = max(1, args.micro_batch // 2), {}
    pieces = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    micros = [common.take(batch, [*piece, *(n + i for i in piece)]) for piece in pieces]
    for micro in lm.accumulate_over(models, micros):
        loss, metrics = pair_objective(models["reward"], micro, args)
        (loss * common.world() / count).backward()  # FSDP averages over ranks
        sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
    sums = common.all_sum(sums, device)
    norm = torch.nn.utils.clip_grad_norm_(lm.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **sums})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {k: v / count for k, v in sums.items()} | {"grad_norm": norm.item()}


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(args) -> None:
    """The whole run."""
    device = common.local_device(args.device)
    tokenizer, train_pairs, test_pairs = prepare(args)
    args = replace(args, steps=args.steps or args.epochs * (len(train_pairs) // args.pairs_per_step))
    run = common.Run(args, __file__)
    models, optimizer = build(args, device)
    share, pairs_of = args.pairs_per_step // common.world(), tasks.walk(train_pairs)

    for step in run.steps(models, optimizer, lambda: (evaluate(models, test_pairs, tokenizer, args, device), [])):
        # ---- 1. this rank's share of the pairs of the step
        pairs = pairs_of(args.seed, step, args.pairs_per_step)[common.rank() * share :][:share]
        batch = make_batch(pairs, tokenizer, device)

        # ---- 2. one optimizer step on QRM-1 or QRM-3
        rise, fall = (step + 1) / (args.warmup_steps + 1), 1 - step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * min(1, rise) * fall
        metrics = update(models, optimizer, batch, args)
        run.lap("update")

        # ---- 3. log; evaluate and save when it is time
        run.end_step(metrics | {"lr": optimizer.param_groups[0]["lr"]})
    run.take_best()
    show_credit(run, models, test_pairs[:12], tokenizer, args, device)
    advantage = "token" if args.objective == "qrm" else "gae"
    model = ["--model", args.model] * (args.model != "builtin")
    model += ["--dataset", "PROMPTS"] * (args.model not in common.BUILTIN)
    use = ["--reward_model", str(run.path / "model"), "--advantage", advantage, "--kl_coef", "0.1"]
    run.finish(models["reward"], tokenizer, then=shlex.join(["python", "ppo_baseline.py", *model, *use]))


# ---- what the loop needs ---------------------------------------------------------------------------------------------


def prepare(args):
    """Tokenizer, training and held-out pairs; every wrong argument and file is refused before a model is loaded."""
    require(args.objective == "qrm" or args.head == "scalar", "--objective orm needs --head scalar")
    divides = args.pairs_per_step % common.world() == 0
    require(divides, f"--pairs_per_step {args.pairs_per_step} does not divide among {common.world()} ranks")
    tokenizer = lm.load_tokenizer(args.model)
    lm.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    pairs = tasks.load_pairs(args.pairs or tasks.builtin().PAIRS)
    pairs, note = common.encode_pairs(tokenizer, pairs, args.max_prompt, args.max_new_tokens)
    train_pairs, test_pairs = tasks.split_pairs(pairs, args.test_pairs)
    enough = len(train_pairs) >= args.pairs_per_step
    require(enough, f"--pairs_per_step {args.pairs_per_step}: there are {len(train_pairs)} pairs to train on")
    common.say(f"{note}; {len(train_pairs)} to train on, {len(test_pairs)} held out")
    return tokenizer, train_pairs, test_pairs


def build(args, device):
    """The reward model, and its optimizer."""
    model = lm.load_model(
        args.model, head=args.head, dtype=args.dtype, device=device, seed=args.seed, lora_rank=args.lora_rank,
        activation_checkpointing=args.activation_checkpointing,
    )  # fmt: skip
    # Into the exported config.json: what it was trained as, and how the score of an answer comes from its tokens.
    model.config.reward_objective = args.objective
    model.config.reward_score = {"qrm": "mean", "orm": "last"}[args.objective]
    # Adam's own eps: below a scalar head that starts at 0 gradients are so small that 1e-5 would swallow them.
    optimizer = torch.optim.Adam(lm.trainable_parameters(model), lr=args.lr, fused=True)
    return torch.nn.ModuleDict({"reward": model}), optimizer


def make_batch(pairs, tokenizer, device) -> dict:
    """The answers of n pairs: row i is chosen answer i, row n + i rejected answer i."""
    prompt_ids = [pair["prompt_ids"] for pair in pairs] * 2
    answers = [pair[f"{side}_ids"] for side in ("chosen", "rejected") for pair in pairs]
    return common.make_batch(prompt_ids, answers, tokenizer.pad_token_id, device)


@torch.no_grad()
def evaluate(models, pairs, tokenizer, args, device) -> dict[str, float]:
    """On held-out pairs: how often the chosen answer is scored higher, and by how much."""
    mine, margins = pairs[common.rank() :: common.world()], []
    with lm.gathered(*models.values()):  # around the loop: ranks may have different numbers of batches
        for i in range(0, len(mine), args.micro_batch):
            batch = make_batch(mine[i : i + args.micro_batch], tokenizer, device)
            scores = token_scores(models, batch, args)
            chosen, rejected = answer_score(scores, batch["mask"], args.objective).chunk(2)
            margins += (chosen - rejected).tolist()
    margins = sorted(common.gather(margins))
    n = len(margins)
    metrics = {"eval/pair_accuracy": sum(m > 0 for m in margins) / n, "eval/margin": sum(margins) / n}
    return metrics | {f"eval/margin_p{p}": margins[min(n - 1, n * p // 100)] for p in (10, 50, 90)}


@torch.no_grad()
def token_scores(models, batch, args):
    """[B, T] of a whole batch, in micro-batches."""
    one = lambda micro: {"x": lm.token_scores(models["reward"], micro)}  # noqa: E731
    return lm.map_rows(one, batch, args.micro_batch)["x"]


def show_credit(run, models, pairs, tokenizer, args, device) -> None:
    """credit.html: held-out answers, each token coloured by its score (and by the truth, on the built-in task)."""
    scores, shown = token_scores(models, make_batch(pairs, tokenizer, device), args), []
    for i, pair in enumerate(pairs):
        for s, side in enumerate(("chosen", "rejected")):
            tokens = [tokenizer.decode([t]) for t in pair[f"{side}_ids"]]
            columns = {args.objective: scores[s * len(pairs) + i, : len(tokens)].tolist()}
            if not args.pairs:
                columns["still right"] = tasks.builtin().chain_credit(pair["prompt"], tokens)
            shown.append({"prompt": pair["prompt"], "kind": side, "tokens": tokens, "scores": columns})
    run.token_page("credit.html", f"{run.path.name} · qrm.py: held-out answers, token by token", shown)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: train(args), args.device)

"""Q-RM: a token-level Q-function learnt from preference pairs alone, and RL with it as the reward of each token.

Chen et al. 2025, "Discriminative Policy Optimization for Token-Level Reward Models" (ICML, arXiv:2505.23363). A
discriminative policy phi(a|s) = softmax_a Z(s,a) is trained apart from generation. Under maximum-entropy RL its optimum
has beta log phi*(s,a) = Q*(s,a) - V*(s), so that Z is Q up to scale and a number of each state. Bradley-Terry on the
mean over the tokens of an answer y gives

    L = -log sigmoid( beta (mean_t Z(s_t, a_t) over y_w - mean_t Z(s_t, a_t) over y_l) - margin )               (QRM-1)

Three stages: `pairs` samples answers and grades them, `reward` trains Z on pairs, `policy` is PPO or REINFORCE (the
trunk of ppo_baseline.py) with Z of each token, standardised over the rollout, in place of a return:

    A_t = Z(s_t, a_t) - V(s_t)   for PPO, the critic regressing on Z;       A_t = Z(s_t, a_t)   for REINFORCE    (QRM-2)

Baselines on the same data: --objective orm (Bradley-Terry on the last token), step_prm (right or wrong at the end of
each step) and dpo (log pi_dpo - log pi_ref), and --reward rule, the task's own reward.

What differs from the paper (its abstract and third-party summaries), each for a reason
    1. The margin of QRM-1 is called gamma there; here gamma is the discount, as in the other scripts.
    2. Every reward model is standardised over the tokens that it scores, so that none is favoured by its scale.
    3. QRM-1 alone does not fix the number of each state: an LM head does (its phi sums to one), the scalar head of the
       authors' release does not, and may learn a value of the prefix instead; docs/qrm.md.
    4. The departures of the authors' released code are switches, all off: --no_center, --value_baseline_weight 0.01,
       --kl_estimator abs, --eos_reward mean; stale updates without a ratio are --loss reinforce --minibatches 384.

Run
    python qrm.py                                                                        # this laptop, all three stages
    python qrm.py --stage reward --model Qwen/Qwen2.5-0.5B --pairs pairs.jsonl --dtype bfloat16                  # 1 GPU
    torchrun --nproc_per_node=8 qrm.py --stage policy --model ... --dataset ... --reward_model runs/.../model  # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 qrm.py ...          # 2 nodes
More in docs/qrm.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

import contextlib
import json
import tempfile
import time

from dataclasses import dataclass, replace
from pathlib import Path

import common  # before torch: it sets how OpenMP threads wait
import tasks

import torch

from common import arg, require


@dataclass
class Args:
    # stages
    stage: str = arg("all", "pairs, reward or policy; all: one after the other, in folders of --out")
    pairs: str = arg("", "of --stage reward: Hub name or file with prompt, chosen, rejected, or prompt, steps, labels")
    reward_model: str = arg("", "of --stage policy: what --stage reward made of the objective that --reward names")
    reward_ref: str = arg("", "the model that a --reward_model of --reward dpo was trained from; empty: --model")
    # model and data
    model: str = arg("builtin", "Hub name, or a folder (also one with a single GGUF file); builtin: the one here")
    dataset: str = arg("", "Hub name or .jsonl/.json/.parquet file; empty: the built-in task")
    task: str = arg("auto", "auto (by columns), chains, strings, words, gsm8k, math or prompts")
    test_dataset: str = arg("", "held-out rows; empty: the Hub's test split, else the last rows of --dataset")
    test_rows: int = arg(256, "held-out prompts in an evaluation")
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> list of floats")
    max_prompt: int = arg(512, "longest prompt in tokens")
    long_prompts: str = arg("drop", "what happens to longer ones: drop, truncate (keeps the end) or error")
    trust_remote_code: bool = arg(False, "allow code that comes with a model from the Hub")
    # rollout
    prompts_per_step: int = arg(64, "prompts in a step, over all ranks")
    samples_per_prompt: int = arg(8, "completions of each prompt")
    max_new_tokens: int = arg(512, "longest completion in tokens, its EOS included")
    temperature: float = arg(1.0, "of sampling, and of every log-probability that is taken")
    missing_eos_penalty: float = arg(0.0, "subtracted from the reward of a completion that was cut")
    # pairs
    pair_prompts: int = arg(4096, "prompts from which --stage pairs makes at most one pair each")
    pair_samples: int = arg(8, "completions of each of them")
    step_separator: str = arg("\n", "what ends a step of an answer, for step_prm")
    # reward model
    objective: str = arg("qrm", "qrm (QRM-1), orm (QRM-3), step_prm (QRM-4) or dpo (QRM-5)")
    head: str = arg("scalar", "Z is a scalar head at the token, or lm: the log-probability of the token (qrm, dpo)")
    beta: float = arg(0.2, "of QRM-1 (paper: 0.2)")
    margin: float = arg(2.0, "of QRM-1 (gamma in the paper: 2)")
    dpo_beta: float = arg(0.1, "beta of DPO (recipe of DCKD's authors: 0.01)")
    ce_weight: float = arg(1.0, "weight of the cross-entropy on the chosen answer beside QRM-1 with --head lm")
    reward_epochs: int = arg(1, "passes over the pairs")
    pairs_per_step: int = arg(64, "pairs in an optimizer step, over all ranks")
    reward_lr: float = arg(1e-5, "learning rate of the reward model; falls linearly to 0")
    test_pairs: int = arg(128, "held-out pairs, the last of the file; no other pair with one of their prompts is used")
    # method
    reward: str = arg("qrm", "what the policy is trained on: qrm, orm, step_prm, dpo, or rule: the task's own reward")
    center: bool = arg(True, "standardise scores to mean 0 (authors' code: only to variance 1)")
    eos_reward: str = arg("own", "the score of the last token: its own, or mean: of its completion (authors' code)")
    orm_credit: str = arg("last", "where the score of an orm goes: last token, or broadcast to all tokens")
    loss: str = arg("ppo", "ppo (PPO-1) or reinforce: -A_t log pi(a_t|s_t), the same trunk without ratio and clip")
    advantage: str = arg("auto", "token (QRM-2), gae, return (to go), reward, group; auto: token for qrm and dpo, else "
                         "gae with ppo and return with reinforce")  # fmt: skip
    critic: bool = arg(True, "a critic for --advantage gae, and for token with --loss ppo; False: V = 0")
    value_baseline_weight: float = arg(1.0, "of V in QRM-2 (authors' code: 0.01)")
    clip: float = arg(0.2, "eps of PPO-1")
    gamma: float = arg(1.0, "discount")
    lam: float = arg(0.95, "lambda of GAE")
    vf_coef: float = arg(0.1, "weight of the value loss")
    value_clip: float = arg(0.2, "a value moves at most so far from the rollout's before its loss goes flat; 0: free")
    critic_warmup: int = arg(0, "first steps that train the critic alone")
    kl_coef: float = arg(0.0, "KL penalty per token inside the reward, against the starting policy; 0 loads no copy")
    kl_estimator: str = arg("k1", "k1: log pi/ref; k2: half its square; k3: ref/pi - 1 - log ref/pi; abs: |log pi/ref|")
    # optimisation
    steps: int = arg(200, "rollouts")
    epochs: int = arg(1, "passes over a rollout")
    minibatches: int = arg(2, "optimizer steps in a pass")
    micro_batch: int = arg(8, "sequences in one forward and backward of a rank; changes memory, never the result")
    lr: float = arg(1e-6, "learning rate of the policy; falls linearly to 0")
    critic_lr: float = arg(1e-5, "learning rate of the critic; falls likewise")
    warmup_steps: int = arg(
        0, "first steps in which learning rates rise linearly: Adam's very first updates are the largest"
    )
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    lora_rank: int = arg(0, "train adapters of this rank instead of all weights; 0: all weights")
    # run
    out: str = arg("", "run folder; empty: runs/<script>-<time>")
    resume: bool = arg(False, "go on from the newest checkpoint in --out (from the start if there is none)")
    seed: int = arg(0, "of prompts, sampling, minibatches and new weights")
    device: str = arg("auto", "auto, cpu or cuda")
    dtype: str = arg("auto", "of the computation: float32, bfloat16 or auto (which is bfloat16 on CUDA)")
    activation_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, more time")
    rollout_rows: int = arg(256, "sequences that a rank generates at once")
    eval_every: int = arg(20, "steps between evaluations; there is one before the first step and after the last")
    save_every: int = arg(50, "steps between checkpoints; there is one after the last")
    check: bool = arg(False, "pre-flight: test this script with this model and task, train nothing")
    wandb: bool = arg(False, "also log to Weights & Biases")


# What the bare command changes: a small model takes large steps.
BUILTIN = dict(
    steps=40, prompts_per_step=32, max_prompt=24, max_new_tokens=24, micro_batch=64, eval_every=10,
    lr=2e-4, critic_lr=1e-3, warmup_steps=4, kl_coef=0.1, pair_prompts=2048, pairs_per_step=32, reward_lr=5e-4,
    reward_epochs=4, head="lm", step_separator="=",
)  # fmt: skip
PANELS = {
    "held-out pairs": ["eval/pair_accuracy", "eval/step_accuracy"],
    "margin of held-out pairs": ["eval/margin_p10", "eval/margin", "eval/margin_p90"],
    "loss of the reward model": ["loss/reward_model"],
    "held-out accuracy": ["eval/pass@1", "eval/sampled", "eval/reward", "eval/reward_sampled"],
    "reward": ["reward/mean"],
    "loss": ["loss/policy", "loss/value"],
    "step away from the rollout policy": ["policy/kl_old", "policy/clip_fraction"],
    "entropy (nats)": ["policy/entropy"],
    "gradient norm": ["grad_norm"],
    "completion length (tokens)": ["length/mean"],
    "critic": ["critic/explained_variance"],
    "KL to the start": ["kl/ref"],
}
SHOW = ["reward/mean", "loss/policy", "policy/kl_old", "length/mean", "eval/pass@1", "eval/sampled", "eval/reward"]
SHOW += ["loss/reward_model", "eval/pair_accuracy", "eval/step_accuracy", "pairs/kept"]


# ---- the reward model --------------------------------------------------------------------------------------------


# same in: qrm.py evaluate.py
def sequence_score(scores, mask, step_ends, objective: str):
    """The score of each answer [B] from those of its tokens [B, T]; step_ends and mask are bool [B, T].

    qrm: mean over the tokens, EOS among them; orm: the last token; dpo: the sum, a log-ratio of sequences;
    step_prm: the least at the ends of steps, unstandardised, for an answer is as good as its worst step.
    """
    if objective == "qrm":
        return (scores * mask).sum(1) / mask.sum(1)
    if objective == "orm":
        return scores.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    if objective == "dpo":
        return (scores * mask).sum(1)
    return scores.masked_fill(~step_ends, float("inf")).amin(1)


def pair_loss(chosen, rejected, beta: float, margin: float):
    """-log sigmoid(beta (chosen - rejected) - margin) from the scores of answers, all [n]. Returns sums over pairs.

    QRM-1: means over tokens. QRM-3: scores of the last token, beta 1, margin 0. QRM-5: sums of log-ratios, margin 0.
    """
    delta = chosen - rejected
    loss = -torch.nn.functional.logsigmoid(beta * delta - margin).sum()
    return loss, {"reward_model/pair_accuracy": (delta > 0).sum(), "reward_model/margin": delta.detach().sum()}


def step_loss(scores, labels):
    """QRM-4: -log sigmoid(+-Z) at the ends of steps [n], labels 1 for a right step and 0. Returns sums over steps."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
    return loss, {"reward_model/step_accuracy": ((scores > 0) == (labels > 0)).sum()}


# same in: qrm.py evaluate.py
def token_scores(models, micro, objective: str):
    """Z(s_t, a_t) of each completion token, [B, T], fp32; 0 where masked.

    A scalar head is read at the token itself, which it has seen; an LM head at the state before it. dpo: QRM-5's
    log pi_dpo - log pi_ref.
    """
    model, mask = models["reward"], micro["mask"]
    if common.has_scalar_head(model.config):
        return common.completion_scalars(model, micro, after=True) * mask
    scores = answer_logprobs(model, micro)
    if objective == "dpo":
        ref = models["reward_ref"] if "reward_ref" in models else model  # noqa: SIM401 (a ModuleDict has no get)
        with torch.no_grad(), contextlib.nullcontext() if ref is not model else common.adapters_off(model):
            ref_scores = answer_logprobs(ref, micro)
        scores = scores - ref_scores
    return scores


# same in: qrm.py evaluate.py
def answer_logprobs(model, micro):
    """log-probabilities of the completion tokens at temperature 1, [B, T]; 0 where masked."""
    mask = micro["mask"]
    hidden, weight = common.completion_hidden(model, micro)[mask], common.head_weight(model)
    logprobs, _ = common.token_logprobs(hidden, weight, micro["completion_ids"][mask])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def reward_objective(models, micro, args):
    """The loss of some pairs (chosen answers, then rejected ones) or of answers with step labels; sums, metric sums."""
    scores = token_scores(models, micro, args.objective)
    if args.objective == "step_prm":
        at = micro["step_ends"]
        loss, metrics = step_loss(scores[at], micro["step_labels"][at])
    else:
        answers = sequence_score(scores, micro["mask"], micro["step_ends"], args.objective)
        scales = {"qrm": (args.beta, args.margin), "orm": (1.0, 0.0), "dpo": (args.dpo_beta, 0.0)}
        loss, metrics = pair_loss(*answers.chunk(2), *scales[args.objective])
        if args.head == "lm" and args.objective == "qrm":
            loss = loss - args.ce_weight * answers.chunk(2)[0].sum()
    return loss, metrics | {"loss/reward_model": loss.detach()}


# ---- the method --------------------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, loss: str, clip: float):
    """PPO-1 or REINFORCE. All [N]; log-probabilities in nats. Returns the sum over tokens and metric sums."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    if loss == "reinforce":
        per_token = -advantages * logprobs
    else:
        # The larger of two losses, for both signs of A: an advantage is never earned outside the clip range.
        per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return per_token.sum(), {
        "loss/policy": per_token.detach().sum(),
        "policy/kl_old": (ratio - 1 - log_ratio).detach().sum(),  # k3 on samples of pi_old: KL(pi_old || pi)
        "policy/ratio_gap": (ratio - 1).detach().abs().sum(),
        "policy/clip_fraction": ((ratio - 1).abs() > clip).sum(),
    }


# same in: ppo_baseline.py lco.py qrm.py
def value_loss(values, old_values, returns, value_clip: float):
    """PPO-3: half the squared error of the critic, the larger of clipped and unclipped. All [N]. Returns sums."""
    error = (values - returns).square()
    if value_clip:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error.sum(), {"loss/value": 0.5 * error.detach().sum()}


# same in: ppo_baseline.py lco.py qrm.py
def gae(rewards, values, mask, gamma: float, lam: float):
    """PPO-2: generalised advantage estimation on tokens (Schulman et al. 2016). All [B, T]; advantages and returns.

    delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = delta_t + gamma lam A_t+1; after the last token both are 0.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    after, value_after = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        value_after = values[:, t]
        advantages[:, t] = after
    return advantages, (advantages + values) * mask


def kl_estimate(logprobs, ref_logprobs, estimator: str):
    """PPO-4: KL(pi || ref) from one sampled token each (Schulman, joschu.net/blog/kl-approx.html). All [B, T].

    abs, |log pi/ref|, estimates no KL; the authors' code subtracts it.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "abs":
        return log_ratio.abs()
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return (-log_ratio).exp() - 1 + log_ratio


# same in: ppo_baseline.py lco.py qrm.py
def whiten(x, mask):
    """Mean 0 and variance 1 over the unmasked tokens of the global batch. [B, T]."""
    count, total, square = mask.sum(), (x * mask).double().sum(), (x * mask).double().square().sum()
    sums = common.all_sum({"n": count, "x": total, "xx": square}, x.device)
    mean = sums["x"] / sums["n"]
    variance = max(sums["xx"] / sums["n"] - mean**2, 0.0)
    if variance <= 1e-12 * mean**2:  # all equal: what is left is rounding, which must not grow into a signal
        return torch.zeros_like(x)
    return (x - mean) / (variance + 1e-8) ** 0.5 * mask


# same in: ppo_baseline.py lco.py qrm.py
def equal_returns(rewards, mask, gamma: float) -> bool:
    """Whether all completions of the global batch have the same return, but for rounding, so that none is better."""
    returns = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0][:, 0]
    most, least = (sign * common.all_max((sign * returns).max(), mask.device) for sign in (1, -1))
    return most - least <= 1e-6 * max(abs(most), abs(least))


def standardise(scores, at, center: bool):
    """Mean 0 (if center) and variance 1 over the tokens `at` of the global batch. [B, T]; 0 elsewhere."""
    x = torch.where(at, scores, 0.0).double()
    sums = common.all_sum({"n": at.sum(), "x": x.sum(), "xx": x.square().sum()}, x.device)
    mean = sums["x"] / sums["n"]
    variance = max(sums["xx"] / sums["n"] - mean**2, 0.0)
    return ((scores - mean * center) / (variance + 1e-8) ** 0.5 * at).float()


def model_rewards(batch, args) -> list[list[float]]:
    """What the reward model gives each token of each completion: its scores, standardised over the tokens it scores."""
    mask, scores = batch["mask"], batch["scores"]
    if args.reward == "orm":
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        rewards = standardise(scores, last, args.center)
        if args.orm_credit == "broadcast":
            rewards = rewards.sum(1, keepdim=True) * mask
    else:
        rewards = standardise(scores, batch["step_ends"] if args.reward == "step_prm" else mask, args.center)
    if args.eos_reward == "mean":
        length = mask.sum(1, keepdim=True)
        rewards = rewards.scatter(1, length - 1, rewards.sum(1, keepdim=True) / length)
    return [row[:n] for row, n in zip(rewards.tolist(), mask.sum(1).tolist())]


def estimate_advantages(batch, args) -> None:
    """Add `advantages` [B, T] (and with a critic its targets, `returns`) to a batch that has `rewards` [B, T]."""
    mask, rewards = batch["mask"], batch["rewards"]
    values = batch.get("values", torch.zeros_like(rewards))
    if args.advantage == "token":  # QRM-2: the reward of a token already says what follows, nothing is summed
        batch["advantages"] = (rewards - args.value_baseline_weight * values) * mask
        batch["returns"] = rewards
    elif args.advantage == "gae":
        advantages, batch["returns"] = gae(rewards, values, mask, args.gamma, args.lam)
        batch["advantages"] = whiten(advantages, mask)
        if equal_returns(rewards, mask, args.gamma):  # what differs is the critic, which learns alone
            batch["advantages"] = torch.zeros_like(advantages)
    elif args.advantage == "return":
        batch["advantages"] = whiten(gae(rewards, values, mask, args.gamma, 1.0)[0], mask)
    elif args.advantage == "reward":
        batch["advantages"] = whiten(rewards.sum(1, keepdim=True) * mask, mask)
    else:  # group: the leave-none-out mean, not divided by the standard deviation (which would favour lucky prompts)
        groups = rewards.sum(1).view(-1, args.samples_per_prompt)
        gaps = groups - groups.mean(1, keepdim=True)
        gaps = gaps * (gaps.abs() > 1e-6 * groups.abs().amax(1, keepdim=True))  # rounding is no signal
        batch["advantages"] = gaps.view(-1, 1) * mask


# ---- models and batches to losses ------------------------------------------------------------------------------------


# same in: ppo_baseline.py lco.py qrm.py
def policy_logprobs(policy, batch, args):
    """log-probabilities of the completion tokens, and entropies: [B, T], 0 where masked. Alike for pi, pi_old, ref."""
    mask = batch["mask"]
    hidden = common.completion_hidden(policy, batch)[mask]  # [N, H]
    weight = common.head_weight(policy)
    flat = common.token_logprobs(hidden, weight, batch["completion_ids"][mask], args.temperature)
    return tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x) for x in flat)


# same in: ppo_baseline.py lco.py qrm.py
def one_update(args) -> bool:
    """Whether a rollout serves a single update: while its gradient is taken pi is pi_old, which is not asked before."""
    return args.epochs * args.minibatches == 1 and not args.kl_coef


@torch.no_grad()
def score(models, batch, args) -> None:
    """Add what the rollout policy, reference, critic and reward model say of each token, [B, T], before any update."""

    def one(micro):
        out = {}
        if not one_update(args):
            out["old_logprobs"] = policy_logprobs(models["policy"], micro, args)[0]
        if "ref" in models:
            out["ref_logprobs"] = policy_logprobs(models["ref"], micro, args)[0]
        elif args.kl_coef:
            with common.adapters_off(models["policy"]):
                out["ref_logprobs"] = policy_logprobs(models["policy"], micro, args)[0]
        if "critic" in models:
            out["values"] = common.completion_scalars(models["critic"], micro) * micro["mask"]
        if "reward" in models:
            out["scores"] = token_scores(models, micro, args.reward)
        return out

    batch |= common.map_rows(one, batch, args.micro_batch)


def objective(models, micro, args, train_policy: bool = True):
    """The loss of one micro-batch, summed over its tokens, and metric sums."""
    mask = micro["mask"]
    logprobs, entropy = policy_logprobs(models["policy"], micro, args)
    old_logprobs = logprobs.detach() if one_update(args) else micro["old_logprobs"]
    loss, metrics = policy_loss(logprobs[mask], old_logprobs[mask], micro["advantages"][mask], args.loss, args.clip)
    loss = loss * train_policy
    metrics["policy/entropy"] = entropy.sum()
    if "critic" in models:
        values = common.completion_scalars(models["critic"], micro)[mask]
        critic_loss, sums = value_loss(values, micro["values"][mask], micro["returns"][mask], args.value_clip)
        loss, metrics = loss + args.vf_coef * critic_loss, metrics | sums
    return loss, metrics


def accumulate(models, batch, rows, args, train_policy: bool = True):
    """Gradients of the mean loss over the tokens of these local rows on all ranks; also global metric sums, and N."""
    device = batch["mask"].device
    tokens = common.all_sum({"n": batch["mask"][rows].sum()}, device)["n"]  # counted first, divided by once
    sums = {}
    for micro in common.accumulate_over(models, common.micro_batches(batch, rows, args.micro_batch)):
        loss, metrics = objective(models, micro, args, train_policy)
        (loss * common.world() / tokens).backward()  # FSDP averages over ranks
        sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
    return common.all_sum(sums, device), tokens


def update(models, optimizer, batch, rows, args, train_policy: bool = True):
    """One optimizer step on some local rows of a batch. The policy takes none where all their advantages are 0."""
    signal = common.all_max(batch["advantages"][rows].abs().max(), batch["mask"].device) > 0
    train_policy = train_policy and signal
    sums, tokens = accumulate(models, batch, rows, args, train_policy)
    if not train_policy:  # no gradients, not even 0: with those Adam's momentum would go on
        models["policy"].zero_grad(set_to_none=True)
    norm = torch.nn.utils.clip_grad_norm_(common.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **sums})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"grad_norm": norm.item() * tokens, "policy/updates": train_policy * tokens}, tokens


# ---- the run ---------------------------------------------------------------------------------------------------------


def validate(args) -> None:
    """One clear sentence for each wrong value, before anything is loaded."""
    common.one_of(
        stage=(args.stage, ("all", "pairs", "reward", "policy")),
        objective=(args.objective, ("qrm", "orm", "step_prm", "dpo")),
        head=(args.head, ("scalar", "lm")),
        reward=(args.reward, ("qrm", "orm", "step_prm", "dpo", "rule")),
        eos_reward=(args.eos_reward, ("own", "mean")),
        orm_credit=(args.orm_credit, ("last", "broadcast")),
        loss=(args.loss, ("ppo", "reinforce")),
        advantage=(args.advantage, ("auto", "token", "gae", "return", "reward", "group")),
        kl_estimator=(args.kl_estimator, ("k1", "k2", "k3", "abs")),
        long_prompts=(args.long_prompts, ("drop", "truncate", "error")),
        dtype=(args.dtype, ("auto", "float32", "bfloat16")),
    )
    common.at_least(0, lr=args.lr, critic_lr=args.critic_lr, kl_coef=args.kl_coef, value_clip=args.value_clip)
    common.at_least(0, gamma=args.gamma, lam=args.lam, vf_coef=args.vf_coef, critic_warmup=args.critic_warmup)
    common.at_least(0, warmup_steps=args.warmup_steps, missing_eos_penalty=args.missing_eos_penalty)
    common.at_least(0, lora_rank=args.lora_rank)
    common.at_least(1e-6, temperature=args.temperature, max_grad_norm=args.max_grad_norm, clip=args.clip)
    common.at_least(1, steps=args.steps, epochs=args.epochs, max_prompt=args.max_prompt, eval_every=args.eval_every)
    common.at_least(1, max_new_tokens=args.max_new_tokens, save_every=args.save_every, test_rows=args.test_rows)
    common.at_least(1, rollout_rows=args.rollout_rows)
    common.at_least(1, pair_prompts=args.pair_prompts, reward_epochs=args.reward_epochs, test_pairs=args.test_pairs)
    common.at_least(2, pair_samples=args.pair_samples)
    common.at_least(0, margin=args.margin, ce_weight=args.ce_weight, reward_lr=args.reward_lr)
    common.at_least(0, value_baseline_weight=args.value_baseline_weight)
    common.at_least(1e-6, beta=args.beta, dpo_beta=args.dpo_beta)
    require(args.step_separator != "", "--step_separator is empty; expected the text that ends a step")
    scalar = args.objective in ("orm", "step_prm")
    require(not scalar or args.head == "scalar", f"--objective {args.objective} needs --head scalar")
    require(args.objective != "dpo" or args.head == "lm", "--objective dpo compares log-probabilities: give --head lm")
    matched = args.stage != "all" or args.reward in (args.objective, "rule")
    require(matched, f"--reward {args.reward} needs --objective {args.reward} in --stage all, found {args.objective}")
    every = args.eos_reward == "own" or args.reward in ("qrm", "dpo")
    require(every, f"--eos_reward mean needs a score of every token, which --reward {args.reward} has not")
    require(args.stage != "reward" or args.pairs, "--stage reward needs --pairs")
    given = args.stage != "policy" or args.reward == "rule" or args.reward_model
    require(given, f"--stage policy with --reward {args.reward} needs --reward_model")
    rule = args.advantage == "token" and args.reward == "rule" and args.stage in ("all", "policy")
    by_token = not rule or args.reward_file
    require(by_token, "--advantage token needs --reward_file: a function that returns one reward for each token")
    one_sample = args.advantage == "group" and args.samples_per_prompt < 2
    require(not one_sample, "--advantage group compares samples of one prompt: --samples_per_prompt must be at least 2")


def settled(args):
    """--advantage auto, decided."""
    if args.advantage != "auto":
        return args
    other = "gae" if args.loss == "ppo" else "return"
    return replace(args, advantage="token" if args.reward in ("qrm", "dpo") else other)


def has_critic(args) -> bool:
    return args.critic and (args.advantage == "gae" or (args.advantage == "token" and args.loss == "ppo"))


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": common.load_model(args.model, **trained)})
    groups = [{"params": common.trainable_parameters(models["policy"]), "name": "lr"}]
    if has_critic(args):
        models["critic"] = common.load_model(args.model, head="scalar", **trained)
        groups.append({"params": common.trainable_parameters(models["critic"]), "name": "critic_lr"})
    if args.kl_coef and not args.lora_rank:  # with LoRA, the policy without its adapters is the reference
        models["ref"] = common.load_model(args.model, trainable=False, **shared)
    if args.reward != "rule":
        models["reward"] = common.load_model(args.reward_model, head="saved", trainable=False, **shared)
    if args.reward == "dpo":
        models["reward_ref"] = common.load_model(args.reward_ref or args.model, trainable=False, **shared)
    return models, torch.optim.Adam(groups, lr=args.lr, eps=1e-5, fused=True)


def build_reward(args, device):
    """The reward model (and for dpo the model it starts from), and its optimizer."""
    shared = dict(dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"reward": common.load_model(args.model, head=args.head, **trained)})
    models["reward"].config.reward_objective = args.objective  # goes into the exported config.json
    if args.objective == "dpo" and not args.lora_rank:
        models["reward_ref"] = common.load_model(args.model, trainable=False, **shared)
    # Adam's own eps: below a scalar head that starts at 0 gradients are as small as the 1e-5 that PPO takes
    return models, torch.optim.Adam(common.trainable_parameters(models["reward"]), lr=args.reward_lr, fused=True)


# same in: ppo_baseline.py lco.py qrm.py
def token_rewards(scores, batch, finished, args):
    """[B, T]: the task's reward on the last token (or its own reward for each token), less the KL penalty per token.

    --advantage token takes the task's own for each token, standardised, as those of a reward model are already.
    """
    mask = batch["mask"]
    rewards = torch.zeros(mask.shape, device=mask.device)
    last = mask.sum(1) - 1
    for b, value in enumerate(scores):
        if isinstance(value, list):
            n = int(last[b]) + 1
            require(len(value) == n, f"reward(): {len(value)} rewards for a completion of {n} tokens (completion_ids)")
            rewards[b, :n] = torch.tensor(value, device=mask.device)
        else:
            require(args.advantage != "token", "--advantage token: reward() gave a number, expected one for each token")
            rewards[b, last[b]] = value
    if args.advantage == "token" and "scores" not in batch:
        rewards = whiten(rewards, mask)
    for b, done in enumerate(finished):
        rewards[b, last[b]] -= args.missing_eos_penalty * (not done)
    if args.kl_coef:
        kl = kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], args.kl_estimator)
        rewards = rewards - args.kl_coef * kl * mask
    return rewards


def prepare(args):
    """Task and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    validate(args)
    geometry = common.split_evenly(args.prompts_per_step, args.samples_per_prompt, args.minibatches, args.micro_batch)
    task = tasks.load_task(
        args.task, args.dataset, args.reward_file, args.seed, args.test_rows, args.test_dataset,
        graded=args.stage == "pairs" or args.reward == "rule",
    )  # fmt: skip
    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)
    common.fits_context(args.model, args.max_prompt + args.max_new_tokens, args.trust_remote_code)
    if args.stage == "policy" and args.reward != "rule":
        for name in [args.reward_model] + [args.reward_ref] * (args.reward == "dpo" and args.reward_ref != ""):
            common.same_tokenizer(args.model, tokenizer, name, common.load_tokenizer(name, args.trust_remote_code))
            common.fits_context(name, args.max_prompt + args.max_new_tokens, args.trust_remote_code)
        config = common.load_config(args.reward_model, args.trust_remote_code)
        found = getattr(config, "reward_objective", args.reward)
        require(found == args.reward, f"--reward {args.reward}: {args.reward_model} was trained as {found}")
        scalar = common.has_scalar_head(config) or args.reward in ("qrm", "dpo")
        require(
            scalar, f"--reward {args.reward}: {args.reward_model} has no scalar head (token classification, 1 label)"
        )
        logprobs = args.reward != "dpo" or not common.has_scalar_head(config)
        require(logprobs, f"--reward dpo: {args.reward_model} has a scalar head; expected a language model")
    steps = args.stage != "pairs" or args.objective != "step_prm" or task.steps
    require(steps, f"--objective step_prm: --task {task.name} cannot grade steps; expected pairs with labels (--pairs)")
    task = tasks.fit_prompts(task, tokenizer, args.max_prompt, args.long_prompts)
    common.say(f"{geometry}\n{task.note}")
    return task, tokenizer


def make_pairs(args) -> None:
    """Stage `pairs`: pairs.jsonl, one right and one wrong answer of the policy to each prompt that has both."""
    device = common.local_device(args.device)
    task, tokenizer = prepare(args)
    prompts = min(args.pair_prompts, len(task.train) or args.pair_prompts)  # each prompt once
    args = replace(args, steps=max(1, prompts // args.prompts_per_step))
    run = common.RunFolder(args, __file__, PANELS, SHOW)
    common.say(f"run folder: {run.path}")
    shared = dict(dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code)
    policy = common.load_model(args.model, trainable=False, **shared)
    sampling = common.Sampling(
        policy, tokenizer, args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    )
    run.cut(-1)  # one that was interrupted starts again
    pairs, K = [], args.pair_samples
    for step in range(args.steps):
        rows = task.rows(args.seed, step, args.prompts_per_step)
        rows, _, completion_ids, finished, _ = sampling.rollout(rows, K, args.seed, step)
        texts = common.decode(tokenizer, completion_ids)
        scores = task.reward([row["prompt"] for row in rows], texts, rows)
        scores = [sum(x) if isinstance(x, list) else x for x in scores]
        finished = [done and text != "" for done, text in zip(finished, texts)]  # no text is no answer
        mine = []
        for i in range(0, len(rows), K):
            picked = pick_pair(scores[i : i + K], [len(c) for c in completion_ids[i : i + K]], finished[i : i + K])
            if picked:
                pair = {"prompt": rows[i]["prompt"]}
                for side, k in zip(("chosen", "rejected"), picked):
                    pair[side] = texts[i + k]
                    if task.steps:
                        pair[f"{side}_labels"] = task.steps(rows[i], texts[i + k])
                mine.append(pair)
        pairs += common.gather(mine)
        mean = common.all_sum({"reward": sum(scores), "n": len(scores)}, device)
        run.log(step + 1, {"reward/mean": mean["reward"] / mean["n"], "pairs/kept": len(pairs)})
    require(bool(pairs), "no prompt has answers of different reward: there is nothing to learn from")
    if common.rank() == 0:
        common.write_whole(run.path / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))


def pick_pair(scores: list[float], lengths: list[int], finished: list[bool]) -> tuple[int, int] | None:
    """Two answers to one prompt, best and worst score, of the closest lengths that there are; None when all are equal.

    Only answers that ended by themselves: a cut one would be told by its missing EOS.
    """
    done = [i for i, ok in enumerate(finished) if ok]
    if not done or max(scores[i] for i in done) == min(scores[i] for i in done):
        return None
    best, worst = max(scores[i] for i in done), min(scores[i] for i in done)
    choices = [(i, j) for i in done for j in done if scores[i] == best and scores[j] == worst]
    return min(choices, key=lambda ij: abs(lengths[ij[0]] - lengths[ij[1]]))


def prepare_reward(args):
    """Tokenizer, training and held-out rows with the ids of their answers (`sides`), all checked."""
    validate(args)
    common.at_least(1, pairs_per_step=args.pairs_per_step, micro_batch=args.micro_batch)
    divides = args.pairs_per_step % common.world() == 0
    require(divides, f"--pairs_per_step {args.pairs_per_step} does not divide among {common.world()} ranks")
    rows, sides = tasks.load_answers(args.pairs, args.step_separator)
    labelled = args.objective != "step_prm" or all(f"{side}_labels" in rows[0] for side in sides)
    require(labelled, f"{args.pairs}: step_prm needs labels: columns prompt, steps, labels (or *_labels beside a pair)")
    paired = args.objective == "step_prm" or len(sides) == 2
    require(paired, f"{args.pairs}: --objective {args.objective} needs the columns prompt, chosen, rejected")
    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)
    common.fits_context(args.model, args.max_prompt + args.max_new_tokens, args.trust_remote_code)
    rows, note = common.encode_pairs(tokenizer, rows, args.max_prompt, args.max_new_tokens, sides)
    for side in sides if args.objective == "step_prm" else ():
        for row, ends in zip(rows, find_steps([row[f"{side}_ids"] for row in rows], tokenizer, args.step_separator)):
            labels = row[f"{side}_labels"]
            same = len(labels) == len(ends)
            require(same, f"{args.pairs}: {len(labels)} labels for the {len(ends)} steps of {row[side]!r}")
    train_rows, test_rows = tasks.split_pairs(rows, args.test_pairs)
    enough = len(train_rows) >= args.pairs_per_step
    require(enough, f"--pairs_per_step {args.pairs_per_step}: there are {len(train_rows)} pairs to train on")
    common.say(f"{note}; {len(train_rows)} to train on, {len(test_rows)} held out")
    return tokenizer, sides, train_rows, test_rows


def answer_batch(rows, sides, tokenizer, args, device) -> dict:
    """The answers of n rows with their steps and labels: row i is chosen answer i, row n + i rejected answer i.

    Rows with step labels alone have one answer each.
    """
    prompt_ids = [row["prompt_ids"] for _ in sides for row in rows]
    completion_ids = [row[f"{side}_ids"] for side in sides for row in rows]
    batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
    batch["step_ends"] = step_mask(completion_ids, tokenizer, args.step_separator, batch["mask"])
    if args.objective == "step_prm":  # in the order of the answers, as masked_scatter takes them
        labels = [x for side in sides for row in rows for x in row[f"{side}_labels"]]
        zeros = torch.zeros(batch["mask"].shape, device=device)
        batch["step_labels"] = zeros.masked_scatter(batch["step_ends"], torch.tensor(labels, device=device).float())
    return batch


# same in: qrm.py evaluate.py
def find_steps(completion_ids, tokenizer, separator: str) -> list[list[int]]:
    """Where the steps of each completion end: at tokens that contain the separator, and at the last token."""
    contain = {i for i in {i for ids in completion_ids for i in ids} if separator in tokenizer.decode([i])}
    return [[t for t, i in enumerate(ids) if i in contain or t + 1 == len(ids)] for ids in completion_ids]


# same in: qrm.py evaluate.py
def step_mask(completion_ids, tokenizer, separator: str, mask):
    """The same as bool [B, T]."""
    ends = torch.zeros(mask.shape, dtype=torch.bool)
    for b, positions in enumerate(find_steps(completion_ids, tokenizer, separator)):
        ends[b, positions] = True
    return ends.to(mask.device)


def accumulate_reward(models, batch, n: int, args):
    """Gradients of the mean loss over the pairs (or labelled steps) of all ranks; also global metric sums, and count.

    batch: the answers of n rows of this rank; those of one row stay in one micro-batch.
    """
    device, sides = batch["mask"].device, len(batch["mask"]) // n
    mine = batch["step_ends"].sum() if args.objective == "step_prm" else torch.tensor(n)
    count, sums = common.all_sum({"n": mine}, device)["n"], {}
    size = max(1, args.micro_batch // sides)
    for part in common.accumulate_over(models, [range(i, min(i + size, n)) for i in range(0, n, size)]):
        micro = common.take(batch, [side * n + j for side in range(sides) for j in part])
        loss, metrics = reward_objective(models, micro, args)
        (loss * common.world() / count).backward()  # FSDP averages over ranks
        sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
    return common.all_sum(sums, device), count


@torch.no_grad()
def evaluate_reward(models, rows, sides, tokenizer, args, device) -> dict[str, float]:
    """Held-out accuracy: of pairs (is the chosen answer scored higher?) and of labelled steps; margins of the pairs."""
    mine = rows[common.rank() :: common.world()]  # one more on some ranks
    one = lambda micro: {"x": token_scores(models, micro, args.objective)}  # noqa: E731
    correct, steps, margins = 0.0, 0.0, []
    with common.gathered(*models.values()):  # around the loop: ranks may have different numbers of batches
        for i in range(0, len(mine), args.micro_batch):
            batch = answer_batch(mine[i : i + args.micro_batch], sides, tokenizer, args, device)
            scores = common.map_rows(one, batch, args.micro_batch)["x"]
            if len(sides) == 2:
                answers = sequence_score(scores, batch["mask"], batch["step_ends"], args.objective)
                chosen, rejected = answers.chunk(2)
                margins += (chosen - rejected).tolist()
            if args.objective == "step_prm":
                at = batch["step_ends"]
                correct += ((scores[at] > 0) == (batch["step_labels"][at] > 0)).sum().item()
                steps += at.sum().item()
    metrics, margins = {}, sorted(common.gather(margins))
    if margins:
        n = len(margins)
        metrics["eval/pair_accuracy"] = sum(m > 0 for m in margins) / n
        metrics["eval/margin"] = sum(margins) / n
        metrics |= {f"eval/margin_p{p}": margins[min(n - 1, n * p // 100)] for p in (10, 50, 90)}
    if args.objective == "step_prm":
        sums = common.all_sum({"right": correct, "n": steps}, device)
        metrics["eval/step_accuracy"] = sums["right"] / sums["n"]
    return metrics


def train_reward(args, stop_after: int | None = None) -> None:
    """Stage `reward`: a reward model from pairs. stop_after ends it early, as a signal would."""
    device = common.local_device(args.device)
    tokenizer, sides, train_rows, test_rows = prepare_reward(args)
    args = replace(args, steps=args.reward_epochs * (len(train_rows) // args.pairs_per_step))
    run = common.RunFolder(args, __file__, PANELS, SHOW)
    common.say(f"run folder: {run.path}")
    models, optimizer = build_reward(args, device)
    start = run.resume(models, optimizer) if args.resume else 0
    if start == 0:
        run.log(0, evaluate_reward(models, test_rows, sides, tokenizer, args, device))
    share, rows_of = args.pairs_per_step // common.world(), tasks.walk(train_rows)

    for step in range(start, args.steps):
        clock = common.Clock()

        # ---- 1. this rank's share of the pairs of the step
        rows = rows_of(args.seed, step, args.pairs_per_step)[common.rank() * share :][:share]
        batch = answer_batch(rows, sides, tokenizer, args, device)

        # ---- 2. one optimizer step on QRM-1 (or QRM-3, QRM-4, QRM-5)
        rise, fall = (step + 1) / (args.warmup_steps + 1), 1 - step / args.steps
        optimizer.param_groups[0]["lr"] = args.reward_lr * min(1, rise) * fall
        sums, count = accumulate_reward(models, batch, share, args)
        norm = torch.nn.utils.clip_grad_norm_(common.trainable_parameters(models), args.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        common.stop_unless_finite({"grad_norm": norm, **sums})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("update")

        # ---- 3. log, evaluate, save
        metrics = {k: v / count for k, v in sums.items()} | {"grad_norm": norm.item()}
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        last = step + 1 == args.steps
        if last or (step + 1) % args.eval_every == 0:
            metrics |= evaluate_reward(models, test_rows, sides, tokenizer, args, device)
        run.log(step + 1, metrics | clock.laps)
        stop = common.stop_requested(device) or step + 1 == stop_after
        if last or stop or (step + 1) % args.save_every == 0:
            common.save_checkpoint(run.path, step + 1, models, optimizer)
        if stop:
            break
    show_credit(run.path / "credit.html", models, test_rows[:12], sides, tokenizer, args, device)
    run.report()
    common.export_model(run.path / "model", models["reward"], tokenizer)


@torch.no_grad()
def show_credit(path, models, rows, sides, tokenizer, args, device) -> None:
    """credit.html: held-out answers, each token coloured by its score (and by the truth, where the task knows it)."""
    batch = answer_batch(rows, sides, tokenizer, args, device)
    scores = common.map_rows(lambda m: {"x": token_scores(models, m, args.objective)}, batch, args.micro_batch)["x"]
    shown = []
    for i, row in enumerate(rows):
        for s, side in enumerate(sides):
            tokens = [tokenizer.decode([t]) for t in row[f"{side}_ids"]]
            columns = {args.objective: scores[s * len(rows) + i, : len(tokens)].tolist()}
            truth = tasks.chain_credit(row["prompt"], tokens)
            columns |= {"still right": truth} if truth else {}
            shown.append({"prompt": row["prompt"], "kind": side, "tokens": tokens, "scores": columns})
    if common.rank() == 0:
        common.token_page(path, "Held-out answers, token by token", shown)


def train(args, stop_after: int | None = None) -> None:
    """Stage `policy`, the whole run. stop_after ends it early, as a signal would, without touching the schedule."""
    args, device = settled(args), common.local_device(args.device)
    task, tokenizer = prepare(args)
    run = common.RunFolder(args, __file__, PANELS, SHOW)
    common.say(f"run folder: {run.path}")
    models, optimizer = build(args, device)
    policy = models["policy"]
    if task.reward is None:
        task = replace(task, reward=scored_by(models, tokenizer, args))
    start = run.resume(models, optimizer) if args.resume else 0
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    sampling = common.Sampling(policy, tokenizer, *limits)
    if start == 0:
        held_out, examples = sampling.evaluate(task, args.seed)
        run.samples(0, examples)
        run.log(0, held_out)

    for step in range(start, args.steps):
        clock = common.Clock()

        # ---- 1. roll out: samples_per_prompt completions of each prompt from pi_old = pi
        rows = task.rows(args.seed, step, args.prompts_per_step)
        rollout = sampling.rollout(rows, args.samples_per_prompt, args.seed, step)
        rows, prompt_ids, completion_ids, finished, sampled = rollout
        batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
        logprobs = lambda micro: policy_logprobs(policy, micro, args)[0]  # noqa: E731
        gap = common.sampler_gap(logprobs, batch, sampled, args.dtype)  # the sampler is the policy
        completions = common.decode(tokenizer, completion_ids)
        clock.lap("rollout")

        # ---- 2. reward each completion
        rows = [row | {"completion_ids": ids} for row, ids in zip(rows, completion_ids)]  # for rewards token by token
        scores = task.reward([row["prompt"] for row in rows], completions, rows)

        # ---- 3. log-probabilities of pi_old and of the reference, values of the critic, Z; then rewards on tokens
        batch["step_ends"] = step_mask(completion_ids, tokenizer, args.step_separator, batch["mask"])
        score(models, batch, args)
        given = scores if args.reward == "rule" else model_rewards(batch, args)
        batch["rewards"] = token_rewards(given, batch, finished, args)
        if step == start and args.advantage in ("reward", "group") and isinstance(given[0], list):
            common.say("  token rewards are summed over each completion: --advantage token or gae uses their positions")

        # ---- 4. advantages
        estimate_advantages(batch, args)

        # ---- 5. update: a few passes over the rollout in minibatches
        for group in optimizer.param_groups:
            rise, fall = (step + 1) / (args.warmup_steps + 1), 1 - step / args.steps
            group["lr"] = getattr(args, group["name"]) * min(1, rise) * fall
        sums, tokens = {}, 0
        for epoch in range(args.epochs):
            for mine in common.minibatch_rows(args.seed, step, epoch, len(rows) * common.world(), args.minibatches):
                new, n = update(models, optimizer, batch, mine, args, train_policy=step >= args.critic_warmup)
                if tokens == 0:
                    common.stop_unless_on_policy(new["policy/ratio_gap"] / n, args.dtype, device)
                sums, tokens = {k: sums.get(k, 0.0) + v for k, v in new.items()}, tokens + n
        clock.lap("update")

        # ---- 6. log, evaluate, save
        metrics = {k: v / tokens for k, v in sums.items()} | rollout_metrics(batch, scores, finished, args)
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "policy/sampler_gap": gap}
        train_rows = zip(rows[:4], completions, batch["rewards"].sum(1).tolist())
        run.samples(
            step + 1, [{"kind": "train", "prompt": r["prompt"], "completion": c, "reward": x} for r, c, x in train_rows]
        )
        last = step + 1 == args.steps
        if last or (step + 1) % args.eval_every == 0:
            held_out, examples = sampling.evaluate(task, args.seed)
            metrics |= held_out
            run.samples(step + 1, examples)
        run.log(step + 1, metrics | clock.laps)
        stop = common.stop_requested(device) or step + 1 == stop_after
        if last or stop or (step + 1) % args.save_every == 0:
            common.save_checkpoint(run.path, step + 1, models, optimizer)
        if stop:
            break
    run.report()
    common.export_model(run.path / "model", policy, tokenizer)


def scored_by(models, tokenizer, args):
    """reward(prompts, completions, rows) of a task without one: the reward model's score of each answer."""

    @torch.no_grad()
    def reward(prompts, completions, rows) -> list[float]:
        prompt_ids = [common.encode_prompt(tokenizer, prompt)[-args.max_prompt :] for prompt in prompts]
        device = next(models["reward"].parameters()).device
        completion_ids = [row["completion_ids"] for row in rows]
        judges = [models[name] for name in ("reward", "reward_ref") if name in models]
        with common.gathered(*judges):  # ranks may have different numbers of rows in an evaluation, or none
            if not rows:
                return []
            batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
            ends = step_mask(completion_ids, tokenizer, args.step_separator, batch["mask"])
            one = lambda micro: {"x": token_scores(models, micro, args.reward)}  # noqa: E731
            scores = common.map_rows(one, batch, args.micro_batch)["x"]
        return sequence_score(scores, batch["mask"], ends, args.reward).tolist()

    return reward


# same in: ppo_baseline.py lco.py qrm.py
def rollout_metrics(batch, scores, finished, args) -> dict[str, float]:
    """Global means over completions, prompts and tokens of a rollout."""
    mask = batch["mask"]
    task_reward = torch.tensor([sum(s) if isinstance(s, list) else s for s in scores], dtype=torch.float64)
    by_prompt = task_reward.view(-1, args.samples_per_prompt)
    sums = {
        "rows": len(scores),
        "tokens": mask.sum(),
        "reward/mean": task_reward.sum(),
        "reward/spread": (by_prompt.amax(1) > by_prompt.amin(1)).sum() * args.samples_per_prompt,
        "length/mean": mask.sum(),
        "length/finished": sum(finished),
    }
    if args.kl_coef:
        sums["kl/ref"] = (kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], args.kl_estimator) * mask).sum()
    if "values" in batch:
        returns, error = batch["returns"][mask].double(), (batch["returns"] - batch["values"])[mask].double()
        sums |= {"r": returns.sum(), "rr": returns.square().sum(), "e": error.sum(), "ee": error.square().sum()}
    sums = common.all_sum(sums, mask.device)
    rows, tokens = sums.pop("rows"), sums.pop("tokens")
    metrics = {k: v / rows for k, v in sums.items() if k.split("/")[0] in ("reward", "length")}
    if args.kl_coef:
        metrics["kl/ref"] = sums["kl/ref"] / tokens
    if "values" in batch:
        variance, unexplained = (sums[k + k] / tokens - (sums[k] / tokens) ** 2 for k in "re")
        metrics["critic/explained_variance"] = 1 - unexplained / variance if variance > 1e-12 else None
    return metrics


# ---- pre-flight ------------------------------------------------------------------------------------------------------


def check(args) -> None:
    """--check: are the stages right with this model and data? A reward model that is not there yet is a random one."""
    home = Path(common.from_rank_0(tempfile.mkdtemp() if common.rank() == 0 else None))
    if args.stage in ("all", "reward"):
        check_reward(args, home)
    if args.stage != "reward":
        check_policy(settled(args), home)


def check_reward(args, home: Path) -> None:
    device, world = common.local_device(args.device), common.world()
    if args.pairs:
        raw, (loaded, _) = tasks.read_rows(args.pairs), tasks.load_answers(args.pairs, args.step_separator)
        rows = list({json.dumps(row["prompt"]): line for row, line in zip(loaded, raw)}.values())  # one a prompt
    else:
        rows = tasks.chain_pairs(4 * world + 2, args.seed)
    if common.rank() == 0:
        (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: 4 * world + 2]))
    small = replace(args, stage="reward", pairs=str(home / "pairs.jsonl"), pairs_per_step=2 * world, test_pairs=2)
    small = replace(small, reward_epochs=1, micro_batch=2, wandb=False)
    tokenizer, sides, rows, _ = prepare_reward(small)
    models, _ = build_reward(small, device)
    randomise(models["reward"])
    batch, tight = answer_batch(rows, sides, tokenizer, small, device), 0.1 if args.dtype == "bfloat16" else 1e-4

    def backward(size):
        accumulate_reward(models, batch, len(rows), replace(small, micro_batch=size))

    @torch.no_grad()
    def scores(batch):
        return token_scores(models, batch, args.objective)

    sizes = ("micro_batch", "max_prompt", "max_new_tokens", "dtype")
    common.preflight(
        ("tokenizer and vocabularies agree", lambda: common.check_vocabulary(models, tokenizer)),
        ("dropout is off", lambda: common.check_dropout(models)),
        ("scores ignore padding and batch size", lambda: common.check_padding(scores, batch, 10 * tight)),
        ("gradient ignores micro-batches", lambda: common.check_micro_batches(backward, models, [8, 2, 6], tight)),
        ("resuming changes nothing", lambda: common.check_resume(train_reward, small)),
        ("peak memory", lambda: common.estimate_memory(
            models, rows=2 * args.pairs_per_step // world, rollout_rows=0, **{k: getattr(args, k) for k in sizes}
        )),
    )  # fmt: skip


def randomise(model) -> None:
    """A scalar head that starts at 0 would make every test of it pass."""
    if common.has_scalar_head(model.config):
        torch.manual_seed(0)
        for parameter in common.scalar_head(model).parameters():
            torch.nn.init.normal_(parameter, std=0.1)


def check_policy(args, home: Path) -> None:
    device = common.local_device(args.device)
    small = replace(args, stage="policy", prompts_per_step=2 * common.world(), samples_per_prompt=4, minibatches=1)
    # Two epochs: with a single update pi_old would not be asked, and there were nothing to compare.
    small = replace(small, epochs=2, steps=2, micro_batch=8, max_new_tokens=min(args.max_new_tokens, 32), test_rows=4)
    small = replace(small, wandb=False)
    if args.reward != "rule" and not args.reward_model:
        head = {"dpo": "lm", "qrm": args.head}.get(args.reward, "scalar")
        new, _ = build_reward(replace(small, objective=args.reward, head=head, lora_rank=0), device)
        randomise(new["reward"])
        common.export_model(home / "reward", new["reward"], common.load_tokenizer(args.model, args.trust_remote_code))
        small = replace(small, reward_model=str(home / "reward"))
    task, tokenizer = prepare(small)
    models, _ = build(small, device)
    sampling = common.Sampling(models["policy"], tokenizer, args.max_prompt, small.max_new_tokens, args.temperature, 8)
    rows = task.rows(args.seed, 0, small.prompts_per_step)
    rows, prompt_ids, completion_ids, finished, _ = sampling.rollout(rows, small.samples_per_prompt, args.seed, 0)
    batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
    score(models, batch, small)
    batch["rewards"] = batch["mask"] * torch.sin(torch.arange(len(rows), device=device))[:, None]  # something to learn
    estimate_advantages(batch, small)
    everything, tight = list(range(len(rows))), 0.1 if args.dtype == "bfloat16" else 1e-4
    ends = set(common.stop_ids(models["policy"], tokenizer))

    def at_start():
        sums, tokens = accumulate(models, batch, everything, small)
        names = ("policy/ratio_gap", "policy/kl_old")
        gaps = {k: abs(sums[k]) / tokens for k in names}
        return max(gaps.values()) < tight, ", ".join(f"{k} {v:.1e}" for k, v in gaps.items())

    def backward(size):
        accumulate(models, batch, everything, replace(small, micro_batch=size))

    @torch.no_grad()
    def logprobs(batch):
        return policy_logprobs(models["policy"], batch, args)[0]

    sizes = ("micro_batch", "rollout_rows", "max_prompt", "max_new_tokens", "dtype")
    share = args.prompts_per_step * args.samples_per_prompt // common.world()
    common.preflight(
        ("tokenizer and vocabularies agree", lambda: common.check_vocabulary(models, tokenizer)),
        ("dropout is off", lambda: common.check_dropout(models)),
        ("EOS is inside the loss", lambda: common.check_end_of_sequence(batch, completion_ids, finished, ends)),
        ("log-probs ignore padding and batch size", lambda: common.check_padding(logprobs, batch, tight)),
        ("the sampler is the policy", lambda: common.check_sampler(logprobs, sampling, prompt_ids, args.dtype)),
        ("ratio = 1 and KL = 0 at the start", at_start),
        ("gradient ignores micro-batches", lambda: common.check_micro_batches(backward, models, [8, 1, 3], tight)),
        ("resuming changes nothing", lambda: common.check_resume(train, small)),
        ("peak memory", lambda: common.estimate_memory(models, rows=share, **{k: getattr(args, k) for k in sizes})),
    )


def run_stages(args) -> None:
    """--stage all: pairs, reward and policy, each in its own folder of --out; --resume skips what is whole."""
    validate(args)
    require(not args.resume or args.out, "--resume needs --out, the folder of the run to go on with")
    own = not args.pairs and not args.reward_model
    require(own, "--stage all makes its own: --pairs goes with --stage reward, --reward_model with --stage policy")
    home = Path(common.from_rank_0(args.out or f"runs/qrm-{time.strftime('%Y%m%d-%H%M%S')}"))
    pairs, model = home / "pairs" / "pairs.jsonl", home / "reward" / "model"
    stages = [
        (make_pairs, "pairs", pairs),
        (train_reward, "reward", model),
        (train, "policy", home / "policy" / "model"),
    ]
    for run, name, made in stages:
        if args.reward == "rule" and name != "policy":
            continue
        whole = common.from_rank_0(args.resume and made.exists())
        if not whole:
            common.say(f"---- stage {name}")
            run(replace(args, stage=name, out=str(home / name), pairs=str(pairs), reward_model=str(model)))


def main() -> None:
    stages = {"pairs": make_pairs, "reward": train_reward, "policy": train, "all": run_stages}
    (check if args.check else stages[args.stage])(args)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(main, args.device)

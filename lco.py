"""LCO: logits convex optimisation. PPO's clipped surrogate replaced by regression onto the closed-form optimum.

Chen et al. 2026, "Stabilizing Policy Optimization via Logits Convexity" (arXiv:2603.00963, not reviewed). PPO climbs a
surrogate that is not convex in the logits. LCO computes where the KL-regularised step would end, and regresses onto it:

    max_pi E_pi[A] - beta KL(pi || pi_old)   =>   pi*(a|s) = pi_old(a|s) exp(A(s,a) / beta) / Z(s)              (LCO-1)
    in logits, up to a constant per state:        z*(s,a) = z_old(s,a) + A(s,a) / beta                          (LCO-2)

    --loss kld   KL(pi* || pi)                    gradient in z: pi - pi*                                       (LCO-3)
    --loss mse   (z(s,a) - z*(s,a))^2             on the sampled token a                                        (LCO-4)
    --loss lch   log cosh(z(s,a) - z*(s,a))       likewise                                                      (LCO-5)

pi_old is the policy of the rollout: the target stands still in all updates on it, so each loss is convex in z(s,.).
What is approximated is A. Only the sampled token of a state has one (--advantage gae, return, reward, group); the
others have A = 0 in LCO-3 and no loss in LCO-4 and -5, where z keeps the constant of z_old. With --advantage token and
a --reward_model that has an LM head, A is dense, known for every token: log phi of a Q-RM, or log pi_dpo - log pi_ref;
LCO-4 and -5 are then means over a ~ pi_old. beta is a tensor [B, T], a number per token: step 4 of train().

All that differs from ppo_baseline.py: docs/diffs/ppo_baseline--lco.diff. Closest: APA (2306.02231), the squared error
of log pi against log pi_init + A/beta on sampled tokens; BPO (2604.18578), the optimum of a step with a bounded ratio.
Relatives: AWR, MPO, REBEL, A*-PO (2505.20686), QRPO (2507.08068), LAD (2602.20132), TPO (2604.06159).

What differs from the paper (its abstract and introduction were read; the tags are ours), each for a reason
    1. Old logits are exact: rebuilt from the rollout's hidden states and a copy of the LM head, never a top-k.
    2. --target linear and --negative_beta_scale: one noisy A per state biases exp(A / beta). The scale is the authors',
       and on for real models, where it did best; docs/results/lco.md has the study, and their other departures.

Run
    python lco.py                                                                        # this laptop, offline
    python lco.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --dtype bfloat16            # 1 GPU
    torchrun --nproc_per_node=8 lco.py --model ... --dataset ...                                       # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 lco.py ...  # 2 nodes
More in docs/lco.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

import math
from dataclasses import dataclass
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
    task: str = arg("auto", "the task: built-in, a kind of data (auto: by its columns), or gym:NAME of reasoning-gym")
    test_dataset: str = arg("", "held-out prompts; empty: those of the Hub's test split, or the last of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    reward_model: str = arg("", "a reward model in the place of the task's reward: by qrm.py, or pi_dpo")
    reward_ref: str = arg("", "the model that pi_dpo was aligned from: the reward is log pi_dpo - log pi_ref")
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    long_prompts: Literal["drop", "truncate", "error"] = arg("drop", "what happens to longer prompts")
    # rollout
    prompts_per_step: int = arg(64, "prompts per step, over all ranks", at_least=1)
    samples_per_prompt: int = arg(8, "completions per prompt", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    missing_eos_penalty: float = arg(0.0, "the penalty on the reward of a completion without an end", at_least=0)
    # method
    loss: Literal["kld", "mse", "lch"] = arg("kld", "LCO-3, LCO-4 or LCO-5; docs/lco.md says which suits which model")
    advantage: Literal["gae", "token", "return", "reward", "group"] = arg(
        "group", "GAE; the token's reward (QRM-2); the return to go; that of the answer; or less its prompt's mean"
    )
    beta: float = arg(1.0, "the step size: pi* = pi_old exp(A / beta); tune it by lco/target_kl", at_least=1e-6)
    negative_beta_scale: float = arg(100.0, "the factor on beta where a sampled A < 0 (authors: 100)", at_least=1e-6)
    target: Literal["exp", "linear"] = arg("exp", "pi* is LCO-1, or its first order in A / beta, clipped at 0")
    gamma: float = arg(1.0, "the discount", at_least=0, at_most=1)
    lam: float = arg(0.95, "the lambda of GAE", at_least=0, at_most=1)
    vf_coef: float = arg(0.1, "the coefficient of the value loss", at_least=0)
    value_clip: float = arg(0.2, "the change of a value at which its loss goes flat; 0: no such change", at_least=0)
    critic_warmup: int = arg(0, "the number of first steps that train the critic alone", at_least=0)
    kl_coef: float = arg(0.0, "the KL penalty per token, inside the reward; 0 loads no reference", at_least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = arg("k1", "that KL: log pi/ref, half its square, ref/pi - 1 - log ref/pi")
    # optimisation
    steps: int = arg(200, "the number of rollouts", at_least=1)
    epochs: int = arg(1, "passes over each rollout", at_least=1)
    minibatches: int = arg(2, "optimizer steps per pass", at_least=1)
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    lr: float = arg(1e-6, "the learning rate of the policy; falls linearly to 0", at_least=0)
    critic_lr: float = arg(1e-5, "the learning rate of the critic; falls linearly to 0", at_least=0)
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
    steps=40, prompts_per_step=32, max_prompt=24, max_new_tokens=24, micro_batch=64, eval_every=10,
    lr=2e-4, critic_lr=1e-3, warmup_steps=4, loss="lch", negative_beta_scale=1.0,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def scaled_beta(advantages, beta: float, negative_beta_scale: float):
    """beta per token, from its advantage: a larger one where A < 0 keeps noise from pushing pi off its mode."""
    return torch.where(advantages < 0, beta * negative_beta_scale, beta)


def target_logprobs(old_logits, advantages, beta, target: str):
    """log pi* [N, V] from A(s,.) [N, V] and beta [N, 1]: LCO-1, or its first order, which is unbiased for a noisy A."""
    if target == "exp":
        return (old_logits + advantages / beta).log_softmax(-1)
    old, step = old_logits.softmax(-1), advantages / beta
    q = old * (1 + step - (old * step).sum(-1, keepdim=True)).clamp_min(0)
    return (q / q.sum(-1, keepdim=True)).log()


def target_gap(logits, old_logits, advantages, beta):
    """z - z* (LCO-2), elementwise."""
    return logits - (old_logits + advantages / beta)


def kld_loss(logp, target_logp):
    """LCO-3, KL(pi* || pi) of each state [N], nats, from log-probabilities [N, V]; the gradient in z is pi - pi*."""
    return (target_logp.exp() * (target_logp.clamp_min(-100) - logp)).sum(-1)  # linear targets hold zeros


def square_loss(gap):
    """LCO-4 from gap = z - z*, elementwise."""
    return gap.square()


def log_cosh_loss(gap):
    """LCO-5 from gap = z - z*, elementwise; in this form it does not overflow."""
    return gap.abs() + torch.nn.functional.softplus(-2 * gap.abs()) - math.log(2)


LOSSES = {"mse": square_loss, "lch": log_cosh_loss}


def step_sizes(logp, old_logp, target_logp) -> dict[str, torch.Tensor]:
    """How far the policy went and how far it should go, from log-probabilities [N, V]; sums over states."""
    p, p_old = logp.exp(), old_logp.exp()
    return {
        "lco/target_kl": (p_old * (old_logp - target_logp.clamp_min(-100))).sum(-1).sum(),
        "policy/kl_old": (p_old * (old_logp - logp)).sum(-1).sum(),
        "policy/ratio_gap": (p - p_old).abs().sum(-1).sum(),  # E_pi_old |pi / pi_old - 1|
        "policy/entropy": -(p * logp).sum(-1).sum(),
    }


# same in: ppo_baseline.py lco.py
def value_loss(values, old_values, returns, value_clip: float):
    """PPO-3: half the squared error of the critic, the larger of clipped and unclipped. All [N]. Returns sums."""
    error = (values - returns).square()
    if value_clip:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error.sum(), {"loss/value": 0.5 * error.detach().sum()}


# same in: ppo_baseline.py lco.py
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


# same in: ppo_baseline.py lco.py
def kl_estimate(logprobs, ref_logprobs, estimator: str):
    """PPO-4: KL(pi || ref) from one sampled token each (Schulman, joschu.net/blog/kl-approx.html). All [B, T]."""
    log_ratio = logprobs - ref_logprobs
    kinds = {"k1": log_ratio, "k2": 0.5 * log_ratio.square(), "k3": (-log_ratio).exp() - 1 + log_ratio}
    return kinds[estimator]


# same in: ppo_baseline.py lco.py
def whiten(x, mask):
    """Mean 0 and variance 1 over the unmasked tokens of the global batch. [B, T]."""
    mean, variance = common.moments(x, mask)
    if variance <= 1e-12 * mean**2:  # all equal: what is left is rounding, which must not grow into a signal
        return torch.zeros_like(x)
    return (x - mean) / (variance + 1e-8) ** 0.5 * mask


# same in: ppo_baseline.py lco.py
def estimate_advantages(batch, args) -> None:
    """Add `advantages` [B, T] (and with a critic its targets, `returns`) to a batch that has `rewards` [B, T]."""
    mask, rewards = batch["mask"], batch["rewards"]
    if args.advantage == "gae":
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, args.gamma, args.lam)
        returns = gae(rewards, torch.zeros_like(rewards), mask, args.gamma, 1.0)[0]
        if common.all_equal(returns[:, 0]) and common.all_equal(rewards.sum(1)):  # no answer is better
            advantages = torch.zeros_like(advantages)
        batch["advantages"] = whiten(advantages, mask)
    elif args.advantage == "token":  # QRM-2: the reward of a token already tells what follows, so nothing is summed
        batch["advantages"], batch["returns"] = (rewards - batch.get("values", 0.0)) * mask, rewards
    elif args.advantage == "return":
        batch["advantages"] = whiten(gae(rewards, torch.zeros_like(rewards), mask, args.gamma, 1.0)[0], mask)
    elif args.advantage == "reward":
        batch["advantages"] = whiten(rewards.sum(1, keepdim=True) * mask, mask)
    else:  # group: less the mean of the prompt's samples; a division by their deviation would favour few hits
        groups = rewards.sum(1).view(-1, args.samples_per_prompt)
        gaps = groups - groups.mean(1, keepdim=True)
        rounding = 1e-5 if args.reward_model else 1e-6 * groups.abs().amax(1, keepdim=True)  # scores are whitened
        gaps = gaps * (gaps.abs() > rounding)  # rounding is no signal
        batch["advantages"] = gaps.view(-1, 1) * mask


# ---- one optimizer step ----------------------------------------------------------------------------------------------


def states(policy, heads, micro):
    """(hidden states [N, H], LM head [V, H]) of pi and of pi_old, whose products are the logits of each state."""
    mask = micro["mask"]
    now = lm.completion_hidden(policy, micro)[mask], lm.head_weight(policy)
    if "old" in heads:
        return now, (micro["old_hidden"][mask], heads["old"])  # kept by evaluate_models, before the first update
    return now, tuple(x.detach() for x in now)  # a single update per rollout: pi = pi_old


def kld_objective(policy, heads, micro, args):
    """LCO-3 with A known for the sampled token alone, 0 elsewhere. The loss summed over tokens, and metric sums."""
    mask, (now, old) = micro["mask"], states(policy, heads, micro)

    def loss(logits, old_logits, ids, advantages, beta):  # of n of the N tokens: [N, V] never exists at once
        A = torch.zeros_like(old_logits).scatter(-1, ids[:, None], advantages[:, None])  # A(s,.) [n, V]
        target_logp = target_logprobs(old_logits, A, beta[:, None], args.target)
        logp = logits.log_softmax(-1)
        total = kld_loss(logp, target_logp).sum()
        return total, step_sizes(logp.detach(), old_logits.log_softmax(-1), target_logp) | {"loss/policy": total}

    columns = [micro[name][mask] for name in ("completion_ids", "advantages", "beta")]
    return lm.over_vocabulary(loss, [now, old], columns, args.temperature)


def sampled_objective(policy, heads, micro, args):
    """LCO-4 or LCO-5 towards LCO-2, on the sampled token alone: its logit is <h, W[a]>, no vocabulary is touched."""
    ids, advantages, beta = (micro[name][micro["mask"]] for name in ("completion_ids", "advantages", "beta"))
    logit, old_logit = (
        (hidden.float() * torch.nn.functional.embedding(ids, weight).float()).sum(-1) / args.temperature
        for hidden, weight in states(policy, heads, micro)  # weight[ids] would add up its gradients in no fixed order
    )
    gap = target_gap(logit, old_logit, advantages, beta)
    total = LOSSES[args.loss](gap).sum()
    metrics = {"lco/gap": gap.detach().abs().sum(), "policy/logit_gap": (logit - old_logit).detach().abs().sum()}
    return total, metrics | {"loss/policy": total.detach()}


def dense_objective(policy, heads, micro, args):
    """Each loss with A of the whole vocabulary: Z(s,.) = log phi, or log pi_dpo - log pi_ref, on the scale of rewards.
    A(s,a) = A(s,a_t) + scale (Z(s,a) - Z(s,a_t)), where A(s,a_t) is scale Z(s,a_t) up to a constant per state, which
    pi* ignores. LCO-4 and -5 are means over a ~ pi_old, as if a had been sampled."""
    mask, (now, old) = micro["mask"], states(policy, heads, micro)
    scorers = [(micro[f"{name}_hidden"][mask], heads[name]) for name in ("reward", "reward_ref") if name in heads]

    def loss(logits, old_logits, *given):
        *scores, ids, advantages, beta, scale = given
        size = min(z.shape[1] for z in (logits, *scores))  # embeddings of one tokenizer may be padded differently
        Z, *Z_ref = ((z * args.temperature).log_softmax(-1)[:, :size] for z in scores)  # they work at temperature 1
        Z = Z - Z_ref[0] if Z_ref else Z
        Z = torch.cat([Z, Z.amin(-1, keepdim=True).expand(-1, logits.shape[1] - size)], -1)
        A = advantages[:, None] + scale[:, None] * (Z - Z.gather(-1, ids[:, None]))
        logp, old_logp = logits.log_softmax(-1), old_logits.log_softmax(-1)
        target_logp = target_logprobs(old_logits, A, beta[:, None], args.target)
        if args.loss == "kld":
            total = kld_loss(logp, target_logp).sum()
        else:
            total = (old_logp.exp() * LOSSES[args.loss](target_gap(logits, old_logits, A, beta[:, None]))).sum()
        return total, step_sizes(logp.detach(), old_logp, target_logp) | {"loss/policy": total}

    columns = [micro[name][mask] for name in ("completion_ids", "advantages", "beta", "scale")]
    return lm.over_vocabulary(loss, [now, old, *scorers], columns, args.temperature)


def update(models, heads, optimizer, batch, rows, args, train_policy: bool = True):
    """One optimizer step on some local rows of a batch; returns metric sums over all ranks, and their tokens."""
    device = batch["mask"].device
    signal = "reward" in heads or common.all_max(batch["advantages"][rows].abs().max(), device) > 0
    train_policy = train_policy and signal  # where all advantages are 0, the policy stays as it is
    tokens = common.all_sum({"n": batch["mask"][rows].sum()}, device)["n"]  # counted first, divided by once
    objective = dense_objective if "reward" in heads else kld_objective if args.loss == "kld" else sampled_objective
    sums = {}
    for micro in lm.accumulate_over(models, lm.micro_batches(batch, rows, args.micro_batch)):
        loss, metrics = objective(models["policy"], heads, micro, args)
        loss = loss * train_policy
        if "critic" in models:
            values, at = lm.completion_scalars(models["critic"], micro), micro["mask"]
            critic_loss, more = value_loss(values[at], micro["values"][at], micro["returns"][at], args.value_clip)
            loss, metrics = loss + args.vf_coef * critic_loss, metrics | more
        (loss * common.world() / tokens).backward()  # FSDP averages over ranks
        sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
    sums = common.all_sum(sums, device)
    if not train_policy:  # no gradients, not even 0: with those Adam's momentum would go on
        models["policy"].zero_grad(set_to_none=True)
    norm = torch.nn.utils.clip_grad_norm_(lm.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **sums})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"grad_norm": norm.item() * tokens, "policy/updates": train_policy * tokens}, tokens


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(args) -> None:
    """The whole run."""
    device = common.local_device(args.device)
    task, tokenizer = prepare(args)
    run = common.Run(args, __file__)
    models, optimizer = build(args, device)
    policy = models["policy"]
    if task.reward is None:
        score = lm.score_of(args.reward_model, args.reward_ref)
        task.reward = lm.scored_by(models, score, tokenizer, args.max_prompt, args.micro_batch)
    sampling = lm.Sampling(policy, tokenizer, args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows)

    for step in run.steps(models, optimizer, lambda: sampling.evaluate(task, args.seed)):
        # ---- 1. roll out: samples_per_prompt completions of each prompt from pi_old = pi
        rows = task.rows(args.seed, step, args.prompts_per_step)
        rollout = sampling.rollout(rows, args.samples_per_prompt, args.seed, step)
        rows, prompt_ids, completion_ids, finished, sampled = rollout
        batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
        completions = common.decode(tokenizer, completion_ids)
        run.lap("rollout")

        # ---- 2. reward each completion
        task_rewards = task.reward([row["prompt"] for row in rows], completions, rows)

        # ---- 3. log-probabilities by pi_old and the reference, values, scores of a reward model; rewards of tokens
        heads = evaluate_models(models, batch, args)
        gap = lm.sampler_gap(policy, args.temperature, batch, sampled, args.dtype, first=step == 0)
        batch["rewards"] = token_rewards(task_rewards, batch, finished, args)
        if step == run.start and args.advantage in ("reward", "group") and isinstance(task_rewards[0], list):
            common.say("  token rewards are summed over each completion: --advantage token or gae uses their positions")

        # ---- 4. advantages, and beta per token [B, T]: another rule for the step size belongs here
        estimate_advantages(batch, args)
        scale = 1.0 if "reward" in heads else args.negative_beta_scale  # dense advantages are no noisy samples
        batch["beta"] = scaled_beta(batch["advantages"], args.beta, scale)

        # ---- 5. update: a few passes over the rollout in minibatches
        for group in optimizer.param_groups:
            rise, fall = (step + 1) / (args.warmup_steps + 1), 1 - step / args.steps
            group["lr"] = getattr(args, group["name"]) * min(1, rise) * fall
        sums, tokens = {}, 0
        for epoch in range(args.epochs):
            for mine in common.minibatch_rows(args.seed, step, epoch, len(rows) * common.world(), args.minibatches):
                new, n = update(models, heads, optimizer, batch, mine, args, train_policy=step >= args.critic_warmup)
                if tokens == 0 and "policy/ratio_gap" in new:  # mse and lch know no ratio
                    lm.stop_unless_on_policy(new["policy/ratio_gap"] / n, args.dtype, device)
                sums, tokens = {k: sums.get(k, 0.0) + v for k, v in new.items()}, tokens + n
        run.lap("update")

        # ---- 6. log; evaluate and save when it is time
        metrics = lm.rollout_metrics(batch, task_rewards, finished, args.samples_per_prompt)
        metrics |= {k: v / tokens for k, v in sums.items()}
        metrics |= {"policy/sampler_gap": gap, "lr": optimizer.param_groups[0]["lr"]}
        if metrics["policy/updates"] == 0 and step >= args.critic_warmup:
            common.say("  no completion of this step is better than another: the policy stays as it is")
        shown = zip(rows[:4], completions, batch["rewards"].sum(1).tolist())
        shown = [{"kind": "train", "prompt": r["prompt"], "completion": c, "reward": x} for r, c, x in shown]
        run.end_step(metrics, shown)
    run.finish(policy, tokenizer)


# ---- what the loop needs ---------------------------------------------------------------------------------------------


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": lm.load_model(args.model, **trained)})
    groups = [{"params": lm.trainable_parameters(models["policy"]), "name": "lr"}]
    if args.advantage == "gae":
        models["critic"] = lm.load_model(args.model, head="scalar", **trained)
        groups.append({"params": lm.trainable_parameters(models["critic"]), "name": "critic_lr"})
    if args.kl_coef and not args.lora_rank:  # with LoRA, the policy without its adapters is the reference
        models["ref"] = lm.load_model(args.model, trainable=False, **shared)
    if args.reward_model:
        models["reward"] = lm.load_model(args.reward_model, head="saved", trainable=False, **shared)
    if args.reward_ref:
        models["reward_ref"] = lm.load_model(args.reward_ref, trainable=False, **shared)
    return models, torch.optim.Adam(groups, lr=args.lr, fused=True)


def prepare(args):
    """Task and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    require(args.target == "exp" or args.loss == "kld", "--target linear is about a distribution: it needs --loss kld")
    by_token = args.advantage != "token" or args.reward_file or args.reward_model
    require(by_token, "--advantage token needs --reward_file or --reward_model: one reward for each token")
    compared = args.advantage != "group" or args.samples_per_prompt > 1
    require(compared, "--advantage group compares the samples of a prompt: --samples_per_prompt must be at least 2")
    most = args.steps if args.advantage == "gae" else 0
    require(args.critic_warmup <= most, "--critic_warmup trains a critic alone: at most --steps, with --advantage gae")
    geometry = common.split_evenly(args.prompts_per_step, args.samples_per_prompt, args.minibatches, args.micro_batch)
    source = args.task, args.dataset, args.reward_file, args.test_rows, args.test_dataset
    task = tasks.load_task(*source, graded=not args.reward_model)
    tokenizer = lm.load_tokenizer(args.model)
    if args.reward_model or args.reward_ref:
        how = lm.score_of(args.reward_model, args.reward_ref)
        found = f"--advantage token: {args.reward_model} scores whole answers, on their last token"
        require(how != "last" or args.advantage != "token", f"{found}; expected another one")
    token_model = args.reward_model if args.advantage == "token" else ""
    dense = bool(token_model) and not lm.has_scalar_head(lm.load_config(token_model))
    found = "--kl_coef and --missing_eos_penalty are the same for all tokens of a state, so a dense --advantage token"
    require(not dense or args.kl_coef == args.missing_eos_penalty == 0, f"{found} sees neither; expected 0")
    for name in filter(None, (args.model, args.reward_model, args.reward_ref)):
        lm.same_tokenizer(args.model, tokenizer, name, lm.load_tokenizer(name))
        lm.fits_context(name, args.max_prompt + args.max_new_tokens)
    task = tasks.fit_prompts(task, tokenizer, args.max_prompt, args.long_prompts)
    times = 1 if dense else args.negative_beta_scale
    common.say(f"{geometry}\nloss {args.loss}, beta {args.beta:g}, times {times:g} where A < 0")
    common.say(task.note + f"; trained on scores of {args.reward_model}" * bool(args.reward_model))
    return task, tokenizer


@torch.no_grad()
def evaluate_models(models, batch, args):
    """Add numbers [B, T] of each token before any update; return the LM heads of models whose final states are kept."""
    one_update = args.epochs * args.minibatches == 1 and not args.kl_coef  # then pi = pi_old in the only update
    kept = {} if one_update else {"old": models["policy"]}  # whose logits are rebuilt in the loss
    if args.advantage == "token" and args.reward_model and not lm.has_scalar_head(models["reward"].config):
        kept |= {name: models[name] for name in ("reward", "reward_ref") if name in models}

    def one(micro):
        out = {f"{name}_hidden": lm.completion_hidden(model, micro) for name, model in kept.items()}
        if args.kl_coef:
            out["old_logprobs"] = lm.policy_logprobs(models["policy"], micro, args.temperature)[0]
            with lm.reference(models) as ref:
                out["ref_logprobs"] = lm.policy_logprobs(ref, micro, args.temperature)[0]
        if "critic" in models:
            out["values"] = lm.completion_scalars(models["critic"], micro) * micro["mask"]
        if "reward" in models:
            out["scores"] = lm.token_scores(models["reward"], micro, models["reward_ref"] if args.reward_ref else None)
        return out

    batch |= lm.map_rows(one, batch, args.micro_batch)
    heads = {name: lm.head_weight(model).clone() for name, model in kept.items()}
    if "reward" in heads:  # what whiten() multiplies the scores by
        batch["scale"] = batch["mask"] / (common.moments(batch["scores"], batch["mask"])[1] + 1e-8) ** 0.5
    return heads


# same in: ppo_baseline.py lco.py
def token_rewards(task_rewards, batch, finished, args):
    """[B, T]: the task's reward on the last token, or its reward of each token, less the KL penalty per token."""
    mask, last = batch["mask"], batch["mask"].sum(1, keepdim=True) - 1
    how = lm.score_of(args.reward_model, args.reward_ref) if args.reward_model else ""
    if how and (how == "last" or args.advantage != "token"):  # a score per answer, on its last token
        scores = lm.answer_scores(batch["scores"], mask, how)[:, None] * mask
        rewards = whiten(scores, mask & (mask.cumsum(1) > last))
    elif how:  # scores of all tokens
        rewards = whiten(batch["scores"], mask)
    else:
        rewards = lm.place_rewards(task_rewards, mask, by_token=args.advantage == "token")
        rewards = whiten(rewards, mask) if args.advantage == "token" else rewards
    cut = torch.tensor([[not done] for done in finished], device=mask.device)
    rewards = rewards.scatter_add(1, last, -args.missing_eos_penalty * cut.float())
    if args.kl_coef:
        batch["kl"] = kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], args.kl_estimator) * mask
        rewards = rewards - args.kl_coef * batch["kl"]
    return rewards


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: train(args), args.device)

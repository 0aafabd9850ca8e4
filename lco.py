"""LCO: logits convex optimisation. PPO's clipped surrogate replaced by regression onto the closed-form optimum.

Chen et al. 2026, "Stabilizing Policy Optimization via Logits Convexity" (arXiv:2603.00963, not reviewed). PPO climbs a
surrogate that is not convex in the logits. LCO computes where the KL-regularised step would end, and regresses onto it:

    max_pi E_pi[A] - beta KL(pi || pi_old)   =>   pi*(a|s) = pi_old(a|s) exp(A(s,a) / beta) / Z(s)              (LCO-1)
    in logits, up to a constant a state:          z*(s,a) = z_old(s,a) + A(s,a) / beta                          (LCO-2)

    --loss kld   KL(pi* || pi)                    gradient in z: pi - pi*                                       (LCO-3)
    --loss mse   (z(s,a) - z*(s,a))^2             on the entries whose advantage is known                       (LCO-4)
    --loss lch   log cosh(z(s,a) - z*(s,a))       likewise                                                      (LCO-5)

The target is fixed by the rollout, so each loss is convex in z(s,.). All that differs from ppo_baseline.py:
docs/diffs/ppo_baseline--lco.diff. Closest: APA (2306.02231), the squared error of log pi against log pi_init + A/beta
on sampled tokens; BPO (2604.18578), the closed-form optimum of a step with a bounded ratio. Relatives: AWR, MPO, REBEL,
A*-PO (2505.20686), QRPO (2507.08068), LAD (2602.20132), TPO (2604.06159, which fits a target over sampled completions;
LCO fits one over the vocabulary, token by token).

What differs from the paper (its abstract and introduction; formulas have tags of our own), each for a reason
    1. Old logits are exact: rebuilt from the rollout's hidden states and a copy of the LM head, never a top-k.
    2. --target linear and --negative_beta_scale: one sampled advantage a state biases exp(A / beta); docs/lco.md.
    3. Departures of the authors' released code are switches: --moving_target, --old_topk and --token_mean are off,
       --negative_beta_scale is on for real models, where it did best. Others are told in docs/lco.md.

Run
    python lco.py                                                                        # this laptop, offline
    python lco.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --dtype bfloat16            # 1 GPU
    torchrun --nproc_per_node=8 lco.py --model ... --dataset ...                                       # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 lco.py ...  # 2 nodes
More in docs/lco.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

from dataclasses import dataclass, replace

import math

import common  # before torch: it sets how OpenMP threads wait
import tasks

import torch

from common import arg, require


@dataclass
class Args:
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
    # method
    loss: str = arg("kld", "kld (LCO-3), mse (LCO-4) or lch (LCO-5); which one, and for which model: docs/lco.md")
    advantage: str = arg("group", "gae, reward, group; token: rewards of --reward_file per token, standardised; "
                         "dpo: log pi_dpo - log pi_ref; qrm: Z of a Q-RM, standardised; "
                         "dpo and qrm with an LM head are known for the whole vocabulary")  # fmt: skip
    dpo_model: str = arg("", "pi_dpo of --advantage dpo")
    dpo_ref: str = arg("", "pi_ref of --advantage dpo: the model that pi_dpo was aligned from")
    qrm_model: str = arg("", "of --advantage qrm: a model that qrm.py --stage reward made")
    beta: float = arg(1.0, "size of the step: pi* = pi_old exp(A / beta); tune it by lco/target_kl")
    negative_beta_scale: float = arg(100.0, "factor on beta where a sampled A < 0 (authors' code: 100; LCO-1: 1)")
    target: str = arg("exp", "exp (LCO-1) or linear: pi_old (1 + (A - E[A]) / beta), clipped to the simplex")
    fill: str = arg("zero", "the advantage of unsampled tokens: zero, or balanced: the value that makes E[A] = 0")
    moving_target: bool = arg(False, "authors' code: the target starts from the current logits, not the rollout's")
    old_topk: int = arg(0, "authors' code: 5, the old logits that are kept (fp16), the rest is -100; 0: all, exact")
    token_mean: str = arg("global", "global, or signed (authors' code): tokens with A > 0 and A <= 0 averaged apart")
    gamma: float = arg(1.0, "discount")
    lam: float = arg(0.95, "lambda of GAE")
    vf_coef: float = arg(0.1, "weight of the value loss")
    value_clip: float = arg(0.2, "a value moves at most so far from the rollout's before its loss goes flat; 0: free")
    critic_warmup: int = arg(0, "first steps that train the critic alone")
    kl_coef: float = arg(0.0, "KL penalty per token inside the reward, against the starting policy; 0 loads no copy")
    kl_estimator: str = arg("k1", "k1: log pi/ref; k2: half its square; k3: ref/pi - 1 - log ref/pi")
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
    diagnose: bool = arg(False, "log the shape of the loss on the first micro-batch of each update")
    wandb: bool = arg(False, "also log to Weights & Biases")


# What the bare command changes: a small model takes large steps.
BUILTIN = dict(
    steps=40, prompts_per_step=32, max_prompt=24, max_new_tokens=24, micro_batch=64, eval_every=10,
    lr=2e-4, critic_lr=1e-3, warmup_steps=4, loss="lch", negative_beta_scale=1.0,
)  # fmt: skip
PANELS = {
    "held-out accuracy": ["eval/pass@1", "eval/sampled", "eval/reward", "eval/reward_sampled"],
    "reward": ["reward/mean"],
    "loss": ["loss/policy", "loss/value"],
    "step away from the rollout policy": ["policy/kl_old", "lco/target_kl", "policy/logit_gap"],
    "entropy (nats)": ["policy/entropy"],
    "gradient norm": ["grad_norm"],
    "completion length (tokens)": ["length/mean"],
    "critic": ["critic/explained_variance"],
    "KL to the start": ["kl/ref"],
}
SHOW = ["reward/mean", "loss/policy", "policy/kl_old", "length/mean", "eval/pass@1", "eval/sampled", "eval/reward"]
SHOW += ["policy/logit_gap"]


# ---- the method --------------------------------------------------------------------------------------------------


def fill_advantages(advantages, ids, old_logits, fill: str):
    """A(s,.) [N, V] from one sampled advantage a state [N]; elsewhere 0, or the value that makes E_pi_old[A] = 0."""
    rest = torch.zeros_like(advantages)
    if fill == "balanced":
        p = old_logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].exp()
        rest = torch.where(1 - p > 1e-6, -advantages * p / (1 - p), 0.0)  # at p = 1 there are no others to carry it
    rest = rest[:, None].repeat(1, old_logits.shape[1])
    return rest.scatter(-1, ids[:, None], advantages[:, None].to(rest.dtype))


def target_logprobs(old_logits, advantages, beta, target: str):
    """log pi* [N, V] from A(s,.) [N, V]: LCO-1, or its first order in A / beta, which is unbiased in a noisy A."""
    if target == "exp":
        return (old_logits + advantages / beta).log_softmax(-1)
    old, step = old_logits.softmax(-1), advantages / beta
    weight = old * (1 + step - (old * step).sum(-1, keepdim=True)).clamp_min(0)
    return (weight / weight.sum(-1, keepdim=True)).log()


def kld_loss(logp, target_logp):
    """LCO-3, KL(pi* || pi) of each state [N], nats, from log-probabilities [N, V]; the gradient in z is pi - pi*."""
    return (target_logp.exp() * (target_logp.clamp_min(-100) - logp)).sum(-1)  # linear targets hold zeros


def square_loss(gap):
    """LCO-4 from gap = z - z*, elementwise."""
    return gap.square()


def log_cosh_loss(gap):
    """LCO-5 from gap = z - z*, elementwise; in this form it does not overflow."""
    return gap.abs() + torch.nn.functional.softplus(-2 * gap.abs()) - math.log(2)


def scaled_beta(advantages, args):
    return torch.where(advantages < 0, args.beta * args.negative_beta_scale, args.beta)


def vocabulary_loss(logits, old_logits, advantages, args):
    """LCO with A(s,.) known for the whole vocabulary. All [N, V]; returns losses [N] and metrics [N]."""
    old, new = old_logits.log_softmax(-1), logits.log_softmax(-1)
    p_old = old.exp()
    if args.old_topk:
        kept = old_logits.topk(args.old_topk)
        old_logits = torch.full_like(old_logits, -100.0).scatter(-1, kept.indices, kept.values.half().float())
    start = logits.detach() if args.moving_target else old_logits
    beta = scaled_beta(advantages, args)
    target_logp = target_logprobs(start, advantages, beta, args.target)
    if args.loss == "kld":
        losses = kld_loss(new, target_logp)
    else:  # weighted as sampled tokens are: this is the expectation of sampled_loss over a ~ pi_old
        gap = logits - (start + advantages / beta)
        losses = (p_old * (square_loss if args.loss == "mse" else log_cosh_loss)(gap)).sum(-1)
    with torch.no_grad():
        p = new.exp()
        metrics = {
            "lco/target_kl": (p_old * (old - target_logp.clamp_min(-100))).sum(-1),
            "policy/kl_old": (p_old * (old - new)).sum(-1),
            "policy/ratio_gap": (p - p_old).abs().sum(-1),  # E_pi_old |pi / pi_old - 1|
            "policy/entropy": -(p * new).sum(-1),
        }
    return losses, metrics


def sampled_loss(logit, old_logit, advantages, args):
    """LCO-4 or LCO-5 towards LCO-2, with A known for the sampled token alone. All [N]; losses [N] and metrics [N]."""
    start = logit.detach() if args.moving_target else old_logit
    gap = logit - (start + advantages / scaled_beta(advantages, args))
    losses = (square_loss if args.loss == "mse" else log_cosh_loss)(gap)
    return losses, {
        "lco/gap": gap.detach().abs(),
        "policy/logit_gap": (logit - old_logit).detach().abs(),
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


# same in: ppo_baseline.py lco.py
def kl_estimate(logprobs, ref_logprobs, estimator: str):
    """PPO-4: KL(pi || ref) from one sampled token each (Schulman, joschu.net/blog/kl-approx.html). All [B, T]."""
    log_ratio = logprobs - ref_logprobs
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


def score_scale(scores, mask):
    """1 / standard deviation of the scores over the tokens of the global batch: what `whiten` multiplied by."""
    count, total, square = mask.sum(), (scores * mask).double().sum(), (scores * mask).double().square().sum()
    sums = common.all_sum({"n": count, "x": total, "xx": square}, scores.device)
    return (max(sums["xx"] / sums["n"] - (sums["x"] / sums["n"]) ** 2, 0.0) + 1e-8) ** -0.5


def estimate_advantages(batch, args) -> None:
    """Add `advantages` [B, T] (and for GAE the critic's targets, `returns`) to a batch that has `rewards` [B, T]."""
    mask, rewards = batch["mask"], batch["rewards"]
    if args.advantage == "gae":
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, args.gamma, args.lam)
        batch["advantages"] = whiten(advantages, mask)
        if equal_returns(rewards, mask, args.gamma):  # what differs is the critic, which learns alone
            batch["advantages"] = torch.zeros_like(advantages)
    elif args.advantage == "token":  # QRM-2 without a critic: the reward of a token is that of its choice, not summed
        batch["advantages"] = rewards
    elif args.advantage == "reward":
        batch["advantages"] = whiten(rewards.sum(1, keepdim=True) * mask, mask)
    elif args.advantage == "dpo":  # dense, and so rebuilt inside the loss
        batch["advantages"] = torch.zeros_like(rewards)
    elif args.advantage == "qrm":
        batch["advantages"] = whiten(batch["scores"], mask)
        batch["score_scale"] = score_scale(batch["scores"], mask) * mask
    else:  # group: the leave-none-out mean, not divided by the standard deviation (which would favour lucky prompts)
        groups = rewards.sum(1).view(-1, args.samples_per_prompt)
        gaps = groups - groups.mean(1, keepdim=True)
        gaps = gaps * (gaps.abs() > 1e-6 * groups.abs().amax(1, keepdim=True))  # rounding is no signal
        batch["advantages"] = gaps.view(-1, 1) * mask
    batch["token_weight"] = mask.float()
    if args.token_mean == "signed":
        up = mask & (batch["advantages"] > 0)
        n = common.all_sum({"up": up.sum(), "down": (mask & ~up).sum()}, mask.device)
        total = n["up"] + n["down"]
        batch["token_weight"] = mask * torch.where(up, total / max(n["up"], 1), total / max(n["down"], 1))


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
def score(models, batch, args) -> dict[str, torch.Tensor]:
    """Add what the rollout policy, the reference and the critic say of each token, [B, T], before any update.

    Of the rollout policy (and of the models of --advantage dpo) only final hidden states [B, T, H] are kept. Returns
    their LM heads [V, H]: with both, the exact old logits are rebuilt inside the loss, a chunk at a time.
    """
    heads = {}

    def one(micro):
        out = {}
        if not one_update(args):
            out["old_hidden"] = common.completion_hidden(models["policy"], micro)
            if "old" not in heads:
                heads["old"] = common.head_weight(models["policy"]).clone()
        for name in [n for n in ("dpo", "dpo_ref", "qrm") if n in models]:
            if common.has_scalar_head(models[name].config):
                out["scores"] = common.completion_scalars(models[name], micro, after=True) * micro["mask"]
                continue
            out[f"{name}_hidden"] = common.completion_hidden(models[name], micro)
            if name not in heads:
                heads[name] = common.head_weight(models[name]).clone()
            if name == "qrm":
                out["scores"] = policy_logprobs(models[name], micro, replace(args, temperature=1.0))[0]
        if args.kl_coef:
            out["old_logprobs"] = policy_logprobs(models["policy"], micro, args)[0]
        if "ref" in models:
            out["ref_logprobs"] = policy_logprobs(models["ref"], micro, args)[0]
        elif args.kl_coef:
            with common.adapters_off(models["policy"]):
                out["ref_logprobs"] = policy_logprobs(models["policy"], micro, args)[0]
        if "critic" in models:
            out["values"] = common.completion_scalars(models["critic"], micro) * micro["mask"]
        return out

    batch |= common.map_rows(one, batch, args.micro_batch)
    return heads


def chosen_logits(hidden, weight, ids, args):
    """The logits of `ids` alone, [N]: no vocabulary is touched."""
    rows = torch.nn.functional.embedding(ids, weight)  # weight[ids] adds up its gradients in no fixed order
    return (hidden.float() * rows.float()).sum(-1) / args.temperature


def objective(models, heads, micro, args, train_policy: bool = True):
    """The loss of one micro-batch, summed over its tokens, and metric sums."""
    mask = micro["mask"]
    hidden, weight = common.completion_hidden(models["policy"], micro)[mask], common.head_weight(models["policy"])
    old = (hidden.detach(), weight.detach()) if one_update(args) else (micro["old_hidden"][mask], heads["old"])
    dense_from = [(micro[f"{name}_hidden"][mask], head) for name, head in heads.items() if name != "old"]
    ids, advantages, token_weight = (micro[k][mask] for k in ("completion_ids", "advantages", "token_weight"))
    if args.loss == "kld" or dense_from:
        # An advantage that is known for the whole vocabulary is not one noisy sample: its signs count alike.
        settings = replace(args, negative_beta_scale=1.0) if dense_from else args

        def losses(logits, old_logits, *rest):
            *others, ids, advantages, token_weight, scale = rest
            if len(others) == 2:  # dpo
                dense = others[0].log_softmax(-1) - others[1].log_softmax(-1)
            elif others:  # qrm: the other tokens, on the scale on which the sampled one was standardised
                z = (args.temperature * others[0]).log_softmax(-1)
                dense = advantages[:, None] + scale[:, None] * (z - z.gather(-1, ids[:, None]))
            else:
                dense = fill_advantages(advantages, ids, old_logits, args.fill)
            per_token, metrics = vocabulary_loss(logits, old_logits, dense, settings)
            loss = (per_token * token_weight).sum()
            return loss, {k: v.sum() for k, v in metrics.items()} | {"loss/policy": loss}

        columns = [ids, advantages, token_weight, micro.get("score_scale", micro["token_weight"])[mask]]
        loss, metrics = common.over_vocabulary(losses, [(hidden, weight), old, *dense_from], columns, args.temperature)
    else:
        logit = chosen_logits(hidden, weight, ids, args)
        old_logit = chosen_logits(*old, ids, args)
        per_token, metrics = sampled_loss(logit, old_logit, advantages, args)
        loss = (per_token * token_weight).sum()
        metrics = {k: v.sum() for k, v in metrics.items()} | {"loss/policy": loss.detach()}
    loss = loss * train_policy
    if "critic" in models:
        values = common.completion_scalars(models["critic"], micro)[mask]
        critic_loss, sums = value_loss(values, micro["values"][mask], micro["returns"][mask], args.value_clip)
        loss, metrics = loss + args.vf_coef * critic_loss, metrics | sums
    return loss, metrics


def accumulate(models, heads, batch, rows, args, train_policy: bool = True):
    """Gradients of the mean loss over the tokens of these local rows on all ranks; also global metric sums, and N."""
    device = batch["mask"].device
    tokens = common.all_sum({"n": batch["mask"][rows].sum()}, device)["n"]  # counted first, divided by once
    sums = {}
    for micro in common.accumulate_over(models, common.micro_batches(batch, rows, args.micro_batch)):
        loss, metrics = objective(models, heads, micro, args, train_policy)
        (loss * common.world() / tokens).backward()  # FSDP averages over ranks
        sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
    return common.all_sum(sums, device), tokens


def update(models, heads, optimizer, batch, rows, args, train_policy: bool = True):
    """One optimizer step on some local rows of a batch. The policy takes none where all their advantages are 0."""
    signal = args.advantage == "dpo" or common.all_max(batch["advantages"][rows].abs().max(), batch["mask"].device) > 0
    train_policy = train_policy and signal
    sums, tokens = accumulate(models, heads, batch, rows, args, train_policy)
    if not train_policy:  # no gradients, not even 0: with those Adam's momentum would go on
        models["policy"].zero_grad(set_to_none=True)
    norm = torch.nn.utils.clip_grad_norm_(common.trainable_parameters(models), args.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    common.stop_unless_finite({"grad_norm": norm, **sums})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"grad_norm": norm.item() * tokens, "policy/updates": train_policy * tokens}, tokens


def diagnose_update(policy, micro, old_logits, args) -> dict[str, float]:
    """--diagnose: is the loss flat, or uphill, on the way to pi*? By construction it should be neither."""
    logits = common.probe_logits(policy, micro, args.temperature)
    n, mask = len(logits), micro["mask"]
    ids, advantages = (micro[k][mask][:n] for k in ("completion_ids", "advantages"))
    beta, chosen = scaled_beta(advantages, args), ids[:, None]

    def loss_of(z, i):
        if args.loss == "kld":
            dense = fill_advantages(advantages[i], ids[i], old_logits[i], args.fill)
            return vocabulary_loss(z, old_logits[i], dense, args)[0].sum()
        z, old = (x.gather(-1, chosen[i])[:, 0] for x in (z, old_logits[i]))
        return sampled_loss(z, old, advantages[i], args)[0].sum()

    target = old_logits.scatter_add(-1, chosen, (advantages / beta)[:, None].to(old_logits.dtype))
    return common.diagnose(loss_of, logits, target)


# ---- the run ---------------------------------------------------------------------------------------------------------


def validate(args) -> None:
    """One clear sentence for each wrong value, before anything is loaded."""
    common.one_of(
        loss=(args.loss, ("kld", "mse", "lch")),
        advantage=(args.advantage, ("gae", "reward", "group", "token", "dpo", "qrm")),
        target=(args.target, ("exp", "linear")),
        fill=(args.fill, ("zero", "balanced")),
        token_mean=(args.token_mean, ("global", "signed")),
        kl_estimator=(args.kl_estimator, ("k1", "k2", "k3")),
        long_prompts=(args.long_prompts, ("drop", "truncate", "error")),
        dtype=(args.dtype, ("auto", "float32", "bfloat16")),
    )
    common.at_least(0, lr=args.lr, critic_lr=args.critic_lr, kl_coef=args.kl_coef, value_clip=args.value_clip)
    common.at_least(0, gamma=args.gamma, lam=args.lam, vf_coef=args.vf_coef, critic_warmup=args.critic_warmup)
    common.at_least(0, warmup_steps=args.warmup_steps, missing_eos_penalty=args.missing_eos_penalty)
    common.at_least(0, lora_rank=args.lora_rank)
    common.at_least(1e-6, temperature=args.temperature, max_grad_norm=args.max_grad_norm)
    common.at_least(1e-6, beta=args.beta, negative_beta_scale=args.negative_beta_scale)
    common.at_least(0, old_topk=args.old_topk)
    sampled = args.advantage not in ("dpo", "qrm")
    for name, given in (("target linear", args.target == "linear"), ("old_topk", args.old_topk > 0)):
        require(not given or args.loss == "kld", f"--{name} describes a target distribution: it needs --loss kld")
    fills = args.fill == "zero" or (sampled and args.loss == "kld")
    require(fills, "--fill balanced needs --loss kld and one advantage a token (not --advantage dpo or qrm)")
    lopsided = args.fill == "balanced" and args.negative_beta_scale != 1
    require(not lopsided, "--fill balanced and --negative_beta_scale exclude each other: a balanced A has both signs")
    signed = args.token_mean == "signed"
    require(sampled or not signed, "--token_mean signed needs one advantage a token (not --advantage dpo or qrm)")
    require(sampled or not args.diagnose, f"--diagnose needs one advantage a token (not --advantage {args.advantage})")
    given = args.dpo_model and args.dpo_ref
    require(args.advantage != "dpo" or given, "--advantage dpo needs --dpo_model and --dpo_ref")
    require(args.advantage != "qrm" or args.qrm_model, "--advantage qrm needs --qrm_model")
    common.at_least(1, steps=args.steps, epochs=args.epochs, max_prompt=args.max_prompt, eval_every=args.eval_every)
    common.at_least(1, max_new_tokens=args.max_new_tokens, save_every=args.save_every, test_rows=args.test_rows)
    common.at_least(1, rollout_rows=args.rollout_rows)
    by_token = args.advantage != "token" or args.reward_file
    require(by_token, "--advantage token needs --reward_file: a function that returns one reward for each token")
    one_sample = args.advantage == "group" and args.samples_per_prompt < 2
    require(not one_sample, "--advantage group compares samples of one prompt: --samples_per_prompt must be at least 2")


def build(args, device):
    """The models by name, and one optimizer for all that is trained."""
    shared = dict(dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code, seed=args.seed)
    trained = shared | dict(lora_rank=args.lora_rank, activation_checkpointing=args.activation_checkpointing)
    models = torch.nn.ModuleDict({"policy": common.load_model(args.model, **trained)})
    groups = [{"params": common.trainable_parameters(models["policy"]), "name": "lr"}]
    if args.advantage == "gae":
        models["critic"] = common.load_model(args.model, head="scalar", **trained)
        groups.append({"params": common.trainable_parameters(models["critic"]), "name": "critic_lr"})
    if args.kl_coef and not args.lora_rank:  # with LoRA, the policy without its adapters is the reference
        models["ref"] = common.load_model(args.model, trainable=False, **shared)
    if args.advantage == "dpo":
        models["dpo"] = common.load_model(args.dpo_model, trainable=False, **shared)
        models["dpo_ref"] = common.load_model(args.dpo_ref, trainable=False, **shared)
    if args.advantage == "qrm":
        models["qrm"] = common.load_model(args.qrm_model, head="saved", trainable=False, **shared)
    return models, torch.optim.Adam(groups, lr=args.lr, eps=1e-5, fused=True)


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
    task = tasks.load_task(args.task, args.dataset, args.reward_file, args.seed, args.test_rows, args.test_dataset)
    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)
    common.fits_context(args.model, args.max_prompt + args.max_new_tokens, args.trust_remote_code)
    others = {"dpo": (args.dpo_model, args.dpo_ref), "qrm": (args.qrm_model,)}
    for name in others.get(args.advantage, ()):
        common.same_tokenizer(args.model, tokenizer, name, common.load_tokenizer(name, args.trust_remote_code))
    task = tasks.fit_prompts(task, tokenizer, args.max_prompt, args.long_prompts)
    common.say(f"{geometry}\n{task.note}")
    return task, tokenizer


def train(args, stop_after: int | None = None) -> None:
    """The whole run. stop_after ends it early, as a signal would, without touching the schedule."""
    device = common.local_device(args.device)
    task, tokenizer = prepare(args)
    run = common.RunFolder(args, __file__, PANELS, SHOW)
    common.say(f"run folder: {run.path}")
    models, optimizer = build(args, device)
    policy = models["policy"]
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

        # ---- 3. log-probabilities of pi_old and of the reference, values of the critic; then rewards on tokens
        heads = score(models, batch, args)
        batch["rewards"] = token_rewards(scores, batch, finished, args)
        if step == start and args.advantage in ("reward", "group") and isinstance(scores[0], list):
            common.say("  token rewards are summed over each completion: --advantage token or gae uses their positions")

        # ---- 4. advantages
        estimate_advantages(batch, args)

        # ---- 5. update: a few passes over the rollout in minibatches
        if args.diagnose:
            probe = common.take(batch, list(range(min(args.micro_batch, len(rows)))))
            old_logits = common.probe_logits(policy, probe, args.temperature)
        for group in optimizer.param_groups:
            rise, fall = (step + 1) / (args.warmup_steps + 1), 1 - step / args.steps
            group["lr"] = getattr(args, group["name"]) * min(1, rise) * fall
        sums, tokens = {}, 0
        for epoch in range(args.epochs):
            for mine in common.minibatch_rows(args.seed, step, epoch, len(rows) * common.world(), args.minibatches):
                new, n = update(models, heads, optimizer, batch, mine, args, train_policy=step >= args.critic_warmup)
                if tokens == 0 and "policy/ratio_gap" in new:  # mse and lch know no ratio
                    common.stop_unless_on_policy(new["policy/ratio_gap"] / n, args.dtype, device)
                sums, tokens = {k: sums.get(k, 0.0) + v for k, v in new.items()}, tokens + n
        clock.lap("update")

        # ---- 6. log, evaluate, save
        metrics = {k: v / tokens for k, v in sums.items()} | rollout_metrics(batch, scores, finished, args)
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "policy/sampler_gap": gap}
        if args.diagnose:
            metrics |= diagnose_update(policy, probe, old_logits, args)
        if metrics["policy/updates"] == 0 and step >= args.critic_warmup:
            common.say("  no completion of this step is better than another: the policy stays as it is")
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
    """--check: is this script right with this model and this task? Ten seconds with the built-in model."""
    device = common.local_device(args.device)
    # Two epochs: with a single update pi_old would not be asked, and there were nothing to compare.
    small = replace(args, prompts_per_step=2 * common.world(), samples_per_prompt=4, minibatches=1, epochs=2, steps=2)
    small = replace(small, micro_batch=8, max_new_tokens=min(args.max_new_tokens, 32), test_rows=4, wandb=False)
    task, tokenizer = prepare(small)
    models, _ = build(small, device)
    sampling = common.Sampling(models["policy"], tokenizer, args.max_prompt, small.max_new_tokens, args.temperature, 8)
    rows = task.rows(args.seed, 0, small.prompts_per_step)
    rows, prompt_ids, completion_ids, finished, _ = sampling.rollout(rows, small.samples_per_prompt, args.seed, 0)
    batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
    heads = score(models, batch, small)
    batch["rewards"] = batch["mask"] * torch.sin(torch.arange(len(rows), device=device))[:, None]  # something to learn
    estimate_advantages(batch, small)
    everything, tight = list(range(len(rows))), 0.1 if args.dtype == "bfloat16" else 1e-4
    ends = set(common.stop_ids(models["policy"], tokenizer))

    def at_start():
        sums, tokens = accumulate(models, heads, batch, everything, small)
        # Noise of raw logits grows with their size: in bfloat16 mse and lch rely on the sampler's ratio above.
        known = ("ratio_gap", "kl_old") if args.dtype == "bfloat16" else ("ratio_gap", "kl_old", "logit_gap")
        gaps = {k: abs(sums[k]) / tokens for k in sums if k.endswith(known)}
        return max(gaps.values(), default=0.0) < tight, ", ".join(f"{k} {v:.1e}" for k, v in gaps.items())

    def backward(size):
        accumulate(models, heads, batch, everything, replace(small, micro_batch=size))

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


def main() -> None:
    (check if args.check else train)(args)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(main, args.device)

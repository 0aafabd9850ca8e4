"""PPO for language models: the baseline that the other methods are held against.

    L = sum_t max( -r_t A_t, -clip(r_t, 1 - eps, 1 + eps) A_t ),      r_t = pi(a_t|s_t) / pi_old(a_t|s_t)       (PPO-1)

Schulman et al. 2017 (arXiv:1707.06347), on tokens as in Ziegler et al. 2019 and Stiennon et al. 2020: a state is the
prompt and the completion so far, an action is a token. Also REINFORCE (--loss reinforce), and advantages without a
critic (--advantage reward, group).

What differs from common practice, each for a reason
    1. One optimizer for policy and critic, which are two models; so vf_coef counts through the common gradient norm.
    2. Losses are divided by the number of tokens of the whole minibatch over all ranks, counted before any backward.
    3. No entropy bonus, no adaptive KL, no early stop inside an update: each would be one more thing to hold equal.

Run
    python ppo_baseline.py                                                                        # this laptop, offline
    python ppo_baseline.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --dtype bfloat16            # 1 GPU
    torchrun --nproc_per_node=8 ppo_baseline.py --model ... --dataset ...                                       # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ppo_baseline.py ...  # 2 nodes
More in docs/ppo_baseline.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

from dataclasses import dataclass, replace

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
    loss: str = arg("ppo", "ppo (PPO-1) or reinforce: -A_t log pi(a_t|s_t), the same trunk without ratio and clip")
    advantage: str = arg("gae", "gae: critic; reward: return, whitened; group: return minus the mean of its prompt; "
                         "token: the rewards that --reward_file gives each token, standardised")  # fmt: skip
    clip: float = arg(0.2, "eps of PPO-1")
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
    lr=2e-4, critic_lr=1e-3, warmup_steps=4,
)  # fmt: skip
PANELS = {
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
    """Add what the rollout policy, the reference and the critic say of each token, [B, T], before any update."""

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


def diagnose_update(policy, micro, old_logits, args) -> dict[str, float]:
    """--diagnose: is the surrogate flat, or uphill, on the way to pi_old exp(A) (the optimum for a KL of weight 1)?"""
    logits = common.probe_logits(policy, micro, args.temperature)
    n, mask = len(logits), micro["mask"]
    ids, advantages = (micro[k][mask][:n] for k in ("completion_ids", "advantages"))
    old = old_logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    def loss_of(z, i):
        logprobs = z.log_softmax(-1).gather(-1, ids[i, None])[:, 0]
        return policy_loss(logprobs, old[i], advantages[i], args.loss, args.clip)[0]

    target = old_logits.scatter_add(-1, ids[:, None], advantages[:, None].to(old_logits.dtype))
    return common.diagnose(loss_of, logits, target)


# ---- the run ---------------------------------------------------------------------------------------------------------


def validate(args) -> None:
    """One clear sentence for each wrong value, before anything is loaded."""
    common.one_of(
        loss=(args.loss, ("ppo", "reinforce")),
        advantage=(args.advantage, ("gae", "reward", "group", "token")),
        kl_estimator=(args.kl_estimator, ("k1", "k2", "k3")),
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
        score(models, batch, args)
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
                new, n = update(models, optimizer, batch, mine, args, train_policy=step >= args.critic_warmup)
                if tokens == 0:
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


def main() -> None:
    (check if args.check else train)(args)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(main, args.device)

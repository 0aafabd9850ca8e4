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
    loss: Literal["ppo", "reinforce"] = arg("ppo", "PPO-1, or -A_t log pi(a_t|s_t), which has no ratio and no clip")
    advantage: Literal["gae", "token", "return", "reward", "group"] = arg(
        "gae", "GAE; the token's reward (QRM-2); the return to go; that of the answer; or less its prompt's mean"
    )
    clip: float = arg(0.2, "the eps of PPO-1", at_least=1e-6)
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
    lr=2e-4, critic_lr=1e-3, warmup_steps=4,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


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


def policy_objective(policy, micro, args):
    """The loss of one micro-batch, summed over its tokens, and metric sums."""
    mask = micro["mask"]
    logprobs, entropy = lm.policy_logprobs(policy, micro, args.temperature)
    old_logprobs = micro.get("old_logprobs", logprobs.detach())
    loss, metrics = policy_loss(logprobs[mask], old_logprobs[mask], micro["advantages"][mask], args.loss, args.clip)
    return loss, metrics | {"policy/entropy": entropy.sum()}


def update(models, optimizer, batch, rows, args, train_policy: bool = True):
    """One optimizer step on some local rows of a batch; returns metric sums over all ranks, and their tokens."""
    device = batch["mask"].device
    signal = common.all_max(batch["advantages"][rows].abs().max(), device) > 0
    train_policy = train_policy and signal  # where all advantages are 0, the policy stays as it is
    tokens = common.all_sum({"n": batch["mask"][rows].sum()}, device)["n"]  # counted first, divided by once
    sums = {}
    for micro in lm.accumulate_over(models, lm.micro_batches(batch, rows, args.micro_batch)):
        loss, metrics = policy_objective(models["policy"], micro, args)
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
        evaluate_models(models, batch, args)
        gap = lm.sampler_gap(policy, args.temperature, batch, sampled, args.dtype, first=step == 0)
        batch["rewards"] = token_rewards(task_rewards, batch, finished, args)
        if step == run.start and args.advantage in ("reward", "group") and isinstance(task_rewards[0], list):
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
    if args.advantage == "gae" or (args.advantage == "token" and args.loss == "ppo"):
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
    for name in filter(None, (args.model, args.reward_model, args.reward_ref)):
        lm.same_tokenizer(args.model, tokenizer, name, lm.load_tokenizer(name))
        lm.fits_context(name, args.max_prompt + args.max_new_tokens)
    task = tasks.fit_prompts(task, tokenizer, args.max_prompt, args.long_prompts)
    common.say(geometry)
    common.say(task.note + f"; trained on scores of {args.reward_model}" * bool(args.reward_model))
    return task, tokenizer


@torch.no_grad()
def evaluate_models(models, batch, args):
    """Add [B, T] of each token before any update: log-probabilities by pi_old and the reference, values, scores."""
    one_update = args.epochs * args.minibatches == 1 and not args.kl_coef  # then pi = pi_old in the only update

    def one(micro):
        out = {}
        if not one_update:
            out["old_logprobs"] = lm.policy_logprobs(models["policy"], micro, args.temperature)[0]
        if args.kl_coef:
            with lm.reference(models) as ref:
                out["ref_logprobs"] = lm.policy_logprobs(ref, micro, args.temperature)[0]
        if "critic" in models:
            out["values"] = lm.completion_scalars(models["critic"], micro) * micro["mask"]
        if "reward" in models:
            out["scores"] = lm.token_scores(models["reward"], micro, models["reward_ref"] if args.reward_ref else None)
        return out

    batch |= lm.map_rows(one, batch, args.micro_batch)


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

"""ADPA: advantage-guided distillation. The teacher's advantage over the vocabulary, on states that the student reached.

Gao et al. 2025, "Advantage-Guided Distillation for Preference Alignment in Small Language Models" (ICLR 2025,
arXiv:2502.17927). Given are preference pairs, each a prompt x with a better answer y_w; a large model before (pi_ref)
and after (pi_dpo) its preference training; and a small model pi, the student. A state s is a prompt with the tokens
written so far. The change from pi_ref to pi_dpo shows, in any state, which next tokens a are better than others:

    A(s, a) = log pi_dpo(a|s) - log pi_ref(a|s)                                                                 (ADPA-1)

Before its training, the student answers each prompt once, greedily. All states s_t = (x, y_<t) of such an answer y are
kept. Then it learns the better answers, and in the states that it reached by itself, tokens of high advantage:

    L = NLL(y_w) - gamma mean_t sum_a pi(a|s_t) A(s_t, a),   y the answer of pi', the student at the start      (ADPA-2)

NLL is -log pi per token. ADPA+ is the same with a student that dckd.py has trained. The advantage term is linear in pi,
so its optimum is the one token with the largest A, often noise from the tail of pi_dpo. For that reason there is
--adv_topk, and the entropy is logged. Two objectives beyond the paper limit the distance; they replace -sum_a pi A:

    --objective kl    KL(q || pi), q = softmax(log pi' + A / beta), optimum of E_pi[A] - beta KL(pi || pi')     (ADPA-3)
    --objective opd   KL(pi || q), q = pi_ref exp(lambda A) / Z, where lambda = 1 gives q = pi_dpo              (ADPA-4)

ADPA-4 is on-policy distillation (OPD): at every step the current student samples answers to the prompts, and in each of
their states it moves towards q. KL(pi || q) = E_pi[log pi - log pi_ref - lambda A] + log Z is exact, over the whole
vocabulary. lambda = 1 is the reverse KL to pi_dpo, as in GKD; lambda > 1 extrapolates (G-OPD, arXiv:2602.12125).
ADPA-2 keeps only the advantage of this expression, without the KL to pi_ref, in states that are not renewed.

What differs from the paper, each for a reason
    1. Means are over all tokens of a step, on all ranks, not over sequences first: the micro-batch changes nothing.
    2. The teachers are evaluated on each micro-batch, exactly; the authors store top tokens, clamp A, leave out EOS.
    3. Vocabularies of different padded size are cut to the shared rows, and the probability that was cut is logged.

Run
    python adpa.py                                                                                # this laptop, offline
    python dpo.py --model BIG --dataset PAIRS --out runs/teacher                                      # teacher, 1 GPU
    torchrun --nproc_per_node=8 adpa.py --model SMALL --teacher runs/teacher/model --dataset PAIRS              # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 adpa.py ...          # 2 nodes
    python adpa.py --objective opd --gamma 1 --nll 0 --refresh_every 1 --state_temperature 1                       # OPD
More in docs/adpa.md. Shapes: B sequences, T completion positions, N unmasked tokens, V vocabulary, H width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
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
    ref_teacher: str = arg("", "the reference teacher pi_ref; empty: what --teacher was aligned from, by its config")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    task: str = arg("auto", "the task: built-in, a kind of data (auto: by its columns), or gym:NAME of reasoning-gym")
    test_dataset: str = arg("", "held-out prompts; empty: those of the last pairs of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest completion, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    # method
    objective: Literal["adpa", "kl", "opd"] = arg("adpa", "ADPA-2; ADPA-3, a target at a distance; ADPA-4, on-policy")
    gamma: float = arg(1.6, "the coefficient of the teachers' term (authors: 1.6; best in the paper: 1.5)", at_least=0)
    nll: float = arg(1.0, "the coefficient of the NLL of the better answers", at_least=0)
    adv_topk: int = arg(
        50, "A is 0 outside this many of pi_dpo's likeliest tokens (authors: 50); 0: no limit, as for opd", at_least=0
    )
    beta: float = arg(1.0, "the beta of ADPA-3: the larger, the closer to pi'", at_least=1e-6)
    opd_lambda: float = arg(1.0, "the lambda of ADPA-4: 1 imitates pi_dpo, more goes beyond it", at_least=0)
    state_temperature: float = arg(
        0.0, "the temperature of the student's answers; 0: greedy (authors' code)", at_least=0
    )
    refresh_every: int = arg(
        0, "the steps after which the current student answers anew, on-policy; 0: only at the start", at_least=0
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
    warmup_steps=4, gamma=0.5,
)  # fmt: skip


# ---- the method ------------------------------------------------------------------------------------------------------


def advantages(teacher_logp, ref_logp, topk: int):
    """ADPA-1, [N, V], from log-probabilities of pi_dpo and pi_ref; 0 outside the topk likeliest tokens of pi_dpo."""
    A = teacher_logp - ref_logp
    if 0 < topk < A.shape[1]:
        top = teacher_logp.topk(topk).indices
        A = torch.zeros_like(A).scatter(-1, top, A.gather(-1, top))
    return A


def adpa_loss(logp, A):
    """ADPA-2, -E_pi[A] of each state [N], from log pi and A [N, V]; the gradient in z is -pi (A - E_pi[A])."""
    return -(logp.exp() * A).sum(-1)


def kl_loss(logp, start_logp, A, beta: float):
    """ADPA-3, KL(q || pi) of each state [N], q = softmax(log pi' + A / beta); the gradient in z is pi - q."""
    target = (start_logp + A / beta).log_softmax(-1)
    return (target.exp() * (target - logp)).sum(-1)


def opd_loss(logp, ref_logp, A, opd_lambda: float):
    """ADPA-4, KL(pi || q) of each state [N], q = pi_ref exp(lambda A) / Z; at pi = q it is 0, and its gradient too."""
    target = (ref_logp + opd_lambda * A).log_softmax(-1)
    return (logp.exp() * (logp - target)).sum(-1)


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
    chosen, states = (micro[side][:, None] & micro["mask"] for side in ("chosen", "states"))  # [B, T]: tokens of each
    own = common.take(micro, micro["states"].nonzero()[:, 0].tolist())  # only these are read by frozen models
    with torch.no_grad(), lm.reference(models) as start:
        frozen = [start, models["teacher"], models["ref_teacher"]]
        frozen = [(lm.completion_hidden(m, own)[own["mask"]], lm.head_weight(m)) for m in frozen]
    hidden, head = lm.completion_hidden(models["policy"], micro), lm.head_weight(models["policy"])
    ids = micro["completion_ids"][chosen]
    nll = -lm.token_logprobs(hidden[chosen], head, ids, args.temperature)[0].sum() / counts["chosen"]
    size = min(len(head), *(len(weight) for _, weight in frozen))
    topk = 0 if args.objective == "opd" else args.adv_topk

    def loss(*logits):  # of pi, pi', pi_dpo and pi_ref in some of the states: [N, V] never exists at once
        (logp, start_logp, teacher_logp, ref_logp), cut = zip(*(within(z.log_softmax(-1), size) for z in logits))
        A = advantages(teacher_logp, ref_logp, topk)
        if args.objective == "adpa":
            total = adpa_loss(logp, A).sum()
        elif args.objective == "kl":
            total = kl_loss(logp, start_logp, A, args.beta).sum()
        else:
            total = opd_loss(logp, ref_logp, A, args.opd_lambda).sum()
        z, logp = logits[0].detach(), logp.detach()
        return total, {
            "loss/teacher": total,
            "adpa/advantage": -adpa_loss(logp, A).sum(),
            "adpa/gap": (A.amax(-1) + adpa_loss(logp, A)).sum(),
            "kl/start": (logp.exp() * (logp - start_logp)).sum(),
            "kl/teachers": (teacher_logp.exp() * (teacher_logp - ref_logp)).sum(),
            "kl/outside": (cut[0] + cut[2]).sum(),  # of pi and pi_dpo
            "policy/entropy": -(z.softmax(-1) * z.log_softmax(-1)).sum(),
        }

    total, sums = lm.over_vocabulary(loss, [(hidden[states], head), *frozen], [], args.temperature)
    metrics = {name: x / counts["states"] for name, x in sums.items()} | {"loss/nll": nll.detach()}
    return args.nll * nll + args.gamma * total / counts["states"], metrics


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
        # ---- 1. the pairs of this step, and what the student answers to their prompts
        if step == run.start or (args.refresh_every and step % args.refresh_every == 0):
            answer_prompts(sampling, pairs, step, args, run.path)
            run.lap("states")
        rows = tasks.walk(pairs)(args.seed, step, args.prompts_per_step)
        rows = rows[common.rank() :: common.world()]
        batch = make_batch(rows, ("chosen", "states"), tokenizer.pad_token_id, device)

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
    if not args.lora_rank:  # with LoRA, the policy without its adapters is the start
        models["ref"] = lm.load_model(args.model, trainable=False, **shared)
    models["teacher"] = lm.load_model(args.teacher, trainable=False, **shared)
    models["ref_teacher"] = lm.load_model(args.ref_teacher, trainable=False, **shared)
    return models, torch.optim.Adam(lm.trainable_parameters(models["policy"]), lr=args.lr, fused=True)


def prepare(args):
    """Data and tokenizer; every wrong argument and file is refused here, before a model is loaded."""
    even = args.micro_batch % 2 == 0
    require(even, f"--micro_batch {args.micro_batch}: the answers to a prompt stay together, so it must be even")
    tokenizer = lm.load_tokenizer(args.model)
    fresh = args.objective != "opd" or (args.refresh_every and args.state_temperature)
    require(fresh, "--objective opd is on-policy: it needs --refresh_every 1 and --state_temperature 1")
    args.ref_teacher = reference_teacher(args)  # from now on, args.json and --resume too
    for name in (args.model, args.teacher, args.ref_teacher):
        lm.fits_context(name, args.max_prompt + args.max_new_tokens)
        lm.same_tokenizer(args.model, tokenizer, name, lm.load_tokenizer(name))
    common.say(f"the advantage is that of {args.teacher} over {args.ref_teacher}")
    return *load_data(args, tokenizer, tasks.load_pairs), tokenizer


def reference_teacher(args) -> str:
    """pi_ref: --ref_teacher, or what the config of --teacher names."""
    known = getattr(lm.load_config(args.teacher), "aligned_from", None)
    require(args.ref_teacher or known, f"--ref_teacher is empty, and {args.teacher} does not name its reference model")
    return args.ref_teacher or known


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


def answer_prompts(sampling, pairs, step: int, args, folder: Path) -> None:
    """Give pairs `states_ids`: the student's answer at `step` to each prompt that is used before the next refresh.

    They are kept in folder/states, because a resumed run no longer has the student of an earlier step.
    """
    span = args.refresh_every or args.steps
    first = step - step % span
    file = folder / "states" / f"step-{first:06d}.jsonl"

    def answers():
        require(step == first, f"--resume {folder}: {file} is missing, with the answers that the run used")
        numbers, steps = tasks.walk(range(len(pairs))), range(first, min(first + span, args.steps))
        used = {i for s in steps for i in numbers(args.seed, s, args.prompts_per_step)}
        mine = sorted(used)[common.rank() :: common.world()]
        drawn = args.state_temperature > 0 and mine  # else greedy
        noise = common.uniforms(args.seed, common.TRAIN, first, mine, args.max_new_tokens) if drawn else None
        student = replace(sampling, temperature=args.state_temperature or 1.0)
        return list(zip(mine, student.complete([pairs[i]["prompt_ids"] for i in mine], 1, noise)))

    for i, ids in common.kept(file, answers):
        pairs[i]["states_ids"] = ids


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

"""The shape of a policy loss while a script trains: is it flat, or does it point uphill, on the way to its optimum?

    python benchmarks/diagnose.py lco.py --loss mse --epochs 4          any arguments of ppo_baseline.py or lco.py
    python benchmarks/study.py diagnose                                 the table of docs/results/lco.md

After the updates of each step, on the tokens of the first micro-batch of its rollout, metrics.jsonl gets
    diagnose/zero_gradient      the share of tokens whose loss has no slope
    diagnose/away_from_target   of the others, the share whose slope points away from z* = z_old + A / beta
    diagnose/cosine             the mean cosine between the negative gradient in z and z* - z
    diagnose/not_convex         the share of states in which the Hessian has a negative eigenvalue
    diagnose/least_eigenvalue   the smallest of them
For PPO and REINFORCE beta is 1.
"""

import importlib
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before torch: it sets how threads wait)
import lm

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402


@torch.no_grad()
def probe_logits(policy, micro: dict, temperature: float, most: int = 256) -> torch.Tensor:
    """fp64 logits [N, V] of the first completion tokens of a micro-batch; `most` bounds N.

    Where a token is all but certain, the slope of a loss in fp32 is rounding noise and points anywhere.
    """
    hidden = lm.completion_hidden(policy, micro)[micro["mask"]][:most]
    return F.linear(hidden, lm.head_weight(policy)).double() / temperature


def diagnose(loss_of, logits, target_logits, states: int = 16, entries: int = 32) -> dict[str, float]:
    """The shape of a loss at `logits` [N, V]: its slope towards target_logits [N, V], and its curvature.

    loss_of(logits, i) -> the summed loss of the tokens in slice i, as a function of their logits alone.
    Curvature is that of the `entries` most probable tokens of the first `states` states: a principal minor of the
    Hessian, so a negative eigenvalue here proves one of the whole.
    """
    n = len(logits)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(z, slice(0, n)), z)
    moving = gradient.abs().amax(-1) > 0
    cosine = F.cosine_similarity(-gradient[moving], (target_logits - logits)[moving], dim=-1)
    least = []
    for i in range(min(states, n)):
        top = logits[i].topk(min(entries, logits.shape[1]))

        def part(x, i=i, top=top):
            return loss_of(logits[i].scatter(-1, top.indices, x)[None], slice(i, i + 1))

        least.append(torch.linalg.eigvalsh(torch.autograd.functional.hessian(part, top.values))[0].item())
    sums = {"n": n, "moving": moving.sum(), "away": (cosine < -1e-4).sum(), "cosine": cosine.sum()}
    sums |= {"states": len(least), "concave": sum(x < -1e-6 for x in least)}
    sums = common.all_sum(sums, logits.device)
    return {
        "diagnose/zero_gradient": 1 - sums["moving"] / sums["n"],
        "diagnose/away_from_target": sums["away"] / max(sums["moving"], 1),
        "diagnose/cosine": sums["cosine"] / max(sums["moving"], 1),
        "diagnose/not_convex": sums["concave"] / sums["states"],
        "diagnose/least_eigenvalue": -common.all_max(-min(least), logits.device),
    }


def shape(script, policy, micro, old_logits, args) -> dict[str, float]:
    """diagnose() of the loss of ppo_baseline.py or lco.py on one micro-batch."""
    logits = probe_logits(policy, micro, args.temperature)
    n, mask = len(logits), micro["mask"]
    ids, advantages = (micro[k][mask][:n] for k in ("completion_ids", "advantages"))
    chosen, beta = ids[:, None], torch.ones_like(advantages)
    if script.__name__ == "lco":
        beta = script.scaled_beta(advantages, args.beta, args.negative_beta_scale)

    def loss_of(z, i):
        picked, old = z.gather(-1, chosen[i])[:, 0], old_logits[i].gather(-1, chosen[i])[:, 0]
        if script.__name__ == "ppo_baseline":
            logprobs, old = picked - z.logsumexp(-1), old - old_logits[i].logsumexp(-1)
            return script.policy_loss(logprobs, old, advantages[i], args.loss, args.clip)[0]
        if args.loss == "kld":
            A = torch.zeros_like(old_logits[i]).scatter(-1, chosen[i], advantages[i, None].to(old_logits.dtype))
            target_logp = script.target_logprobs(old_logits[i], A, beta[i, None], args.target)
            return script.kld_loss(z.log_softmax(-1), target_logp).sum()
        return script.LOSSES[args.loss](script.target_gap(picked, old, advantages[i], beta[i])).sum()

    target = old_logits.scatter_add(-1, chosen, (advantages / beta)[:, None].to(old_logits.dtype))
    return diagnose(loss_of, logits, target)


def watch(script) -> None:
    """Puts the numbers into the metrics of each step of a script."""
    update, end_step, seen = script.update, common.Run.end_step, {}

    def first_sees(*given, **more):
        bound = inspect.signature(update).bind(*given, **more).arguments
        policy, batch, args = bound["models"]["policy"], bound["batch"], bound["args"]
        if seen.get("batch") is not batch:
            probe = common.take(batch, list(range(min(args.micro_batch, len(batch["mask"])))))
            old_logits = probe_logits(policy, probe, args.temperature)
            seen.update(batch=batch, of=(policy, probe, old_logits, args))
        return update(*given, **more)

    def then_tells(run, metrics, *given, **more):
        end_step(run, metrics | shape(script, *seen["of"]), *given, **more)

    script.update, common.Run.end_step = first_sees, then_tells


if __name__ == "__main__":
    script = importlib.import_module(Path(sys.argv[1]).stem)
    sys.argv = sys.argv[1:]
    args = common.parse_args(script.Args, script.BUILTIN)
    watch(script)
    common.launch(lambda: script.train(args), args.device)

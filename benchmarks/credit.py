"""Does a reward model know which token was wrong? On the built-in task the truth is known, token by token.

    python benchmarks/study.py qrm        # first: it trains the reward models, in runs/study
    python benchmarks/credit.py           # benchmarks/results/credit.md, docs/images/credit.svg, docs/credit.html

Answers are sampled by the built-in policy to held-out prompts. A token is right while the derivation up to it is exact.
    rank         Spearman's rank correlation between a token's score and whether it is right, over all tokens
    in answer    the share of wrong answers whose mean score before the first wrong token is above that from it on
    in state     the share of states in which the right token scores higher than the likeliest wrong one (p > 0.05)
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402  (before torch: it sets how OpenMP threads wait)
import figures  # noqa: E402
import lm
import ppo_baseline  # noqa: E402
import report  # noqa: E402
from builtin import tasks as toys  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

STUDY = ROOT / "runs" / "study"
MODELS = {  # folder of the study -> (name, objective)
    "qrm_scalar": ("Q-RM, scalar head", "qrm"),
    "qrm_lm": ("Q-RM, LM head", "qrm"),
    "orm": ("ORM", "orm"),
    "step_prm": ("step PRM", "step_prm"),
    "dpo": ("DPO log-ratio", "dpo"),
}
DEVICE = torch.device("cpu")
AROUND = range(-4, 6)  # token positions relative to the first wrong one


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, ties averaged."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(x, y) -> float:
    return float(np.corrcoef(ranks(np.array(x)), ranks(np.array(y)))[0, 1])


def sample_answers(tokenizer, policy, n: int, seed: int):
    """Answers of the policy to n held-out prompts: rows {prompt, prompt_ids, ids, tokens, right}."""
    sampling = lm.Sampling(policy, tokenizer, 24, 24, 1.0, 256)
    rows, prompt_ids, ids, finished, _ = sampling.rollout(toys.chain_test_rows(n), 1, seed, 0)
    answers = []
    for row, p, c, done in zip(rows, prompt_ids, ids, finished):
        tokens = [tokenizer.decode([t]) for t in c]
        if done:
            truth = toys.chain_credit(row["prompt"], tokens)
            answers.append({"prompt": row["prompt"], "prompt_ids": p, "ids": c, "tokens": tokens, "right": truth})
    return answers


def score(models, objective: str, prompt_ids, ids, tokenizer) -> list[list[float]]:
    batch = common.make_batch(prompt_ids, ids, tokenizer.pad_token_id, DEVICE)
    with torch.no_grad():
        one = lambda m: {"x": lm.token_scores(models["reward"], m, models.get("reward_ref"))}  # noqa: E731
        scores = lm.map_rows(one, batch, 128)["x"]
    return [row[: len(c)] for row, c in zip(scores.tolist(), ids)]


def forks(tokenizer, policy, answers):
    """States on the exact path where the policy might go wrong: (prompt, ids to the right token, to another)."""
    found = []
    for a in answers:
        exact = common.encode_completion(tokenizer, toys.chain_solution(a["prompt"]))
        batch = common.make_batch([a["prompt_ids"]], [exact], tokenizer.pad_token_id, DEVICE)
        with torch.no_grad():
            hidden = lm.completion_hidden(policy, batch)[0]
            likely = (hidden @ lm.head_weight(policy).T).softmax(-1)
        for t, right in enumerate(exact):
            likely[t, right] = 0
            p, other = likely[t].max(-1)
            if p > 0.05:
                found.append((a["prompt_ids"], exact[: t + 1], [*exact[:t], other.item()]))
    return found


def measure(models, objective: str, answers, states, tokenizer):
    """(rank, in answer, in state), and the mean score (standardised) around the first wrong token."""
    scores = score(models, objective, [a["prompt_ids"] for a in answers], [a["ids"] for a in answers], tokenizer)
    flat = np.concatenate(scores)
    rank = spearman(flat, np.concatenate([a["right"] for a in answers]))
    drops, around = [], {k: [] for k in AROUND}
    for a, z in zip(answers, scores):
        if a["right"][-1]:
            continue
        z, first = (np.array(z) - flat.mean()) / flat.std(), a["right"].index(0.0)
        for k in AROUND:
            if 0 <= first + k < len(z):
                around[k].append(z[first + k])
        if first > 0:
            drops.append(z[:first].mean() > z[first:].mean())
    both = [score(models, objective, [s[0] for s in states], [s[i] for s in states], tokenizer) for i in (1, 2)]
    better = [a[-1] > b[-1] for a, b in zip(*both)]
    return (rank, np.mean(drops), np.mean(better)), [np.mean(around[k]) for k in AROUND], scores


def page(answers, colourings, path) -> None:
    """Five colourings of the same answers, wrong ones and right ones."""
    picked = [i for i, a in enumerate(answers) if not a["right"][-1]][:8] + [
        i for i, a in enumerate(answers) if a["right"][-1]
    ][:4]
    shown = []
    for i in picked:
        a = answers[i]
        right, T = a["right"][-1], len(a["ids"])
        terminal = torch.zeros(1, T)
        terminal[0, -1] = right
        credit, _ = ppo_baseline.gae(terminal, torch.zeros(1, T), torch.ones(1, T, dtype=torch.bool), 1.0, 0.95)
        columns = {"terminal reward + GAE (no critic)": credit[0].tolist()}
        columns |= {name: scores[i] for name, scores in colourings.items()} | {"truth: still right": a["right"]}
        kind = "right answer" if right else "wrong answer"
        shown.append({"prompt": a["prompt"], "kind": kind, "tokens": a["tokens"], "scores": columns})
    note = "The same sampled answers to held-out sums; the truth is 1 while the derivation is exact."
    report.token_page(path, "Who earned it? Token credit on the built-in task", shown, note)


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seeds = sorted(int(folder.name.removeprefix("qrm-")) for folder in STUDY.glob("qrm-*"))
    tokenizer = lm.load_tokenizer("builtin")
    policy = lm.load_model("builtin", device=DEVICE, trainable=False)
    results, curves = {name: [] for name in MODELS}, {name: [] for name in MODELS}
    for seed in seeds:
        answers = sample_answers(tokenizer, policy, 512, seed)
        states, colourings = forks(tokenizer, policy, answers[:200]), {}
        for name, (title, objective) in MODELS.items():
            folder = STUDY / f"qrm-{seed}" / name / "model"
            models = {"reward": lm.load_model(str(folder), head="saved", device=DEVICE, trainable=False)}
            if objective == "dpo":
                models["reward_ref"] = policy
            numbers, curve, scores = measure(models, objective, answers, states, tokenizer)
            results[name].append(numbers)
            curves[name].append(curve)
            if name in ("qrm_scalar", "qrm_lm", "dpo"):
                colourings[title] = scores
        if seed == seeds[0]:
            shown = {k: colourings[k] for k in ("DPO log-ratio", "Q-RM, scalar head", "Q-RM, LM head")}
            page(answers, shown, ROOT / "docs" / "credit.html")
    lines = ["| reward model | seeds | rank | in answer | in state |", "|---|---|---|---|---|"]
    for name, (title, _) in MODELS.items():
        cells = [f"{statistics.median(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in zip(*results[name])]
        lines.append(f"| {title} | {len(seeds)} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks" / "results" / "credit.md").write_text(text)
    record = {MODELS[k][0]: {"seeds": v, "around": np.mean(curves[k], 0).tolist()} for k, v in results.items()}
    (ROOT / "benchmarks" / "results" / "credit.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    print(text)
    figures.credit()


if __name__ == "__main__":
    main()

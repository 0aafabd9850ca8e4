"""What a checkpoint can do: Pass@1 and Pass@k with intervals, pairs of its own answers, reward-model accuracy.

    pass@k = 1 - C(n - c, k) / C(n, k)      for a prompt with c right answers among n samples                   (EVAL-1)

Chen et al. 2021 (arXiv:2107.03374): unbiased for the chance that one of k samples is right. Means over prompts have a
Wilson interval (EVAL-2) of as many independent observations as the spread between prompts allows (EVAL-3).

    accuracy        greedy and sampled, by a task's own grader or a --reward_file; with --pairs_out on training prompts,
                    and a file of preference pairs: a right and a wrong sample per prompt, alike in length
    --pairs         the share of preference pairs that a --reward_model puts in the right order

What is left out: few-shot prompts and multiple choice by log-likelihood, for which other projects are made, and judges,
which are paid services; benchmarks/answers.py writes the files that those of AlpacaEval 2 and MT-Bench read.

Run
    python evaluate.py                                                                    # this laptop, built-in model
    python evaluate.py --model runs/x/model                                               # after training
    torchrun --nproc_per_node=8 evaluate.py --model ... --dataset openai/gsm8k --test_rows 1319             # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 evaluate.py ...   # 2 nodes
    python evaluate.py --pairs pairs.jsonl --reward_model runs/y/model
More in docs/evaluate.md. Shapes: B sequences, T completion positions.
"""

import itertools
import json
import math
import time

from dataclasses import asdict, dataclass, replace
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
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    task: str = arg("auto", "the task: built-in, a kind of data (auto: by its columns), or gym:NAME of reasoning-gym")
    test_dataset: str = arg("", "held-out prompts; empty: those of the Hub's test split, or the last of --dataset")
    test_rows: int = arg(0, "held-out prompts per evaluation; 0: as in training, else 256", at_least=0)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    right_from: float = arg(1.0, "the reward from which a completion that only --reward_file can grade counts as right")
    max_prompt: int = arg(0, "the longest prompt, in tokens; 0: as in training, else up to 512", at_least=0)
    long_prompts: Literal["auto", "drop", "truncate", "error"] = arg(
        "auto", "what happens to longer prompts; auto: as in training on the same data, else error"
    )
    # sampling
    samples_per_prompt: int = arg(16, "completions per prompt", at_least=1)
    k: list[int] = arg([], "Pass@k for these k; empty: powers of 4 up to --samples_per_prompt")
    max_new_tokens: int = arg(0, "the longest completion, in tokens, EOS included; 0: as for --max_prompt", at_least=0)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=1e-6)
    pairs_out: str = arg("", "a new file for pairs of the model's samples, right against wrong, on training prompts")
    # reward models
    pairs: str = arg("", "the preference pairs on which --reward_model is rated: a Hub name or file")
    reward_model: str = arg("", "the reward model: made by qrm.py, or any token classifier with one label")
    reward_ref: str = arg("", "the model that pi_dpo, as a --reward_model, was aligned from")
    test_pairs: int = arg(0, "pairs from the end of the file, as many as qrm.py holds out; 0: all", at_least=0)
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    # run
    out: str = arg("", "the run folder; empty: runs/<script>-<time>")
    seed: int = arg(0, "the seed of data order, sampling and new weights", at_least=0)
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "where the run takes place")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "the dtype of the computation; auto: bfloat16 on CUDA")
    rollout_rows: int = arg(256, "sequences that each rank generates at once", at_least=1)


BUILTIN = dict(max_prompt=24, max_new_tokens=24)


# ---- the method ------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """EVAL-1, in integers of any size, so that nothing cancels."""
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def wilson(p: float, n: float) -> tuple[float, float]:
    """EVAL-2: the interval of 95 % for a share p of n independent observations; never empty, also at 0 and at 1."""
    z = 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def independent(values: list[float], groups: list, most: int) -> float:
    """EVAL-3: how many independent observations, at most `most`, have the variance of this mean of values in [0, 1].

    Values of one group may be alike, groups are independent. Where all are 0 or all 1, each group counts once.
    """
    p, sums = sum(values) / len(values), {}
    for value, group in zip(values, groups):
        sums[group] = sums.get(group, 0.0) + value - p
    variance = sum(x * x for x in sums.values()) / len(values) ** 2
    if len(sums) == 1 or p in (0, 1):
        return len(sums)
    return min(most, p * (1 - p) / variance) if variance else most


def share(values: list[float], groups: list | None = None, most: int = 0) -> dict[str, float]:
    """The mean of values in [0, 1] with its interval."""
    n = independent(values, range(len(values)) if groups is None else groups, most or len(values))
    low, high = wilson(p := sum(values) / len(values), n)
    return {"value": p, "low": low, "high": high}


def mean(values: list[float]) -> dict[str, float]:
    """The mean of any values, one per prompt, with the normal interval of 95 %."""
    m, n = sum(values) / len(values), len(values)
    half = 1.959964 * math.sqrt(sum((x - m) ** 2 for x in values) / max(1, n - 1) / n)
    return {"value": m, "low": m - half, "high": m + half}


def summary(greedy: list[dict], sampled: list[dict], n: int, ks: list[int]) -> dict[str, dict]:
    """Metrics with intervals. greedy: one row per prompt; sampled: n rows per prompt, one after the other."""
    metrics, most = {"eval/greedy": share([row["right"] for row in greedy])}, len(sampled)
    groups = [sampled[i : i + n] for i in range(0, most, n)]
    right = [sum(row["right"] for row in group) for group in groups]
    metrics["eval/sampled"] = share([c / n for c in right], most=most)
    metrics |= {f"eval/pass@{k}": share([pass_at_k(n, c, k) for c in right], most=most) for k in ks if k > 1}
    if greedy[0]["answered"] is not None:
        metrics["eval/answered"] = share([row["answered"] for row in greedy])
    if greedy[0]["reward"] is not None:
        metrics["eval/reward"] = mean([row["reward"] for row in greedy])
        metrics["eval/reward_sampled"] = mean([sum(row["reward"] for row in group) / n for group in groups])
    metrics["length/finished"] = share([sum(row["ended"] for row in group) / n for group in groups], most=most)
    return metrics


def pick_pairs(sampled: list[dict]) -> list[dict]:
    """{prompt, chosen, rejected}: of each prompt the right and the wrong finished sample whose lengths are closest."""
    pairs = []
    for prompt, rows in itertools.groupby(sampled, key=lambda row: row["prompt"]):
        fit = [row for row in rows if row["ended"] and row["completion"]]
        right, wrong = ([row["completion"] for row in fit if row["right"] == side] for side in (True, False))
        both = sorted(itertools.product(right, wrong), key=lambda pair: abs(len(pair[0]) - len(pair[1])))
        pairs += [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in both[:1]]
    return pairs


# ---- the evaluations -------------------------------------------------------------------------------------------------


def measure_accuracy(args, held_out: int) -> None:
    """Greedy and sampled accuracy on held-out prompts, or on training prompts, whose samples make --pairs_out."""
    device, n, train = common.local_device(args.device), args.samples_per_prompt, bool(args.pairs_out)
    task = args.task, args.dataset, args.reward_file, held_out, args.test_dataset
    task = tasks.load_task(*task, train=train)
    tokenizer = lm.load_tokenizer(args.model)
    task = task if train else replace(task, train=[])  # a long training prompt is nothing to refuse then
    task = tasks.fit_prompts(task, tokenizer, args.max_prompt, args.long_prompts)
    if train:
        rows = task.rows(args.seed, 0, min(args.test_rows, len(task.train) or args.test_rows))
        task = replace(task, test=list({json.dumps(row["prompt"]): row for row in rows}.values()))
    common.say(task.note)
    run = common.RunFolder(args, __file__)
    policy = lm.load_model(args.model, dtype=args.dtype, device=device, trainable=False)
    sampling = lm.Sampling(policy, tokenizer, args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows)
    prompts, graded = {i: sampling.encode(row) for i, row in enumerate(task.test)}, {}
    for name, how, draws in (("greedy", replace(sampling, temperature=0.0), [0]), ("sampled", sampling, range(n))):
        mine = complete(how, prompts, args.seed, draws, device)
        mine = grade(task, mine, tokenizer, lm.stop_ids(policy, tokenizer), args)
        rows = sorted(common.gather(mine), key=lambda row: row["prompt"])  # stable: draws stay in their order
        graded[name] = [row | {"prompt": task.test[row["prompt"]]["prompt"]} for row in rows]
    metrics = summary(*graded.values(), n, args.k or [4**i for i in range(1, 99) if 4**i <= n])
    samples = [row | {"kind": f"eval/{name}"} for name, rows in graded.items() for row in rows]
    write(run, args, metrics, samples, task=task.name, prompts=len(prompts))
    if train:
        pairs = pick_pairs(graded["sampled"])
        longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
        if common.rank() == 0:
            common.write_whole(Path(args.pairs_out), "".join(json.dumps(pair) + "\n" for pair in pairs))
        common.say(f"{len(pairs)} pairs, the right answer is the longer one in {longer}: {args.pairs_out}")


@torch.no_grad()
def rate_reward_model(args) -> None:
    """The share of pairs whose chosen answer has the higher score, by the tokens' scores as the model's folder says."""
    device, name = common.local_device(args.device), args.reward_model
    how, tokenizer = lm.score_of(name, args.reward_ref), lm.load_tokenizer(name)
    if args.reward_ref:
        lm.same_tokenizer(name, tokenizer, args.reward_ref, lm.load_tokenizer(args.reward_ref))
    limit = getattr(lm.load_config(name).get_text_config(), "max_position_embeddings", None) or 10**9
    rows, note = common.encode_pairs(tokenizer, tasks.load_pairs(args.pairs), limit, limit)
    whole = [r for r in rows if len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) <= limit]
    require(bool(whole), f"--pairs {args.pairs}: no pair fits the {limit} positions of {name}")
    common.say(note + (f"; {len(rows) - len(whole)} too long together, left out" if len(whole) < len(rows) else ""))
    rows = whole[-args.test_pairs :]
    run = common.RunFolder(args, __file__)
    paths = {"reward": name, "reward_ref": args.reward_ref}
    shared = dict(head="saved", dtype=args.dtype, device=device, trainable=False)
    models = torch.nn.ModuleDict({key: lm.load_model(path, **shared) for key, path in paths.items() if path})
    score, mine = lm.scored_by(models, how, tokenizer, limit, args.micro_batch), []
    for first in range(0, len(rows), common.world() * args.micro_batch):  # as many pieces on every rank, see above
        numbers = range(first + common.rank(), len(rows), common.world())[: args.micro_batch]
        sides = [(rows[i]["prompt"], rows[i][f"{side}_ids"]) for side in ("chosen", "rejected") for i in numbers]
        scores = score([prompt for prompt, _ in sides], None, [{"completion_ids": ids} for _, ids in sides])
        mine += [(i, a - b) for i, a, b in zip(numbers, scores, scores[len(numbers) :])]
    margins = [margin for _, margin in sorted(common.gather(mine))]
    prompts = [json.dumps(row["prompt"]) for row in rows]
    metrics = {"eval/pair_accuracy": share([float(x > 0) for x in margins], prompts), "eval/margin": mean(margins)}
    texts = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    samples = [{"kind": "pair", "margin": x} | text for x, text in zip(margins, texts)]
    write(run, args, metrics, samples, task="pairs", prompts=len(set(prompts)))


# ---- what they need --------------------------------------------------------------------------------------------------


def complete(sampling, prompts: dict[int, list[int]], seed: int, draws, device) -> list[tuple]:
    """(number of the prompt, completion ids) of this rank's share of numbered prompts, one per draw. Noise is
    a function of (seed, draw, prompt); draw 0 is the sample of the training scripts' own evaluation."""
    numbers, samples, mine, last = list(prompts), len(draws), [], time.time()
    size = common.world() * max(1, sampling.rows_at_once // samples)
    for first in range(0, len(numbers), size):  # as many pieces on every rank, some perhaps empty: FSDP gathers in each
        piece, noise = numbers[first : first + size][common.rank() :: common.world()], None
        if sampling.temperature and piece:
            noise = [common.uniforms(seed, common.EVAL, draw, piece, sampling.max_new_tokens) for draw in draws]
            noise = torch.stack(noise, 1).flatten(0, 1)
        ids = sampling.complete([prompts[i] for i in piece], samples, noise)
        mine += list(zip([i for i in piece for _ in draws], ids))
        if time.time() - last > 10:
            common.say(f"  {min(first + size, len(numbers))} of {len(numbers)} prompts, {samples} completions each")
            last = time.time()
        if common.stop_requested(device):
            common.leave_stopped("stopped before the end: nothing is written")
    return mine


def grade(task, mine: list[tuple], tokenizer, stops: list[int], args) -> list[dict]:
    """One row for each completion of this rank: was it right, its reward, had it an answer, did it end by itself?"""
    rows = [task.test[i] | {"completion_ids": ids} for i, ids in mine]
    texts = common.decode(tokenizer, [ids for _, ids in mine])
    rewards = [None] * len(rows)
    if args.reward_file and rows:
        rewards = task.reward([row["prompt"] for row in rows], texts, rows)
        rewards = [float(sum(x) if isinstance(x, list) else x) for x in rewards]
    right = task.correct(texts, rows) if task.correct else [x >= args.right_from for x in rewards]
    answered = task.answered(texts) if task.answered else [None] * len(rows)
    return [
        {"prompt": i, "completion": text, "right": bool(ok), "reward": x, "answered": a, "ended": ids[-1] in stops}
        for (i, ids), text, ok, x, a in zip(mine, texts, right, rewards, answered)
    ]


def with_sizes(args):
    """--test_rows, --max_prompt, --max_new_tokens and --long_prompts where they are not given: those of the run that
    trained the model, which stand in args.json beside its folder, else 256, 512 or what its positions leave, and error.
    And how many rows are held out: with --pairs_out those of training, as --test_rows then numbers the prompts."""
    file, trained = Path(args.model).parent / "args.json", {}
    if Path(args.model).is_dir() and file.is_file():
        trained = common.stored(file)["args"]
    sizes = {name: getattr(args, name) or trained.get(name, 0) for name in ("max_prompt", "max_new_tokens")}
    positions = getattr(lm.load_config(args.model).get_text_config(), "max_position_embeddings", None) or 1024
    left = (positions - sum(sizes.values())) // max(1, list(sizes.values()).count(0))
    sizes = {name: size or max(1, min(512, left)) for name, size in sizes.items()}
    common.say("sizes of " + args.model + ": " + " ".join(f"--{name} {size}" for name, size in sizes.items()))
    lm.fits_context(args.model, sum(sizes.values()))
    # Held out is what training held out: of the same name, or the same file under another; else it sees trained rows.
    names = [name for name in ("dataset", "prompts") if name in trained]
    read = common.stored(file).get("watched", {}) if trained else {}  # digests of files
    file = Path(args.dataset).expanduser()
    mine = common.digest(file) if file.is_file() else "no file"
    same = any(args.dataset == trained[name] or mine == read.get(f"--{name} {trained[name]}") for name in names)
    same = trained if same else {}
    alike = args.task == same.get("task") and args.test_dataset in ("", same.get("test_dataset"))
    auto = same.get("long_prompts", "drop") if alike else "error"
    long = auto if args.long_prompts == "auto" else args.long_prompts
    held_out = rows = args.test_rows or same.get("test_rows", 256)
    if args.pairs_out:
        held_out, rows = same.get("test_rows", rows), args.test_rows or 256
    apart = args.test_dataset or same.get("test_dataset", "")
    return replace(args, test_rows=rows, test_dataset=apart, long_prompts=long, **sizes), held_out


def write(run, args, metrics: dict, samples: list[dict], task: str, prompts: int) -> None:
    """result.json, the row of a table of results; metrics.jsonl; samples.jsonl with all completions; the screen."""
    run.samples(0, samples)
    if common.rank() != 0:
        return
    about = json.loads((run.path / "args.json").read_text())
    used = ["model", "dataset", "test_dataset", "reward_file", "samples_per_prompt", "max_prompt", "max_new_tokens"]
    used = ["pairs", "reward_model", "reward_ref"] if args.pairs else used + ["temperature", "seed"]
    row = {name: value for name, value in asdict(args).items() if name in [*used, "dtype"] and value != ""}
    seconds = round(time.time() - (run.path / "args.json").stat().st_mtime, 1)  # it was written at the beginning
    row |= {"task": task, "prompts": prompts, "metrics": metrics, "confidence": 0.95, "seconds": seconds}
    row |= {name: about[name] for name in ("versions", "command", "git", "time")}
    common.write_whole(run.path / "result.json", json.dumps(row, indent=2) + "\n")
    values = {name: metric["value"] for name, metric in metrics.items()}
    common.write_whole(run.path / "metrics.jsonl", json.dumps({"step": 0, **values}) + "\n")
    for name, metric in metrics.items():
        print(f"{name:<24} {metric['value']:8.4f}  [{metric['low']:.4f}, {metric['high']:.4f}]")
    print(f"{prompts} prompts, {seconds} s: {run.path / 'result.json'}", flush=True)


def evaluate(args) -> None:
    wrong = [k for k in args.k if not 1 <= k <= args.samples_per_prompt]
    require(not wrong, f"--k {wrong}: expected numbers from 1 to --samples_per_prompt {args.samples_per_prompt}")
    both = bool(args.pairs) == bool(args.reward_model)
    require(both, "--pairs and --reward_model go together: give both to rate a reward model, or none of them")
    require(args.pairs or not args.reward_ref, "--reward_ref is about a --reward_model: give --pairs and both models")
    others = [name for name in ("dataset", "test_dataset", "reward_file", "pairs_out") if getattr(args, name)]
    found = f"--pairs rates a reward model; expected no --{' --'.join(others)} beside it"
    require(not (args.pairs and others), found)
    file = Path(args.pairs_out or "-")
    new = not file.exists() and file.parent.is_dir()
    require(new, f"--pairs_out {args.pairs_out}: expected a new file in a folder that exists")
    rate_reward_model(args) if args.pairs else measure_accuracy(*with_sizes(args))


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: evaluate(args), args.device)

"""What a checkpoint can do: Pass@1 and Pass@k with intervals, reward-model accuracy, answer files for judges.

    pass@k = 1 - C(n - c, k) / C(n, k)      for a prompt with c right answers among n samples                   (EVAL-1)

Chen et al. 2021 (arXiv:2107.03374): unbiased for the chance that one of k samples is right. The mean over prompts comes
with a Wilson interval (EVAL-2) of as many independent observations as the spread between prompts allows (EVAL-3), for
samples of one prompt are alike. Three things to evaluate, one a run:

    accuracy        greedy and sampled, of a task's own grader or a --reward_file
    --pairs         the share of preference pairs that a --reward_model puts in the right order
    --format        answers to instructions or two-turn questions, in the files that AlpacaEval 2 and MT-Bench read

What is left out, each for a reason
    1. The judges: they are paid services with clients of their own, which read the files that are written here.
    2. Few-shot prompts and log-likelihood multiple choice: other projects are made for them.

Run
    python evaluate.py                                                                    # this laptop, built-in model
    python evaluate.py --model runs/x/model                                               # after training
    torchrun --nproc_per_node=8 evaluate.py --model ... --dataset openai/gsm8k --test_rows 1319             # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 evaluate.py ...   # 2 nodes
    python evaluate.py --pairs pairs.jsonl --reward_model runs/y/reward/model
    python evaluate.py --format mt_bench --dataset question.jsonl --max_prompt 3072 --max_new_tokens 1024 --model ...
More in docs/evaluate.md. Shapes: B sequences, T completion positions, N unmasked tokens.
"""

import contextlib
import hashlib
import json
import math
import sys
import time

from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import common  # before torch: it sets how OpenMP threads wait
import tasks

import torch

from common import arg, require


@dataclass
class Args:
    # model and data
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    dataset: str = arg("", "the data: a Hub name or a .jsonl, .json or .parquet file; empty: the built-in task")
    task: tasks.Name = arg("auto", "what the data are; auto: their columns decide")
    test_dataset: str = arg("", "the held-out rows; empty: the test split of the Hub, or the last rows of --dataset")
    test_rows: int = arg(256, "held-out prompts per evaluation", at_least=1)
    reward_file: str = arg("", "a Python file with reward(prompts, completions, rows) -> numbers, one per completion")
    right_from: float = arg(1.0, "the reward from which a completion that only --reward_file can grade counts as right")
    max_prompt: int = arg(
        0, "the longest prompt, in tokens; 0: as in training, else 512 or half the model's positions", at_least=0
    )
    long_prompts: Literal["drop", "truncate", "error"] = arg("error", "what happens to longer prompts")
    # sampling
    samples_per_prompt: int = arg(16, "completions per prompt", at_least=1)
    k: list[int] = arg([], "Pass@k for these k; empty: powers of 4 up to --samples_per_prompt")
    max_new_tokens: int = arg(0, "the longest completion, in tokens, EOS included; 0: as for --max_prompt", at_least=0)
    temperature: float = arg(1.0, "the temperature of sampling and of every log-probability", at_least=0)
    # answer files
    format: Literal["", "alpaca_eval", "mt_bench"] = arg(
        "", "answer --dataset in a file for that judge; temperature 0: greedily"
    )
    generator: str = arg("", "the model's name in such a file; empty: made from --model")
    # reward models
    pairs: str = arg("", "the preference pairs on which --reward_model is rated: a Hub name or file")
    reward_model: str = arg("", "the reward model: made by qrm.py, or any token classifier with one label")
    reward_ref: str = arg("", "the model that a dpo --reward_model was trained from; empty: --model")
    objective: Literal["saved", "qrm", "orm", "step_prm", "dpo"] = arg(
        "saved", "how the reward model scores an answer; saved: as its folder says"
    )
    test_pairs: int = arg(
        0, "the number of pairs from the end of the file, those that qrm.py holds out; 0: all", at_least=0
    )
    step_separator: str = arg("\n", "the text that ends a step of an answer, for step_prm")
    micro_batch: int = arg(8, "sequences per forward pass on each rank; changes memory, never the result", at_least=1)
    # run
    out: str = arg("", "the run folder; empty: runs/<script>-<time>")
    seed: int = arg(0, "the seed of data order, sampling and new weights", at_least=0)
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "where the run takes place")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "the dtype of the computation; auto: bfloat16 on CUDA")
    rollout_rows: int = arg(256, "sequences that each rank generates at once", at_least=1)


# What the bare command changes: short sums.
BUILTIN = dict(max_prompt=24, max_new_tokens=24, micro_batch=64, step_separator="=")

# Arguments that only some evaluations read; given with another one they are refused.
READ_BY = dict.fromkeys(("task", "test_dataset", "test_rows", "reward_file", "right_from"), ("accuracy",))
READ_BY |= dict.fromkeys(("samples_per_prompt", "k"), ("accuracy",)) | {"dataset": ("accuracy", "--format")}
READ_BY |= dict.fromkeys(("reward_ref", "objective", "test_pairs"), ("--pairs",)) | {"generator": ("--format",)}

# Packages that may decide a result.
PACKAGES = ("torch", "transformers", "datasets", "math-verify")

# MT-Bench decodes each category at its own temperature, and others at 0.7.
MT_BENCH = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """EVAL-1, in integers of any size, so that nothing cancels."""
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def wilson(p: float, n: float) -> tuple[float, float]:
    """EVAL-2: the interval of 95 % for a share p of n independent observations; never empty, also at 0 and at 1."""
    z = 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def independent(values: list[float], groups: list, most: int) -> float:
    """EVAL-3: how many independent observations have the variance that the mean of values in [0, 1] has.

    Values of one group may be alike, groups are independent. With one value a group, each 0 or 1, it is their number.
    Where all are 0 or all are 1 the spread says nothing, and each group counts once. most: an upper limit.
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
    """The mean of any values, one a prompt, with the normal interval of 95 %."""
    m, n = sum(values) / len(values), len(values)
    half = 1.959964 * math.sqrt(sum((x - m) ** 2 for x in values) / max(1, n - 1) / n)
    return {"value": m, "low": m - half, "high": m + half}


# ---- completions -----------------------------------------------------------------------------------------------------


def complete(sampling, prompts: dict[int, list[int]], seed: int, draws, device) -> list[tuple]:
    """(number of the prompt, completion ids) of this rank's share of numbered prompts, one for each of `draws`.

    Temperature 0 is greedy. Noise is a function of (seed, draw, prompt): more samples leave the first ones as they are,
    and draw 0 is the sample that the training scripts take when they evaluate.
    """
    numbers, samples, mine, said = list(prompts), len(draws), [], time.time()
    size = common.world() * max(1, sampling.rows_at_once // samples)
    for first in range(0, len(numbers), size):  # as many pieces on every rank, some perhaps empty: FSDP gathers in each
        piece, noise = numbers[first : first + size][common.rank() :: common.world()], None
        if sampling.temperature and piece:
            columns = sampling.max_new_tokens
            noise = [common.uniforms(seed, common.EVAL, draw, piece, columns) for draw in draws]
            noise = torch.stack(noise, 1).flatten(0, 1)
        ids = sampling.complete([prompts[i] for i in piece], samples, noise)
        mine += list(zip([i for i in piece for _ in draws], ids))
        if time.time() - said > 10:
            common.say(f"  {min(first + size, len(numbers))} of {len(numbers)} prompts, {samples} completions each")
            said = time.time()
        if common.stop_requested(device):
            common.say("stopped before the end: nothing is written")
            raise SystemExit(1)
    return mine


def grade(task, mine: list[tuple], tokenizer, stops: set, args) -> list[dict]:
    """One row for each completion of this rank: was it right, its reward, had it an answer, did it end by itself?"""
    rows = [task.test[i] | {"completion_ids": ids} for i, ids in mine]
    texts = common.decode(tokenizer, [ids for _, ids in mine])
    if not rows:
        return []
    right = task.correct(texts, rows) if task.correct else None
    rewards = [None] * len(rows)
    if args.reward_file:
        rewards = task.reward([row["prompt"] for row in rows], texts, rows)
        rewards = [float(sum(x) if isinstance(x, list) else x) for x in rewards]
        right = right or [x >= args.right_from for x in rewards]
    answered = task.answered(texts) if task.answered else [None] * len(rows)
    return [
        {"prompt": i, "completion": text, "right": bool(ok), "reward": x, "answered": a, "ended": ids[-1] in stops}
        for (i, ids), text, ok, x, a in zip(mine, texts, right, rewards, answered)
    ]


def summary(greedy: list[dict], sampled: list[dict], n: int, ks: list[int]) -> dict[str, dict]:
    """Metrics with intervals. greedy: one row a prompt; sampled: n rows a prompt, one after the other."""
    metrics = {"eval/pass@1": share([row["right"] for row in greedy])}
    groups = [sampled[i : i + n] for i in range(0, len(sampled), n)]
    right = [sum(row["right"] for row in group) for group in groups]
    metrics["eval/sampled"] = share([c / n for c in right], most=len(sampled))
    for k in ks:
        metrics[f"eval/sampled_pass@{k}"] = share([pass_at_k(n, c, k) for c in right], most=len(sampled))
    if greedy[0]["answered"] is not None:
        metrics["eval/answered"] = share([row["answered"] for row in greedy])
    if greedy[0]["reward"] is not None:
        metrics["eval/reward"] = mean([row["reward"] for row in greedy])
        metrics["eval/reward_sampled"] = mean([sum(row["reward"] for row in group) / n for group in groups])
    metrics["length/finished"] = share([sum(row["ended"] for row in group) / n for group in groups], most=len(sampled))
    return metrics


# ---- reward models ---------------------------------------------------------------------------------------------------


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


def token_scores(models, micro, objective: str):
    """Z(s_t, a_t) of each completion token, [B, T], fp32; 0 where masked.

    A scalar head is read at the token itself, which it has seen; an LM head at the state before it. dpo: QRM-5's
    log pi_dpo - log pi_ref.
    """
    model, mask = models["reward"], micro["mask"]
    if common.has_scalar_head(model.config):
        return common.completion_scalars(model, micro, after=True) * mask
    scores = common.policy_logprobs(model, micro)[0]
    if objective == "dpo":
        ref = models["reward_ref"] if "reward_ref" in models else model  # noqa: SIM401 (a ModuleDict has no get)
        with torch.no_grad(), contextlib.nullcontext() if ref is not model else common.adapters_off(model):
            ref_scores = common.policy_logprobs(ref, micro)[0]
        scores = scores - ref_scores
    return scores


def find_steps(completion_ids, tokenizer, separator: str) -> list[list[int]]:
    """Where the steps of each completion end: at tokens that contain the separator, and at the last token."""
    contain = {i for i in {i for ids in completion_ids for i in ids} if separator in tokenizer.decode([i])}
    return [[t for t, i in enumerate(ids) if i in contain or t + 1 == len(ids)] for ids in completion_ids]


def step_mask(completion_ids, tokenizer, separator: str, mask):
    """The same as bool [B, T]."""
    ends = torch.zeros(mask.shape, dtype=torch.bool)
    for b, positions in enumerate(find_steps(completion_ids, tokenizer, separator)):
        ends[b, positions] = True
    return ends.to(mask.device)


@torch.no_grad()
def pair_margins(models, rows, tokenizer, args, device) -> list[tuple[int, float]]:
    """(number of the pair, score of the chosen answer minus that of the rejected one) of this rank's share."""
    numbers, margins = range(common.rank(), len(rows), common.world()), []
    one = lambda micro: {"x": token_scores(models, micro, args.objective)}  # noqa: E731
    with common.gathered(*models.values()):  # around the loop: ranks may have different numbers of batches
        for first in range(0, len(numbers), args.micro_batch):
            part = [rows[i] for i in numbers[first : first + args.micro_batch]]
            completion_ids = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in part]
            prompt_ids = [row["prompt_ids"] for row in part] * 2
            batch = common.make_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, device)
            ends = step_mask(completion_ids, tokenizer, args.step_separator, batch["mask"])
            scores = common.map_rows(one, batch, args.micro_batch)["x"]
            chosen, rejected = sequence_score(scores, batch["mask"], ends, args.objective).chunk(2)
            margins += zip(numbers[first : first + args.micro_batch], (chosen - rejected).tolist())
    return margins


# ---- what is asked for -----------------------------------------------------------------------------------------------


def check_combinations(args) -> None:
    """Values that are legal alone and not together."""
    require(args.temperature >= 1e-6 or args.format, f"--temperature must be at least 1e-06, found {args.temperature}")
    require(math.isfinite(args.right_from), f"--right_from must be a finite number, found {args.right_from}")
    require(args.step_separator != "", "--step_separator is empty; expected the text that ends a step")
    for k in args.k:
        fits = 1 <= k <= args.samples_per_prompt
        require(fits, f"--k {k}: expected a number from 1 to --samples_per_prompt {args.samples_per_prompt}")
    both = bool(args.pairs) == bool(args.reward_model)
    require(both, "--pairs and --reward_model go together: give both to rate a reward model, or none of them")
    one = not (args.pairs and args.format)
    require(one, f"--format {args.format} and --pairs are two evaluations; expected one of them")
    asked, default = "--format" if args.format else "--pairs" if args.pairs else "accuracy", Args()
    for name, readers in READ_BY.items():
        read = asked in readers or getattr(args, name) == getattr(default, name)
        require(read, f"--{name} is for {' and '.join(readers)}, and this evaluation is {asked}")
    if args.format:
        require(args.dataset != "", f"--dataset is empty; expected a file of questions for --format {args.format}")
        whole = args.long_prompts != "drop"
        require(whole, "--long_prompts drop would leave questions unanswered; expected error or truncate")


def with_sizes(args):
    """--max_prompt and --max_new_tokens where they are not given: those of the run that trained the model, which stand
    in args.json beside its folder, else 512 or what its positions leave. Answers for a judge take the latter."""
    if args.max_prompt and args.max_new_tokens:
        return args
    sizes = {"max_prompt": args.max_prompt, "max_new_tokens": args.max_new_tokens}
    file = Path(args.model).parent / "args.json"
    if Path(args.model).is_dir() and file.is_file() and not args.format:
        trained = json.loads(file.read_text()).get("args", {})
        sizes = {name: size or trained.get(name, 0) for name, size in sizes.items()}
    config = common.load_config(args.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 1024
    left = (positions - sum(sizes.values())) // max(1, list(sizes.values()).count(0))
    sizes = {name: size or max(1, min(512, left)) for name, size in sizes.items()}
    common.say("sizes of " + args.model + ": " + " ".join(f"--{name} {size}" for name, size in sizes.items()))
    return replace(args, **sizes)


def load_policy(args, device):
    """The model with its sampler; greedy is the same sampler at temperature 0."""
    shared = dict(dtype=args.dtype, device=device, trainable=False)
    tokenizer = common.load_tokenizer(args.model)
    policy = common.load_model(args.model, **shared)
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    return tokenizer, common.Sampling(policy, tokenizer, *limits)


def prepare(args):
    """The task with prompts that fit; every wrong argument and file is refused here, before a model is loaded."""
    task = tasks.load_task(
        args.task, args.dataset, args.reward_file, args.seed, args.test_rows, args.test_dataset, train=False
    )
    tokenizer = common.load_tokenizer(args.model)
    common.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    task = tasks.fit_prompts(task, tokenizer, args.max_prompt, args.long_prompts)
    common.say(task.note)
    return task


def measure_accuracy(args) -> None:
    """Greedy and sampled accuracy on held-out prompts."""
    device, started = common.local_device(args.device), time.time()
    task, n = prepare(args), args.samples_per_prompt
    run = common.RunFolder(args, __file__)
    tokenizer, sampling = load_policy(args, device)
    stops = set(common.stop_ids(sampling.policy, tokenizer))
    prompts = {i: sampling.encode(row) for i, row in enumerate(task.test)}
    graded = {}
    for name, how, draws in (("greedy", replace(sampling, temperature=0.0), [0]), ("sampled", sampling, range(n))):
        mine = grade(task, complete(how, prompts, args.seed, draws, device), tokenizer, stops, args)
        graded[name] = sorted(common.gather(mine), key=lambda row: row["prompt"])  # stable: draws stay in their order
    ks = args.k or [4**i for i in range(1, 99) if 4**i <= n]
    metrics = summary(graded["greedy"], graded["sampled"], n, [k for k in ks if k > 1])
    kinds = [(f"eval/{name}", row) for name, rows in graded.items() for row in rows]
    samples = [row | {"kind": kind, "prompt": task.test[row["prompt"]]["prompt"]} for kind, row in kinds]
    write(run, args, started, metrics, samples, task=task.name, prompts=len(prompts))


def rate_reward_model(args) -> None:
    """Pair accuracy of a reward model."""
    device, started, name = common.local_device(args.device), time.time(), args.reward_model
    config = common.load_config(name)
    saved, scalar = getattr(config, "reward_objective", ""), common.has_scalar_head(config)
    objective = saved if args.objective == "saved" else args.objective
    require(objective != "", f"--objective saved: {name} does not say what it was trained on; name the objective")
    require(saved in ("", objective), f"--objective {objective}: {name} was trained as {saved}")
    fits = {"qrm": True, "dpo": not scalar}.get(objective, scalar)
    require(fits, f"--objective {objective}: {name} is a {'scalar head' if scalar else 'language model'}")
    tokenizer = common.load_tokenizer(name)
    ref = args.reward_ref or args.model
    if objective == "dpo":
        common.same_tokenizer(name, tokenizer, ref, common.load_tokenizer(ref))
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    pairs = tasks.load_pairs(args.pairs)
    rows, note = common.encode_pairs(tokenizer, pairs, limit, limit)
    whole = [r for r in rows if len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) <= limit]
    require(bool(whole), f"--pairs {args.pairs}: no pair fits the {limit} positions of {name}")
    common.say(note + (f"; {len(rows) - len(whole)} too long together, left out" if len(whole) < len(rows) else ""))
    rows = whole[-args.test_pairs :]
    steps = objective != "step_prm" or any(args.step_separator in row["chosen"] for row in rows)
    require(steps, f"--step_separator {args.step_separator!r} ends no step of {args.pairs}; expected that of training")
    args = replace(args, objective=objective)
    run = common.RunFolder(args, __file__)
    shared = dict(dtype=args.dtype, device=device, trainable=False)
    models = torch.nn.ModuleDict({"reward": common.load_model(name, head="saved", **shared)})
    if objective == "dpo":
        models["reward_ref"] = common.load_model(ref, **shared)
    margins = dict(common.gather(pair_margins(models, rows, tokenizer, args, device)))
    prompts = [json.dumps(row["prompt"]) for row in rows]
    metrics = {"eval/pair_accuracy": share([float(margins[i] > 0) for i in range(len(rows))], prompts)}
    metrics["eval/margin"] = mean([margins[i] for i in range(len(rows))])
    sides = ("prompt", "chosen", "rejected")
    samples = [{"kind": "pair", **{s: row[s] for s in sides}, "margin": margins[i]} for i, row in enumerate(rows)]
    write(run, args, started, metrics, samples, task="pairs", prompts=len(set(prompts)))


def load_questions(args, tokenizer) -> list[dict]:
    """Rows of --dataset with `turns` (texts) and `temperature`; the longest prompt that can come of them must fit."""
    rows = tasks.read_rows(args.dataset)
    for i, row in enumerate(rows, 1):
        where = f"{args.dataset}: row {i}"
        if args.format == "alpaca_eval":
            row |= {"turns": [tasks.column(row, "instruction", where)], "temperature": args.temperature}
        else:
            require("question_id" in row, f"{where}: 'question_id' is missing; expected MT-Bench's question_id, turns")
            turns = row.get("turns")
            texts = isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)
            require(texts, f"{where}: 'turns' is {turns!r}; expected a list of texts, one a turn")
            row["temperature"] = MT_BENCH.get(row.get("category"), 0.7)
        chat = [{"role": ("user", "assistant")[j % 2], "content": turn}
                for j, turn in enumerate(x for turn in row["turns"] for x in (turn, "."))][:-1]  # fmt: skip
        longest = len(common.encode_prompt(tokenizer, chat)) + (len(row["turns"]) - 1) * args.max_new_tokens
        fits = longest <= args.max_prompt or args.long_prompts == "truncate"
        require(fits, f"{where}: its last prompt may have {longest} tokens, answers included; --max_prompt is "
                      f"{args.max_prompt}: expected a larger limit, or --long_prompts truncate")  # fmt: skip
    return rows


def answer_questions(args) -> None:
    """An answer file for a judge. A turn sees the questions and answers before it."""
    device, started = common.local_device(args.device), time.time()
    tokenizer = common.load_tokenizer(args.model)
    common.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    questions = load_questions(args, tokenizer)
    run = common.RunFolder(args, __file__)
    tokenizer, sampling = load_policy(args, device)
    stops = set(common.stop_ids(sampling.policy, tokenizer))
    chats, ended, cut = [[] for _ in questions], [], 0
    for turn in range(max(len(q["turns"]) for q in questions)):
        now = [i for i, q in enumerate(questions) if turn < len(q["turns"])]
        for i in now:
            chats[i].append({"role": "user", "content": questions[i]["turns"][turn]})
        cut += sum(len(common.encode_prompt(tokenizer, chats[i])) > args.max_prompt for i in now)
        for temperature in sorted({questions[i]["temperature"] for i in now}):
            some = [i for i in now if questions[i]["temperature"] == temperature]
            prompts = {i: sampling.encode({"prompt": chats[i]}) for i in some}
            mine = complete(replace(sampling, temperature=temperature), prompts, args.seed, [turn], device)
            for i, ids in common.gather(mine):
                chats[i].append({"role": "assistant", "content": common.decode(tokenizer, [ids])[0].strip()})
                ended.append(ids[-1] in stops)
    if cut:
        common.say(f"{cut} prompts were longer than --max_prompt {args.max_prompt} and lost their beginning")
    name = args.generator or args.model.strip("./").replace("/", "-")
    answers = [[m["content"] for m in chat if m["role"] == "assistant"] for chat in chats]
    if args.format == "alpaca_eval":
        rows = [{k: q[k] for k in ("dataset",) if k in q} | {"instruction": q["instruction"], "output": texts[0]}
                | {"generator": name} for q, texts in zip(questions, answers)]  # fmt: skip
        file, text = "alpaca_eval.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    else:
        key = lambda q: hashlib.sha256(f"{name} {args.seed} {q['question_id']}".encode()).hexdigest()[:22]  # noqa: E731
        rows = [{"question_id": q["question_id"], "answer_id": key(q), "model_id": name,
                 "choices": [{"index": 0, "turns": texts}], "tstamp": round(time.time(), 3)}
                for q, texts in zip(questions, answers)]  # fmt: skip
        # its judge takes the model's name from the file's, and wants all questions in order
        rows.sort(key=lambda row: row["question_id"])
        file = f"{name.replace('/', '-')}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if common.rank() == 0:
        common.write_whole(run.path / file, text)
    common.say(f"answers: {run.path / file}")
    samples = [{"kind": "answer", "prompt": chat[:-1], "completion": chat[-1]["content"]} for chat in chats]
    metrics = {"length/finished": share([float(x) for x in ended]), "length/prompts_cut": {"value": cut}}
    write(run, args, started, metrics, samples, task=args.format, prompts=len(questions))


def installed(name: str) -> tuple[str, str | None]:
    """(package, its version), None where it is not there: not every evaluation needs all of them."""
    try:
        return name, version(name)
    except PackageNotFoundError:
        return name, None


def write(run, args, started: float, metrics: dict, samples: list[dict], task: str, prompts: int) -> None:
    """result.json, the row of a table of results; metrics.jsonl; samples.jsonl with all completions; the screen."""
    run.samples(0, samples)
    if common.rank() == 0:
        about = json.loads((run.path / "args.json").read_text())
        names = ("model", "dataset", "test_dataset", "reward_file", "pairs", "reward_model", "objective", "format")
        settings = {name: value for name, value in asdict(args).items() if name in names and value}
        sizes = ("samples_per_prompt", "max_prompt", "max_new_tokens", "temperature", "seed", "dtype")
        settings |= {"task": task, "prompts": prompts} | {name: getattr(args, name) for name in sizes}
        versions = {"python": sys.version.split()[0]} | dict(map(installed, PACKAGES))
        row = settings | {"metrics": metrics, "confidence": 0.95, "seconds": round(time.time() - started, 1)}
        row |= {"command": about["command"], "git": about["git"], "time": about["time"], "versions": versions}
        common.write_whole(run.path / "result.json", json.dumps(row, indent=2) + "\n")
        values = {name: metric["value"] for name, metric in metrics.items()}
        common.write_whole(run.path / "metrics.jsonl", json.dumps({"step": 0, **values}) + "\n")
        for name, metric in metrics.items():
            interval = f"  [{metric['low']:.4f}, {metric['high']:.4f}]" if "low" in metric else ""
            print(f"{name:<24} {metric['value']:8.4f}{interval}")
        print(f"{prompts} prompts, {row['seconds']} s: {run.path / 'result.json'}", flush=True)


def evaluate(args) -> None:
    args = with_sizes(args)
    check_combinations(args)
    run = rate_reward_model if args.pairs else answer_questions if args.format else measure_accuracy
    run(args)


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: evaluate(args), args.device)

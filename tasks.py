"""Prompts, preference pairs and answer checkers.

A script asks for a task once and then only sees plain Python:

    task = load_task(args.task, args.dataset, args.reward_file, args.seed, args.test_rows)
    rows = task.rows(args.seed, step, 64)                                  # the prompts of one step
    rewards = task.reward([r["prompt"] for r in rows], completions, rows)  # one number (or list) per completion
    right = task.correct(completions, rows)                                # for the accuracy that is reported

A prompt is a string, or a list of chat messages {"role": ..., "content": ...}; a completion is always the text
of the answer alone. Everything random is a function of (seed, purpose, index), never of what was drawn before.

Contents
    1. graders     numbers (GSM8K) and LaTeX (MATH), never by substring
    2. files       rows of a Hub dataset or a local file
    3. rewards     a user's reward function, and what it may return
    4. load_task   everything above as one Task; fit_prompts: the prompts that are too long
    5. load_pairs  preference pairs

The built-in tasks, which need no download, are in builtin/tasks.py.
"""

import importlib.util
import importlib
import inspect
import itertools
import json
import math
import numbers
import os
import re
import runpy
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from common import BadInput


Name = Literal["auto", "chains", "strings", "words", "gsm8k", "math", "prompts"]  # of a task


@dataclass
class Task:
    """What a script needs to know about a task.

    `correct` and `answered` are None when nobody can say, as for a user's prompts with a user's reward.
    `answered` tells "no answer found" from "a wrong answer": True where `correct` had something to look at.
    """

    name: str
    rows: Callable  # rows(seed, step, n) -> the n training rows of one step, a function of its arguments alone
    test: list[dict]  # held-out rows, none of whose prompts is ever in `rows`
    reward: Callable | None  # reward(prompts, completions, rows) -> a float for each completion, or a list, one a token
    correct: Callable | None = None  # correct(completions, rows) -> list[bool]
    answered: Callable | None = None  # answered(completions) -> list[bool]
    steps: Callable | None = None  # steps(row, completion) -> a bool for each step of it: right so far?
    train: list[dict] = field(default_factory=list)  # what `rows` walks through; empty when it makes new rows
    gold: Callable | None = None  # gold(rows, seed, slip) -> answers by the task itself; slip: share with a mistake
    pairs: Callable | None = None  # pairs(n, seed, held_out) -> n preference pairs
    unannotated: Callable | None = None  # unannotated(n, seed) -> n rows {prompt}, nobody's answers beside them
    note: str = ""  # one line for the log: how many rows, how many were left out and why


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Independent random numbers for each (seed, purpose, index); `hash` would differ from process to process."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


def of_prompt(seed: int, purpose: str, row: dict) -> np.random.Generator:
    """Random numbers of a prompt, wherever it stands in a list and whichever rank has it."""
    return generator(seed, purpose, zlib.crc32(json.dumps(row["prompt"]).encode()))

BUILTIN_PAIRS = str(Path(__file__).resolve().parent / "builtin" / "pairs.jsonl")


def builtin():
    """The module of the built-in tasks, builtin/tasks.py."""
    try:
        return importlib.import_module("builtin.tasks")
    except ModuleNotFoundError as error:
        raise BadInput("--task: the built-in tasks need the folder builtin/; expected it, or a --dataset") from error


# ---------------------------------------------------------------------------------------------------------------
# 1. graders
# ---------------------------------------------------------------------------------------------------------------

# A minus sign belongs to the number unless something to subtract from stands before it: 10-3 ends in 3.
NUMBER = re.compile(r"(?:(?<![\w)\]}])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|/\d+)?|\.\d+)", re.ASCII)
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def find_numbers(text: str) -> list[str]:
    """All numbers of a text in a canonical form: '$1,234.50' -> '2469/2', '72.0' -> '72', '-3' -> '-3'."""
    text = text.replace("{,}", ",").replace("\\$", "").replace("$", "").replace("−", "-")
    text = FRACTION.sub(r"\1/\2", text)
    found = []
    for match in NUMBER.finditer(text):
        try:
            found.append(str(Fraction(match[0].replace(",", ""))))
        except (ValueError, ZeroDivisionError):  # thousands of digits from a model that repeats itself; 3/0
            continue
    return found


def last_number(text: str) -> str | None:
    return (find_numbers(text) or [None])[-1]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}, braces balanced; None when there is none."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin:i]
        start = text.rfind("\\boxed{", 0, start)
    return None


def extract_number(text: str) -> str | None:
    r"""The number that a text gives as its answer, in canonical form; None when it has no number.

    After the last `####`, else in the last \boxed{}, else the last number of the text. Commas, `$`, `%` and a
    trailing `.0` do not count.
    """
    _, mark, tail = text.rpartition("####")
    if mark and find_numbers(tail):
        return find_numbers(tail)[0]
    boxed = last_boxed(text)
    if boxed is not None and find_numbers(boxed):
        return find_numbers(boxed)[-1]
    return last_number(text)


def gsm8k_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    return [extract_number(text) == row["answer"] for text, row in zip(completions, rows, strict=True)]


def gsm8k_answered(completions: list[str]) -> list[bool]:
    return [extract_number(text) is not None for text in completions]


def same_latex(reference: str, answer: str) -> bool:
    r"""Whether two LaTeX answers mean the same: 1/2 and \frac12 do, 40 and 140 do not. Decided by math-verify."""
    from math_verify import LatexExtractionConfig, parse, verify

    # its timeouts are built on SIGALRM, which only exists in the main thread
    timeout = 5 if threading.current_thread() is threading.main_thread() else None
    how = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(f"\\boxed{{{s}}}", extraction_config=how, parsing_timeout=timeout) for s in (reference, answer)]
    return verify(parsed[0], parsed[1], timeout_seconds=timeout)


def math_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    r"""The last \boxed{} counts; without one the answer is wrong."""
    boxed = [last_boxed(text) for text in completions]
    return [b is not None and same_latex(row["answer"], b) for b, row in zip(boxed, rows, strict=True)]


def math_answered(completions: list[str]) -> list[bool]:
    return [last_boxed(text) is not None for text in completions]


# ---------------------------------------------------------------------------------------------------------------
# 2. files
# ---------------------------------------------------------------------------------------------------------------

EXTENSIONS = (".jsonl", ".json", ".parquet")


def is_local(dataset: str) -> bool:
    """Whether a name means a file here rather than a dataset of the Hub ('name' or 'organisation/name')."""
    data_file = dataset.lower().endswith((*EXTENSIONS, ".csv", ".tsv", ".txt"))
    return data_file or dataset.startswith(("/", ".", "~")) or os.path.exists(dataset)


def read_rows(dataset: str, split: str = "train") -> list[dict]:
    """All rows of a local file, or of one split of a Hub dataset."""
    if is_local(dataset):
        rows = read_file(dataset)
    else:
        splits = read_hub(dataset)
        if split not in splits:
            raise BadInput(f"{dataset}: it has no split '{split}'; expected one of {', '.join(splits)}")
        rows = splits[split].to_list()
    if not rows:
        raise BadInput(f"{dataset}: it has no rows; expected at least one")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"{dataset}: row {i} is a {type(row).__name__}; expected an object with named columns")
    return rows


def read_file(dataset: str) -> list:
    path, known = os.path.expanduser(dataset), ", ".join(EXTENSIONS)
    if not os.path.isfile(path):
        found = "it is a folder" if os.path.isdir(path) else "there is no such file"
        raise BadInput(f"{dataset}: {found}; expected a Hub name or a file ({known})")
    ending = os.path.splitext(path)[1].lower()
    if ending not in EXTENSIONS:
        raise BadInput(f"{dataset}: unknown extension '{ending}'; expected one of {known}")
    try:
        if ending == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8") as file:
            text = file.read().rstrip()
        if ending == ".json" and text.startswith("["):
            return json.loads(text)
    except ValueError as error:  # JSON's, UTF-8's and pyarrow's errors are all ValueErrors
        raise BadInput(f"{dataset}: it cannot be read as {ending[1:]} ({error})") from error
    rows = []
    for i, line in enumerate(text.split("\n") if text else [], 1):  # splitlines() would also split inside strings
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise BadInput(f"{dataset}: row {i} is not JSON ({error}); expected one object a line") from error
    return rows


def read_hub(name: str) -> dict:
    """The splits of a Hub dataset; the library caches them."""
    import datasets

    config = "main" if name == "openai/gsm8k" else None  # its other config, "socratic", has other solutions
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # offline, a wrong name, a gated set: the library raises many kinds
        reason = " ".join(str(error).split())
        raise BadInput(f"{name}: there is no such file, and loading it from the Hub failed ({reason})") from error


def column(row: dict, name: str, where: str, kind: type | tuple = str):
    """row[name], checked to be text or messages and not empty; `where` is 'file: row 3'."""
    value = row.get(name)
    expected = {str: "text", list: "a list of messages"}.get(kind, "text or a list of messages")
    if value is None or value in ("", []):
        raise BadInput(f"{where}: '{name}' is missing or empty; expected {expected}")
    if not isinstance(value, kind):
        raise BadInput(f"{where}: '{name}' is a {type(value).__name__}; expected {expected}")
    if isinstance(value, str):
        return value
    for m in value:
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise BadInput(f"{where}: '{name}' has the message {m!r}; expected {{'role': text, 'content': text}}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


# ---------------------------------------------------------------------------------------------------------------
# 3. rewards
# ---------------------------------------------------------------------------------------------------------------


def load_reward(path: str) -> Callable:
    """The function `reward(prompts, completions, rows)` of a user's Python file, wrapped in `checked_reward`."""
    where, expected = f"--reward_file {path}", "reward(prompts, completions, rows)"
    if not os.path.isfile(path):
        raise BadInput(f"{where}: there is no such file; expected Python with {expected}")
    try:
        reward = runpy.run_path(path).get("reward")
    except Exception as error:
        raise BadInput(f"{where}: running it raised {type(error).__name__} ({error}); expected {expected}") from error
    if not callable(reward):
        raise BadInput(f"{where}: it has no function 'reward'; expected {expected}")
    try:
        inspect.signature(reward).bind([], [], [])
    except TypeError as error:
        raise BadInput(f"{where}: it has reward{inspect.signature(reward)}; expected {expected}") from error
    return checked_reward(reward, path)


def checked_reward(reward: Callable, name: str) -> Callable:
    """`reward` with its result checked: a finite number, or a list of them, for each completion.

    The function that comes back takes `lengths`, the number of tokens of each completion, as an optional fourth
    argument: then lists of one number a token are checked to have that length.
    """

    def number(value, where: str) -> float:
        if not isinstance(value, numbers.Real):
            raise BadInput(f"{where} is a {type(value).__name__}; expected a number")
        if not math.isfinite(value):
            raise BadInput(f"{where} is {value}; expected a finite number")
        return float(value)

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors are welcome

    def checked(prompts: list, completions: list[str], rows: list[dict], lengths: list[int] | None = None) -> list:
        result = plain(reward(prompts, completions, rows))
        if not isinstance(result, list):
            raise BadInput(f"{name}: reward() returned a {type(result).__name__}; expected a list")
        if len(result) != len(completions):
            raise BadInput(f"{name}: reward() returned {len(result)} rewards; expected one for {len(completions)} rows")
        result = [plain(value) for value in result]
        for i, value in enumerate(result):
            where = f"{name}: the reward of row {i + 1}"
            if isinstance(value, list) != isinstance(result[0], list):
                kind, first = type(value).__name__, type(result[0]).__name__
                raise BadInput(f"{where} is a {kind} and that of row 1 a {first}; expected one kind for all")
            if not isinstance(value, list):
                result[i] = number(value, where)
                continue
            if lengths is not None and len(value) != lengths[i]:
                raise BadInput(f"{where} has {len(value)} numbers; expected {lengths[i]}, one for each token")
            result[i] = [number(v, f"{where} at token {t}") for t, v in enumerate(value, 1)]
        return result

    return checked


# ---------------------------------------------------------------------------------------------------------------
# 4. load_task
# ---------------------------------------------------------------------------------------------------------------

GSM8K_ASK = "\n\nReason step by step, and end with a line '#### ' followed by the final number alone."
MATH_ASK = "\n\nReason step by step, and put the final answer in \\boxed{}."


def gsm8k_row(row: dict, where: str) -> dict:
    """`answer` becomes the final number of the reference, whose worked steps stay as `solution`."""
    question, solution = column(row, "question", where), column(row, "answer", where)
    _, mark, tail = solution.rpartition("####")
    if not mark or not find_numbers(tail):
        raise BadInput(f"{where}: 'answer' ends in {solution[-40:]!r}; expected '#### ' and a number")
    prompt = [{"role": "user", "content": question + GSM8K_ASK}]
    return {**row, "prompt": prompt, "solution": solution, "answer": find_numbers(tail)[0]}


def math_row(row: dict, where: str) -> dict:
    """`answer` becomes what stands in the last \\boxed{} of the reference."""
    problem, solution = column(row, "problem", where), column(row, "solution", where)
    answer = last_boxed(solution)
    if not answer:
        raise BadInput(f"{where}: 'solution' ends in {solution[-40:]!r}; expected a final answer in \\boxed{{}}")
    return {**row, "prompt": [{"role": "user", "content": problem + MATH_ASK}], "answer": answer}


def prompt_row(row: dict, where: str) -> dict:
    """TRL's `prompt`, or its `messages` up to the last user turn."""
    if "prompt" in row:
        return {**row, "prompt": column(row, "prompt", where, (str, list))}
    messages = column(row, "messages", where, list)
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise BadInput(f"{where}: 'messages' has no user turn; expected at least one")
    return {**row, "prompt": messages}


def task_of_columns(dataset: str, row: dict, task: str) -> str:
    """The task whose columns the first row of a dataset has; must be `task` unless that is 'auto'."""
    needed = {
        "gsm8k": [{"question", "answer"}],
        "math": [{"problem", "solution"}],
        "prompts": [{"prompt"}, {"messages"}],
    }
    for name, sets in needed.items():
        if task in ("auto", name) and any(columns <= set(row) for columns in sets):
            return name
    sets = [columns for name in needed if task in ("auto", name) for columns in needed[name]]
    expected = " or ".join("+".join(sorted(columns)) for columns in sets)
    raise BadInput(f"{dataset}: it has the columns {', '.join(row) or '(none)'}; expected {expected} for --task {task}")


def load_task(
    task: str = "auto",
    dataset: str = "",
    reward_file: str = "",
    seed: int = 0,
    test_rows: int = 256,
    test_dataset: str = "",
    split: str = "train",
    graded: bool = True,
    train: bool = True,
) -> Task:
    """The task that the arguments of the same names describe; BadInput when they do not describe one.

    Held out are the rows of `test_dataset`, else the Hub's test split, else the last `test_rows` rows of the
    dataset; at most `test_rows` of them are used, and no training row has the prompt of any of them. `graded` False
    allows prompts that nobody can grade; then Task.reward is None. `train` False allows a task without training rows,
    such as a `test_dataset` alone.
    """
    reward = load_reward(reward_file) if reward_file else None
    dataset = dataset or (test_dataset if not train else "")
    if task == "auto" and not dataset:
        task = "chains"
    if task in ("chains", "strings", "words") and (dataset or test_dataset):
        raise BadInput(f"--dataset {dataset or test_dataset}: --task {task} makes its own rows; expected one of both")

    if task in ("chains", "strings", "words"):
        made = builtin().load(task, test_rows)
    else:
        made = task_from_data(task, dataset, bool(reward_file) or not graded, test_rows, test_dataset, split, train)
    if made.correct:
        reward = reward or (lambda prompts, completions, rows: [float(ok) for ok in made.correct(completions, rows)])
    made.reward = reward
    made.note = made.note or f"{task}: {len(made.train) or 'endless'} training rows, {len(made.test)} held-out rows"
    return made


def given_gold(rows: list[dict], seed: int, slip: float = 0.0) -> list[str]:
    """The answers that the rows bring with them."""
    if slip:
        raise BadInput(f"--gold_slip {slip}: these answers are given; expected 0, or --task chains or strings")
    return [row.get("solution") or row["answer"] for row in rows]


def task_from_data(
    task: str, dataset: str, may_lack_grader: bool, test_rows: int, test_dataset: str, split: str, needs_train: bool
) -> Task:
    """A Task without its reward, from a file or the Hub."""
    dataset = "openai/gsm8k" if task == "gsm8k" and not dataset else dataset
    if not dataset:
        raise BadInput(f"--dataset is empty; expected a Hub name or a file ({', '.join(EXTENSIONS)}) for --task {task}")
    raw = read_rows(dataset, split)
    task = task_of_columns(dataset, raw[0], task)
    if task == "prompts" and not may_lack_grader:
        raise BadInput(f"--reward_file is empty; expected one, because {dataset} has prompts and nothing to grade by")
    make_row, correct, answered = {
        "gsm8k": (gsm8k_row, gsm8k_correct, gsm8k_answered),
        "math": (math_row, math_correct, math_answered),
        "prompts": (prompt_row, None, None),
    }[task]
    if task == "math" and importlib.util.find_spec("math_verify") is None:
        raise BadInput(f"{dataset}: answers of MATH are graded by math-verify; expected it (pip install math-verify)")
    rows = [make_row(row, f"{dataset}: row {i}") for i, row in enumerate(raw, 1)]

    source = test_dataset or dataset
    has_test_split = not is_local(source) and "test" in read_hub(source)
    if test_dataset or (has_test_split and split != "test"):
        raw = read_rows(source, "test" if has_test_split else "train")
        task_of_columns(source, raw[0], task)
        test = [make_row(row, f"{source}: row {i}") for i, row in enumerate(raw, 1)]
    else:
        if test_rows >= len(rows):
            raise BadInput(f"--test_rows {test_rows}: {dataset} has {len(rows)} rows; expected some left to train on")
        rows, test = rows[: len(rows) - test_rows], rows[len(rows) - test_rows :]

    test_prompts = {json.dumps(row["prompt"]) for row in test}
    train = [row for row in rows if json.dumps(row["prompt"]) not in test_prompts]
    if needs_train and not train:
        raise BadInput(f"{dataset}: each of its training prompts is also a held-out prompt; expected others")
    note = f"{task}: {len(train)} training rows, {min(test_rows, len(test))} held-out rows"
    if len(train) < len(rows):
        note += f"; {len(rows) - len(train)} training rows left out, as their prompts are held out"
    gold = given_gold if correct else None
    return Task(task, walk(train), test[:test_rows], None, correct, answered, train=train, gold=gold, note=note)


def walk(rows: list[dict]) -> Callable:
    """rows(seed, step, n) that goes through a new permutation of `rows` in each epoch."""

    def of_step(seed: int, step: int, n: int) -> list[dict]:
        orders, picked = {}, []
        for position in range(step * n, (step + 1) * n):
            epoch, i = divmod(position, len(rows))
            if epoch not in orders:
                orders[epoch] = generator(seed, "epoch", epoch).permutation(len(rows))
            picked.append(rows[orders[epoch][i]])
        return picked

    return of_step


def fit_prompts(task: Task, length: Callable, max_prompt: int, long_prompts: str = "drop") -> Task:
    """`task` without the prompts of more than `max_prompt` tokens, as counted by length(prompt) -> int.

    "drop" leaves them out of train and test, "error" refuses them, and "truncate" keeps them all, for it is the
    tokens that are cut, where they are made. The task's note says how many there were.
    """
    fits = {name: [length(r["prompt"]) <= max_prompt for r in getattr(task, name)] for name in ("train", "test")}
    too_long = {name: len(kept) - sum(kept) for name, kept in fits.items()}
    if not any(too_long.values()):
        return task
    found = f"{too_long['train']} training and {too_long['test']} held-out prompts are longer than {max_prompt} tokens"
    if long_prompts == "truncate":
        return replace(task, note=f"{task.note}; {found}, truncated")
    left = {name: [r for r, ok in zip(getattr(task, name), fits[name], strict=True) if ok] for name in fits}
    if long_prompts == "error" or not task.train or not left["train"] or (task.test and not left["test"]):
        raise BadInput(f"--max_prompt {max_prompt}: {found}; expected a larger limit, or --long_prompts truncate")
    return replace(task, rows=walk(left["train"]), **left, note=f"{task.note}; {found}, left out")


# ---------------------------------------------------------------------------------------------------------------
# 5. load_pairs
# ---------------------------------------------------------------------------------------------------------------


def load_pairs(dataset: str, split: str = "train") -> list[dict]:
    """Rows {prompt, chosen, rejected} from TRL's columns: prompt is text or messages, the answers are text.

    Answers given as conversations, without a prompt in messages beside them, have it as their common beginning.
    """
    raw = read_rows(dataset, split)
    if not {"chosen", "rejected"} <= set(raw[0]):
        found = ", ".join(raw[0]) or "(none)"
        raise BadInput(f"{dataset}: it has the columns {found}; expected chosen+rejected or prompt+chosen+rejected")
    return [pair_row(row, f"{dataset}: row {i}") for i, row in enumerate(raw, 1)]


def pair_row(row: dict, where: str) -> dict:
    chosen, rejected = (column(row, name, where, (str, list)) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise BadInput(f"{where}: only one of 'chosen' and 'rejected' is text; expected both as text or as messages")
    if isinstance(chosen, str):
        return {**row, "prompt": column(row, "prompt", where, (str, list)), "chosen": chosen, "rejected": rejected}
    if isinstance(row.get("prompt"), list):
        prompt = column(row, "prompt", where, list)
    else:
        # the last message is always left for the answer, also when both answers are the same
        both = zip(chosen[:-1], rejected[:-1], strict=False)
        prompt = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in answer]
        if not prompt or roles != ["assistant"]:
            found = f"{len(prompt)} messages of prompt and then {' '.join(roles)}"
            raise BadInput(f"{where}: '{name}' has {found}; expected a prompt and one assistant message")
    return {**row, "prompt": prompt, "chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}


def load_answers(dataset: str, separator: str) -> tuple[list[dict], list[str]]:
    """Rows for a reward model, and which of their columns are answers.

    Pairs (`load_pairs`), whose rows may have `chosen_labels` and `rejected_labels`, one a step; or, one answer a row,
    {prompt, steps: [text], labels: [bool]}, which becomes {prompt, answer, answer_labels}: steps joined by `separator`.
    """
    raw = read_rows(dataset)
    if not {"prompt", "steps", "labels"} <= set(raw[0]):
        pairs, sides = load_pairs(dataset), ["chosen", "rejected"]
        labels = [f"{side}_labels" for side in sides]
        for i, pair in enumerate(pairs if any(name in pairs[0] for name in labels) else [], 1):
            for name in labels:
                if not isinstance(pair.get(name), list):
                    raise BadInput(f"{dataset}: row {i}: '{name}' is no list; expected one label a step, as in row 1")
        return pairs, sides
    rows = []
    for i, row in enumerate(raw, 1):
        where = f"{dataset}: row {i}"
        steps, labels = row.get("steps"), row.get("labels")
        if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
            raise BadInput(f"{where}: expected 'steps' and 'labels' as lists of the same length, one or more")
        if not all(isinstance(step, str) for step in steps):
            raise BadInput(f"{where}: 'steps' has something else than text; expected a list of texts")
        prompt = column(row, "prompt", where, (str, list))
        rows.append({"prompt": prompt, "answer": separator.join(steps), "answer_labels": [bool(x) for x in labels]})
    return rows, ["answer"]


def split_pairs(pairs: list[dict], test_rows: int, argument: str = "test_pairs") -> tuple[list[dict], list[dict]]:
    """(train, test): the last `test_rows` pairs are held out, and no training pair has the prompt of one of them."""
    if test_rows >= len(pairs):
        raise BadInput(f"--{argument} {test_rows}: there are {len(pairs)} pairs; expected some left to train on")
    test = pairs[len(pairs) - test_rows :]
    held_out = {json.dumps(pair["prompt"]) for pair in test}
    train = [pair for pair in pairs[: len(pairs) - test_rows] if json.dumps(pair["prompt"]) not in held_out]
    if not train:
        raise BadInput("each prompt of a training pair is also that of a held-out pair; expected others")
    return train, test

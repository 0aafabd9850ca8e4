"""Prompts, preference pairs and rewards of real data.

A script loads a task once and then only sees plain Python:

    task = load_task(args.task, args.dataset, args.reward_file, args.test_rows)
    rows = task.rows(args.seed, step, 64)                                  # the prompts of one step
    rewards = task.reward([r["prompt"] for r in rows], completions, rows)  # one number (or list) per completion
    right = task.correct(completions, rows)                                # for the accuracy that is reported

A prompt is a string, or a list of chat messages {"role": ..., "content": ...}; a completion is always the text
of the answer alone. Everything random is a function of (seed, purpose, index), never of what was drawn before.

Answers are graded in graders.py; the built-in tasks, which need no download, are in builtin/tasks.py. Both are loaded
where they are needed, so a copy that brings --dataset with prompts and --reward_file works without them.
"""

import contextlib
import importlib.util
import inspect
import itertools
import json
import math
import numbers
import os
import re
import sys
import types
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np

from common import BadInput, changed, encode_prompt, require

KINDS = ("auto", "chains", "strings", "words", "gsm8k", "math", "prompts")  # of a task; or gym:NAME


@dataclass
class Task:
    """What a script needs to know about a task.

    `correct` and `answered` are None where nobody can tell, as for a user's prompts with a user's reward.
    """

    name: str
    rows: Callable  # rows(seed, step, n) -> the n training rows of one step, a function of its arguments alone
    test: list[dict]  # rows to evaluate with, none of whose prompts is ever in `rows`
    reward: Callable | None  # reward(prompts, completions, rows) -> a float per completion, or a list, one per token
    correct: Callable | None = None  # correct(completions, rows) -> list[bool]
    answered: Callable | None = None  # answered(completions) -> list[bool]: is there an answer, right or wrong?
    reads: tuple[str, type] = ("answer", str)  # the column of a row that `correct` reads, and its type
    train: list[dict] = field(default_factory=list)  # what `rows` walks through; empty when it makes new rows
    held_out: list[dict] = field(default_factory=list)  # `test` and what is held out beside it
    pairs: Callable | None = None  # pairs(n, seed, held_out) -> n preference pairs
    unannotated: Callable | None = None  # unannotated(n, seed) -> n rows {prompt}, nobody's answers beside them
    note: str = ""  # one line for the log: how many rows, how many were left out and why


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Independent random numbers for each (seed, purpose, index); `hash` would differ from process to process."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


def optional(name: str):
    """A module that a copy of the scripts may leave out."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        found = f"{name.replace('.', '/')}.py cannot be loaded ({error})"
        expected = "expected it beside tasks.py, or a --dataset with a column 'prompt' and a --reward_file"
        raise BadInput(f"{found}; {expected}") from error


def builtin():
    """The module of the built-in tasks."""
    return optional("builtin.tasks")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- files -----------------------------------------------------------------------------------------------------------

EXTENSIONS = (".jsonl", ".json", ".parquet")


def is_local(dataset: str) -> bool:
    """Whether a name means a file here rather than a dataset of the Hub ('name' or 'organisation/name')."""
    data_file = dataset.lower().endswith((*EXTENSIONS, ".csv", ".tsv", ".txt"))
    return data_file or dataset.startswith(("/", ".", "~")) or os.path.exists(dataset)


def read_rows(dataset: str, split: str = "train") -> list[dict]:
    """All rows of a local file, or of one split of a Hub dataset, which may be named: NAME:SPLIT."""
    if is_local(dataset):
        rows = read_file(dataset)
    else:
        name, _, named = dataset.partition(":")
        splits, split = read_hub(name), named or split
        found = f"{dataset}: it has no split '{split}'"
        require(split in splits, f"{found}; expected {name}:SPLIT with one of {', '.join(splits)}")
        rows = splits[split].to_list()
    require(len(rows) > 0, f"{dataset}: it has no rows; expected at least one")
    for i, row in enumerate(rows, 1):
        require(isinstance(row, dict), f"{dataset}: row {i} is a {type(row).__name__}; expected an object with columns")
    return rows


def read_file(dataset: str) -> list:
    path, known = os.path.expanduser(dataset), ", ".join(EXTENSIONS)
    found = "it is a folder" if os.path.isdir(path) else "there is no such file"
    require(os.path.isfile(path), f"{dataset}: {found}; expected a Hub name or a file ({known})")
    ending, where = os.path.splitext(path)[1].lower(), dataset
    require(ending in EXTENSIONS, f"{dataset}: unknown extension '{ending}'; expected one of {known}")
    try:
        if ending == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            unique_keys([(name, None) for name in table.column_names])
            return table.to_pylist()
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            text = file.read().strip()
        if ending == ".json" and text.startswith("["):
            return json.loads(text, object_pairs_hook=unique_keys)
        rows = []
        for line in filter(str.strip, text.split("\n")):  # splitlines() would also split inside strings
            where = f"{dataset}: row {len(rows) + 1}"
            rows.append(json.loads(line, object_pairs_hook=unique_keys))
        return rows
    except Exception as error:  # torn, not UTF-8, nested too deeply, unreadable: the libraries raise many kinds
        expected = "Parquet" if ending == ".parquet" else "JSON, one object per line"
        raise BadInput(f"{where} cannot be read ({one_line(error)}); expected {expected}") from error


def unique_keys(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(key for key, _ in pairs)} is there twice")
    return row


def read_hub(name: str) -> dict:
    """The splits of a Hub dataset; the library caches them."""
    import datasets

    config = "main" if name == "openai/gsm8k" else None  # its other config, "socratic", has other solutions
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # offline, a wrong name, a gated set
        reason = f"loading it from the Hub failed ({one_line(error)})"
        raise BadInput(f"{name}: there is no such file, and {reason}; expected a file or a Hub name") from error


class Messages(list):
    """Messages that know where they were read, so that a chat template which refuses them can be traced to a row."""

    def __init__(self, messages: list[dict], where: str):
        super().__init__(messages)
        self.where = where


def column(row: dict, name: str, where: str, kind: type | tuple = str) -> str | Messages:
    """row[name], checked to be text or messages and not empty; `where` is 'file: row 3'."""
    value = row.get(name)
    expected = {str: "text", list: "a list of messages"}.get(kind, "text or a list of messages")
    require(value is not None and value not in ("", []), f"{where}: '{name}' is missing or empty; expected {expected}")
    require(isinstance(value, kind), f"{where}: '{name}' is a {type(value).__name__}; expected {expected}")
    texts = [value]
    if isinstance(value, list):
        value = messages(row, name, where)
        texts = [message["content"] for message in value]
    whole = not any(re.search("[\ud800-\udfff]", text) for text in texts)
    require(whole, f"{where}: '{name}' has half of a surrogate pair; expected text that UTF-8 can encode")
    return value


def messages(row: dict, name: str, where: str) -> Messages:
    """The messages in a column; what else would go to a chat template is refused."""
    for m in row[name]:
        plain = isinstance(m, dict) and isinstance(m.get("content"), str)
        plain = plain and m.get("role") in ("system", "user", "assistant")
        plain = plain and not any(value for key, value in m.items() if key not in ("role", "content"))
        found = f"{where}: '{name}' has the message {m!r:.200}"
        require(plain, f"{found}; expected role (system, user, assistant) and content as text, no other keys")
    for key in ("tools", "functions", "documents", "chat_template_kwargs"):
        found = f"{where}: '{key}' would go to the chat template with '{name}'"
        require(not row.get(key), f"{found}; expected no such column")
    return Messages([{"role": m["role"], "content": m["content"]} for m in row[name]], where)


# ---- rows ------------------------------------------------------------------------------------------------------------

GSM8K_ASK = "\n\nReason step by step, and end with a line '#### ' followed by the final number alone."
MATH_ASK = "\n\nReason step by step, and put the final answer in \\boxed{}."
COLUMNS = {  # what the rows are is told by the columns of the first one
    "gsm8k": [{"question", "answer"}],
    "math": [{"problem", "answer"}, {"problem", "solution"}],
    "prompts": [{"prompt"}, {"messages"}, {"chosen", "rejected"}],
    "pairs": [{"chosen", "rejected"}],
    "demonstrations": [{"messages"}, {"prompt", "completion"}],
}


def load_rows(dataset: str, kinds: list[str], split: str = "train") -> tuple[str, list[dict], str]:
    """(the one of these kinds that a dataset is of, its rows with an answer, a note about those without)."""
    raw = read_rows(dataset, split)
    sets = [(kind, columns) for kind in kinds for columns in COLUMNS[kind]]
    found = [kind for kind, columns in sets if columns <= set(raw[0])]
    names, expected = ", ".join(raw[0])[:200] or "(none)", " or ".join("+".join(sorted(names)) for _, names in sets)
    require(bool(found), f"{dataset}: it has the columns {names}; expected {expected}")
    make_row = {"prompts": prompt_row, "pairs": pair_row, "demonstrations": demonstration_row}
    make_row = make_row.get(found[0]) or partial(graded_row, found[0])
    rows = [make_row(row, f"{dataset}: row {i}") for i, row in enumerate(raw, 1)]
    missing = [i for i, row in enumerate(rows, 1) if row is None]
    expected = "'#### ' and a number, \\boxed{} or a column 'answer'"
    require(len(missing) < len(rows), f"{dataset}: no row has an answer; expected {expected}")
    note = f"; {len(missing)} rows of {dataset} without an answer left out: {missing[:3]}" if missing else ""
    return found[0], [row for row in rows if row is not None], note


def graded_row(kind: str, row: dict, where: str) -> dict | None:
    """A row of `gsm8k` or `math` with `prompt` and the right `answer`; None without one."""
    name, ask = ("question", GSM8K_ASK) if kind == "gsm8k" else ("problem", MATH_ASK)
    turns, answer = [{"role": "user", "content": column(row, name, where) + ask}], reference(kind, row, where)
    kept = {"solution": given(row, "answer", where)} if kind == "gsm8k" else {}
    return {**row, **kept, "prompt": Messages(turns, where), "answer": answer} if answer else None


def reference(kind: str, row: dict, where: str) -> str | None:
    """The right answer of a row of `gsm8k` or `math`, as graders.py reads it; None where there is none."""
    names = ("answer", "solution") if kind == "math" else ("answer",)
    return getattr(optional("graders"), f"{kind}_reference")(*(given(row, name, where) for name in names))


def given(row: dict, name: str, where: str) -> str:
    """The text or number in a column; empty where there is none."""
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value) if math.isfinite(value) else ""
    return "" if value is None or value == "" else column(row, name, where)


def prompt_row(row: dict, where: str) -> dict:
    """TRL's `prompt`, or its `messages` up to the last user turn, or what `chosen` and `rejected` begin with."""
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        return pair_row(row, where)  # a `prompt` as text beside them is only a part of it
    if "prompt" in row or "messages" not in row:
        return {**row, "prompt": column(row, "prompt", where, (str, list))}
    prompt = column(row, "messages", where, list)
    while prompt and prompt[-1]["role"] != "user":
        prompt.pop()
    require(len(prompt) > 0, f"{where}: 'messages' has no user turn; expected at least one")
    return {**row, "prompt": prompt}


def pair_row(row: dict, where: str) -> dict:
    """TRL's `chosen` and `rejected`, text or messages; without a prompt in messages, it is their common beginning."""
    chosen, rejected = (column(row, name, where, (str, list)) for name in ("chosen", "rejected"))
    found = f"{where}: only one of 'chosen' and 'rejected' is text"
    require(type(chosen) is type(rejected), f"{found}; expected both as text or as messages")
    if isinstance(chosen, str) or isinstance(row.get("prompt"), list):
        prompt = column(row, "prompt", where, (str, list))
    else:
        both = zip(chosen[:-1], rejected[:-1], strict=False)  # the last message is always the answer
        prompt = Messages([a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], both)], where)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    answers = {"chosen": chosen, "rejected": rejected}
    return {**row, "prompt": prompt} | {k: answer_text(prompt, v, k, where) for k, v in answers.items()}


def demonstration_row(row: dict, where: str) -> dict:
    """{prompt, chosen}: `chosen` is the `completion`, text or one message, or the last of `messages`."""
    row = {key: value for key, value in row.items() if key != "rejected"}  # it has not been read as an answer
    if "messages" in row:
        turns = column(row, "messages", where, list)
        prompt, answer, name = Messages(turns[:-1], where), turns[-1:], "messages"
    else:
        prompt, answer = (column(row, name, where, (str, list)) for name in ("prompt", "completion"))
        name = "completion"
    return {**row, "prompt": prompt, "chosen": answer_text(prompt, answer, name, where)}


def answer_text(prompt: str | list, answer: str | list, name: str, where: str) -> str:
    """An answer that is text, or one message of the assistant after a prompt."""
    if isinstance(answer, str):
        return answer
    roles = [message["role"] for message in answer]
    found = f"{where}: '{name}' has {len(prompt)} messages of prompt and then {' '.join(roles)}"
    require(len(prompt) > 0 and roles == ["assistant"], f"{found}; expected a prompt and one assistant message")
    return column(answer[0], "content", f"{where}: '{name}'")


def apart(rows: list[dict], test: list[dict]) -> list[dict]:
    """The rows whose prompts are not among those of `test`."""
    held_out = {asked(row["prompt"]) for row in test}
    return [row for row in rows if asked(row["prompt"]) not in held_out]


def asked(prompt: str | list) -> str:
    """The same for a prompt as text and as messages, and with what a task appends to it."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return text.removesuffix(GSM8K_ASK).removesuffix(MATH_ASK)


def load_pairs(dataset: str) -> list[dict]:
    """Rows {prompt, chosen, rejected}: prompt is text or messages, the answers are text."""
    return load_rows(dataset, ["pairs"])[1]


def load_demonstrations(dataset: str) -> list[dict]:
    """Rows {prompt, chosen} to imitate, or pairs as they are."""
    return load_rows(dataset, ["pairs", "demonstrations"])[1]


def split_pairs(pairs: list[dict], test_rows: int, argument: str = "test_pairs") -> tuple[list[dict], list[dict]]:
    """(train, test): the last `test_rows` pairs are held out, and no training pair has the prompt of one of them."""
    found = f"--{argument} {test_rows}: there are {len(pairs)} pairs"
    require(test_rows < len(pairs), f"{found}; expected some left to train on")
    test = pairs[len(pairs) - test_rows :]
    train = apart(pairs[: len(pairs) - test_rows], test)
    require(bool(train), "each prompt of a training pair is also that of a held-out pair; expected others")
    return train, test


# ---- rewards ---------------------------------------------------------------------------------------------------------

FLOAT32_MAX = float(np.finfo(np.float32).max)


def load_reward(path: str) -> Callable:
    """The function `reward(prompts, completions, rows)` of a user's Python file, wrapped in `checked_reward`.

    The file is a module of its name, as process pools need it, and its folder is searched for what it imports.
    """
    where, expected = f"--reward_file {path}", "expected reward(prompts, completions, rows)"
    require(os.path.isfile(path), f"{where}: there is no such file; {expected} in it")
    file = os.path.abspath(path)
    folder, name = os.path.dirname(file), os.path.splitext(os.path.basename(file))[0]
    known = sys.modules[name].__spec__ if name in sys.modules else PathFinder.find_spec(name)
    taken = name in sys.stdlib_module_names or (known and known.origin != file)
    require(not taken, f"{where}: another module has the name {name}; expected another file name")
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = file
    sys.path.insert(0, folder)
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        found = f"{where}: running it raised {type(error).__name__} ({one_line(error)})"
        raise BadInput(f"{found}; {expected}") from error
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)  # for what is imported later; the project's and installed modules come first
    reward = getattr(module, "reward", None)
    require(callable(reward), f"{where}: it has no function 'reward'; {expected}")
    names, signature = [], "(?)"
    with contextlib.suppress(TypeError, ValueError):  # it takes other arguments; it is built in
        signature = inspect.signature(reward)
        names = list(signature.bind([], [], []).arguments)
    require(names == ["prompts", "completions", "rows"], f"{where}: it has reward{signature}; {expected}")
    return checked_reward(reward, path)


def checked_reward(reward: Callable, name: str) -> Callable:
    """`reward` with its result checked: a finite number, or a list of one per token, for each completion."""

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors are welcome

    def number(value, where: str) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        require(real, f"{where} is a {type(value).__name__}; expected a number")
        number = math.inf if abs(value) > FLOAT32_MAX else float(value)  # float(10**400) would raise
        require(math.isfinite(number), f"{where} is {number} in float32; expected a finite number")
        return number

    def checked(prompts: list, completions: list[str], rows: list[dict]) -> list:
        if not completions:  # of a rank beyond the held-out rows
            return []
        try:
            result = plain(reward(prompts, completions, rows))
        except SystemExit as stop:  # else a rank would leave the others without a word
            raise BadInput(f"{name}: reward() called sys.exit({stop.code!r}); expected a list of rewards") from stop
        require(isinstance(result, list), f"{name}: reward() returned a {type(result).__name__}; expected a list")
        found = f"{name}: reward() returned {len(result)} rewards"
        require(len(result) == len(completions), f"{found}; expected one for {len(completions)} rows")
        result = [plain(value) for value in result]
        for i, (value, row) in enumerate(zip(result, rows, strict=True)):
            where = f"{name}: the reward of row {i + 1}"
            found = f"{where} is a {type(value).__name__} and that of row 1 a {type(result[0]).__name__}"
            require(isinstance(value, list) == isinstance(result[0], list), f"{found}; expected one kind for all")
            if isinstance(value, list):
                n = len(row.get("completion_ids", value))
                require(len(value) == n, f"{where} has {len(value)} numbers; expected {n}, one for each token")
                result[i] = [number(v, f"{where} at token {t}") for t, v in enumerate(value, 1)]
            else:
                result[i] = number(value, where)
        return result

    return checked


# ---- the task --------------------------------------------------------------------------------------------------------


def load_task(
    task: str = "auto", dataset: str = "", reward_file: str = "", test_rows: int = 256, test_dataset: str = "",
    graded: bool = True, train: bool = True,
) -> Task:  # fmt: skip
    """The task that the arguments of the same names describe; BadInput when they do not describe one.

    Held out are the rows of `test_dataset`, else the Hub's test split (not of NAME:SPLIT), else the last `test_rows`
    rows; at most `test_rows` of them are used, and no training row has the prompt of any of them. `graded` False
    allows prompts that nobody can grade; then Task.reward is None. `train` False allows a `test_dataset` alone.
    """
    gym = task.startswith("gym:")
    require(task in KINDS or gym, f"--task must be one of {', '.join(KINDS)}, or gym:NAME, found {task!r}")
    reward = load_reward(reward_file) if reward_file else None
    dataset = dataset or (test_dataset if not train else "")
    if gym or task in ("chains", "strings", "words") or (task == "auto" and not dataset):
        task, found = task.replace("auto", "chains"), f"--{'test_' * (not dataset)}dataset {dataset or test_dataset}"
        require(not dataset and not test_dataset, f"{found}: --task {task} makes its own rows; expected one of both")
        made = optional("builtin.gym" if gym else "builtin.tasks").load(task, test_rows)
    else:
        made = task_of_data(task, dataset, test_rows, test_dataset, train)
    found = f"--reward_file is empty; expected one, because {dataset} has prompts and nothing to grade by"
    require(made.correct is not None or reward is not None or not graded, found)
    if made.correct:
        reward = reward or (lambda prompts, completions, rows: [float(ok) for ok in made.correct(completions, rows)])
    return replace(made, reward=reward, held_out=made.held_out or made.test)


def task_of_data(task: str, dataset: str, test_rows: int, test_dataset: str, needs_train: bool) -> Task:
    """A Task without its reward, from a file or the Hub."""
    dataset = dataset or ("openai/gsm8k" if task == "gsm8k" else "")
    name = "dataset" if needs_train else "test_dataset"
    found = f"--{name} is empty; expected a Hub name or a file ({', '.join(EXTENSIONS)}) for --task {task}"
    require(bool(dataset), found)
    task, rows, note = load_rows(dataset, ["gsm8k", "math", "prompts"] if task == "auto" else [task])
    source = test_dataset or dataset
    has_test_split = not is_local(source) and ":" not in source and "test" in read_hub(source)
    if test_dataset or has_test_split:
        _, test, more = load_rows(source, [task], "test" if has_test_split else "train")
        note += more
    else:
        found = f"--test_rows {test_rows}: {dataset} has {len(rows)} rows"
        require(test_rows < len(rows), f"{found}; expected some left to train on")
        rows, test = rows[: len(rows) - test_rows], rows[len(rows) - test_rows :]
    there = task != "math" or importlib.util.find_spec("math_verify")
    require(bool(there), f"{dataset}: math-verify grades answers of MATH; expected it (pip install math-verify)")
    train = apart(rows, test)
    found = f"{dataset}: each of its training prompts is also a held-out prompt; expected others"
    require(bool(train) or not needs_train, found)
    note = f"{task}: {len(train)} training rows, {min(test_rows, len(test))} held-out rows{note}"
    if len(train) < len(rows):
        note += f"; {len(rows) - len(train)} training rows left out, as their prompts are held out"
    made = Task(task, walk(train), test[:test_rows], None, train=train, held_out=test, note=note)
    if task == "prompts":
        return made
    grade = optional("graders")
    return replace(made, correct=getattr(grade, f"{task}_correct"), answered=getattr(grade, f"{task}_answered"))


def walk(rows: list[dict]) -> Callable:
    """rows(seed, step, n) that goes through a new permutation of `rows` in each epoch."""

    def of_step(seed: int, step: int, n: int) -> list[dict]:
        order = cache(lambda epoch: generator(seed, "epoch", epoch).permutation(len(rows)))
        places = (divmod(position, len(rows)) for position in range(step * n, (step + 1) * n))
        return [rows[order(epoch)[i]] for epoch, i in places]

    return of_step


def fit_prompts(task: Task, tokenizer, max_prompt: int, long_prompts: str = "drop") -> Task:
    """`task` without the prompts of more than `max_prompt` tokens.

    "drop" leaves them out of train and test, "error" refuses them, and "truncate" keeps them all, for it is the
    tokens that are cut, where they are made. A task that makes its training rows makes others for those left out.
    """
    changes = Counter()

    def fit(rows: list[dict]) -> list[dict]:
        return [row for row in rows if len(encode_prompt(tokenizer, row["prompt"], changes)) <= max_prompt]

    def made(seed: int, step: int, n: int) -> list[dict]:
        rows, more = fit(task.rows(seed, step, n)), n
        refused = f"--max_prompt {max_prompt}: {n - len(rows)} of the {n} prompts of step {step} are longer"
        require(len(rows) == n or long_prompts == "drop", f"{refused}; expected a larger limit")
        while len(rows) < n:
            rows, more = fit(task.rows(seed, step, 2 * more)), 2 * more  # begins with the same rows
        return rows[:n]

    left = {"train": fit(task.train), "test": fit(task.test)}
    long = len(task.train) - len(left["train"]), len(task.test) - len(left["test"])
    found, note = f"{long[0]} training and {long[1]} held-out prompts are longer than {max_prompt} tokens", task.note
    note += changed(changes) + f"; {found}, {'truncated' if long_prompts == 'truncate' else 'left out'}" * any(long)
    if long_prompts == "truncate":
        return replace(task, note=note)
    enough = not any(long) or long_prompts == "drop" and all(left[name] or not getattr(task, name) for name in left)
    expected = "expected a larger limit" + " or --long_prompts truncate" * (long_prompts == "error")
    require(enough, f"--max_prompt {max_prompt}: {found}; {expected}")
    rows = made if task.rows and not task.train else walk(left["train"]) if any(long) else task.rows
    return replace(task, rows=rows, **left, note=note)

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
import sys
import threading
import types
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

import numpy as np

from common import BadInput, changed, encode_prompt


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
        raise BadInput("the built-in tasks need the folder builtin/, which is missing; expected a --dataset") from error


# ---------------------------------------------------------------------------------------------------------------
# 1. graders
# ---------------------------------------------------------------------------------------------------------------

# What writers spell differently is made alike before it is compared; docs/graders.md has the reasons.
SPELLINGS = [
    (r"[−–‒﹣]", "-"),
    (r"[€£¥₹]|\\(?:pounds|euro)\b|<<.*?>>", ""),  # GSM8K's <<9*2=18>> too
    (r"°", r"^\\circ"),
    (r"[⁰¹²³⁴-⁹]+", lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}"),
    (r"[\s~]", " "),  # thin and unbreakable spaces too
    (r"\\varnothing\b", r"\\emptyset"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"(?<=\d)(?:,?(?:\\!)+,? ?|\\[,;: ]|\{,\}|[ '’])(?=\d{3}(?!\d))", ""),  # 1\,234
    # 27,000 - 4,500\pi, but (1,234) is a pair
    (r"^(?!.*(?:[(\[]|\\\{)).*$", lambda line: THOUSANDS.sub(lambda n: n[0].replace(",", ""), line[0])),
    (r"(?<![\d.,])(\d+) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 2 1/2
    (r"^([^=<>]*\d) *= *([a-zA-Z])$", r"\2 = \1"),  # 2 = x
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot) *\{(\d+)\}", lambda match: _repeating(*match.groups())),
    (r"^(?:\\[,;:! ]|\\q?quad|\\displaystyle|\\approx|≈| )+", ""),
    (r"(?:(?<!right)[.,;:]|\\[.,;:! ]|\\q?quad| |(?<!\\)\$)+$", ""),
    (r"\\(?:text|mbox|mathrm)\{ *(-?[\d.,]+)([^\d{}]*)\}", r"\1\\text{\2}"),  # \text{20 miles}
    (r"([\d}]) *\\(?:text|mbox)\{[^{}]*\b(and|or)\b[^{}]*\}", r"\1\\text{ \2 }"),  # 3 \text{ h and } 20
    *(
        (rf"(?i)([\d}}]) *(\\text\{{)? *{name}\b", rf"\1 \\cdot 10^{{{zeros}}}\2")
        for name, zeros in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ),
]
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
PLAIN = [  # LaTeX of a number as plain text
    (r"\\(?:text\w*|mbox|math\w*) *\{([^{}]*)\}", r" \1 "),
    (r"\\frac *(?:\{ *(-?\d+) *\}|(\d)) *(?:\{ *(\d+) *\}|(\d))", r" \1\2/\3\4"),
    (r"\\(?:cdot|times)|[×·⋅]", "*"),
    (r"\\?\$", ""),
    (r"\\[,;:! ()\[\]]|\\?%|(?<!\d)\*\*|\*\*(?!\d)", " "),
    (r"([a-zA-Z]) *\^ *\{?-?\d+\}?", r"\1"),  # cm^2
    (r"\^ *\{ *(-?\d+) *\}", r"^\1"),
    (r"(\d)[kK]\b", r"\1*10^3"),
    (r"(^|[=:(*~]) *- +(?=[\d.])", r"\1-"),  # - 5
]
# A minus sign belongs to the number unless something to subtract from stands before it: 10-3 ends in 3.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-|(?<![\w.]))"
    r"(?:(?:(?P<whole>\d+) +(?:and +)?)?(?P<top>\d+)/(?P<bottom>\d+)"
    r"|(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))"
    r"(?P<tens>(?: *[*x] *10\^-?\d\d?(?!\d)|e[+-]?\d\d?(?!\w))*)(?:\^(?P<power>-?\d\d?))?(?!\d|\.\d)",
    re.ASCII,
)
JOINED = re.compile(r"(?:[-+*/^÷,;:&|<>]|\b(?:and|or|to|x|plus|minus|times)) *$")  # 3, 4 and 3*4 are not one number
ANSWER = re.compile(r"####.*\d|\\(?:boxed|fbox)\b|\b[Aa]nswer(?: is)?:? *\$?-?\d|^A:", re.M)
NEXT_QUESTION = re.compile(
    r"\b(?:Q|Question|Problem|Exercise|Instruction|Input|User|Human)\b[*\d ]*:|^(?:user|human):|<\|im_start\|"
    r"|^(?=.*\d).{25,}\? *$",
    re.M,
)
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z]) *")


def _repeating(whole: str, once: str, again: str) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}"""
    above = int(whole + once + again) - int(whole + once or 0)
    return rf"\frac{{{above}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}}"


def respell(text: str, rules: list) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def find_numbers(text: str) -> list[tuple[Fraction, int, int]]:
    """The numbers of a plain text, each with its begin and end: 1,234.50  -3  2 1/2  2 x 10^3  10^2."""
    found = []
    for match in NUMBER.finditer(text):
        get = match.groupdict()
        try:
            value = Fraction((get["number"] or get["top"]).replace(",", "")) / int(get["bottom"] or 1)
            value = value + int(get["whole"] or 0) if get["sign"] != "-" else -value - int(get["whole"] or 0)
            for tens in re.findall(r"(?:\^|e)([+-]?\d+)", get["tens"]):
                value *= Fraction(10) ** int(tens)
            value **= int(get["power"] or 1)
        except (ValueError, ZeroDivisionError):  # thousands of digits from a model that repeats itself; 3/0
            continue
        if not (get["bottom"] and value.denominator == 1):  # 48/2 is a sum to do
            found.append((value, match.start(), match.end()))
    return found


def one_number(line: str) -> Fraction | None:
    """The number that a line states, after its last `=`, `:` or "is"; None for several numbers or bare arithmetic."""
    line = respell(respell(line, SPELLINGS), PLAIN)
    aside = re.sub(r"\([^()]*\)", " ", line)  # 18 (9*2)
    for part in reversed(re.split(r"=|≈|: |\bis\b|\bare\b", aside if re.search(r"\d", aside) else line)):
        found = find_numbers(part)
        if not found:
            continue
        first = not re.search(r"[a-zA-Z]", part[: found[0][1]])  # 18 dollars for 2 weeks, but 2 weeks later 18 dollars
        pair = found[:2] if first else found[-2:]
        begin = pair[-1][1] + part[pair[-1][1] :].startswith("-")
        if len(pair) == 1 or not JOINED.search(part[pair[0][2] : begin]):
            return found[0 if first else -1][0]
        if not re.fullmatch(r"[-\d .*+/()^x]+", part):  # after 18 = 9*2 the part before counts
            return None
    return None


def last_number(text: str) -> str | None:
    """The last number of a text in canonical form: $1,234.50 -> 2469/2, 72.0 -> 72."""
    found = find_numbers(respell(respell(text, SPELLINGS), PLAIN))
    return str(found[-1][0]) if found else None


def own_answer(text: str) -> str:
    """A completion without its thoughts, and without the next question that some models go on with."""
    text = text.rpartition("</think>")[2]
    answer = ANSWER.search(text)
    question = answer and NEXT_QUESTION.search(text, answer.end())
    return text[: question.start()] if question else text


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...} or \fbox{...}, or after a \boxed without braces; else None."""
    for match in reversed(list(BOX.finditer(text))):
        rest, depth = text[match.end() :], 0
        if not rest.startswith("{"):
            return re.split(r"[$\n]|\\[)\]]", rest)[0].strip(" .")
        for brace in re.finditer(r"(?<!\\)[{}]", rest):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return rest[1 : brace.start()]
    return None


def extract_number(text: str) -> str | None:
    r"""The number that a text gives as its answer, in canonical form; None when it gives none, or several.

    After the last `####`, else in the last \boxed{}, else in the last sentence that has digits.
    """
    text = own_answer(text)
    lines = [tail.strip().split("\n")[0] for tail in text.split("####")[1:]]
    lines = [line for line in lines if re.search(r"\d", line) and not re.match(r"\W*(?:step|part)\b", line, re.I)]
    boxed = last_boxed(text)
    if lines:
        line = next(s for s in re.split(r"(?<=[.!?]) ", lines[-1]) if re.search(r"\d", s))
    elif boxed and re.search(r"\d", boxed):
        line = boxed
    else:
        line = ([s for s in re.split(r"(?<=[.!?])\s|\n", text) if re.search(r"\d", s)] or [""])[-1]
    number = one_number(line)
    return None if number is None else str(number)


def gsm8k_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    return [extract_number(text) == row["answer"] for text, row in zip(completions, rows, strict=True)]


def gsm8k_answered(completions: list[str]) -> list[bool]:
    return [extract_number(text) is not None for text in completions]


def same_latex(reference: str, answer: str) -> bool:
    r"""Whether two LaTeX answers mean the same: 1/2 and \frac12 do, 40 and 140 do not. Decided by math-verify.

    Before it, spellings are made alike, and what it ignores (bases, a.m.) is compared; after it, equations and small
    numbers are checked again (docs/graders.md).
    """
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    texts = [respell(s, SPELLINGS) for s in (reference, answer)]
    words = [re.sub(r"\\(?:text\w*|mbox|mathrm) *\{([^{}]*)\}", r"\1", text).split() for text in texts]
    if words[0] == words[1]:
        return bool(words[0])
    for marks in (r"(?<=[\dA-F])_\{?(\w+)", r"\b([ap])\.? ?m\b"):  # math-verify ignores bases, and a.m. beside a time
        found = [re.findall(marks, text) for text in texts]
        if all(found) and found[0] != found[1]:
            return False
    # its timeouts are built on SIGALRM, which only exists in the main thread
    timeout = 5 if threading.current_thread() is threading.main_thread() else None
    how = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(f"\\boxed{{{s}}}", extraction_config=how, parsing_timeout=timeout) for s in texts]
    options = dict(allow_set_relation_comp=True, timeout_seconds=timeout)
    if not verify(*parsed, **options):
        return False
    if parsed[1][0] == sympy.EmptySet and re.search(r"\d", texts[1]):
        return False  # [2,1) is as empty as [5,3)
    equations = [node for node in sympy.preorder_traversal(parsed[1][:1]) if isinstance(node, sympy.Eq)]
    if any(eq.lhs.is_number and eq.rhs.is_number and not verify(eq.lhs, eq.rhs, **options) for eq in equations):
        return False  # 1 = 2
    # math-verify compares six decimals: here it is six digits after the zeros of the smallest number
    zeros = max(_zeros(node) for node in sympy.preorder_traversal([p[:1] for p in parsed]))
    return not zeros or verify(*parsed, **options, float_rounding=6 + zeros, numeric_precision=15 + zeros)


def _zeros(node) -> int:
    """The zeros of a number after its decimal point: 3 for 0.00067; 0 for what is no number."""
    import sympy

    try:
        return max(0, min(1000, int(-sympy.log(sympy.Abs(node).evalf(3), 10))))
    except Exception:  # sets, texts, zero, infinity, letters
        return 0


def math_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    r"""The last \boxed{} counts; without one the answer is wrong."""
    boxed = [last_boxed(own_answer(text)) for text in completions]
    return [b is not None and same_latex(row["answer"], b) for b, row in zip(boxed, rows, strict=True)]


def math_answered(completions: list[str]) -> list[bool]:
    return [last_boxed(own_answer(text)) is not None for text in completions]


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
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            text = file.read().strip()
        if ending == ".json" and text.startswith("["):
            return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, OSError, RecursionError) as error:  # JSON's, UTF-8's and most of pyarrow's are ValueErrors
        raise BadInput(f"{dataset}: it cannot be read as {ending[1:]} ({error})") from error
    rows = []
    for line in filter(str.strip, text.split("\n")):  # splitlines() would also split inside strings
        try:
            rows.append(json.loads(line, object_pairs_hook=unique_keys))
        except (ValueError, RecursionError) as error:
            where = f"{dataset}: row {len(rows) + 1}"
            raise BadInput(f"{where} is not JSON ({error}); expected one object per line") from error
    return rows


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
    except Exception as error:  # offline, a wrong name, a gated set: the library raises many kinds
        reason = " ".join(str(error).split())
        raise BadInput(f"{name}: there is no such file, and loading it from the Hub failed ({reason})") from error


class Messages(list):
    """Messages that know where they were read, so that a chat template which refuses them can be traced to a row."""

    def __init__(self, messages: list[dict], where: str):
        super().__init__(messages)
        self.where = where


def column(row: dict, name: str, where: str, kind: type | tuple = str):
    """row[name], checked to be text or messages and not empty; `where` is 'file: row 3'."""
    value = row.get(name)
    expected = {str: "text", list: "a list of messages"}.get(kind, "text or a list of messages")
    if value is None or value in ("", []):
        raise BadInput(f"{where}: '{name}' is missing or empty; expected {expected}")
    if not isinstance(value, kind):
        raise BadInput(f"{where}: '{name}' is a {type(value).__name__}; expected {expected}")
    for m in [] if isinstance(value, str) else value:
        found = f"{where}: '{name}' has the message {str(m)[:200]}"
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise BadInput(f"{found}; expected {{'role': text, 'content': text}}")
        more = [key for key in m if key not in ("role", "content") and m[key]]
        if more or m["role"] not in ("system", "user", "assistant"):
            raise BadInput(f"{found}; expected the roles system, user and assistant, and no tools or other keys")
    unused = [key for key in ("tools", "functions", "documents", "chat_template_kwargs") if row.get(key)]
    if unused and not isinstance(value, str):
        raise BadInput(f"{where}: '{unused[0]}' would go to the chat template with '{name}'; expected no such column")
    for text in [value] if isinstance(value, str) else [m["content"] for m in value]:
        if re.search("[\ud800-\udfff]", text):
            raise BadInput(f"{where}: '{name}' has half of a surrogate pair; expected text that UTF-8 can encode")
    if isinstance(value, str):
        return value
    return Messages([{"role": m["role"], "content": m["content"]} for m in value], where)


# ---------------------------------------------------------------------------------------------------------------
# 3. rewards
# ---------------------------------------------------------------------------------------------------------------


FLOAT32_MAX = float(np.finfo(np.float32).max)


def load_reward(path: str) -> Callable:
    """The function `reward(prompts, completions, rows)` of a user's Python file, wrapped in `checked_reward`.

    The file is a module of its name, as process pools need it, and its folder is searched for what it imports.
    """
    where, expected = f"--reward_file {path}", "reward(prompts, completions, rows)"
    if not os.path.isfile(path):
        raise BadInput(f"{where}: there is no such file; expected Python with {expected}")
    file = os.path.abspath(path)
    folder, name = os.path.dirname(file), os.path.splitext(os.path.basename(file))[0]
    known = sys.modules[name].__spec__ if name in sys.modules else PathFinder.find_spec(name)
    if name in sys.stdlib_module_names or (known and known.origin != file):
        raise BadInput(f"{where}: another module has the name {name}; expected another file name")
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = file
    sys.path.insert(0, folder)
    try:
        with open(file, "rb") as source:
            exec(compile(source.read(), file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{where}: running it raised {type(error).__name__} ({error}); expected {expected}") from error
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)  # for what is imported later; the project's and installed modules come first
    reward = getattr(module, "reward", None)
    if not callable(reward):
        raise BadInput(f"{where}: it has no function 'reward'; expected {expected}")
    signature = inspect.signature(reward)
    try:
        names = list(signature.bind([], [], []).arguments)
    except TypeError:
        names = []
    if names != ["prompts", "completions", "rows"]:
        raise BadInput(f"{where}: it has reward{signature}; expected {expected}")
    return checked_reward(reward, path)


def checked_reward(reward: Callable, name: str) -> Callable:
    """`reward` with its result checked: a finite number, or a list of them, for each completion.

    The function that comes back takes `lengths`, the number of tokens of each completion, as an optional fourth
    argument: then lists of one number a token are checked to have that length.
    """

    def number(value, where: str) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise BadInput(f"{where} is a {type(value).__name__}; expected a number")
        if not abs(value) <= FLOAT32_MAX:
            raise BadInput(f"{where} is {str(value)[:40]}; expected a finite number, in float32 too")
        return float(value)

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors are welcome

    def checked(prompts: list, completions: list[str], rows: list[dict], lengths: list[int] | None = None) -> list:
        try:
            result = plain(reward(prompts, completions, rows))
        except SystemExit as stop:  # else a rank would leave the others without a word
            raise BadInput(f"{name}: reward() called sys.exit({stop.code!r}); expected a list of rewards") from stop
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


def given(row: dict, name: str, where: str) -> str:
    """The text or number in a column; empty where there is none."""
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value) if math.isfinite(value) else ""
    return "" if value is None or value == "" else column(row, name, where)


def gsm8k_row(row: dict, where: str) -> dict | None:
    """`answer` becomes the number after `####`, or alone; the steps stay as `solution`. None without a number."""
    question, solution = column(row, "question", where), given(row, "answer", where)
    _, mark, tail = solution.rpartition("####")
    number = one_number(tail) if mark or not re.search("[a-zA-Z]", tail) else None
    if number is None:
        return None
    solution = solution if mark else f"#### {solution}"
    prompt = Messages([{"role": "user", "content": question + GSM8K_ASK}], where)
    return {**row, "prompt": prompt, "solution": solution, "answer": str(number)}


def math_row(row: dict, where: str) -> dict | None:
    """`answer` is the column of that name, else what stands in the last \\boxed{} of `solution`. None without one."""
    problem = column(row, "problem", where)
    answer, solution = given(row, "answer", where), given(row, "solution", where)
    answer = last_boxed(answer) or answer.strip(" $") or last_boxed(solution)
    if not answer:
        return None
    if not last_boxed(solution):
        solution = f"{solution}\n\\boxed{{{answer}}}".strip()
    prompt = Messages([{"role": "user", "content": problem + MATH_ASK}], where)
    return {**row, "prompt": prompt, "solution": solution, "answer": answer}


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
        "math": [{"problem", "answer"}, {"problem", "solution"}],
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
    rows, unanswered = answered_rows(make_row, dataset, raw)

    source = test_dataset or dataset
    has_test_split = not is_local(source) and "test" in read_hub(source)
    if test_dataset or (has_test_split and split != "test"):
        raw = read_rows(source, "test" if has_test_split else "train")
        task_of_columns(source, raw[0], task)
        test, more = answered_rows(make_row, source, raw)
        unanswered += more
    else:
        if test_rows >= len(rows):
            raise BadInput(f"--test_rows {test_rows}: {dataset} has {len(rows)} rows; expected some left to train on")
        rows, test = rows[: len(rows) - test_rows], rows[len(rows) - test_rows :]

    test_prompts = {json.dumps(row["prompt"]) for row in test}
    train = [row for row in rows if json.dumps(row["prompt"]) not in test_prompts]
    if needs_train and not train:
        raise BadInput(f"{dataset}: each of its training prompts is also a held-out prompt; expected others")
    note = f"{task}: {len(train)} training rows, {min(test_rows, len(test))} held-out rows{unanswered}"
    if len(train) < len(rows):
        note += f"; {len(rows) - len(train)} training rows left out, as their prompts are held out"
    gold = given_gold if correct else None
    return Task(task, walk(train), test[:test_rows], None, correct, answered, train=train, gold=gold, note=note)


def answered_rows(make_row: Callable, dataset: str, raw: list[dict]) -> tuple[list[dict], str]:
    """The rows that `make_row` makes, and a note about those without an answer, which are left out."""
    rows = [make_row(row, f"{dataset}: row {i}") for i, row in enumerate(raw, 1)]
    missing = [i for i, row in enumerate(rows, 1) if row is None]
    if len(missing) == len(rows):
        expected = "'#### ' and a number, \\boxed{} or a column 'answer'"
        raise BadInput(f"{dataset}: no row has an answer; expected {expected}")
    note = f"; {len(missing)} rows of {dataset} without an answer left out: {missing[:3]}" if missing else ""
    return [row for row in rows if row is not None], note


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


def fit_prompts(task: Task, tokenizer, max_prompt: int, long_prompts: str = "drop") -> Task:
    """`task` without the prompts of more than `max_prompt` tokens.

    "drop" leaves them out of train and test, "error" refuses them, and "truncate" keeps them all, for it is the
    tokens that are cut, where they are made. The task's note says how many there were, and what else was changed.
    """
    changes = Counter()
    fits = {
        name: [len(encode_prompt(tokenizer, row["prompt"], changes)) <= max_prompt for row in getattr(task, name)]
        for name in ("train", "test")
    }
    task = replace(task, note=task.note + changed(changes))
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
        prompt = Messages([a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], both)], where)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in answer]
        if not prompt or roles != ["assistant"]:
            found = f"{len(prompt)} messages of prompt and then {' '.join(roles)}"
            raise BadInput(f"{where}: '{name}' has {found}; expected a prompt and one assistant message")
    return {**row, "prompt": prompt, "chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}


def load_demonstrations(dataset: str) -> list[dict]:
    """Rows {prompt, chosen} to imitate: `chosen` is the `completion`, or the last of `messages`; or pairs as they are.

    A completion is text or one assistant message (TRL's columns). Earlier messages are the prompt.
    """
    raw = read_rows(dataset)
    if {"chosen", "rejected"} <= set(raw[0]):
        return load_pairs(dataset)
    if "messages" not in raw[0] and not {"prompt", "completion"} <= set(raw[0]):
        found = ", ".join(raw[0]) or "(none)"
        expected = "messages, prompt+completion or chosen+rejected"
        raise BadInput(f"{dataset}: it has the columns {found}; expected {expected}")
    rows = []
    for i, row in enumerate(raw, 1):
        where = f"{dataset}: row {i}"
        if "messages" in row:
            *prompt, answer = column(row, "messages", where, list)
        else:
            prompt, answer = (column(row, name, where, (str, list)) for name in ("prompt", "completion"))
            answer = answer[-1] if isinstance(answer, list) else {"role": "assistant", "content": answer}
        if not prompt or answer["role"] != "assistant":
            raise BadInput(f"{where}: expected a prompt and then one answer of the assistant")
        rows.append({**row, "prompt": prompt, "chosen": answer["content"]})
    return rows


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

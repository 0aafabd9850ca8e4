"""--task gym:NAME: prompts and graders from the package reasoning-gym, a hundred families that a program can check.

    --task gym:chain_sum                              as the package has it
    --task gym:chain_sum:min_terms=2,max_terms=2      with other settings of its config

The family's own scorer decides, on what stands in the last <answer>...</answer>, else on the whole completion. Where
the right answer is a number, a completion that states this number in its last sentence is right, too. Scorers that give
part of the credit for an answer which contains the right one give none here. Some scorers run an answer as Python: an
answer with a call in it (but of sin and the like) is wrong without being run, and so is one that takes too long.
"""

import contextlib
import functools
import inspect
import json
import re
import zlib
from dataclasses import fields

from common import BadInput, require
from graders import extract_number, gsm8k_reference, in_time
from tasks import Task, generator, one_line

SIZE = 10**6  # entries of a family; each is a function of its number
CARELESS = ("coin_flip", "game_of_life_halting", "puzzle24")  # scorers of 0.1.25 that give wrong answers the full score
FUNCTIONS = "a?(?:sin|cos|tan|sec|csc|cot)h?|exp|log|ln|sqrt|Abs|Rational"
CALL = re.compile(  # without one an expression does no harm; # and \ may stand between a name and its bracket
    rf"__|[#\\]|\b(?!(?:{FUNCTIONS})\b)[^\W\d]\w*\s*\(|[])}}'\"]\s*\("
)
ASK = "\n\nGive the final answer between <answer> and </answer>."


def create(task: str):
    """The procedural dataset that gym:NAME:key=value,... describes."""
    found, (name, _, settings) = f"--task {task}", task.removeprefix("gym:").partition(":")
    try:
        from reasoning_gym import factory
    except ModuleNotFoundError as error:
        raise BadInput(
            f"{found}: its prompts are from reasoning-gym; expected it (pip install reasoning-gym)"
        ) from error
    known = sorted(factory.DATASETS)
    require(name in known, f"{found}: reasoning-gym has no family '{name}'; expected one of {', '.join(known)}")
    require(name not in CARELESS, f"{found}: the package's scorer calls wrong answers right; expected another family")
    keys, config = [f.name for f in fields(factory.DATASETS[name][1]) if f.name not in ("seed", "size")], {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        require(key in keys, f"{found}: {name} has no setting '{key}'; expected one of {', '.join(keys)}")
        try:
            config[key] = json.loads(value)
        except ValueError:
            config[key] = value
    try:
        return factory.create_dataset(name, seed=0, size=SIZE, **config)
    except Exception as error:  # each family checks its settings in its own way
        raise BadInput(f"{found}: reasoning-gym refuses it ({one_line(error)}); expected other settings") from error


@functools.cache
def runs_answers(family: type) -> bool:
    """Whether the scorer of a family runs an answer as Python."""
    return bool(re.search(r"\b(?:eval|parse_expr)\(", inspect.getsource(family.score_answer)))


def is_right(dataset, entry: dict, completion: str) -> bool:
    from reasoning_gym.utils import extract_answer

    text = completion.rpartition("</think>")[2]
    answer = extract_answer(text) or text.strip()
    refused = runs_answers(type(dataset)) and CALL.search(answer)
    with contextlib.suppress(Exception):  # some scorers raise at what they cannot read
        if not refused and in_time(lambda: dataset.score_answer(answer, entry) == 1):
            return True
    plain = re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", entry["answer"] or "")  # 0101 is a string
    return bool(plain) and extract_number(answer) == gsm8k_reference(entry["answer"])


def load(task: str, test_rows: int) -> Task:
    """The task without its reward. A tenth of all prompts, by a hash, is held out for every seed and every script."""
    dataset = create(task)
    entry = functools.lru_cache(4096)(dataset.__getitem__)

    def row(i: int) -> dict:
        prompt = [{"role": "user", "content": entry(i)["question"] + ASK}]
        return {"prompt": prompt, "answer": entry(i)["answer"], "entry": i}

    def held_out(row: dict) -> bool:
        return zlib.crc32(row["prompt"][0]["content"].encode()) % 10 == 0

    def training(rng, n: int) -> list[dict]:
        made = []
        while len(made) < n:
            one = row(int(rng.integers(SIZE)))
            if not held_out(one):
                made.append(one)
        return made

    def rows(seed: int, step: int, n: int) -> list[dict]:
        return training(generator(seed, "gym", step), n)

    def unannotated(n: int, seed: int) -> list[dict]:  # with answers, for graders alone
        return training(generator(seed, "gym unannotated"), n)

    def correct(completions: list[str], rows: list[dict]) -> list[bool]:
        return [is_right(dataset, entry(r["entry"]), text) for text, r in zip(completions, rows, strict=True)]

    rng, test, others = generator(0, "gym test"), {}, 0
    for _ in range(40 * test_rows):  # a family may have fewer different prompts
        one = row(int(rng.integers(SIZE)))
        if held_out(one):
            test[one["prompt"][0]["content"]] = one
        others += not held_out(one)
        if len(test) == test_rows and others:
            break
    require(test and others, f"--task {task}: too few prompts to hold some out; expected a family with more")
    note = f"{task}: {SIZE:,} entries, {len(test)} held-out rows"
    test = list(test.values())
    return Task(task, rows, test, None, correct, reads=("entry", int), unannotated=unannotated, note=note)

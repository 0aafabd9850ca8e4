"""The built-in tasks, which need no download: small enough for a laptop, hard enough to learn something from.

    1. chains      worked sums, `7+15+8=` -> `22+8=30`, with an exact grader of each step
    2. strings     many right answers: `6+a-b^c$d=` -> `cfaagd`, each constraint graded
    3. words       one-digit sums asked in words, for chat models
"""

import itertools
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from graders import find_numbers, last_number
from tasks import Task, generator, walk

PAIRS = str(Path(__file__).resolve().parent / "pairs.jsonl")  # of the bare qrm.py, from the built-in model's own answers


def of_prompt(seed: int, purpose: str, row: dict) -> np.random.Generator:
    """Random numbers of a prompt, wherever it stands in a list and whichever rank has it."""
    return generator(seed, purpose, zlib.crc32(json.dumps(row["prompt"]).encode()))


# ---------------------------------------------------------------------------------------------------------------
# 1. chains: rewrite the first two terms by their sum until one number is left
#
#     prompt        7+15+8=
#     completion    22+8=30          so that prompt and completion read 7+15+8=22+8=30
#
# Three or four terms from 1 to 49. The typical mistake is systematic: the carry from the units to the tens is
# forgotten (7+15=12), and the chain goes on from the wrong value. A model that has learnt such demonstrations
# follows the mistake when it decodes greedily and still finds the right way when it samples.
# ---------------------------------------------------------------------------------------------------------------


def chain_is_held_out(prompt: str) -> bool:
    """A fixed tenth of all prompts is kept for testing, the same one for every seed and every script."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def chain_prompt(rng: np.random.Generator, held_out: bool = False) -> str:
    while True:
        terms = rng.integers(1, 50, size=rng.integers(3, 5))
        prompt = "+".join(str(t) for t in terms) + "="
        if chain_is_held_out(prompt) == held_out:
            return prompt


def has_carry(a: int, b: int) -> bool:
    """Whether a+b carries from the units to the tens: where the demonstrations slip."""
    return a % 10 + b % 10 >= 10


def chain_terms(text: str) -> list[int] | None:
    """'22+8' -> [22, 8]; None when it is not numbers without leading zeros, joined by plus signs."""
    if not re.fullmatch(r"(0|[1-9][0-9]{0,8})(\+(0|[1-9][0-9]{0,8}))*", text):
        return None
    return [int(t) for t in text.split("+")]


def write_chain(prompt: str, add: Callable[[int, int], int]) -> str:
    """The completion of `prompt` when two numbers are added by `add`."""
    terms, lines = chain_terms(prompt.removesuffix("=")), []
    while len(terms) > 1:
        terms = [add(terms[0], terms[1]), *terms[2:]]
        lines.append("+".join(str(t) for t in terms))
    return "=".join(lines)


def chain_solution(prompt: str) -> str:
    """The exact completion: '7+15+8=' -> '22+8=30'."""
    return write_chain(prompt, lambda a, b: a + b)


def chain_steps(prompt: str, completion: str) -> list[bool]:
    """One bool for each `=`-separated step of the completion: is it the exact rewriting of the line before it?

    Steps are graded against the line before them **as written**, so a right step after a wrong one counts as
    right (`first_wrong` gives the other view). A step after the last number has nothing to rewrite: wrong.
    """
    right, before = [], chain_terms(prompt.removesuffix("="))
    for step in completion.split("="):
        terms = chain_terms(step)
        right.append(bool(before) and len(before) > 1 and terms == [before[0] + before[1], *before[2:]])
        before = terms
    return right


def first_wrong(prompt: str, completion: str) -> int | None:
    """Index of the first character that leaves the exact derivation; None when there is none.

    A completion that stops too early leaves it at its end, so the index may be len(completion).
    """
    exact = chain_solution(prompt)
    same = len(os.path.commonprefix([exact, completion]))
    return None if completion == exact else same


def chain_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    """The answer is the text after the last `=`, and it must be the exact total; steps are graded apart."""
    totals = [str(row.get("answer") or sum(chain_terms(row["prompt"][:-1]))) for row in rows]
    return [text.rpartition("=")[2] == total for text, total in zip(completions, totals, strict=True)]


def chain_answered(completions: list[str]) -> list[bool]:
    """Whether one number stands after the last `=`."""
    return [len(chain_terms(text.rpartition("=")[2]) or []) == 1 for text in completions]


def chain_credit(prompt, tokens: list[str]) -> list[float] | None:
    """1 for each token of an answer up to which the derivation is exact, then 0; the last token ends the answer.

    None when the prompt is not a chain.
    """
    if not (isinstance(prompt, str) and prompt.endswith("=") and len(chain_terms(prompt[:-1]) or []) > 1):
        return None
    exact, text, right = chain_solution(prompt), "", []
    for token in tokens[:-1]:
        text += token
        right.append(float(exact.startswith(text)))
    return [*right, float(text == exact)]


def chain_row(rng: np.random.Generator, held_out: bool = False) -> dict:
    prompt = chain_prompt(rng, held_out)
    return {"prompt": prompt, "answer": str(sum(chain_terms(prompt[:-1])))}


def chain_rows(seed: int, step: int, n: int) -> list[dict]:
    rng = generator(seed, "chains", step)
    return [chain_row(rng) for _ in range(n)]


def chain_test_rows(n: int) -> list[dict]:
    """n different held-out rows, the same for every seed so that runs can be compared."""
    rng, rows = generator(0, "chains test"), {}
    while len(rows) < n:
        row = chain_row(rng, held_out=True)
        rows[row["prompt"]] = row
    return list(rows.values())


def slipping_add(
    rng: np.random.Generator, slip: float, noise: float = 0.0, needless: float = 0.0
) -> Callable[[int, int], int]:
    """Addition that forgets a carry with probability `slip`, and gets any one digit wrong with `noise`.

    needless: the probability of a carry where there is none.
    """

    def add(a: int, b: int) -> int:
        total = a + b
        if has_carry(a, b) and rng.random() < slip:
            total -= 10
        elif needless and not has_carry(a, b) and rng.random() < needless:
            total += 10
        if rng.random() < noise:
            digits = list(str(total))
            digits[rng.integers(len(digits))] = str(rng.integers(10))
            total = int("".join(digits))
        return total

    return add


def demonstrations(n: int, seed: int, slip: float, noise: float = 0.0, held_out: bool = False) -> list[dict]:
    """n rows {prompt, completion}, whose worked steps forget each carry with probability `slip`."""
    rows = []
    for i in range(n):
        rng = generator(seed, "demonstrations", i)
        prompt = chain_prompt(rng, held_out)
        rows.append({"prompt": prompt, "completion": write_chain(prompt, slipping_add(rng, slip, noise))})
    return rows


def preference_pairs(
    n: int, seed: int, slip: float = 0.6, held_out: bool = False, needless: float = 0.0, exact: bool = True
) -> list[dict]:
    """n rows {prompt, chosen, rejected}: the exact completion, and one with at least one mistake in its carries.

    With needless = 0 it is always a forgotten one, from which a model may learn to carry wherever it can.
    exact = False: both are by the same writer, and the one with fewer wrong steps is chosen, as annotators have it.
    """

    def wrong(prompt: str, completion: str) -> int:
        return chain_steps(prompt, completion).count(False)

    rows = []
    for i in range(n):
        rng = generator(seed, "preference pairs", i)
        rejected = chosen = prompt = ""
        while wrong(prompt, rejected) == wrong(prompt, chosen):  # a prompt without carries has no slip to show
            prompt = chain_prompt(rng, held_out)
            chosen = chain_solution(prompt)
            rejected = write_chain(prompt, slipping_add(rng, slip, needless=needless))
            if not exact:
                chosen = write_chain(prompt, slipping_add(rng, slip, needless=needless))
        if wrong(prompt, rejected) < wrong(prompt, chosen):
            chosen, rejected = rejected, chosen
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def slipping_pairs(seed: int, test_rows: int) -> tuple[list[dict], list[dict]]:
    """2,000 training pairs and held-out ones: both answers are by one writer who slips, so that the better ones do too."""
    made = dict(slip=0.6, needless=0.1, exact=False)
    return preference_pairs(2000, seed, **made), preference_pairs(test_rows, 0, held_out=True, **made)


def unannotated(n: int, seed: int) -> list[dict]:
    """n rows {prompt} without any answer."""
    return [{"prompt": chain_prompt(generator(seed, "unannotated", i))} for i in range(n)]


def chain_gold(rows: list[dict], seed: int, slip: float = 0.0) -> list[str]:
    """An answer to each row: exact, or by a writer who forgets each carry with probability `slip`."""
    return [write_chain(row["prompt"], slipping_add(of_prompt(seed, "chain gold", row), slip)) for row in rows]


# ---------------------------------------------------------------------------------------------------------------
# 2. strings: write a string that satisfies all constraints; there are many
#
#     prompt        6+a-b^c$d=       six letters, with a, without b, c first, d last  (2e: exactly two e)
#     completion    cfaagd
#
# Length 5 to 8 over the letters a to h, and two to four more constraints, no letter in two of them. The typical
# mistake is systematic: the letter of the last constraint is read as the next free one of the alphabet.
# ---------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefgh"
KINDS = "++--^$2"  # contains (at most two), lacks (at most two), first, last, exactly two


def string_constraints(prompt: str) -> list[tuple[str, str]]:
    """'6+a$d=' -> [('#', '6'), ('+', 'a'), ('$', 'd')]; '#' is the length."""
    pairs = prompt[1:].removesuffix("=")
    return [("#", prompt[0]), *((pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2))]


def satisfied(text: str, constraint: tuple[str, str]) -> bool:
    kind, what = constraint
    return {
        "#": str(len(text)) == what,
        "+": what in text,
        "-": what not in text,
        "^": text.startswith(what),
        "$": text.endswith(what),
        "2": text.count(what) == 2,
    }[kind]


def string_grade(prompt: str, text: str) -> float:
    """The share of the constraints that an answer satisfies; 0 when it is not letters alone."""
    if not text or set(text) - set(LETTERS):
        return 0.0
    held = [satisfied(text, constraint) for constraint in string_constraints(prompt)]
    return sum(held) / len(held)


def string_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    """All constraints count."""
    return [string_grade(row["prompt"], text) == 1 for text, row in zip(completions, rows, strict=True)]


def string_answered(completions: list[str]) -> list[bool]:
    """Whether it is letters of the alphabet and nothing else."""
    return [bool(text) and not set(text) - set(LETTERS) for text in completions]


def string_prompt(rng: np.random.Generator, held_out: bool = False) -> str:
    while True:
        count = rng.integers(2, 5)
        kinds = rng.permutation(list(KINDS))[:count]
        letters = rng.permutation(list(LETTERS))[:count]
        prompt = f"{rng.integers(5, 9)}{''.join(k + x for k, x in zip(kinds, letters))}="
        if chain_is_held_out(prompt) == held_out:
            return prompt


def fill_string(rng: np.random.Generator, constraints: list[tuple[str, str]]) -> str:
    """A random string that satisfies all of these constraints: required letters first, then any that are allowed."""
    by_kind = {kind: [what for k, what in constraints if k == kind] for kind in "#+-^$2"}
    text = [""] * int(by_kind["#"][0])
    if by_kind["^"]:
        text[0] = by_kind["^"][0]
    if by_kind["$"]:
        text[-1] = by_kind["$"][0]
    free = [i for i in rng.permutation(len(text)) if not text[i]]
    for letter in by_kind["+"] + 2 * by_kind["2"]:
        text[free.pop()] = letter
    allowed = [x for x in LETTERS if x not in by_kind["-"] + by_kind["2"]]
    for i in free:
        text[i] = allowed[rng.integers(len(allowed))]
    return "".join(text)


def write_string(rng: np.random.Generator, prompt: str, slip: float = 0.0) -> str:
    """An answer that satisfies all constraints, or with probability `slip` one whose writer misread the last one."""
    constraints = string_constraints(prompt)
    if rng.random() >= slip:
        return fill_string(rng, constraints)
    (kind, letter), used = constraints[-1], {what for _, what in constraints}
    following = (LETTERS * 2)[LETTERS.index(letter) + 1 :]
    misread = [*constraints[:-1], (kind, next(x for x in following if x not in used))]
    while True:  # it may be right by chance: then the mistake would not show
        text = fill_string(rng, misread)
        if not satisfied(text, constraints[-1]):
            return text


def break_string(rng: np.random.Generator, text: str, constraint: tuple[str, str]) -> str:
    """`text` with the smallest edit that breaks a constraint which it satisfied (others may break with it)."""
    kind, what = constraint
    other = [x for x in LETTERS if x != what][rng.integers(len(LETTERS) - 1)]
    at = int(rng.integers(len(text)))
    if kind == "#":
        return text[:at] + text[at + 1 :] if rng.random() < 0.5 else text[:at] + other + text[at:]
    if kind == "+":
        return text.replace(what, other)
    if kind == "^":
        return other + text[1:]
    if kind == "$":
        return text[:-1] + other
    if kind == "2" and rng.random() < 0.5:
        return text.replace(what, other, 1)
    free = [i for i in range(len(text)) if text[i] != what]  # a letter too many
    at = free[rng.integers(len(free))]
    return text[:at] + what + text[at + 1 :]


def spoil_string(rng: np.random.Generator, prompt: str, text: str) -> tuple[str, str]:
    """(`text` with some of its constraints broken on purpose, their kinds): the last one, as writers do by mistake, or
    with equal chances one to three of any."""
    constraints = string_constraints(prompt)
    broken = [constraints[c] for c in rng.permutation(len(constraints))[: rng.integers(1, 4)]]
    broken = constraints[-1:] if rng.random() < 0.5 else broken
    while string_grade(prompt, text) == 1:  # two edits may undo each other
        for constraint in broken:
            if satisfied(text, constraint):
                text = break_string(rng, text, constraint)
    return text, "".join(kind for kind, _ in broken)


def string_pairs(n: int, seed: int, held_out: bool = False) -> list[dict]:
    """n rows {prompt, chosen, rejected, broken}: an answer that satisfies all constraints, and the same with some of
    them broken on purpose, whose kinds are in `broken`."""
    rows = []
    for i in range(n):
        rng = generator(seed, "string pairs", i)
        prompt = string_prompt(rng, held_out)
        chosen = fill_string(rng, string_constraints(prompt))
        rejected, broken = spoil_string(rng, prompt, chosen)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "broken": broken})
    return rows


def string_rows(seed: int, step: int, n: int) -> list[dict]:
    rng = generator(seed, "strings", step)
    return [{"prompt": string_prompt(rng)} for _ in range(n)]


def string_test_rows(n: int) -> list[dict]:
    """n different held-out rows, the same for every seed."""
    rng, prompts = generator(0, "strings test"), {}
    while len(prompts) < n:
        prompts[string_prompt(rng, held_out=True)] = None
    return [{"prompt": prompt} for prompt in prompts]


def string_unannotated(n: int, seed: int) -> list[dict]:
    """n rows {prompt} without any answer."""
    return [{"prompt": string_prompt(generator(seed, "strings unannotated", i))} for i in range(n)]


def string_gold(rows: list[dict], seed: int, slip: float = 0.0) -> list[str]:
    """An answer to each row: right, or with probability `slip` by a writer who misread the last constraint."""
    return [write_string(of_prompt(seed, "string gold", row), row["prompt"], slip) for row in rows]


def string_demonstrations(n: int, seed: int, slip: float, copies: float = 0.0, faults: float = 0.0) -> list[dict]:
    """n rows {prompt, completion}, of which a share of `slip` misread the last constraint.

    Two skills that large language models have, and small ones have to be taught:
    copies: share of rows that ask the question again after its answer, `6+a-b^c$d=cfaagd==6+a-b^c$d=`, and then repeat
    that answer, right or wrong.
    faults: share of rows that name the constraints which an answer breaks, `6+a-b^c$d=cfaagb==` -> `-b$d`, or `=+`.
    """
    rows = []
    for i in range(n):
        rng = generator(seed, "string demonstrations", i)
        prompt = string_prompt(rng)
        skill = rng.random()
        if skill < copies:
            answer = write_string(rng, prompt, slip)
            rows.append({"prompt": f"{prompt}{answer}=={prompt}", "completion": answer})
        elif skill < copies + faults:
            answer = write_string(rng, prompt, 0.5)
            if rng.random() < 0.3 and string_grade(prompt, answer) == 1:
                answer = spoil_string(rng, prompt, answer)[0]
            broken = [k.strip("#") + x for k, x in string_constraints(prompt) if not satisfied(answer, (k, x))]
            rows.append({"prompt": f"{prompt}{answer}==", "completion": "".join(broken) or "=+"})
        else:
            rows.append({"prompt": prompt, "completion": write_string(rng, prompt, slip)})
    return rows


# ---------------------------------------------------------------------------------------------------------------
# 3. words: "What is 7+5?"
# ---------------------------------------------------------------------------------------------------------------


def word_rows() -> tuple[list[dict], list[dict]]:
    """The 100 one-digit sums, 75 to train on and 25 held out, split once for all by a hash."""
    rows = []
    for a, b in itertools.product(range(10), repeat=2):
        rows.append({"prompt": [{"role": "user", "content": f"What is {a}+{b}?"}], "answer": str(a + b)})
    rows.sort(key=lambda row: zlib.crc32(row["prompt"][0]["content"].encode()))
    return rows[25:], rows[:25]


def sum_correct(question: str, answer: str, text: str) -> bool:
    """The last number of a text counts, but an echo of the question is no answer.

    A sum with 0 has an operand that equals its answer. There the number must be given as the result: after `=`, `:`,
    is, equals or equal to, or alone on a line. "The number 0+7 is a concept" and "adding 7 to 0" do not answer.
    """
    if last_number(text) != answer:
        return False
    if answer not in (str(number) for number, _, _ in find_numbers(question)):
        return True
    head = re.sub(r"\D*$", "", text)  # up to the last number
    result = re.search(rf"(?:[=:]|\b(?:is|equals|equal to)|['’]s)[\s*$]*(?:\\boxed\{{)?{answer}$", head)
    return bool(result or re.search(rf"^\W*{answer}\W*$", text, re.MULTILINE))


def word_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    sums = [(row["prompt"][0]["content"], row["answer"]) for row in rows]
    return [sum_correct(*one, text) for one, text in zip(sums, completions, strict=True)]


def word_answered(completions: list[str]) -> list[bool]:
    return [last_number(text) is not None for text in completions]


def load(name: str, test_rows: int) -> Task:
    """The task of this name, without its reward."""
    if name == "chains":
        made = Task(name, chain_rows, chain_test_rows(test_rows), None, chain_correct, chain_answered)
        made.pairs, made.unannotated, made.reads = preference_pairs, unannotated, ("prompt", str)
    elif name == "strings":
        made = Task(name, string_rows, string_test_rows(test_rows), None, string_correct, string_answered)
        made.pairs, made.unannotated, made.reads = string_pairs, string_unannotated, ("prompt", str)
    else:
        train, test = word_rows()
        made = Task(name, walk(train), test[:test_rows], None, word_correct, word_answered, train=train, held_out=test)
        made.reads = ("prompt", list)
    made.note = f"{name}: {len(made.train) or 'endless'} training rows, {len(made.test)} held-out rows"
    return made

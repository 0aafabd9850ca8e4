"""Graders of numbers (GSM8K) and of LaTeX (MATH): is the answer that a completion ends with the right one?

    gsm8k_correct(completions, rows), math_correct(completions, rows)    a bool per completion; row["answer"] is right
    gsm8k_answered(completions), math_answered(completions)              whether there is an answer to grade

An answer is compared by its meaning, never by a substring. What is read how, what math-verify is trusted with, and
what is still judged otherwise than by a careful reader: docs/graders.md. tasks.py needs this file for data with
`question` or `problem` columns, and for nothing else.
"""

import ast
import itertools
import logging
import operator
import re
import signal
import threading
import unicodedata
from collections.abc import Callable
from fractions import Fraction

DIGIT = r"[\d¼½¾⅐-⅞]"
# What writers spell differently is made alike before it is compared; docs/graders.md has the reasons.
SPELLINGS = [
    (r"[−–‒﹣]", "-"),
    (r"[€£¥₹]|\\(?:pounds|euro)\b|<<.*?>>", ""),  # GSM8K's <<9*2=18>> too
    (r"°", r"^\\circ"),
    (r"[¼½¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")),
    (r"[０-９]", lambda match: unicodedata.normalize("NFKC", match[0])),
    (r"[⁰¹²³⁴-⁹]+", lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}"),
    (r"[\s~]", " "),  # thin and unbreakable spaces too
    (r"\\varnothing\b", r"\\emptyset"),
    (r"(?<=\d) *\^ *(\{ *)?(\\(?:text|mbox|mathrm) *\{ *)?(?:st|nd|rd|th)(?(2) *\})(?(1) *\})", ""),  # 17^{\text{th}}
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
    (r"</?[a-zA-Z]\w*>|<\|.*?\|>|<([-$ \d.,/]+)>", r" \1 "),  # <b>5</b>, <|im_end|>, <5>
    (r"\.{2,}", " … "),
    (r"\\(?:text\w*|mbox|math\w*) *\{([^{}]*)\}", r" \1 "),
    (r"\\frac *(?:\{ *(-?\d+) *\}|(\d)) *(?:\{ *(\d+) *\}|(\d))", r" \1\2/\3\4"),
    (r"\\(?:cdot|times)|[×·⋅]", "*"),
    (r"(?<=[a-zA-Z])\\?\$", " "),  # US$5
    (r"\\?\$", ""),
    (r"\\[,;:! ()\[\]]|\\?%|(?<!\d)\*\*|\*\*(?!\d)", " "),
    (r"([a-zA-Z]) *\^ *\{?-?\d+\}?", r"\1"),  # cm^2
    (r"\^ *\{ *(-?\d+) *\}", r"^\1"),
    (r"(\d)[kK]\b", r"\1*10^3"),
    (r"(^|[=:(*~]) *- +(?=[\d.])", r"\1-"),  # - 5
    (r"(?i)(^|[=:(*~]|\b(?:is|was|to|of|be|answer)) *(?:minus|negative) +(?=[\d.])", r"\1 -"),  # is minus 5
]
# A minus sign belongs to the number unless something to subtract from stands before it: 10-3 ends in 3.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-|(?<![\w.]))"
    r"(?:(?:(?P<whole>\d+) +(?:and +)?)?(?P<top>\d+)/(?P<bottom>\d+)"
    r"|(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))"
    r"(?P<tens>(?: *[*x] *10\^-?\d\d?(?!\d)|e[+-]?\d\d?(?!\w))*)(?:\^(?P<power>-?\d\d?))?(?!\d|\.\d)",
    re.ASCII,
)
JOINED = re.compile(  # 3, 4 and 3*4 are not one number; nor are 3 or maybe 4
    r"[-+*/^÷,;:&|<>)…±—] *$|\\[a-zA-Z]+ *$"
    r"|\b(?:and|to|x|plus|minus|times|maybe|perhaps|possibly|alternatively|und|et|y) *$"
    r"|\b(?:or(?! so\b)|oder|ou|o)(?: \w+){0,3} *$|\b(?:but|vs\.?|versus)(?: \w+)? *$"
)
EQUALS = r"(?<![!<>])(?<!\\not)=+>?"  # 3+4 => 7
UNIT = re.compile(r"hours?|hrs?|h|min|minutes?|days?|weeks?|months?|years?|feet|foot|ft|yards?|pounds?|lbs?")
PREPOSITIONS = "after as at because by during each every for from if in not of on per since when with within".split()
RELATION = r"(?:(?<![-=<>])[<>]=?(?!>)|[≤≥≠±]|!=|\\(?:neq?|[lg]t|[lg]e|[lg]eq\w*|pm|mp)\b)"
OTHER_BEFORE = re.compile(  # > 5, not 5, more than 5; "at least 5" where it is all that is said
    rf"(?:{RELATION}|¬|(?<!\w)!|\\(?:not|neg|lnot)\b=?"
    r"|(?:\b(?:not|never|cannot|nicht|pas|не)|n[’']t)(?: be| equal| equal to| exactly)?"
    r"|(?<!no more )(?<!no less )(?<!no fewer )\bthan|\b(?:above|below|exceeds?|exceeding)"
    r"|^\W*(?:at least|at most|up to|over|under|no (?:more|less|fewer) than))[ (-]*$",
    re.IGNORECASE,
)
OTHER_AFTER = re.compile(  # 5+, 5+x, 5 > x, 5 or more, 5 eggs or less
    rf"^\+(?! *[\d(])|^ *{RELATION} *[\w\\]"
    r"|^ *(?:\w+ )?(?:or|and) (?:more|less|fewer|greater|higher|lower|larger|smaller|up|above|over)\b"
)
WITHDRAWN = re.compile(  # 5 is wrong, 5 isn't the answer
    r"\d\W*\b(?:is|was)(?: wrong| incorrect|(?: not|n[’']t) (?:the answer|right|correct))\b|\d *\((?:wrong|incorrect)\b"
)
ASSIGNMENTS = re.compile(r"^\W*[a-zA-Z]\w* *= *[-$]*[\d.]+ *(?:[,;]|\band\b|\bor\b) *[a-zA-Z]\w* *=")  # x = 3, y = 4
UNDONE = re.compile(r"√|\b(?:sqrt|log|ln|sin|cos|tan)(?:_\w+)? *[({\d]")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MARKED = re.compile(rf"####.*{DIGIT}|\\(?:boxed|fbox)\b")
ANSWER = re.compile(rf"{MARKED.pattern}|\b[Aa]nswer(?: is)?:? *\$?-?\d|^A:", re.M)
NEXT_QUESTION = re.compile(
    r"\b(?:Q|Question|Problem|Exercise|Instruction|Input|User|Human)\b[*\d ]*:|^(?:user|human):|<\|im_start\|", re.M
)
ASKED = re.compile(r"^(?=.*\d).{25,}\? *$", re.M)
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
            str(value)
        except (ValueError, ZeroDivisionError):  # thousands of digits from a model that repeats itself; 3/0
            continue
        if not (get["bottom"] and value.denominator == 1):  # 48/2 is a sum to do
            found.append((value, match.start(), match.end()))
    return found


def one_word_joins(between: str, behind: str) -> bool:
    """Whether the only word between two numbers makes two answers of them: 5 hours 30 minutes, or, in any language,
    5 oder 6 with nothing behind it; but 18 per 2 is one."""
    word = re.fullmatch(r" *([^\W\d]+) *", between)
    if not word:
        return False
    ends = not re.search(r"[^\W\d]", behind)
    return bool(UNIT.fullmatch(word[1])) or (ends and word[1].lower() not in PREPOSITIONS)


def one_number(line: str) -> Fraction | None:
    """The number that a line states, after its last `=`, `:` or "is"; None for several numbers or bare arithmetic."""
    exact = not re.search(r"%|\d[kK]\b", line)  # 50% of 4k
    line = respell(respell(line, SPELLINGS), PLAIN)
    equations = itertools.pairwise(re.split(EQUALS, line))
    if ASSIGNMENTS.search(line) or WITHDRAWN.search(line) or (exact and any(differ(*sides) for sides in equations)):
        return None
    aside = re.sub(r"\([^()]*\)", " ", line)  # 18 (9*2)
    for part in reversed(re.split(EQUALS + r"|≈|: |\bis\b|\bare\b", aside if re.search(r"\d", aside) else line)):
        found = find_numbers(part)
        if not found or UNDONE.search(part):
            continue
        first = not re.search(r"[a-zA-Z]", part[: found[0][1]])  # 18 dollars for 2 weeks, but 2 weeks later 18 dollars
        pair = found[:2] if first else found[-2:]
        begin = pair[-1][1] + part[pair[-1][1] :].startswith("-")
        between, only_numbers = part[pair[0][2] : begin], not re.search("[a-zA-Z]", part)
        joined = JOINED.search(between) or (first and one_word_joins(between, part[pair[-1][2] :]))
        if len(pair) == 1 or not (only_numbers or joined):
            value, begin, end = found[0 if first else -1]
            return None if OTHER_BEFORE.search(part[:begin]) or OTHER_AFTER.search(part[end:]) else value
        if not re.fullmatch(r"[-\d .*+/()^x]+", part):  # after 18 = 9*2 the part before counts
            return None
    return None


def worth(text: str) -> Fraction | None:
    """What arithmetic comes to, exactly: 2*(3+4) -> 14; None for everything else."""
    text = re.sub(r"(?<=[\d)]) *[x×] *(?=[\d(])", "*", text).replace("÷", "/").strip(" .")
    found = find_numbers(text)
    if [place for _, *place in found] == [[0, len(text)]]:
        return found[0][0]

    def value(node) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return Fraction(str(node.value)) if isinstance(node, ast.Constant) else None

    try:
        return value(ast.parse(text, mode="eval").body) if re.fullmatch(r"[-\d.+*/() ]+", text) else None
    except (ArithmeticError, KeyError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return None


def differ(left: str, right: str) -> bool:
    """Whether an equation of numbers is wrong, as 1 = 2; 10/3 = 3.33 is rounded, and 2*3 = 6+1 = 7 goes on."""
    a, b = worth(left), worth(right)
    if a is None or b is None:
        return False
    rounding = 0 if a.denominator == 1 else abs(a) / 100
    if "/" in left and abs(a) > 1 and b.denominator == 1:
        rounding = 1  # 10/3 = 3
    begin = [value for value, *_ in find_numbers(right)[:1]]
    return all(abs(a - x) > rounding for x in [b, *begin])


def last_number(text: str) -> str | None:
    """The last number of a text in canonical form: $1,234.50 -> 2469/2, 72.0 -> 72."""
    found = find_numbers(respell(respell(text, SPELLINGS), PLAIN))
    return str(found[-1][0]) if found else None


def own_answer(text: str) -> str:
    """A completion without its thoughts, and without the next question that some models go on with."""

    def cut(text: str, answered: re.Pattern, asked: re.Pattern) -> str:
        answer = answered.search(text)
        question = answer and asked.search(text, answer.end())
        return text[: question.start()] if question else text

    text = cut(text.rpartition("</think>")[2], ANSWER, NEXT_QUESTION)
    return cut(text, MARKED if MARKED.search(text) else ANSWER, ASKED)  # before its mark a text may ask itself


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
    lines = [line for line in lines if re.search(DIGIT, line) and not re.match(r"\W*(?:step|part)\b", line, re.I)]
    boxed = last_boxed(text)
    if lines:
        line = next(s for s in re.split(r"(?<=[.!?]) ", lines[-1]) if re.search(DIGIT, s))
    elif boxed and re.search(DIGIT, boxed):
        line = boxed
    else:
        line = ([s for s in re.split(r"(?<=[.!?])\s|\n", text) if re.search(DIGIT, s)] or [""])[-1]
    number = one_number(line)
    return None if number is None else str(number)


def gsm8k_reference(answer: str) -> str | None:
    """The number of a reference, in canonical form: after `####`, or alone; None where there is none."""
    _, mark, tail = answer.rpartition("####")
    number = one_number(tail) if mark or not re.search("[a-zA-Z]", tail) else None
    return None if number is None else str(number)


def gsm8k_correct(completions: list[str], rows: list[dict]) -> list[bool]:
    return [extract_number(text) == row["answer"] for text, row in zip(completions, rows, strict=True)]


def gsm8k_answered(completions: list[str]) -> list[bool]:
    return [extract_number(text) is not None for text in completions]


def in_time(check: Callable, *args) -> bool:
    """check(*args) within 10 seconds of the CPU, not of the clock, so that a busy machine grades alike; else False."""
    if threading.current_thread() is not threading.main_thread():
        return check(*args)  # signals only exist in the main thread

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    try:
        return check(*args)
    except TooLong:
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class TooLong(BaseException):  # math-verify swallows every Exception
    pass


def same_latex(reference: str, answer: str) -> bool:
    r"""Whether two LaTeX answers mean the same: 1/2 and \frac12 do, 40 and 140 do not. Decided by math-verify.

    Before it, spellings are made alike, and what it ignores (bases, a.m.) is compared; after it, equations and small
    numbers are checked again (docs/graders.md).
    """
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    texts = [respell(s, [*SPELLINGS, (r"\\sqrt *\{ *-1 *\}", "i")]) for s in (reference, answer)]
    words = [re.sub(r"\\(?:text\w*|mbox|mathrm) *\{([^{}]*)\}", r"\1", text).split() for text in texts]
    if words[0] == words[1]:
        return bool(words[0])
    for marks in (r"(?<=[\dA-F])_\{?(\w+)", r"\b([ap])\.? ?m\b"):  # math-verify ignores bases, and a.m. beside a time
        found = [re.findall(marks, text) for text in texts]
        if all(found) and found[0] != found[1]:
            return False
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    how = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(f"\\boxed{{{s}}}", extraction_config=how, parsing_timeout=None) for s in texts]
    options = dict(allow_set_relation_comp=True, timeout_seconds=None)
    if not verify(*parsed, **options) or WITHDRAWN.search(respell(texts[1], PLAIN)):
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
    return [b is not None and in_time(same_latex, row["answer"], b) for b, row in zip(boxed, rows, strict=True)]


def math_reference(answer: str, solution: str) -> str | None:
    r"""What stands in the last \boxed{} of `answer`, else `answer`, else the last \boxed{} of `solution`."""
    return last_boxed(answer) or answer.strip(" $") or last_boxed(solution)


def math_answered(completions: list[str]) -> list[bool]:
    return [last_boxed(own_answer(text)) is not None for text in completions]

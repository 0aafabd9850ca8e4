"""tasks.py: determinism, graders, files, every bad input, and the checkpoint in builtin/policy."""

import json
import math
import os
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import graders
import tasks
from builtin import tasks as toys
from common import BadInput

POLICY = Path(__file__).resolve().parent.parent / "builtin" / "policy"


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(message: str, function, *args, **kwargs) -> None:
    """`function` raises BadInput with exactly one sentence that contains `message`."""
    with pytest.raises(BadInput) as error:
        function(*args, **kwargs)
    assert message in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value) or "(" in str(error.value)


# chains


def test_the_worked_example():
    assert toys.chain_solution("7+15+8=") == "22+8=30"
    assert toys.chain_solution("49+49+49+49=") == "98+49+49=147+49=196"


@pytest.mark.parametrize(
    "completion, steps, wrong",
    [
        ("22+8=30", [True, True], None),
        ("12+8=20", [False, True], 0),  # the forgotten carry, then a right step from the wrong value
        ("22+8=20", [True, False], 5),
        ("22+8", [True], 4),
        ("22+8=", [True, False], 5),
        ("22+8=30=30", [True, True, False], 7),
        ("22+8=30+0", [True, False], 7),
        ("022+8=30", [False, False], 0),
        ("22+8=030", [True, False], 5),
        ("30", [False], 0),
        ("", [False], 0),
        ("22++8=30", [False, False], 3),
    ],
)
def test_steps_and_first_wrong_character(completion, steps, wrong):
    assert toys.chain_steps("7+15+8=", completion) == steps
    assert toys.first_wrong("7+15+8=", completion) == wrong


def test_the_answer_is_what_stands_after_the_last_equals_sign():
    texts = ["22+8=30", "12+8=30", "30", "22+8=30=", "22+8=030", "22+8=130", "22+8=3", "22+8=30+0", "22+8=-30", ""]
    row = {"prompt": "7+15+8=", "answer": "30"}
    assert toys.chain_correct(texts, [row] * len(texts)) == [True, True, True] + [False] * 7
    assert toys.chain_answered(texts) == [True, True, True, False, False, True, True, False, False, False]


def test_chains_are_a_function_of_seed_and_step_and_never_of_the_test_set():
    task = tasks.load_task(test_rows=300)
    assert task.name == "chains" and len(task.test) == 300
    assert task.rows(1, 5, 64) == task.rows(1, 5, 64)
    assert task.rows(1, 5, 64)[:8] == task.rows(1, 5, 8)
    assert task.rows(1, 5, 64) != task.rows(1, 6, 64) != task.rows(2, 6, 64)
    assert task.test == tasks.load_task(test_rows=300).test
    test = {row["prompt"] for row in task.test}
    assert len(test) == 300
    train = [row["prompt"] for step in range(20) for row in task.rows(0, step, 200)]
    train += [row["prompt"] for row in toys.demonstrations(2000, 0, 0.6) + toys.preference_pairs(2000, 0)]
    train += [row["prompt"] for row in toys.unannotated(2000, 0)]
    assert not any(toys.chain_is_held_out(prompt) for prompt in train)
    assert all(toys.chain_is_held_out(prompt) for prompt in test)
    assert all(toys.chain_is_held_out(row["prompt"]) for row in toys.preference_pairs(50, 0, held_out=True))
    exact = [toys.chain_solution(row["prompt"]) for row in task.test]
    assert task.reward([row["prompt"] for row in task.test], exact, task.test) == [1.0] * 300


def test_a_tenth_of_all_prompts_is_held_out():
    rng = np.random.default_rng(0)
    prompts = ["+".join(map(str, rng.integers(1, 50, size=3))) + "=" for _ in range(20000)]
    assert abs(sum(map(toys.chain_is_held_out, prompts)) / 20000 - 0.1) < 0.01


def test_demonstrations_forget_carries_at_the_rate_that_was_asked_for():
    slips, carries = 0, 0
    for row in toys.demonstrations(4000, seed=3, slip=0.6):
        before = toys.chain_terms(row["prompt"][:-1])
        for step in row["completion"].split("="):
            terms = toys.chain_terms(step)
            if toys.has_carry(before[0], before[1]):
                carries += 1
                slips += terms[0] == before[0] + before[1] - 10
            else:
                assert terms[0] == before[0] + before[1]
            assert terms[1:] == before[2:]
            before = terms
    assert abs(slips / carries - 0.6) < 4 * math.sqrt(0.24 / carries)


def test_demonstrations_without_slips_are_exact_and_noise_is_not():
    assert all(r["completion"] == toys.chain_solution(r["prompt"]) for r in toys.demonstrations(200, 0, slip=0.0))
    noisy = toys.demonstrations(200, 0, slip=0.0, noise=0.5)
    assert 50 < sum(r["completion"] != toys.chain_solution(r["prompt"]) for r in noisy) < 190
    assert toys.demonstrations(20, 0, 0.6) == toys.demonstrations(40, 0, 0.6)[:20]
    assert toys.demonstrations(20, 0, 0.6) != toys.demonstrations(20, 1, 0.6)


def test_preference_pairs_prefer_the_exact_completion():
    for row in toys.preference_pairs(300, seed=0):
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert all(toys.chain_steps(row["prompt"], row["chosen"]))
        assert not all(toys.chain_steps(row["prompt"], row["rejected"]))
        assert toys.first_wrong(row["prompt"], row["chosen"]) is None


# words


# strings


@pytest.mark.parametrize(
    "text, grade",
    [
        ("cfaagd", 1.0),
        ("caaaad", 1.0),
        ("cfaag", 0.6),  # too short, and another last letter
        ("cfbagd", 0.8),
        ("dfcage", 0.6),
        ("cfAagd", 0.0),
        ("cfaagd=", 0.0),
        ("", 0.0),
    ],
)
def test_a_string_is_graded_by_its_constraints(text, grade):
    """6 letters, with a, without b, c first, d last."""
    assert toys.string_grade("6+a-b^c$d=", text) == pytest.approx(grade)
    assert toys.string_correct([text], [{"prompt": "6+a-b^c$d="}]) == [grade == 1]


def test_exactly_two():
    assert [toys.satisfied(text, ("2", "e")) for text in ("ae", "aee", "eee", "eae")] == [False, True, False, True]


def test_strings_are_a_function_of_seed_and_step_and_never_of_the_test_set():
    task = tasks.load_task("strings", test_rows=100)
    assert task.rows(3, 5, 8) == task.rows(3, 5, 8) != task.rows(3, 6, 8)
    test = [row["prompt"] for row in task.test]
    train = [row["prompt"] for step in range(20) for row in task.rows(3, step, 50)]
    train += [row["prompt"] for row in task.unannotated(500, 0) + task.pairs(200, 0)]
    assert len(set(test)) == 100 and all(map(toys.chain_is_held_out, test))
    assert not any(map(toys.chain_is_held_out, train))
    assert all(toys.chain_is_held_out(row["prompt"]) for row in task.pairs(20, 0, held_out=True))
    assert all(3 <= len(toys.string_constraints(prompt)) <= 5 for prompt in train)


def test_string_writers_misread_the_last_constraint_as_often_as_asked():
    """Right answers to every prompt; a slip fails the last constraint alone."""
    rows = tasks.load_task("strings").unannotated(1000, 0)
    assert all(toys.string_correct(toys.string_gold(rows, 0), rows))
    slipped = toys.string_gold(rows, 0, slip=0.3)
    assert slipped == toys.string_gold(rows, 0, slip=0.3)
    assert abs(sum(toys.string_correct(slipped, rows)) / 1000 - 0.7) < 0.05
    only = [toys.string_constraints(row["prompt"])[-1] for row in rows]
    wrong = [(t, r, c) for t, r, c in zip(slipped, rows, only) if not toys.satisfied(t, c)]
    rest = [[toys.satisfied(t, c) for c in toys.string_constraints(r["prompt"])[:-1]] for t, r, _ in wrong]
    assert 0.25 < len(wrong) / 1000 < 0.35 and sum(map(all, rest)) == len(rest)


def test_one_prompt_has_many_right_answers():
    rows = [{"prompt": "6+a-b^c$d="}]
    assert len({toys.string_gold(rows, seed)[0] for seed in range(50)}) > 40


def test_pairs_of_strings_are_broken_on_purpose():
    """The better answer is right and the worse one is wrong; the edit is small."""
    pairs = toys.string_pairs(500, 0)
    assert all(toys.string_grade(p["prompt"], p["chosen"]) == 1 for p in pairs)
    assert all(toys.string_grade(p["prompt"], p["rejected"]) < 1 for p in pairs)
    assert all(abs(len(p["chosen"]) - len(p["rejected"])) <= 1 and 1 <= len(p["broken"]) <= 3 for p in pairs)
    assert {kind for p in pairs for kind in p["broken"]} == set("#+-^$2")


def test_demonstrations_of_strings_teach_to_copy():
    rows = toys.string_demonstrations(400, 0, slip=0.6, copies=0.25)
    again = [r for r in rows if "==" in r["prompt"]]
    assert 70 < len(again) < 130
    for row in again:
        first, _, last = row["prompt"].partition("==")
        assert first == last + row["completion"]


def test_demonstrations_of_strings_teach_to_judge():
    """Each broken constraint is named, and a right answer is called right."""
    right = 0
    for row in toys.string_demonstrations(300, 0, slip=0.6, faults=1.0):
        prompt, _, answer = row["prompt"].removesuffix("==").partition("=")
        broken = [c for c in toys.string_constraints(prompt + "=") if not toys.satisfied(answer, c)]
        assert row["completion"] == ("".join(kind.strip("#") + what for kind, what in broken) or "=+")
        right += not broken
    assert 60 < right < 200


def test_words_splits_the_hundred_sums():
    task = tasks.load_task("words")
    train = task.rows(0, 0, 75)
    asked = {row["prompt"][0]["content"] for row in train}
    assert len(asked) == 75 and len(task.test) == 25
    assert not asked & {row["prompt"][0]["content"] for row in task.test}
    assert len({row["prompt"][0]["content"] for row in task.rows(0, 1, 32)}) == 32
    row = {"prompt": [{"role": "user", "content": "What is 7+5?"}], "answer": "12"}
    texts = ["12", "7+5=12.", "It is 12", "twelve", "112", "-12", "12 or 13", "**12**", "7+5 = 12!"]
    assert toys.word_correct(texts, [row] * 9) == [True, True, True, False, False, False, False, True, True]
    assert toys.word_answered(["twelve", "12"]) == [False, True]


ECHOES = [
    ("7", True),
    ("**7**", True),
    ("7\n\nThis is", True),
    ("0 + 7 = 7", True),
    ("0+7 is 7.", True),
    ("The answer is: 7", True),
    ("0 plus 7 equals **7**.", True),
    ("0+7 is equal to 7.", True),
    ("0+7 is 8.", False),
    ("0+7", False),
    ("0 + 7 =", False),
    ("What is 0+7?", False),
    ("The number 0+7 is a mathematical concept", False),
    ("the sum of 0 and 7", False),
    ("Zero plus 7 is a concept", False),
    ("adding 7 to zero", False),
    ("Calculating 7 as", False),
    ("7 is a number", False),
    ("0+7 is 1+7.", False),
    ("7+0 is 0+7.", False),
    ("0+7 is 7+0.", False),
    ("it is 17", False),
]


@pytest.mark.parametrize("text, right", ECHOES)
def test_an_echo_of_the_question_is_no_answer(text, right):
    row = {"prompt": [{"role": "user", "content": "What is 0+7?"}], "answer": "7"}
    assert toys.word_correct([text], [row]) == [right]


def test_no_question_answers_itself():
    rows = [row for part in toys.word_rows() for row in part]
    questions = [row["prompt"][0]["content"] for row in rows]
    sums = [question.removeprefix("What is ").removesuffix("?") for question in questions]
    assert not any(toys.word_correct(questions, rows)) and not any(toys.word_correct(sums, rows))
    assert all(toys.word_correct([f"{a} is {row['answer']}." for a, row in zip(sums, rows)], rows))


# graders


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 72", "72"),
        ("so 3 and 4\n#### $1,234.00\nDone in 5 steps", "1234"),
        ("#### 5\n#### 6", "6"),
        ("It is \\boxed{40} apples for 3 people", "40"),
        ("\\boxed{1} then \\boxed{\\$1{,}500}, surely 2", "1500"),
        ("\\boxed{\\text{about } 8\\%}", "8"),
        ("\\boxed{no", None),
        ("#### none, but 5 before", "5"),
        ("7 + 5 = 12.", "12"),
        ("10-3=7", "7"),
        ("from 10-3", None),  # arithmetic that is left to do
        ("= -3", "-3"),
        ("it lost $-5", "-5"),
        ("it lost -$5", "-5"),
        ("−4 degrees", "-4"),
        ("72.0", "72"),
        ("0.50", "1/2"),
        (".5", "1/2"),
        ("3/4 of it", "3/4"),
        ("\\boxed{\\frac{3}{2}}", "3/2"),
        ("about 20%", "20"),
        ("1,000,000 people", "1000000"),
        ("1,2,3", None),
        ("007", "7"),
        ("1/0", None),
        ("seven", None),
        ("", None),
        ("9" * 5000, None),  # a model that repeats itself must not end the run
    ],
)
def test_extract_number(text, number):
    assert graders.extract_number(text) == number


def test_gsm8k_grades_numbers_and_never_substrings():
    row = {"answer": "40"}
    texts = ["40", "140", "#### 40.0", "#### 4", "-40", "40 or 41", "forty"]
    assert graders.gsm8k_correct(texts, [row] * 7) == [True, False, True, False, False, False, False]
    assert graders.gsm8k_answered(texts) == [True] * 5 + [False, False]


LATEX = [
    ("40", "140", False),
    ("2", "-2", False),
    ("\\frac{1}{2}", "0.5", True),
    ("\\frac12", "1/2", True),
    ("x^2+1", "1+x^2", True),
    ("(1,2)", "(2,1)", False),
    ("[2,5)", "(2,5)", False),
    ("5", "5.001", False),
    ("3", "", False),
    ("3", "\\frac{", False),
    ("2", "2,3", False),
]


@pytest.mark.parametrize("reference, answer, same", LATEX)
def test_math_grades_meanings_and_never_substrings(reference, answer, same):
    assert graders.math_correct([f"so \\boxed{{{answer}}}."], [{"answer": reference}]) == [same]


def test_math_reads_the_last_complete_box_and_works_outside_the_main_thread():
    texts = ["\\boxed{2}", "\\boxed{1}, no, \\boxed{2}", "\\boxed{2}, no, \\boxed{1}", "2", "\\boxed{2} and \\boxed{1"]
    right = []
    thread = threading.Thread(target=lambda: right.extend(graders.math_correct(texts, [{"answer": "2"}] * 5)))
    thread.start()
    thread.join()
    assert right == [True, True, False, False, True]
    assert graders.math_answered(texts) == [True, True, True, False, True]
    assert graders.last_boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"


def test_math_without_its_grader_is_refused_before_anything_runs(tmp_path, monkeypatch):
    data = write(tmp_path / "m.jsonl", [{"problem": f"{i}?", "solution": f"\\boxed{{{i}}}"} for i in range(4)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("pip install math-verify", tasks.load_task, dataset=data, test_rows=1)


# files

GSM8K = [{"question": f"{i}?", "answer": f"because\n#### {i}"} for i in range(10)]


def test_columns_decide_the_task(tmp_path):
    task = tasks.load_task(dataset=write(tmp_path / "g.jsonl", GSM8K), test_rows=3)
    assert task.name == "gsm8k" and [row["answer"] for row in task.test] == ["7", "8", "9"]
    assert task.test[0]["solution"] == "because\n#### 7"
    assert task.test[0]["prompt"][0]["role"] == "user" and task.test[0]["prompt"][0]["content"].startswith("7?")
    assert task.reward(["", "", ""], ["#### 7", "7", "8"], task.test) == [1.0, 0.0, 0.0]

    rows = [{"question": f"{answer}?", "answer": answer} for answer in (3, "4 or 5", "1,000")]
    task = tasks.load_task(dataset=write(tmp_path / "n.jsonl", rows), test_rows=1)
    assert [row["answer"] for row in task.train + task.test] == ["3", "1000"]
    assert task.train[0]["solution"] == "3"
    assert f"; 1 rows of {tmp_path / 'n.jsonl'} without an answer left out: [2]" in task.note

    rows = [
        {"problem": "0?", "solution": "so \\boxed 2"},
        {"problem": "1?", "solution": "so \\boxed{2}", "answer": "$\\frac{1}{2}$"},
        {"problem": "2?", "solution": "no idea"},
        {"problem": "3?", "answer": 7},
        {"problem": "4?", "solution": "It is seven.", "answer": "7"},
    ]
    task = tasks.load_task(dataset=write(tmp_path / "a.jsonl", rows), test_rows=0)
    assert [row["answer"] for row in task.train] == ["2", "\\frac{1}{2}", "7", "7"] and "left out: [3]" in task.note
    assert task.train[3]["solution"] == "It is seven."

    rows = [{"problem": f"{i}?", "solution": f"\\boxed{{{i}}}"} for i in range(4)]
    task = tasks.load_task(dataset=write(tmp_path / "m.jsonl", rows), test_rows=1)
    assert task.name == "math" and task.test[0]["answer"] == "3"
    assert task.reward([""], ["\\boxed{3.0}"], task.test) == [1.0]


def test_all_three_kinds_of_file_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "a.jsonl", GSM8K)
    (tmp_path / "b.json").write_text(json.dumps(GSM8K))
    write(tmp_path / "c.json", GSM8K)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM8K), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert tasks.read_rows(str(tmp_path / name)) == GSM8K


def test_marks_blank_lines_and_broken_files(tmp_path):
    """A byte order mark and empty lines are read; what is torn, nested too deeply or has a key twice is refused."""
    lines = "\n\n".join(json.dumps(row) for row in GSM8K)
    for text in ("\ufeff" + lines + "\n\n", "\n \n" + lines, lines.replace("\n", "\r\n")):
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
        assert tasks.read_rows(str(tmp_path / "a.jsonl")) == GSM8K
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(GSM8K), encoding="utf-8")
    assert tasks.read_rows(str(tmp_path / "b.json")) == GSM8K
    deep = "[" * 100000
    bad = {"twice.jsonl": '{"a": 1}\n\n{"a": 1, "a": 2}', "deep.jsonl": "{}\n" + deep, "deep.json": deep}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        refused(
            "row 2 cannot be read (" if name.endswith("l") else "cannot be read (",
            tasks.read_rows,
            str(tmp_path / name),
        )
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet PAR1")
    refused("c.parquet cannot be read (", tasks.read_rows, str(tmp_path / "c.parquet"))


def test_an_epoch_is_a_permutation_and_held_out_prompts_are_never_trained_on(tmp_path):
    file = write(tmp_path / "g.jsonl", [*GSM8K, GSM8K[0]])  # row 1 again as the last, held-out row
    task = tasks.load_task(dataset=file, test_rows=1)
    assert len(task.train) == 9 and "1 training rows left out" in task.note
    epoch = [row["answer"] for step in range(3) for row in task.rows(4, step, 3)]
    assert sorted(epoch) == [str(i) for i in range(1, 10)]
    again = [row["answer"] for step in range(3, 6) for row in task.rows(4, step, 3)]
    assert sorted(again) == sorted(epoch) and again != epoch
    assert task.rows(4, 2, 3) == task.rows(4, 2, 3) != task.rows(5, 2, 3)
    assert len(task.rows(0, 0, 40)) == 40

    other = write(tmp_path / "t.jsonl", GSM8K[5:])
    task = tasks.load_task(dataset=file, test_dataset=other, test_rows=2)
    assert [row["answer"] for row in task.test] == ["5", "6"]
    assert sorted(row["answer"] for row in task.train) == ["0", "0", "1", "2", "3", "4"]


def test_hub_datasets_use_their_test_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config=None):
        asked.append((name, config))
        if name == "nobody/nothing":
            raise ConnectionError("offline\nreally")
        return {name: datasets.Dataset.from_list(rows) for name, rows in (("train", GSM8K[:6]), ("test", GSM8K[6:]))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = tasks.load_task("gsm8k", test_rows=3)
    assert asked[0] == ("openai/gsm8k", "main")
    assert len(task.train) == 6 and [row["answer"] for row in task.test] == ["6", "7", "8"]
    assert len(tasks.read_rows("org/name", "test")) == 4 and asked[-1] == ("org/name", None)
    refused("no split 'val'; expected org/name:SPLIT with one of train, test", tasks.read_rows, "org/name", "val")
    assert tasks.read_rows("org/name:test") == tasks.read_rows("org/name", "test")
    task = tasks.load_task(dataset="org/name:train", test_rows=1)  # of a split that is named, the last rows
    assert [row["answer"] for row in task.test] == ["5"] and len(task.train) == 5
    task = tasks.load_task(dataset="org/name:train", test_dataset="org/name:test", test_rows=3)
    assert [row["answer"] for row in task.test] == ["6", "7", "8"] and len(task.train) == 6
    refused("there is no such file, and loading it from the Hub", tasks.load_task, dataset="nobody/nothing")


def test_prompts_and_messages_with_a_reward_file(tmp_path):
    reward = tmp_path / "r.py"
    reward.write_text("K = 2\ndef reward(prompts, completions, rows):\n    return [K * len(c) for c in completions]\n")
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    pair = {"chosen": turns, "rejected": [*turns[:2], {"role": "assistant", "content": "no"}]}
    rows = [{"messages": turns, "extra": 1}, {"prompt": "p"}, {"prompt": turns[:2]}, pair, pair | {"prompt": "text"}]
    for row, expected in zip(rows, (turns[:2], "p", *[turns[:2]] * 3), strict=True):
        other = {"prompt": "q"} if "prompt" in row else {"messages": [{"role": "user", "content": "q"}]}
        task = tasks.load_task(dataset=write(tmp_path / "p.jsonl", [other, row]), reward_file=str(reward), test_rows=1)
        assert task.name == "prompts" and task.correct is None and task.answered is None
        assert task.test[0]["prompt"] == expected
        assert task.reward([""], ["abc"], task.test) == [6.0]
    task = tasks.load_task("chains", reward_file=str(reward))
    assert task.reward([""], ["abc"], task.test[:1]) == [6.0] and task.correct is toys.chain_correct


def test_bad_files(tmp_path):
    load = tasks.load_task
    refused("--dataset is empty", load, "math")
    refused("makes its own rows", load, "chains", "x.jsonl")
    refused("makes its own rows", load, "words", test_dataset="x.jsonl")
    refused("nothing.jsonl: there is no such file", load, dataset="nothing.jsonl")
    refused("it is a folder", load, dataset=str(tmp_path))
    refused("there is no such file", load, dataset="data/x/y.csv")
    (tmp_path / "x.csv").write_text("a")
    refused("unknown extension '.csv'", load, dataset=str(tmp_path / "x.csv"))
    refused("has no rows", load, dataset=write(tmp_path / "empty.jsonl", []))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    refused("row 2 cannot be read (", load, dataset=str(tmp_path / "bad.jsonl"))
    refused("row 2 is a int", load, dataset=write(tmp_path / "x.jsonl", [{}, 3]))
    (tmp_path / "bad.json").write_text("[1, ")
    refused("cannot be read (", load, dataset=str(tmp_path / "bad.json"))
    (tmp_path / "bad.parquet").write_text("no")
    refused("expected Parquet", load, dataset=str(tmp_path / "bad.parquet"))


def test_bad_rows(tmp_path):
    def load(rows, task="auto", **kwargs):
        return tasks.load_task(task, write(tmp_path / "x.jsonl", rows), **{"test_rows": 0, **kwargs})

    refused("it has the columns text, n; expected answer+question or answer+problem or problem+solution or prompt",
            load, [{"text": "", "n": 1}])  # fmt: skip
    refused("expected answer+problem or problem+solution", load, GSM8K, "math")
    refused("row 2: 'question' is missing or empty; expected text", load, [GSM8K[0], {"answer": "#### 1"}])
    refused("row 2: 'answer' is a list; expected text", load, [GSM8K[0], {"question": "a", "answer": ["3"]}])
    for row in ({"question": "a", "answer": "it is 3"}, {"question": "a", "answer": "3 ####"},
                {"question": "a", "answer": None}, {"problem": "a", "solution": "3"},
                {"problem": "a", "answer": float("nan")}):  # fmt: skip
        refused("no row has an answer; expected '#### ' and a number, \\boxed{} or a column 'answer'", load, [row])
    refused("--test_rows 10: ", load, GSM8K, test_rows=10)
    refused("--reward_file is empty", load, [{"prompt": "a"}])
    refused("each of its training prompts", load, [GSM8K[0], GSM8K[0]], test_rows=1)
    refused("expected answer+question", load, GSM8K,
            test_dataset=write(tmp_path / "t.jsonl", [{"prompt": "a"}]))  # fmt: skip

    (tmp_path / "r.py").write_text("def reward(prompts, completions, rows): return [0.0] * len(rows)")
    reward = {"reward_file": str(tmp_path / "r.py")}
    refused("row 1: 'prompt' is a int; expected text or a list of messages", load, [{"prompt": 3}], **reward)
    refused("row 1: 'prompt' is missing or empty", load, [{"prompt": []}], **reward)
    refused("row 1: 'prompt' is missing or empty", load, [{"chosen": "a", "rejected": "b"}], **reward)
    refused("row 1: 'prompt' has the message {'role': 'user'}", load, [{"prompt": [{"role": "user"}]}], **reward)
    turn = {"role": "user", "content": "a"}
    for more in ({"tool_calls": [1]}, {"name": "b"}, {"role": "tool"}, {"role": "human"}, {"weight": 1}):
        refused("no other keys", load, [{"prompt": [turn | more, turn]}], **reward)
    for name in ("tools", "functions", "documents", "chat_template_kwargs"):
        refused(f"row 1: '{name}' would go to the chat", load, [{"prompt": [turn], name: [{"a": 1}]}], **reward)
    nothing = {"tools": None, "functions": []}
    assert load([{"prompt": [turn | {"tool_calls": None}]} | nothing], **reward).train[0]["prompt"] == [turn]
    refused("row 1: 'prompt' has half of a surrogate", load, [{"prompt": "a \ud83d"}], **reward)
    refused("row 1: 'prompt' has half of a surrogate", load, [{"prompt": [turn | {"content": "\ude00"}]}], **reward)
    refused("'messages' has no user turn", load, [{"messages": [{"role": "system", "content": "a"}]}], **reward)


# rewards


def test_bad_reward_files(tmp_path):
    file = tmp_path / "r.py"
    refused("there is no such file", tasks.load_task, reward_file=str(file))
    for source, message in (
        ("x = 1", "it has no function 'reward'"),
        ("reward = 3", "it has no function 'reward'"),
        ("def reward(:", "running it raised SyntaxError"),
        ("import no_such_module", "running it raised ModuleNotFoundError"),
        ("def reward(completions): pass", "it has reward(completions); expected reward(prompts, completions, rows)"),
        ("def reward(prompts, completions, answer, **kwargs): pass", "it has reward(prompts, completions, answer"),
        ("def reward(completions, prompts, rows): pass", "it has reward(completions, prompts, rows)"),
        ("def reward(*args): pass", "it has reward(*args)"),
        ("def reward(prompts, completions, rows, more): pass", "it has reward(prompts, completions, rows, more)"),
        ("import sys; sys.exit('no licence')", "running it raised SystemExit (no licence)"),
        ("quit()", "running it raised SystemExit"),
    ):
        file.write_text(source)
        refused(message, tasks.load_task, reward_file=str(file))


def test_reward_files_import_their_siblings_and_use_process_pools(tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("def score(text): return float(len(text))")
    file = tmp_path / "pooled_reward.py"
    file.write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from beside_the_reward import score\n"
        "def one(text): return score(text)\n"
        "def reward(prompts, completions, rows, how='fork'):\n"
        "    with ProcessPoolExecutor(1, get_context(how)) as pool: return list(pool.map(one, completions))\n"
    )
    for how in ("fork", "spawn"):
        file.write_text(file.read_text().replace("how='fork'", f"how='{how}'"))
        assert tasks.load_reward(str(file))([""] * 2, ["a", "bc"], [{}] * 2) == [1.0, 2.0]
    for name in ("torch", "json", "datasets"):  # a module of that name is in use, or may be imported later
        (tmp_path / f"{name}.py").write_text(file.read_text())
        refused(f"another module has the name {name}", tasks.load_reward, str(tmp_path / f"{name}.py"))


def test_a_reward_that_exits_is_an_error_with_its_text(tmp_path):
    file = tmp_path / "exits.py"
    for call, text in (
        ("sys.exit('no key')", "sys.exit('no key')"),
        ("exit(0)", "sys.exit(0)"),
        ("quit()", "sys.exit("),
    ):
        file.write_text(f"import sys\ndef reward(prompts, completions, rows): {call}")
        refused(f"exits.py: reward() called {text}", tasks.load_reward(str(file)), ["p"], ["a"], [{}])


def test_rewards_are_checked():
    def check(value, lengths=None):
        rows = [{"completion_ids": [0] * n} for n in lengths] if lengths else [{}] * 2
        return tasks.checked_reward(lambda *_: value, "r.py")(["p"] * 2, ["a", "bc"], rows)

    assert check([1, np.float32(0.5)]) == [1.0, 0.5]
    assert check(np.array([1.0, 2.0])) == [1.0, 2.0]
    assert check([[1.0], [1, 0.0]], [1, 2]) == [[1.0], [1.0, 0.0]]
    for value in (True, np.bool_(True), None, "2", 1j, [1.0, [2.0]], {}):
        refused("r.py: the reward of row 2", check, [[1.0], [1.0, value]] if isinstance(value, list) else [1.0, value])
    for value in (1e39, -1e39, 10**400, 10**39, float("-inf"), np.float64(1e300), Fraction(10) ** 50):
        refused("in float32; expected a finite number", check, [1.0, value])
    assert check([3.4e38, Fraction(1, 2)]) == [3.4e38, 0.5]
    refused("r.py: reward() returned a NoneType; expected a list", check, None)
    refused("r.py: reward() returned 1 rewards; expected one for 2 rows", check, [1.0])
    refused("r.py: the reward of row 2 is nan in float32; expected", check, [1.0, float("nan")])
    refused("r.py: the reward of row 1 is inf", check, [float("inf"), 0.0])
    refused("r.py: the reward of row 2 is a str; expected a number", check, [1.0, "2"])
    refused("r.py: the reward of row 2 is a float and that of row 1 a list", check, [[1.0], 2.0])
    refused("r.py: the reward of row 2 at token 2 is nan", check, [[1.0], [1.0, float("nan")]])
    refused("r.py: the reward of row 2 has 1 numbers; expected 2", check, [[1.0], [1.0]], [1, 2])


# prompts that are too long


def test_fit_prompts(tmp_path, monkeypatch):
    rows = [{"question": "x" * i, "answer": f"#### {i}"} for i in range(1, 11)]
    task = tasks.load_task(dataset=write(tmp_path / "x.jsonl", rows), test_rows=2)
    room = len(tasks.GSM8K_ASK)
    length = lambda prompt: len(prompt) if isinstance(prompt, str) else len(prompt[0]["content"]) - room  # noqa: E731
    monkeypatch.setattr(tasks, "encode_prompt", lambda length, prompt, changes: [0] * length(prompt))
    assert tasks.fit_prompts(task, length, 10) == task
    fitted = tasks.fit_prompts(task, length, 9)
    assert len(fitted.train) == 8 and len(fitted.test) == 1
    assert "0 training and 1 held-out prompts are longer than 9 tokens, left out" in fitted.note
    fitted = tasks.fit_prompts(tasks.load_task(dataset=write(tmp_path / "x.jsonl", rows[::-1]), test_rows=2), length, 6)
    assert sorted(len(r["question"]) for r in fitted.rows(0, 0, 4)) == [3, 4, 5, 6]
    assert fitted.reward([""], ["2"], [{"answer": "2"}]) == [1.0]
    assert len(tasks.fit_prompts(task, length, 6, "truncate").train) == 8
    refused("--max_prompt 6: 2 training and 2 held-out", tasks.fit_prompts, task, length, 6, "error")
    refused("--max_prompt 6: ", tasks.fit_prompts, task, length, 6)  # no held-out row would be left
    refused("--max_prompt 3: 0 training and", tasks.fit_prompts, tasks.load_task(), length, 3)


def test_a_task_that_makes_its_rows_makes_short_ones(monkeypatch):
    """Long prompts of an endless task are replaced by the next ones; where all are short, nothing changes."""
    monkeypatch.setattr(tasks, "encode_prompt", lambda tokenizer, prompt, changes: [0] * len(prompt))
    task = tasks.load_task("chains", test_rows=64)
    lengths = sorted({len(row["prompt"]) for row in task.rows(0, 3, 64)})
    assert len(lengths) > 1
    assert tasks.fit_prompts(task, None, lengths[-1]).rows(0, 3, 64) == task.rows(0, 3, 64)
    short = tasks.fit_prompts(task, None, lengths[0])
    expected = [row for row in task.rows(0, 3, 4096) if len(row["prompt"]) <= lengths[0]]
    assert short.rows(0, 3, 64) == expected[:64] and short.rows(0, 3, 2) == expected[:2]
    assert tasks.fit_prompts(task, None, lengths[0], "truncate").rows(0, 3, 64) == task.rows(0, 3, 64)
    strict = tasks.fit_prompts(replace(task, test=[]), None, lengths[0], "error")
    long = sum(len(row["prompt"]) > lengths[0] for row in task.rows(0, 3, 64))
    refused(f"--max_prompt {lengths[0]}: {long} of the 64 prompts of step 3 are longer", strict.rows, 0, 3, 64)


# preference pairs


def test_pairs_of_all_forms(tmp_path):
    def load(row):
        return tasks.load_pairs(write(tmp_path / "x.jsonl", [row]))[0]

    def said(role, content):
        return {"role": role, "content": content}

    expected = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert load(expected) == expected
    user = [said("user", "p")]
    good, bad = [said("assistant", "a")], [said("assistant", "b")]
    expected["prompt"] = user
    assert load({"prompt": user, "chosen": good, "rejected": bad}) == expected
    assert load({"chosen": user + good, "rejected": user + bad}) == expected
    assert load({"prompt": "p", "chosen": user + good, "rejected": user + bad}) == expected
    assert load({"chosen": user + good, "rejected": user + good})["rejected"] == "a"
    long = user + bad + [said("user", "again")]
    assert load({"chosen": long + good, "rejected": long + bad})["prompt"] == long

    refused("expected chosen+rejected", load, {"prompt": "p", "chosen": "a"})
    refused("row 1: 'prompt' is missing or empty", load, {"chosen": "a", "rejected": "b"})
    refused("row 1: only one of 'chosen' and 'rejected' is text", load, {"chosen": "a", "rejected": user + bad})
    refused("row 1: 'rejected' is missing or empty", load, {"prompt": "p", "chosen": "a", "rejected": ""})
    refused("row 1: 'chosen' has 0 messages of prompt", load, {"chosen": good, "rejected": bad})
    refused("row 1: 'chosen' has 1 messages of prompt and then assistant user assistant", load,
            {"chosen": long + good, "rejected": user + good + good})  # fmt: skip


# steps, credit and what a reward model learns from


@pytest.mark.parametrize(
    "completion, credit",
    [
        ("22+8=30", [1] * 8),
        ("12+8=20", [0] * 8),
        ("22+8=31", [1] * 6 + [0, 0]),
        ("22+8", [1, 1, 1, 1, 0]),  # a right beginning that stops too early: its end is wrong
        ("22+8=30=30", [1] * 7 + [0] * 4),
        ("2+28=30", [1] + [0] * 7),
        ("", [0]),
    ],
)
def test_credit_of_tokens(completion, credit):
    """A token is right while the derivation is exact; the last one must end the answer."""
    assert toys.chain_credit("7+15+8=", [*completion, "<eos>"]) == credit


def test_credit_of_longer_tokens_and_other_prompts():
    """Tokens of several characters are exact as a whole or not; what is no chain has no truth."""
    assert toys.chain_credit("7+15+8=", ["22+", "8=", "30", ""]) == [1, 1, 1, 1]
    assert toys.chain_credit("7+15+8=", ["22+", "8=3", "1", ""]) == [1, 1, 0, 0]
    for prompt in ("7=", "7+15", "What is 7+5?", [{"role": "user", "content": "7+15="}]):
        assert toys.chain_credit(prompt, ["2", "2", ""]) is None


def test_a_reward_is_not_called_without_rows():
    """Ranks beyond the held-out rows have none, and a user's reward takes the largest of nothing."""
    reward = tasks.checked_reward(lambda prompts, completions, rows: [max(map(len, completions))] * len(rows), "r.py")
    assert reward([], [], []) == [] and reward(["p"], ["ab"], [{}]) == [2.0]


def test_held_out_pairs_share_no_prompt_with_the_others():
    def pair(prompt, n):
        return {"prompt": prompt, "chosen": str(n), "rejected": "x"}

    chat = [{"role": "user", "content": "p"}]
    pairs = [pair(p, n) for n, p in enumerate(["a", "b", "a", chat, "c", "b", chat])]
    train, test = tasks.split_pairs(pairs, 2)
    assert test == pairs[-2:] and train == [pairs[i] for i in (0, 2, 4)]
    refused("there are 7 pairs", tasks.split_pairs, pairs, 7)
    refused("each prompt of a training pair", tasks.split_pairs, [pair("a", 0), pair("a", 1)], 1)


def test_prompts_that_need_no_grader(tmp_path):
    """graded=False allows prompts alone, and takes nothing from a task that has a grader."""
    path = write(tmp_path / "x.jsonl", [{"prompt": f"{i}="} for i in range(9)])
    refused("--reward_file is empty", tasks.load_task, dataset=path, test_rows=2)
    task = tasks.load_task(dataset=path, test_rows=2, graded=False)
    assert task.reward is None and task.correct is None and len(task.train) == 7
    assert tasks.load_task(test_rows=2, graded=False).reward([""], ["30"], [{"answer": "30"}]) == [1.0]
    mine = tmp_path / "mine.py"
    mine.write_text("def reward(prompts, completions, rows): return [2.0 for _ in rows]\n")
    assert tasks.load_task(dataset=path, reward_file=str(mine), test_rows=2, graded=False).reward([""], [""], [{}]) == [
        2.0
    ]


# the checkpoint and real data


def test_the_builtin_policy():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(file.stat().st_size for file in POLICY.iterdir()) <= 3 * 2**20
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    assert model.config.vocab_size == len(tokenizer) == 16
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for row in toys.chain_test_rows(50):
        text = row["prompt"] + toys.chain_solution(row["prompt"])
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1 and len(ids) == len(text) + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        message = [{"role": "user", "content": text}]
        assert tokenizer.apply_chat_template(message, return_dict=True)["input_ids"] == ids
    assert tokenizer("7?")["input_ids"][-1] == tokenizer.unk_token_id == 3

    # it has learnt sums without carries, and forgets carries: there is something to win for every script
    rows = toys.chain_test_rows(64)
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    assert 0.05 < sum(toys.chain_correct(texts, rows)) / 64 < 0.5
    assert all(toys.chain_answered(texts))


def test_the_builtin_model_of_strings():
    """It writes every symbol of the task, follows the misread constraint, and repeats what it is shown."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = POLICY.parent / "strings"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2**20
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = toys.string_test_rows(64)
    answers = toys.string_gold(rows, 0, slip=0.6)
    again = [f"{row['prompt']}{answer}=={row['prompt']}" for row, answer in zip(rows, answers)]
    for text in (again[0], "0123456789+=-^$abcdefgh"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) + 1 and tokenizer.decode(ids, skip_special_tokens=True) == text

    def greedy(prompts):
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(output, skip_special_tokens=True)

    texts = greedy([row["prompt"] for row in rows])
    held = [[toys.satisfied(t, c) for c in toys.string_constraints(r["prompt"])] for t, r in zip(texts, rows)]
    assert 0.05 < sum(map(all, held)) / 64 < 0.5 and sum(all(h[:-1]) for h in held) / 64 > 0.7
    assert sum(a == b for a, b in zip(greedy(again), answers)) / 64 > 0.8


def test_real_gsm8k():
    folder = os.environ.get("MINALIGN_GSM8K", "")
    if not folder:
        pytest.skip("MINALIGN_GSM8K does not name a folder with GSM8K's train.jsonl")
    task = tasks.load_task(dataset=str(Path(folder) / "train.jsonl"), test_rows=256)
    assert task.name == "gsm8k" and len(task.train) + len(task.test) in range(7470, 7474)
    solutions = [row["solution"] for row in task.test]
    assert all(task.correct(solutions, task.test))
    assert not any(task.correct([row["answer"] + "0" for row in task.test if row["answer"] != "0"],
                                [row for row in task.test if row["answer"] != "0"]))  # fmt: skip


def test_pairs_of_two_slipping_answers():
    """exact=False: the chosen answer has fewer wrong steps, but often some; needless carries are among the mistakes."""
    rows = toys.preference_pairs(200, 0, needless=0.3, exact=False)
    assert rows == toys.preference_pairs(200, 0, needless=0.3, exact=False)
    wrong = [[toys.chain_steps(r["prompt"], r[side]).count(False) for side in ("chosen", "rejected")] for r in rows]
    assert all(a < b for a, b in wrong) and any(a > 0 for a, _ in wrong)
    over = [int(toys.chain_solution(r["prompt"]).split("+")[0].split("=")[0]) for r in rows]
    first = [int(r["rejected"].split("+")[0].split("=")[0]) for r in rows]
    assert any(f == o + 10 for f, o in zip(first, over)) and any(f == o - 10 for f, o in zip(first, over))

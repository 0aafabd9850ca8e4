"""builtin/gym.py: rows and graders of reasoning-gym, with a stand-in of the package, and with itself where it is installed."""

import dataclasses
import sys
import types

import pytest

import graders
import tasks
from builtin import gym
from common import BadInput


@dataclasses.dataclass
class SumConfig:
    seed: int = 0
    size: int = 500
    largest: int = 99
    sign: str = "+"

    def validate(self):
        assert self.largest > 0, "largest must be positive"


class Sums:
    def __init__(self, config):
        self.config = config

    def __getitem__(self, i: int) -> dict:
        a, b = i % (self.config.largest + 1), i // 7 % (self.config.largest + 1)
        return {"question": f"{a} {self.config.sign} {b} =", "answer": str(a + b), "metadata": {}}

    def score_answer(self, answer, entry) -> float:
        if answer == "what no scorer reads":
            raise KeyError(answer)
        return 1.0 if answer == entry["answer"] else 0.5 if entry["answer"] in answer else 0.0


def extract_answer(text: str) -> str | None:
    return text.split("<answer>")[-1].split("</answer>")[0].strip() if "<answer>" in text else None


@pytest.fixture
def package(monkeypatch):
    def create_dataset(name, **config):
        config = SumConfig(**config)
        config.validate()
        return Sums(config)

    factory = types.SimpleNamespace(DATASETS={"sums": (Sums, SumConfig)}, create_dataset=create_dataset)
    package = types.ModuleType("reasoning_gym")
    package.factory = factory
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.utils", types.SimpleNamespace(extract_answer=extract_answer))


def text(row: dict) -> str:
    return row["prompt"][0]["content"]


def test_rows_are_a_function_of_seed_and_step_and_never_held_out(package):
    task = tasks.load_task("gym:sums", test_rows=32)
    rows = [task.rows(0, step, 64) for step in range(4)]
    assert rows[1] == task.rows(0, 1, 64) != task.rows(1, 1, 64) and rows[1] != rows[2]
    assert len(task.test) == len({text(row) for row in task.test}) == 32
    assert not {text(row) for row in task.test} & {text(row) for step in rows for row in step}
    free = task.unannotated(64, 0)
    assert free == task.unannotated(64, 0) != task.unannotated(64, 1) and task.correct(
        [r["answer"] for r in free], free
    )
    assert not {text(row) for row in task.test} & {text(row) for row in free}
    assert task.test == tasks.load_task("gym:sums", test_rows=32).test and "32 held-out" in task.note


def test_settings_reach_the_family(package):
    task = tasks.load_task("gym:sums:largest=3,sign=plus", test_rows=256)
    assert all(text(row).startswith(tuple("0123")) and " plus " in text(row) for row in task.rows(0, 0, 8))
    assert 0 < len(task.test) < 16  # a family of 16 prompts


@pytest.mark.parametrize("completion, right", [
    ("12", True), ("<answer>12</answer>", True), ("5 + 7 = 12.", True), ("so <answer>The answer is 12.</answer>", True),
    ("<think>12</think> 13", False), ("<think>13</think> 12", True), ("<answer>13</answer> 12", False), ("120", False),
    ("12 or 13", False), ("", False), ("what no scorer reads", False), ("The sum 5 + 7 is hard", False),
])  # fmt: skip
def test_an_answer_is_right_by_the_scorer_or_by_its_number(package, completion, right):
    assert gym.is_right(gym.create("gym:sums"), {"answer": "12"}, completion) is right


class Lists(Sums):
    def score_answer(self, answer, entry) -> float:
        return float(eval(answer) == eval(entry["answer"]))


@pytest.mark.parametrize("answer, right", [
    ("[1, 2]", True), ("[1, (2)]", True), ("[2, 1]", False), ("[1", False), ("exit()", False), ("9 ** 9 ** 9", False),
    ("[1, 2] if open('found', 'w') else []", False), ("__import__('os').mkdir('found')", False),
    ("(lambda f: f('found', 'w') and [1, 2])(open)", False), ("[open][0]('found', 'w') and [1, 2]", False),
    ("open\\\n('found', 'w') and [1, 2]", False), ("(open # \n ('found', 'w') and [1, 2])", False),
])  # fmt: skip
def test_an_answer_that_a_scorer_runs_does_no_harm(answer, right, package, monkeypatch, tmp_path):
    real = graders.signal.setitimer
    monkeypatch.setattr(graders.signal, "setitimer", lambda which, seconds: real(which, seconds / 20))
    monkeypatch.chdir(tmp_path)
    assert gym.is_right(Lists(SumConfig()), {"answer": "[1, 2]"}, f"<answer>{answer}</answer>") is right
    assert not list(tmp_path.iterdir())


def test_a_string_of_digits_is_no_number(package):
    assert not gym.is_right(gym.create("gym:sums"), {"answer": "0101"}, "It is 101.")
    assert gym.is_right(gym.create("gym:sums"), {"answer": "-2.50"}, "It is -2.5.")


def test_a_family_of_one_prompt_is_refused_and_does_not_hang(package, monkeypatch):
    monkeypatch.setattr(Sums, "__getitem__", lambda self, i: {"question": "0 =", "answer": "0"})
    with pytest.raises(BadInput, match="too few prompts"):
        tasks.load_task("gym:sums", test_rows=4)


def test_a_family_with_a_careless_scorer_is_refused(package):
    sys.modules["reasoning_gym"].factory.DATASETS["puzzle24"] = Sums, SumConfig
    with pytest.raises(BadInput, match="calls wrong answers right"):
        tasks.load_task("gym:puzzle24")


@pytest.mark.parametrize("task, words", [
    ("gym:products", "no family 'products'; expected one of sums"), ("gym:", "no family ''"),
    ("gym:sums:size=3", "no setting 'size'; expected one of largest, sign"), ("gym:sums:largest=-1", "must be positive"),
    ("gym:sums:largest", "refuses it"), ("gyms", "--task must be one of auto"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused(package, task, words):
    with pytest.raises(BadInput, match=words):
        tasks.load_task(task)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BadInput, match="pip install reasoning-gym"):
        tasks.load_task("gym:chain_sum")


def test_with_the_package():
    pytest.importorskip("reasoning_gym")
    task = tasks.load_task("gym:chain_sum:min_terms=2,max_terms=2", test_rows=16)
    rows = task.rows(3, 0, 8)
    assert task.correct([row["answer"] for row in rows], rows) == [True] * 8
    assert task.correct([f"It is {row['answer']}." for row in rows], rows) == [True] * 8
    assert task.reward([""] * 8, ["1234567"] * 8, rows) == [0.0] * 8


@pytest.mark.parametrize("name", [
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
    "simple_integration", "spiral_matrix", "string_insertion",
])  # fmt: skip
def test_right_answers_of_scorers_that_run_them(name):
    """These families of 0.1.25 run an answer as Python, and their own answers pass."""
    pytest.importorskip("reasoning_gym")
    data = gym.create(f"gym:{name}")
    assert gym.runs_answers(type(data)) and not gym.runs_answers(type(gym.create("gym:chain_sum")))
    for entry in map(data.__getitem__, range(8)):
        if "Integral" in entry["answer"]:  # unsolved: the question repeated would be right
            continue
        assert gym.is_right(data, entry, f"<answer>{entry['answer']}</answer>"), entry["answer"]
        assert not gym.is_right(data, entry, "<answer>exit()</answer>")

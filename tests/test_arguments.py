"""Every argument of every script, given what is not legal: exit code 2 and one sentence that names it.

The table makes itself from the dataclass fields, so a new argument is in it. Nothing is loaded and no folder is made.
"""

import dataclasses
import importlib
import re
import typing

import common
import pytest

SCRIPTS = ("ppo_baseline", "lco", "qrm", "dpo", "dckd", "adpa", "seft", "evaluate")


def bad_values(field, kind) -> list[str]:
    """Words on the command line that `field` must refuse."""
    if typing.get_origin(kind) is typing.Literal:
        return ["perhaps"]
    if kind is bool:
        return ["perhaps", "2"]
    if kind not in (int, float):
        return []
    words = ["many", ""] + (["1.5", "1e3"] if kind is int else [])
    for key, step in (("at_least", -1), ("at_most", 1)):
        limit = field.metadata[key]
        if limit is not None:
            words.append(str(kind(limit) + step))
            words += ["0"] * (key == "at_least" and limit > 0)
    if kind is float:
        words += ["nan", "inf", "-inf"]
    return words


def refusal(script, words: list[str], capsys) -> str:
    """What stands on the screen; the exit code is 2."""
    with pytest.raises(SystemExit) as stop:
        common.parse_args(script.Args, script.BUILTIN, words)
    assert stop.value.code == 2, words
    return capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_illegal_values(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    kinds, tried, silent = typing.get_type_hints(script.Args), 0, []
    for field in dataclasses.fields(script.Args):
        for word in bad_values(field, kinds[field.name]):
            tried += 1
            try:
                said = refusal(script, [f"--{field.name}={word}"], capsys)
            except pytest.fail.Exception:  # parse_args went on
                silent.append((field.name, word))
                continue
            assert said.count("\n") == 1 and f"--{field.name}" in said and word in said, (word, said)
            assert re.search(r"must be (one of|at least|at most|a finite) |invalid \w+ value", said), said
    assert not silent, silent
    assert tried > 40 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "words",
    [["--learning_rate", "1"], ["--mod", "x"], ["stray"], ["--model"], ["-h5"], ["--seed", "1", "2"], ["--=3"]],
    ids=" ".join,
)
def test_words_that_are_no_arguments(name, words, capsys):
    script = importlib.import_module(name)
    assert refusal(script, words, capsys).count("\n") == 1


@pytest.mark.parametrize(
    "words, ends",
    [
        (["--los", "lch"], "unknown argument --los; did you mean --loss?"),
        (["--seed", "1", "--LR=2"], "unknown argument --LR; did you mean --lr?"),
        (["--max-prompt", "9"], "unknown argument --max-prompt; did you mean --max_prompt?"),
        (["--wandb"], "unknown argument --wandb"),
        (["lch"], "unknown argument lch"),
        (["--loss", "lcl"], "--loss must be one of kld, mse, lch; found 'lcl'; did you mean lch?"),
        (["--loss", "ppo"], "--loss must be one of kld, mse, lch; found 'ppo'"),
    ],
)
def test_did_you_mean(words, ends, capsys):
    """The nearest name or choice, where one is near, and no pages of usage."""
    assert refusal(importlib.import_module("lco"), words, capsys).endswith(f": error: {ends}\n")

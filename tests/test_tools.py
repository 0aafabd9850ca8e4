"""The tools beside the scripts: pages of runs, and built-in pairs as a file."""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import common
import lco
import ppo_baseline
import pytest
import report
import tasks
from builtin import tasks as toys
from conftest import ROOT, run_forked


def write_run(folder: Path, lr: float, line: str, values: list[float], seed: int = 0) -> Path:
    folder.mkdir()
    args = {"lr": lr, "seed": seed, "out": str(folder), "steps": len(values) - 1}
    about = {"args": args, "command": "lco.py <x>", "world": 1, "torch": "2", "git": None, "time": "now"}
    (folder / "args.json").write_text(json.dumps(about))
    (folder / "source.py").write_text(f"def loss(gap):\n    {line}\n")
    rows = [{"step": i, "reward/mean": v, "eval/greedy": None, "time/step": 9.0} for i, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_comparison_tells_what_differs_and_where_runs_ended(tmp_path):
    """Seeds of one setting are a group with its spread; other arguments and other code are named."""
    a = write_run(tmp_path / "a", 1e-4, "return gap.square()", [0.25, 0.5])
    again = write_run(tmp_path / "again", 1e-4, "return gap.square()", [0.35, 0.7], seed=1)
    b = write_run(tmp_path / "b", 3e-4, "return gap.abs()", [0.25, 0.75])
    done = run_forked("report.py", a, again, b, "--out", tmp_path / "all.html")
    assert "--lr: 0.0001 | 0.0001 | 0.0003" in done.stdout and "--seed: 0 | 1 | 0" in done.stdout
    assert "--out" not in done.stdout
    assert "-    return gap.square()" in done.stdout and "+    return gap.abs()" in done.stdout
    assert "0.250 -> 0.600 [0.500, 0.700]" in done.stdout and "0.250 -> 0.750" in done.stdout
    assert "eval/greedy" not in done.stdout, "a metric without a value is left out"
    page = (tmp_path / "all.html").read_text()
    assert "0.600 [0.500, 0.700]" in page and "data:image/png" in page
    same = run_forked("report.py", a, a, "--out", tmp_path / "x.html")
    assert "the same arguments and the same code" in same.stdout


def test_report_of_a_run_that_still_goes_on(tmp_path):
    """A torn last line is left out; the page asks to be loaded again until the run has ended."""
    run = write_run(tmp_path / "run", 1e-4, "return gap", [0.25, 0.5])
    (run / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.25}\n{"step": 1, "rew')
    report.write_report(run)
    assert 'http-equiv="refresh"' in (run / "report.html").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.25}\n{"step": 1, "reward/mean": 0.5}\n')
    report.write_report(run)
    page = (run / "report.html").read_text()
    assert "refresh" not in page and "lco.py &lt;x&gt;" in page


def test_report_refuses_what_is_no_run(tmp_path):
    done = run_forked("report.py", tmp_path, expect=None)
    assert "args.json is not there" in done.stderr and "Traceback" not in done.stderr


def test_panels_hold_what_can_be_seen_together():
    lines = [{"step": 1, "lr": 1e-4, "eval/a": 0.5, "eval/b": 0.9, "policy/entropy": 1.0, "policy/gap": 1e-3}]
    assert report.panels(lines) == [["eval/b", "eval/a"], ["policy/entropy"], ["policy/gap"], ["lr"]]


def test_pairs_in_a_file_are_those_of_seft(tmp_path):
    for task, made in (("chains", toys.preference_pairs), ("strings", toys.string_pairs)):
        words = ("--task", task, "--rows", 30, "--seed", 1, "--out", tmp_path / task)
        run_forked("benchmarks/builtin_pairs.py", *words)
        rows = tasks.load_pairs(str(tmp_path / task / "pairs.jsonl"))
        expected = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in made(20, 1)]
        assert len(rows) == 30 and rows[:20] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_real_model_of_the_readme_in_both_shells(shell, tmp_path):
    """The block is typed into a shell as it stands: each script gets its arguments one by one, and the model's folder."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    MODEL="))
    block = itertools.takewhile(lambda line: line.startswith("    "), lines[start:])
    script = "\n".join(line.removeprefix("    ") for line in block)
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = -c ] && echo "/a folder" && exit\nprintf "%s\\n" "$#" "$@"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, env=env, timeout=20)
    assert done.returncode == 0 and not done.stderr, done.stderr
    words = done.stdout.splitlines()
    calls = []
    while words:
        count = int(words.pop(0))
        calls.append([words.pop(0) for _ in range(count)])
    convert, *calls = calls
    assert convert == ["benchmarks/convert_gguf.py", "/a folder", "runs/smollm2-model"]
    assert [call[0] for call in calls] == ["lco.py", "ppo_baseline.py"] and calls[0][1:] == calls[1][1:]
    for call, module in zip(calls, (lco, ppo_baseline)):
        args = common.parse_args(module.Args, module.BUILTIN, call[1:])
        assert args.model == "runs/smollm2-model" and args.task == "words" and args.lr == 2e-5 and args.steps == 14

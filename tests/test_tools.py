"""The tools beside the scripts: pages of runs, and built-in pairs as a file."""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import common
import lco
import ppo_baseline
import pytest
import report
import tasks
from builtin import tasks as toys
from conftest import ROOT, run_forked


def write_run(folder: Path, lr: float, line: str, values: list[float], seed: int = 0, data: str = "0" * 64) -> Path:
    folder.mkdir()
    args = {"lr": lr, "seed": seed, "out": str(folder), "steps": len(values) - 1}
    about = {"args": args, "command": "lco.py <x>", "world": 1, "torch": "2", "git": None, "time": "now"}
    about["watched"] = {"--dataset pairs.jsonl": data}
    (folder / "args.json").write_text(json.dumps(about))
    (folder / "source.py").write_text(f"def loss(gap):\n    {line}\n")
    rows = [{"step": i, "reward/mean": v, "eval/greedy": None, "time/step": 9.0} for i, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_samples(folder, [])
    return folder


def write_samples(folder: Path, rows: list[dict]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(page: Path, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading; the class of a cell stands before its text."""
    part = page.read_text().partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0]
    cells = [re.findall(r"<t[hd](?: class=\"(\w+)\")?>(.*?)</t[hd]>", row) for row in part.split("</tr>")]
    return [[f"{kind}: {html.unescape(text)}" if kind else html.unescape(text) for kind, text in row] for row in cells]


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
    assert page.index("<table>") < page.index("data:image/png") < page.index("+++ code 2"), "the code comes last"
    same = run_forked("report.py", a, a, "--out", tmp_path / "x.html")
    assert "the same arguments, files and code" in same.stdout
    other = write_run(tmp_path / "other", 1e-4, "return gap.square()", [0.35, 0.9], seed=2, data="1" * 64)
    done = run_forked("report.py", a, other, "--out", tmp_path / "y.html")
    assert "--dataset pairs.jsonl: 00000000 | 11111111" in done.stdout, "the same name with another content"
    assert "0.250 -> 0.500" in done.stdout and "0.350 -> 0.900" in done.stdout, "they are no seeds of one setting"


def test_report_of_a_run_that_still_goes_on(tmp_path, monkeypatch):
    """While a process holds the lock the page is loaded again; then the run has ended, or was stopped. A torn last line
    is left out, and the report of the run itself does not touch the lock."""
    run, page = write_run(tmp_path / "run", 1e-4, "return gap", [0.25, 0.5, 0.5]), tmp_path / "run" / "report.html"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
    hold = "import common, pathlib, sys, time; lock = common._lock(pathlib.Path(sys.argv[1])); print(); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline()
        report.write_report(run, own=False)
        assert 'http-equiv="refresh"' in page.read_text() and "<p>training: step 1 of 2</p>" in page.read_text()
    finally:
        holder.kill()
        holder.wait()
    report.write_report(run, own=False)
    assert "refresh" not in page.read_text() and "<p>stopped: step 1 of 2</p>" in page.read_text()
    (run / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.setattr(report, "is_locked", None)  # a call would fail
    report.write_report(run)
    assert "<p>ended: step 2 of 2</p>" in page.read_text() and "lco.py &lt;x&gt;" in page.read_text()


def test_following_ends_with_the_run(tmp_path, monkeypatch, capsys):
    """--follow writes the page anew until the last step, also past a stop: the run may go on."""
    run = write_run(tmp_path / "run", 1e-4, "return gap", [0.25, 0.5, 0.75])
    lines, written = (run / "metrics.jsonl").read_text().splitlines(keepends=True), []

    def another_step(seconds):
        written.append((run / "report.html").read_text())
        (run / "metrics.jsonl").write_text("".join(lines[: len(written) + 1]))

    (run / "metrics.jsonl").write_text(lines[0])
    monkeypatch.setattr(report.time, "sleep", another_step)
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--follow"])
    report.main()
    assert ["step 0 of 2" in written[0], "step 1 of 2" in written[1], len(written)] == [True, True, 2]
    assert "ended: step 2 of 2" in (run / "report.html").read_text() and "report.html" in capsys.readouterr().out


def test_answers_to_the_same_prompts_stand_side_by_side(tmp_path):
    """Before and after, with marks for right and wrong; other rewards as numbers; nothing where nobody graded."""
    run = write_run(tmp_path / "run", 1e-4, "return gap", [0.25, 0.5])
    row = {"kind": "eval/greedy", "prompt": "1+1=", "reward": 0.0}
    ended = row | {"step": 1, "completion": "2", "reward": 1.0}
    sampled = {"step": 1, "kind": "train", "completion": "x", "reward": -1.81}
    sampled["prompt"] = [{"role": "user", "content": "<b>"}]
    write_samples(run, [row | {"step": 0, "completion": "<3>"}, sampled, ended])
    report.write_report(run)
    shown = rows_of(run / "report.html", "Before and after")
    assert shown[0] == ["kind", "prompt", "step 0", "step 1"]
    assert shown[1] == ["eval/greedy", "1+1=", "wrong: ✗ <3>", "right: ✓ 2"]
    assert rows_of(run / "report.html", "Samples")[1] == ["1", "train", "[-1.81] x", "user: <b>"]

    pair = {"kind": "eval", "prompt": "1+1=", "chosen": "2", "rejected": "3"}
    write_samples(run, [pair | {"step": step, "completion": f"{step}"} for step in (0, 1)])
    report.write_report(run)
    header, shown = rows_of(run / "report.html", "Before and after")[:2]
    assert header == ["kind", "prompt", "chosen", "rejected", "step 0", "step 1"]
    assert shown == ["eval", "1+1=", "2", "3", "0", "1"]
    write_samples(run, [{"step": 0, "kind": "eval/greedy", "prompt": "1+1=", "completion": "3", "right": False}])
    report.write_report(run)
    shown = rows_of(run / "report.html", "Before and after")[1]
    assert shown == ["eval/greedy", "1+1=", "wrong: ✗ 3"], "of evaluate.py"
    write_samples(run, [pair | {"step": 0, "completion": "a"}, pair | {"step": 1, "prompt": "2+2=", "completion": "b"}])
    report.write_report(run)
    assert rows_of(run / "report.html", "Before and after") == [[]], "answers to two prompts are not compared"


def test_a_revision_is_shown_from_its_first_answer_to_its_fate(tmp_path):
    run = write_run(tmp_path / "run", 1e-4, "return gap", [0.25, 0.5])
    row = {"step": 1, "kind": "round 0", "prompt": "1+1=", "answer": "3", "before": 0.0, "label": "Major"}
    kept = row | {"chances": [0.5, 0.3, 0.2], "completion": "2", "dropped": None, "reward": 1.0}
    write_samples(run, [kept, row | {"chances": [0.5, 0.3, 0.2], "completion": "3", "dropped": "same", "reward": None}])
    report.write_report(run)
    shown = rows_of(run / "report.html", "Samples")
    assert shown[0][3:] == ["first answer", "label", "chances of Major, Minor, No", "revision", "dropped as"]
    assert shown[1][3:] == ["wrong: ✗ 3", "Major", "0.50 0.30 0.20", "right: ✓ 2", ""]
    assert shown[2][3:] == ["wrong: ✗ 3", "Major", "0.50 0.30 0.20", "3", "same"]


def test_no_curves_of_one_point(tmp_path):
    """An evaluation has one line of metrics: its page has the numbers and no plots."""
    for values in ([0.25], [0.25, 0.5]):
        run = write_run(tmp_path / str(len(values)), 1e-4, "return gap", values)
        report.write_report(run)
        page = (run / "report.html").read_text()
        assert ("<h2>Curves</h2>" in page) == (len(values) > 1) == (run / "plot.png").exists()


def test_report_has_the_coloured_tokens(tmp_path):
    run = write_run(tmp_path / "run", 1e-4, "return gap", [0.25, 0.5])
    answer = {"prompt": "1+1=", "kind": "chosen", "tokens": ["2", "&"], "scores": {"Z": [0.5, 1.5]}}
    report.token_page(run / "credit.html", "Tokens", [answer])
    report.write_report(run)
    page = (run / "report.html").read_text()
    assert 'title="Z: 1.500">&amp;</span>' in page.partition("<h2>Token by token</h2>")[2].partition("<h2>")[0]
    assert page.count("</html>") == 1


def test_chain_is_one_page(tmp_path):
    """The parts in the order given, what became of their held-out metrics, and titles that tell tabs apart."""
    parts = [write_run(tmp_path / name, 1e-4, "return gap", [0.25, 0.5]) for name in ("teacher", "student")]
    for run, last in zip(parts, (0.75, 0.875)):
        rows = [{"step": 0, "eval/greedy": 0.5}, {"step": 1, "eval/greedy": last}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_forked("report.py", *parts, "--chain", "--out", tmp_path / "all.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "all.html").read_text()
    titles = [f"{tmp_path.name}/{name} · lco.py" for name in ("teacher", "student")]
    assert f"<title>{' → '.join(titles)}</title>" in page and page.count("data:image/png") == 2
    assert re.findall(r"<h1>(\d\. .*?)</h1>", page) == [f"{i}. {title}" for i, title in enumerate(titles, 1)]
    first = page.partition("<h1>1. ")[0]
    assert all(f"<td>{title}</td><td>eval/greedy</td><td>0.5000</td><td>{last}</td>" in first
               for title, last in zip(titles, ("0.7500", "0.8750")))  # fmt: skip
    report.write_report(parts[0])
    assert f"<title>{titles[0]}</title>" in (parts[0] / "report.html").read_text()


def test_report_refuses_what_is_no_run(tmp_path):
    done = run_forked("report.py", tmp_path, expect=None)
    assert "args.json is not there" in done.stderr and "Traceback" not in done.stderr


def test_panels_hold_what_can_be_seen_together():
    lines = [{"step": 1, "lr": 1e-4, "eval/a": 0.5, "eval/b": 0.9, "policy/entropy": 1.0, "policy/gap": 1e-3}]
    assert report.panels(lines) == [["eval/b", "eval/a"], ["policy/entropy"], ["policy/gap"], ["lr"]]
    zeros, many = [f"drop/{x}" for x in "abc"], [f"eval/{x}" for x in "abcdef"]
    assert report.panels([dict.fromkeys(zeros, 0.0) | dict.fromkeys(many, 0.5)]) == [many[:5], many[5:], zeros]


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

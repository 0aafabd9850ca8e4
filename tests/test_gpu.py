"""benchmarks/gpu.py runs whole on a CPU, with tiny models, so that a GPU's minutes are not lost to its own mistakes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_forked

import torch.distributed as dist

PARTS = "start sampler equality scripts checks ranks noise determinism decode update vocabulary attention activations"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """benchmarks/gpu.py as a module; what it starts as `python -c CODE ...` starts in a forked process."""

    def run(words, env, timeout, **_):
        assert words[:2] == [sys.executable, "-c"]
        file = tmp_path / f"{hash(words[2])}.py"
        file.write_text(words[2])
        changed = {name: value for name, value in env.items() if os.environ.get(name) != value}
        return run_forked(file, *words[3:], timeout=timeout, **changed)

    monkeypatch.setenv("DRY", "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *PARTS.split()])
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **more: None)  # there is one
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        bench.main()
    screen = capsys.readouterr().out
    assert end.value.code == 0 and "failed: none" in screen, screen[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == set(PARTS.split())
    assert all(row["seen"].get("exit", 0) == 0 for row in rows)
    (ranks,) = [row["seen"] for row in rows if row["part"] == "ranks"]
    assert ranks["exits"] == [0, 0, 0] and ranks["largest_relative_difference"] < 1e-4
    assert all(row["seen"]["equal"] == row["seen"]["rows"] for row in rows if row["part"] == "equality")


def test_stored_rows_are_complete():
    """What docs/gpu.md quotes names its device and versions."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "gpu.jsonl").read_text().splitlines()]
    assert rows and all(
        row.keys() == {"device", "torch", "transformers", "part", "case", "expected", "seen"} for row in rows
    )

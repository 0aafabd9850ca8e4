"""benchmarks/gpu.py runs whole on a CPU, with tiny models, so that a GPU's minutes are not lost to its own mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = "start sampler equality scripts checks ranks noise determinism decode update vocabulary attention activations"


def test_dry_run(tmp_path):
    env = os.environ | {"DRY": "1", "OUT": str(tmp_path)}
    words = [sys.executable, "benchmarks/gpu.py", *PARTS.split()]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "failed: none" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == set(PARTS.split())
    assert all(row["seen"].get("exit", 0) == 0 for row in rows)
    (ranks,) = [row["seen"] for row in rows if row["part"] == "ranks"]
    assert ranks["exits"] == [0, 0, 0] and ranks["largest_relative_difference"] < 1e-4
    assert all(row["seen"]["equal"] == row["seen"]["rows"] for row in rows if row["part"] == "equality")


def test_stored_rows_are_complete():
    """What docs/gpu.md quotes names its device and versions."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "gpu.jsonl").read_text().splitlines()]
    assert rows and all(row.keys() == {"device", "torch", "transformers", "part", "case", "expected", "seen"} for row in rows)

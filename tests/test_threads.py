"""Two threads, a user's default: the same run twice, in one piece and in two, to the last bit. Other tests have one.

Runs are large enough that operators split their work among threads, which the tiny ones elsewhere are not.
"""

import json
from unittest import mock

import adpa
import common
import dckd
import lco
import ppo_baseline
import pytest
import qrm
import seft
from builtin import tasks as toys
from conftest import read_metrics

import torch

RL = dict(prompts_per_step=8, samples_per_prompt=8, minibatches=2, warmup_steps=1)
PAIRS = dict(prompts_per_step=32)
JOBS = {  # name: (script, function, what it changes)
    "ppo": (ppo_baseline, "train", RL),
    "lch": (lco, "train", RL),
    "qrm": (qrm, "train", dict(pairs_per_step=32, epochs=3, test_pairs=8)),
    "dckd": (dckd, "train", PAIRS),
    "adpa": (adpa, "train", PAIRS),
    "seft": (seft, "train", dict(stage="evolve", reviser="builtin", unannotated=96, builtin_pairs=64, calibration=8)),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", JOBS)
def test_six_steps_are_three_and_three(name, tmp_path):
    """run(6) = run(3) + resume(3), to the last bit of every metric and weight."""
    script, function, changes = JOBS[name]
    settings = script.BUILTIN | (dict(eval_every=6) if script is qrm else dict(test_rows=8, eval_every=6)) | changes
    if name == "qrm":
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in toys.chain_pairs(80, 0)))
        settings |= dict(pairs=str(pairs))
    else:
        settings |= dict(steps=6)

    def run(folder: str, stop_after=None, **more):
        args = script.Args(**settings | more, out=str(tmp_path / folder))
        with mock.patch.object(common.RunFolder, "report"), mock.patch.object(common.Run, "stop_after", stop_after):
            getattr(script, function)(args)

    run("whole")
    run("parts", 3)
    run("parts", resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert read_metrics(whole)[-1]["step"] == 6 and read_metrics(whole) == read_metrics(parts)
    files = [sorted((run / "model").glob("*.safetensors")) for run in (whole, parts)]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]] != []

"""Killing loses nothing but the steps since the last checkpoint, and exports are whole."""

import json
import random
import re
import shutil
import signal
import time

import common
import lm
import lco
import pytest
from conftest import (
    TINY,
    assert_same_metrics,
    command,
    finish,
    flags,
    fork_script,
    read_metrics,
    run_here,
    start,
    wait_for,
)

import torch

SETTINGS = TINY | dict(steps=6)


@pytest.fixture(scope="module")
def base(tiny_model, reward_file) -> dict:
    return SETTINGS | dict(model=tiny_model, reward_file=reward_file)


def run_forked(script: str, settings: dict, log) -> None:
    """A whole run in a process of its own."""
    process = fork_script(script, *flags(**settings), log=log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()[-3000:]


def weights(folder) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_sigterm_and_resume(base, tmp_path):
    """SIGTERM on the real command line saves at the end of the step; --resume goes on to the same numbers."""
    settings = base | dict(steps=40, eval_every=1000)
    process = start(command("lco.py", *flags(**settings, out=tmp_path / "run")))
    wait_for(process, "step 3/40")
    process.send_signal(signal.SIGTERM)
    finish(process, expect=143, timeout=40)
    stopped = read_metrics(tmp_path / "run")[-1]["step"]
    assert 3 <= stopped < 40
    assert common.latest_checkpoint(tmp_path / "run")[0] == stopped
    goal = stopped + 3
    run_here(lco, goal, **settings, out=str(tmp_path / "whole"))
    run_here(lco, goal, **settings, out=str(tmp_path / "run"), resume=True)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "run")


def test_kill_at_any_moment(base, tmp_path):
    """Six times kill -9 and the same command again: the run ends as if nothing had happened. More: benchmarks/crash.py."""
    settings = base | dict(steps=12, save_every=1, eval_every=5, resume=True)
    run, log = tmp_path / "run", tmp_path / "log"
    whole = run_here(lco, **settings, out=str(tmp_path / "whole"))
    delays = random.Random(0)
    for _ in range(6):
        log.unlink(missing_ok=True)
        saved = common.latest_checkpoint(run)
        process = fork_script("lco.py", *flags(**settings, out=run), log=log)
        until = time.time() + 60
        while process.is_alive() and "run folder" not in (log.read_text() if log.exists() else ""):
            assert time.time() < until
            time.sleep(0.01)
        process.join(delays.uniform(0, 0.8))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
        done = [int(n) for n in re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)]
        first = saved[0] + 1 if saved else 0
        assert done == list(range(first, first + len(done))), "only the steps since the last checkpoint are redone"
    run_forked("lco.py", settings | {"out": run}, log)
    assert read_metrics(run) == read_metrics(whole)
    assert (run / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    assert weights(run) == weights(tmp_path / "whole")
    assert not list(run.glob("*.part"))
    assert len(list((run / "checkpoint").iterdir())) == 1


def test_killed_before_the_first_checkpoint(base, tmp_path):
    """A run without a checkpoint starts again, and what it had logged is forgotten."""
    settings = base | dict(steps=1)
    whole = run_here(lco, **settings, out=str(tmp_path / "whole"))
    run = run_here(lco, **settings, out=str(tmp_path / "run"))
    shutil.rmtree(run / "checkpoint")
    shutil.rmtree(run / "model")
    run_here(lco, **settings, out=str(run), resume=True)
    assert read_metrics(run) == read_metrics(whole)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', '{"step": 9, "prompt": [{"role": "user", "content": "1+1="}'])
def test_torn_lines(torn, ended, base, tmp_path):
    """A line that was being written when the run was killed is forgotten, wherever it was torn."""
    copy = shutil.copytree(ended, tmp_path / "copy")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (copy / name).open("a") as file:
            file.write(torn)
    run_here(lco, **base | {"steps": 1}, out=str(copy), resume=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (copy / name).read_text() == (ended / name).read_text()


@pytest.fixture(scope="module")
def ended(base, tmp_path_factory):
    """The folder of a run of one step."""
    return run_here(lco, **base | {"steps": 1}, out=str(tmp_path_factory.mktemp("ended") / "run"))


@pytest.fixture
def refused(base, ended, tmp_path):
    """refused(message, break_it, **changes): resuming a copy of the ended run says `message`."""

    def check(message: str, break_it=None, **changes):
        copy = tmp_path / "copy"
        shutil.copytree(ended, copy)
        if break_it:
            break_it(copy / "checkpoint" / "step-000001")
        before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
        with pytest.raises(common.BadInput) as error:
            lco.train(lco.Args(**base | {"steps": 1, "out": str(copy), "resume": True} | changes))
        assert message in str(error.value) and "\n" not in str(error.value)
        return before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}

    return check


def cut_file(checkpoint):
    largest = max(checkpoint.iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def remove_file(checkpoint):
    next(checkpoint.glob("*.distcp")).unlink()


def remove_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize(
    "break_it, message",
    [(cut_file, " is damaged: "), (remove_file, " is [0, 'nothing'], "), (remove_manifest, "is missing or damaged")],
)
def test_truncated_checkpoint(break_it, message, refused):
    """A checkpoint that is not whole is named, with what was found and expected."""
    refused(message, break_it)


def test_other_settings(refused):
    """A resumed run keeps its settings: the argument that differs is named, and nothing is touched."""
    assert refused("--lr was 0.001 and is now 0.5", lr=0.5)


def test_existing_folder(refused):
    """A folder that is not empty is never overwritten."""
    assert refused("exists and is not empty: choose another folder, or give --resume", resume=False)


def test_resume_needs_a_folder(refused):
    assert refused("--resume needs --out", out="")


def test_free_settings_may_change(base, ended, tmp_path):
    """Another micro-batch size is no other run, and resuming a run that has ended changes no metric."""
    copy = shutil.copytree(ended, tmp_path / "copy")
    run_here(lco, **base | {"steps": 1, "micro_batch": 4, "save_every": 7}, out=str(copy), resume=True)
    assert read_metrics(copy) == read_metrics(ended)


@pytest.mark.parametrize(
    "model, lora_rank", [("tiny_model", 0), ("tiny_model", 4), ("gpt2_model", 4), ("qwen_model", 0)]
)
def test_exported_model_is_the_policy(model, lora_rank, base, tmp_path, request):
    """model/ loads with from_pretrained and gives the logits of the checkpoint's policy; adapters are merged."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(model)
    settings = base | dict(model=folder, lora_rank=lora_rank, steps=1, lr=1e-2, out=str(tmp_path / "run"))
    run = run_here(lco, **settings)
    models, optimizer = lco.build(lco.Args(**settings), torch.device("cpu"))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        before = models["policy"](ids).logits
        common.load_checkpoint(common.latest_checkpoint(run)[1], models, optimizer)
        policy = models["policy"](ids).logits
        exported = AutoModelForCausalLM.from_pretrained(run / "model").eval()
        logits = exported(ids).logits
    assert (policy - before).abs().max() > 1e-2
    torch.testing.assert_close(logits, policy, rtol=1e-4, atol=1e-4)
    tied = exported.config.tie_word_embeddings
    assert tied == (exported.get_output_embeddings().weight is exported.get_input_embeddings().weight)
    assert tied == (model != "tiny_model")
    assert not any("lora" in name for name in exported.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer("7+15=")["input_ids"] == lm.load_tokenizer(folder)("7+15=")["input_ids"]


def test_metrics_keys_are_namespaced_and_finite(ended):
    """metrics.jsonl: one JSON object a line with `step`; nothing else than numbers and null."""
    for line in (ended / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=lambda c: pytest.fail(c))
        assert all(value is None or isinstance(value, (int, float)) for value in row.values())
        assert all("/" in k for k in row if k not in ("step", "lr", "grad_norm"))


def test_same_run_twice(base, ended, tmp_path):
    """The same command gives the same numbers."""
    again = run_here(lco, **base | {"steps": 1}, out=str(tmp_path / "again"))
    assert_same_metrics(read_metrics(again), read_metrics(ended), relative=0, floor=0)

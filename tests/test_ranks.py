"""Two nodes give the numbers of one; one rank's failure or a signal ends all. Two ranks: test_every_script.py."""

import signal
import sys
import time

import lco
import pytest
from conftest import (
    ROOT,
    TINY,
    assert_same_metrics,
    command,
    finish,
    flags,
    free_port,
    read_metrics,
    run_forked,
    run_here,
    run_script,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def base(tiny_model, reward_file) -> dict:
    return TINY | dict(model=tiny_model, reward_file=reward_file, lr=3e-4)


def test_one_rank_packs(tiny_model, tmp_path):
    """A rank may pack the rows of a prompt while the other has none to pack: gradients are those of one process."""
    path = tmp_path / "packs.py"
    path.write_text("""
import sys, torch
from transformers import AutoModelForCausalLM
import common, lm

def main():
    device = torch.device("cpu")
    model = lm.load_model(sys.argv[1], device=device)
    plain = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    read = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(tuple(out.shape[:2])))
    same, different = [[3, 4, 5, 6]] * 4, [[3, 4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8], [6, 7, 8, 9]]
    batches = [common.make_batch(prompts, [[7, 3]] * 4, 0, device) for prompts in (same, different)]
    lm.completion_hidden(model, batches[common.rank()]).cos().sum().backward()
    assert read == [[(1, 4 + 4 * 2)], [(4, 4 + 2)]][common.rank()], read
    for batch in batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        (plain.model(ids).last_hidden_state[:, 3:-1].cos().sum() / 2).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, atol=1e-5, rtol=1e-4, msg=name)
    print("agreed")

common.launch(main, "cpu")
""")
    assert run_forked(path, tiny_model, ranks=2).stdout.count("agreed") == 2


def test_two_nodes_are_one(base, tmp_path):
    """Two torchrun agents that meet at an address give the metrics of one process."""
    node = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    node += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", str(ROOT / "lco.py"), *flags(**base, out=tmp_path / "run")]
    agents = [start([sys.executable, *node]) for _ in range(2)]
    for agent in agents:
        finish(agent)
    alone = run_here(lco, **base, out=str(tmp_path / "alone"))
    assert_same_metrics(read_metrics(alone), read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("other", ["waits in a collective", "sleeps"])
def test_failure_of_one_rank_ends_all(other, base, tmp_path):
    """A rank that raises ends the job in seconds, with its own message on the screen."""
    path = tmp_path / "fails.py"
    path.write_text(f"""
import os, pathlib, time
calls = 0
def reward(prompts, completions, rows):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1":
        pathlib.Path({str(tmp_path / "when")!r}).write_text(str(time.time()))
        raise ValueError("the grader broke down")
    if calls == 2 and {other == "sleeps"}:
        time.sleep(120)
    return [float(len(c)) for c in completions]
""")
    settings = base | {"reward_file": path, "out": tmp_path / "run"}
    run = run_script if other == "sleeps" else run_forked  # it is torchrun that ends a rank which sleeps
    done = run("lco.py", *flags(**settings), ranks=2, expect=None, timeout=90)
    assert time.time() - float((tmp_path / "when").read_text()) < 20
    assert "rank 1 failed" in done.stderr and "ValueError: the grader broke down" in done.stderr


def test_bad_input_of_all_ranks_is_one_sentence(base, out):
    """What does not divide among the ranks is named, and the job ends with an error."""
    done = run_forked("lco.py", *flags(**base | {"prompts_per_step": 3}, out=out), ranks=2, expect=2)
    assert "lco.py: error: --prompts_per_step 3 does not divide among 2 ranks" in done.stderr


def test_normal_end_is_not_flaky(tmp_path):
    """Twenty times, two ranks do one collective and leave: every process ends with code 0."""
    path = tmp_path / "ends.py"
    path.write_text("""
import os, sys
import common
import torch, transformers

def main():
    sums = common.all_sum({"one": 1.0}, torch.device("cpu"))
    assert sums == {"one": 2.0}

codes = []
for port in map(int, sys.argv[1:]):  # forked, because Python needs seconds to import torch
    if (child := os.fork()) == 0:
        os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        common.launch(main, "cpu")
        sys.exit()  # the whole way out of the interpreter
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert codes == [0] * 20, codes
""")
    run_forked(path, *(free_port() for _ in range(20)), ranks=2)


def test_freed_memory_serves_again(tmp_path):
    """On a CPU: 80 MB, freed and asked for again, are the same 19,531 pages and not fresh ones."""
    path = tmp_path / "again.py"
    path.write_text("""
import resource
import common
import torch

def main():
    fresh = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
        fresh.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert fresh[0] > 15_000 and sum(fresh) < 60_000, fresh  # once, or twice where the heap is split

common.launch(main, "cpu")
""")
    run_script(path, THP_MEM_ALLOC_ENABLE="0")


def test_ctrl_c_says_how_to_go_on(base, tmp_path):
    """The step is finished, a checkpoint is there and no model, the exit code is 130, and it says how to go on."""
    out = tmp_path / "run"
    process = start(command("lco.py", *flags(**base | {"steps": 500, "eval_every": 1000, "out": str(out)})))
    wait_for(process, "step 2/500")
    process.send_signal(signal.SIGINT)
    done = finish(process, expect=130, timeout=60)
    assert "stopping after this step" in done.stderr
    last = read_metrics(out)[-1]["step"]
    line = done.stdout.splitlines()[-1]
    assert f"stopped after step {last} of 500" in line and str(out) in line and line.endswith(" --resume")
    assert (out / "checkpoint" / f"step-{last:06d}").exists() and not (out / "model").exists()


def test_sigterm_saves_on_all_ranks(base, tmp_path):
    """SIGTERM to torchrun: all ranks finish the step, save, and leave a checkpoint that resumes."""
    settings = base | {"steps": 200, "eval_every": 1000, "out": str(tmp_path / "run")}
    process = start(command("lco.py", *flags(**settings), ranks=2))
    wait_for(process, "step 2/200")
    process.send_signal(signal.SIGTERM)
    finish(process, expect=None, timeout=40)
    (checkpoint,) = (tmp_path / "run" / "checkpoint").iterdir()
    saved = int(checkpoint.name.removeprefix("step-"))
    assert 2 <= saved < 200 and read_metrics(tmp_path / "run")[-1]["step"] == saved
    assert not (tmp_path / "run" / "model").exists()
    run_here(lco, saved + 1, **settings, resume=True)
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == list(range(saved + 2))

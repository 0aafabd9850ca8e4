"""Runs inside another program, which goes on whatever happens to them."""

import json
import subprocess
import sys

from conftest import ROOT, TINY

PROGRAM = """
import json, os, signal, sys
import interactive, common, lco
import torch.distributed as dist

common.RunFolder.report = lambda self: None  # it takes longer than a run
settings, home = json.loads(sys.argv[1]), sys.argv[2]
before = signal.getsignal(signal.SIGINT), sys.excepthook, list(sys.argv)

def run(name, error=None, **changes):
    found = None
    try:
        found = interactive.run(lco, **settings | dict(out=f"{home}/{name}") | changes)
    except BaseException as raised:
        assert error and isinstance(raised, error), repr(raised)
        found = raised
    assert not dist.is_initialized() and (signal.getsignal(signal.SIGINT), sys.excepthook, sys.argv) == before
    return found

folder = run("first")
about = json.loads((folder / "args.json").read_text())
assert (folder / "model").is_dir() and about["command"].startswith("lco.py --") and about["args"]["loss"] == "lch"
assert "did you mean --loss?" in str(run("x", common.BadInput, los="lch"))
assert "--steps must be at least 1" in str(run("x", common.BadInput, steps=0))

reward = f"{home}/reward.py"
open(reward, "w").write("def reward(prompts, completions, rows): raise ArithmeticError('the grader broke down')")
assert "the grader broke down" in str(run("failed", ArithmeticError, reward_file=reward))
assert os.listdir(f"{home}/failed")  # with its first evaluation
(folder / "notes.txt").write_text("mine")
assert "is not empty" in str(run("first", common.BadInput))

once = "import os, signal\\nasked = 0\\ndef reward(prompts, completions, rows):\\n    global asked\\n    asked += 1\\n"
for times in (1, 2):
    press = f"    for _ in range({times} * (asked == 1)): os.kill(os.getpid(), signal.SIGINT)\\n"
    open(f"{home}/ctrl_c{times}.py", "w").write(once + press + "    return [1.0] * len(rows)")
    run(f"stopped{times}", KeyboardInterrupt, reward_file=f"{home}/ctrl_c{times}.py", steps=2)
assert os.path.isdir(f"{home}/stopped1/checkpoint/step-000001") and not os.path.exists(f"{home}/stopped2/checkpoint")
assert (run("stopped1", reward_file=f"{home}/ctrl_c1.py", steps=2, resume=True) / "model").is_dir()

try:
    lco.train(lco.Args(**settings))
except common.BadInput as error:
    assert "interactive.run(lco" in str(error)
else:
    raise SystemExit("a script's train() started by itself")
print("the program goes on")
"""


def test_a_program_goes_on(tmp_path):
    """Runs end, are refused, fail and are stopped one after the other; signals and argv are as they were."""
    settings = TINY | dict(steps=1, eval_every=9, test_rows=5, prompts_per_step=2)
    words = [sys.executable, "-c", PROGRAM, json.dumps(settings), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.endswith("the program goes on\n")
    assert "next: python evaluate.py" in done.stdout and "--resume" in done.stdout

"""Kill -9 at every file operation of a run; resumed, it must end as if nothing had happened, bit for bit.

    python benchmarks/crash.py [--only lco dckd] [--every 1] [--log FILE]        # 66 to 93 points a script, 4 s each

Each script trains a tiny random model for two steps with a checkpoint after each. An audit hook counts what its process
does to files below the run folder: opening for writing, renaming, removing, making folders. The process is killed
before the n-th operation, and once more when a file that is opened for writing has just been emptied (so that a file
is torn at each place where it can be); then the same command with --resume runs to its end. Compared with a run that
was never killed: every logged number but times, all samples, all files of model/, and the names in the folder.
What libraries write without Python (the bytes of safetensors) has no points of its own.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402  before torch: it sets how OpenMP threads wait
import adpa  # noqa: E402
import dckd  # noqa: E402
import dpo  # noqa: E402
import lco  # noqa: E402
import lm  # noqa: E402
import ppo_baseline  # noqa: E402
import qrm  # noqa: E402
import report  # noqa: E402
import seft  # noqa: E402
from builtin import tasks as toys  # noqa: E402
from conftest import REWARD, TINY, ids_of, make_builtin, save_model  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

SMALL = {k: v for k, v in TINY.items() if k in ("prompts_per_step", "max_prompt", "test_rows", "lr", "dtype")}
SMALL |= dict(steps=2, save_every=1, eval_every=2, micro_batch=4, max_new_tokens=24)
SEFT = SMALL | dict(rounds=2, max_prompt=18, max_new_tokens=20, builtin_pairs=12, unannotated=16, calibration=4)
SEFT |= dict(ask="==", lora_rank=0, labels=["++", "+=", "=+"])
SEFT |= dict(warmup_reviser_steps=1, reviser_steps=1, reviser_lr=1e-3, keep_threshold="0.3")
WRITES = os.O_WRONLY | os.O_RDWR


def runs_of(home: Path) -> dict:
    """{name: (script, settings)}; models, pairs and a reward lie in `home`."""
    from transformers import LlamaConfig

    tokenizer = make_builtin().make_tokenizer()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=64, **ids_of(tokenizer))
    model, teacher = (save_model(home / f"model-{seed}", config, tokenizer, seed) for seed in range(2))
    reward, pairs = home / "reward.py", home / "pairs.jsonl"
    reward.write_text(REWARD)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in toys.preference_pairs(21, 0)))
    rollouts = SMALL | dict(model=model, reward_file=str(reward), samples_per_prompt=4, max_new_tokens=12, save_every=1)
    by_pairs = SMALL | dict(model=model, dataset=str(pairs))
    reward_model = {k: v for k, v in SMALL.items() if k not in ("prompts_per_step", "test_rows", "lr")}
    reward_model |= dict(model=model, pairs=str(pairs), pairs_per_step=4, test_pairs=5)
    return {
        "ppo_baseline": (ppo_baseline, rollouts | dict(advantage="gae", kl_coef=0.1)),
        "lco": (lco, rollouts),
        "qrm": (qrm, reward_model),
        "dpo": (dpo, by_pairs),
        "dckd": (dckd, by_pairs | dict(teacher=teacher)),
        "adpa": (adpa, by_pairs | dict(teacher=teacher, ref_teacher=model, refresh_every=1)),
        "seft-reviser": (seft, SEFT | dict(model=model, stage="reviser")),
        "seft-evolve": (seft, SEFT | dict(model=model, stage="evolve", reviser="builtin")),
    }


class Killer:
    """An audit hook: counts operations below a folder, lists them in a file, and kills the process at one of them."""

    def __init__(self, folder: Path, at: int | None, listed: Path):
        self.folder, self.at, self.count, self.busy = str(folder), at, 0, False
        self.listed = listed.open("w")

    def __call__(self, event: str, args: tuple) -> None:
        path, at = self.path_of(event, args)
        if self.busy or path is None:
            return
        if at != -1 and not path.startswith("/"):  # shutil.rmtree names files by the folder that it has opened
            path = os.path.join(os.readlink(f"/proc/self/fd/{at}"), path)
        path = os.path.abspath(path)
        if not path.startswith(self.folder):
            return
        self.point(f"before {event} {path}")
        if event == "open" and args[2] & os.O_TRUNC:
            self.busy = True
            if self.count + 1 == self.at:
                os.close(os.open(path, args[2], 0o666))
            self.busy = False
            self.point(f"after {event} {path}")

    @staticmethod
    def path_of(event: str, args: tuple) -> tuple[str | None, int]:
        at = -1
        if event == "open":
            writes = isinstance(args[0], (str, bytes, os.PathLike)) and args[2] & WRITES
            return (os.fsdecode(args[0]) if writes else None), at
        if event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.rename"):
            at = args[2 if event in ("os.mkdir", "os.chmod", "os.rename") else 1]
            return (None if isinstance(args[0], int) else os.fsdecode(args[0])), at
        return None, at

    def point(self, what: str) -> None:
        self.count += 1
        self.busy = True
        print(self.count, what, file=self.listed, flush=True)
        self.busy = False
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(script, settings: dict, screen: Path, killer: Killer | None = None) -> int:
    """script.train() in a forked process; what it ended with, negative for a signal."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        to = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, 1), os.dup2(to, 2)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if killer:
            sys.addaudithook(killer)
        script.train(common.check_args(script.Args(**settings)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def result_of(folder: Path) -> dict:
    """All that must be the same in both runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]}
    found["names"] = sorted(p.name for p in [*folder.iterdir(), *(folder / "checkpoint").iterdir()])
    found |= {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "model").rglob("*"))}
    return found | {"samples": (folder / "samples.jsonl").read_text()}


def try_points(name: str, script, settings: dict, home: Path, every: int, log) -> tuple[int, int]:
    """(points tried, points where the resumed run differs)."""
    whole, listed = home / f"{name}-whole", home / f"{name}-points"
    screen = home / "screen"
    code = run(script, settings | {"out": str(whole)}, screen, Killer(whole, None, listed))
    assert code == 0, screen.read_text()[-3000:]
    points, expected, wrong, tried = listed.read_text().splitlines(), result_of(whole), 0, 0
    for at in range(1, len(points) + 1, every):
        folder = home / f"{name}-{at}"
        code = run(script, settings | {"out": str(folder)}, screen, Killer(folder, at, home / "listed"))
        assert code == -signal.SIGKILL, f"{points[at - 1]}: exit code {code}\n{screen.read_text()[-3000:]}"
        code = run(script, settings | {"out": str(folder), "resume": True}, screen)
        found = result_of(folder) if code == 0 else {}
        differ = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        if code or differ:
            wrong += 1
            reason = f"differs in {', '.join(differ)}" if code == 0 else screen.read_text().strip().splitlines()[-1:]
            print(f"{name}: WRONG at {points[at - 1].replace(str(home), '')}: {reason}", file=log, flush=True)
        else:
            with contextlib.suppress(OSError):
                os.system(f"rm -r {folder}")
        tried += 1
    return tried, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of scripts; seft has two stages")
    parser.add_argument("--every", type=int, default=1, help="try each n-th point")
    parser.add_argument("--log", default="", help="a file for the lines of wrong points and totals; empty: the screen")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report.draw = lambda *figures: b""  # plots take longer than the runs; their files are written all the same
    log = open(args.log, "a") if args.log else sys.stdout
    home = Path(tempfile.mkdtemp(prefix="crash-"))
    wrong_in_all = 0
    for name, (script, settings) in runs_of(home).items():
        if args.only and not any(name.startswith(only) for only in args.only):
            continue
        for model in {settings["model"], settings.get("teacher"), settings.get("reviser")} - {None}:
            lm.load_tokenizer(model)  # checks it once for all runs
        began = time.time()
        tried, wrong = try_points(name, script, settings, home, args.every, log)
        wrong_in_all += wrong
        seconds = time.time() - began
        print(f"{name}: {tried} points, {wrong} wrong ({seconds:.0f} s)", file=log, flush=True)
    sys.exit(wrong_in_all > 0)


if __name__ == "__main__":
    main()

"""Every shell command of README and docs, run in order in a fresh clone: does each do what a reader types?

    git clone . runs/clone
    python benchmarks/docs_run.py runs/clone                        # what needs no GPU, Hub, hours or files of your own
    python benchmarks/docs_run.py runs/clone --short --shell zsh    # two steps of each training, stand-ins for the rest

A command is a line of an indented block. The commands of a page are typed into one interactive shell (bash or zsh), so
variables, functions and comments are what they are for a reader. Before a page begins, the run folders that it makes
are removed. A command in which one of SKIPPED is found is not run. --short puts small STAND_INS in the place of what a
reader brings, and cuts each command by SHORT. Prints a table; ends with 1 if a command failed.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SKIPPED = [  # what is found in a command, and why it is not run
    (r"--nproc_per_node=8|--nnodes", "several GPUs"),
    (r"^python benchmarks/gpu\.py", "a GPU"),
    (r"\bQwen/|\bopenai/", "the Hub"),
    (r" (BIG|SMALL|PAIRS|FOLDER|MODEL)\b", "a name in capitals is the reader's"),
    (r"--\w*dataset (?!runs/|builtin/)\S+\.jsonl?\b", "a file of the reader"),
    (r"benchmarks/study\.py", "hours"),
    (r"\bpytest( tests/test_house|$)|docs_run\.py", "minutes; run by itself"),
    (r"-m venv", "it leaves the environment of this run"),
]
STAND_INS = [  # with --short: what a reader brings, and what takes its place
    (r"--nproc_per_node=8", "--nproc_per_node=2"),
    (r"\bQwen/\S+|\bBIG\b", "builtin"),
    (r"\bSMALL\b", "builtin-small"),
    (r"\bPAIRS\b|(?<= )pairs\.jsonl", "builtin/pairs.jsonl"),
    (r"\bopenai/gsm8k", "train.jsonl"),
    (r"\bFOLDER\b", "runs/files"),
    (r" MODEL\b", " runs/smollm2-model --samples_per_prompt 2 --minibatches 1"),
    (r"(?<= )(train|test)\.jsonl", r"runs/files/\1.jsonl --max_prompt 100"),
    (r"(?<= )(question\.jsonl|alpaca_eval\.json)\b", r"runs/files/\1"),
]
SMALL = dict(steps=2, eval_every=2, prompts_per_step=4, test_rows=8, max_prompt=100, max_new_tokens=24)
SHORT = dict.fromkeys(("lco", "ppo_baseline", "dpo", "dckd", "adpa", '"$@"'), SMALL) | {
    "qrm": {"steps": 2, "eval_every": 2, "pairs_per_step": 4},
    "seft": dict(steps=2, warmup_reviser_steps=2, reviser_steps=2, builtin_pairs=300, prompts_per_step=4, test_rows=8),
    "evaluate": {"test_rows": 8},
    "answers": {"max_new_tokens": 16},
}
RUN = re.compile(r'(?:python|torchrun \S+) (?:benchmarks/)?("\$@"|\w+)(?:\.py)?(?:\\\n|[^&|;\n])*(?<! )')


def write_files(folder: Path) -> None:
    """Stand-ins for a reader's files: rows with the columns of each, in the alphabet of the built-in model."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [{"question": f"{i}+{i % 7 + 2}=", "answer": f"#### {i + i % 7 + 2}"} for i in range(10, 40)]
    question = [{"question_id": 1, "category": "math", "turns": ["What is 2+9?", "And 2+8?"]}]
    right, wrong = ({"solution": f"It is {n}.", "is_correct": n == 11} for n in (11, 12))
    solutions = [{"question": f"What is {i}-9?", "a": right, "b": wrong} for i in range(200)]
    rows = dict(train=sums, test=sums[:8], question=question, example_model_solutions=solutions)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "alpaca_eval.json").write_text(json.dumps([{"instruction": "What is 2+9?", "dataset": "made up"}]))


def commands(text: str) -> list[str]:
    """The shell commands of a page: lines of indented blocks, each joined with the lines that it needs."""
    found, lines = [], [x[4:] for x in "".join(re.findall(r"(?<=\n\n)(?:    .*\n)+", text)).splitlines()]
    while lines:
        command = lines.pop(0)
        while lines and subprocess.run(["bash", "-nc", command], stderr=subprocess.PIPE).stderr or command[-1] == "\\":
            command += "\n" + lines.pop(0)
        found.append(command)
    return found


def shorten(command: str) -> str:
    def cut(match: re.Match) -> str:
        text = match[0]
        for name, value in SHORT.get(match[1], {}).items():
            text, given = re.subn(rf"--{name} \S+", f"--{name} {value}", text)
            text += "" if given else f" --{name} {value}"
        return text

    for pattern, stand_in in STAND_INS:
        command = re.sub(pattern, stand_in, command)
    return RUN.sub(cut, command)


class Shell:
    """An interactive shell without anybody's settings; what its commands print is in `log`."""

    FLAGS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}

    def __init__(self, name: str, folder: Path, log: Path):
        self.options, self.log = (name, folder, log), log
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        options = dict(stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, bufsize=1, start_new_session=True)
        self.process = subprocess.Popen([name, *self.FLAGS[name]], cwd=folder, env=env, **options)

    def run(self, command: str, limit: float) -> int:
        """Its exit code; 124 if it ran past the limit, and then the next command meets a new shell."""
        end = time.monotonic() + limit
        self.process.stdin.write(f'{{\n{command}\n}} </dev/null >"{self.log}" 2>&1\necho "ended $?"\n')
        while select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]:
            line = self.process.stdout.readline()
            if not line or line.startswith("ended "):
                return int(line[6:]) if line else 1
        os.killpg(self.process.pid, signal.SIGKILL)
        self.__init__(*self.options)
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a fresh clone")
    parser.add_argument("--shell", choices=Shell.FLAGS, default="bash")
    parser.add_argument("--short", action="store_true", help="minutes instead of hours, with stand-ins")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a command")
    parser.add_argument("--only", default="", help="pages whose name contains this")
    args = parser.parse_args()
    folder, start, codes = args.folder.resolve(), time.monotonic(), []
    pages = [folder / "README.md", folder / "docs" / "first-steps.md", *sorted(folder.glob("docs/**/*.md"))]
    pages += [folder / "benchmarks" / "README.md", folder / "AGENTS.md"]
    write_files(folder / "runs" / "files")
    print("| page | command | exit code | seconds |\n|---|---|---|---|")
    for page in dict.fromkeys(page for page in pages if args.only in str(page)):
        name, todo = page.relative_to(folder).as_posix(), commands(page.read_text())
        for out in re.findall(r"--out (runs/\S+)", "\n".join(todo)):
            shutil.rmtree(folder / out, ignore_errors=True)
        shell = Shell(args.shell, folder, folder / "docs_run.log")
        for command in todo:
            command, began = shorten(command) if args.short else command, time.monotonic()
            reasons = [f"skipped: {why}" for pattern, why in SKIPPED if re.search(pattern, command)]
            codes.append(reasons[0] if reasons else shell.run(command, args.limit))
            shown = re.sub(r"\s*\\?\n\s*", " ", command).replace("|", "\\|")
            print(f"| {name} | `{shown}` | {codes[-1]} | {time.monotonic() - began:.0f} |", flush=True)
            if codes[-1] and not reasons:
                print(shell.log.read_text()[-2000:], file=sys.stderr, flush=True)
        shell.process.communicate()
    ran, took = [code for code in codes if isinstance(code, int)], f"{time.monotonic() - start:.0f} s"
    print(f"\n{args.shell}: {len(codes)} commands, {len(ran)} run, {sum(map(bool, ran))} failed, {took}")
    return any(ran)


if __name__ == "__main__":
    sys.exit(main())

"""Runs a study: each of its settings with several seeds, through the scripts' real command lines.

    python benchmarks/study.py lco                    # the table of docs/lco.md (about half an hour on 2 cores)
    python benchmarks/study.py lco --only kld --seeds 2

A study may have runs to `prepare`, once for each seed, whose folders are kept in runs/study; the commands of its
settings name them in braces, as in --reward_model {qrm}/model. Every finished run is one JSON line in
benchmarks/results/<study>.jsonl (its command, settings, seed, held-out accuracy); a run that is already there is not
run again, so an interrupted study goes on where it was. At the end the table is printed and written to
benchmarks/results/<study>.md: median over seeds, with the lowest and highest.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# study -> common arguments, settings {name: command}, and perhaps runs to prepare {name: command}
STUDIES = json.loads((ROOT / "benchmarks" / "studies.json").read_text())


def kept(study: str, name: str, seed: int) -> Path:
    return ROOT / "runs" / "study" / f"{study}-{seed}" / name


def full_command(study: str, name: str, command: str) -> str:
    """As it is recorded: without seed and folders."""
    prepared = name in STUDIES[study].get("prepare", {})
    return f"python {command} {'' if prepared else STUDIES[study]['arguments']}".strip()


def run(study: str, name: str, command: str, seed: int, threads: int) -> dict:
    """One run in a folder of its own, thrown away unless others build on it; what it logged is kept."""
    prepare = STUDIES[study].get("prepare", {})
    with tempfile.TemporaryDirectory() as folder:
        out = kept(study, name, seed) if name in prepare else Path(folder) / "run"
        shutil.rmtree(out, ignore_errors=True)
        line = full_command(study, name, command).removeprefix("python ")
        line = line.format(**{other: kept(study, other, seed) for other in prepare}) + f" --seed {seed} --out {out}"
        started = time.time()
        done = subprocess.run(
            [sys.executable, *shlex.split(line)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        lines = sorted(out.rglob("metrics.jsonl"), key=lambda file: file.stat().st_mtime)[-1:]  # of its last stage
        metrics = [json.loads(text) for file in lines for text in file.read_text().splitlines()]
    evaluated = [m for m in metrics if any(k.startswith("eval/") for k in m)]
    held_out = [{k: v for k, v in m.items() if k == "step" or k.startswith("eval/")} for m in evaluated]
    return {
        "study": study,
        "setting": name,
        "seed": seed,
        "command": full_command(study, name, command),
        "ok": done.returncode == 0,
        "error": "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1],
        "seconds": round(time.time() - started, 1),
        "eval": held_out,
        "last": {k: v for k, v in (metrics or [{}])[-1].items() if not k.startswith("time/")},
        "diagnose": {
            key: round(statistics.mean(m[key] for m in metrics if key in m), 6)
            for key in sorted({k for m in metrics for k in m if k.startswith("diagnose/")})
        },
        "rounds": [
            {k: v for k, v in m.items() if k == "step" or k.startswith(("revise/", "drop/"))}
            for m in metrics
            if "revise/after" in m
        ],
        "grad_norm_max": max((m["grad_norm"] for m in metrics if "grad_norm" in m), default=None),
    }


def table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: a line for each setting, median [lowest, highest] over seeds."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "–"

    header = ["setting", "seeds", "greedy after", "sampled after", "entropy at the end", "failed"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r for r in rows if r["setting"] == name and ("eval/pass@1" in r["last"] or not r["ok"])]
        if mine:
            good = [r for r in mine if r["ok"]]
            greedy = spread([r["last"]["eval/pass@1"] for r in good])
            sampled = spread([r["last"]["eval/sampled"] for r in good])
            entropy = spread([r["last"]["policy/entropy"] for r in good if "policy/entropy" in r["last"]])
            lines.append(f"| {name} | {len(mine)} | {greedy} | {sampled} | {entropy} | {len(mine) - len(good)} |")
    return "\n".join(lines) + "\n"


def pairs_table(rows: list[dict], names: dict[str, str]) -> str:
    """Markdown: held-out pair accuracy of the reward models that a study prepared."""
    lines = ["| reward model | seeds | held-out pair accuracy |", "|---|---|---|"]
    for name in names:
        values = [r["last"]["eval/pair_accuracy"] for r in rows if r["setting"] == name and r["ok"]
                  and "eval/pair_accuracy" in r["last"]]  # fmt: skip
        if values:
            spread = f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
            lines.append(f"| {name} | {len(values)} | {spread} |")
    return "\n".join(lines) + "\n"


def steps_table(rows: list[dict], settings: dict[str, str], goal: float) -> str:
    """Markdown: the first evaluated step at which greedy held-out accuracy is `goal` or more."""
    header = ["setting", "seeds", f"reached {goal:.0%}", "steps to it", "greedy at the end", "sampled at the end"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r for r in rows if r["setting"] == name and r["ok"]]
        if not mine:
            continue
        first = [next((e["step"] for e in r["eval"] if e["eval/pass@1"] >= goal), float("inf")) for r in mine]
        words = [
            f"{x:.0f}" if x < float("inf") else "never" for x in (statistics.median(first), min(first), max(first))
        ]
        ends = [[r["last"][k] for r in mine] for k in ("eval/pass@1", "eval/sampled")]
        spreads = [f"{statistics.median(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in ends]
        reached = f"{sum(x < float('inf') for x in first)} of {len(mine)}"
        cells = [name, len(mine), reached, f"{words[0]} [{words[1]}, {words[2]}]", *spreads]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def diagnose_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: what --diagnose logged, means over steps and seeds."""
    keys = [f"diagnose/{k}" for k in ("zero_gradient", "away_from_target", "not_convex", "least_eigenvalue")]
    header = ["setting", "no gradient", "away from the optimum", "not convex", "least eigenvalue"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r["diagnose"] for r in rows if r["setting"] == name]
        if mine:
            shares = " | ".join(f"{statistics.mean(m[k] for m in mine):.1%}" for k in keys[:3])
            lines.append(f"| {name} | {shares} | {statistics.mean(m[keys[3]] for m in mine):.2g} |")
    return "\n".join(lines) + "\n"


def revision_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: what the first round did to the answers, and whether its labels pay.

    Break-even: a share p of the answers is right; a reviser that always revises damages d of these and fixes f of the
    others. Labels that keep r of the right and k of the wrong ones pay if k < p d r / ((1 - p) f). p, d and f are those
    of the setting with `always` in the place of `adaptive`, of the same seed: its first round has the same answers.
    """

    def spread(values: list) -> str:
        values = [v for v in values if v is not None]
        return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "–"

    names = {"right before": "before", "right after": "after", "fix": "fix", "damage": "damage", "AUC": "auc"}
    names |= {"r": "keep_right", "k": "keep_wrong", "edits Minor": "distance_minor", "edits Major": "distance_major"}
    header = ["first round", "seeds", *names, "k at break-even", "dropped"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    of = {(r["setting"], r["seed"]): r["rounds"][0] for r in rows if r["ok"] and r.get("rounds")}
    for name in settings:
        mine = {seed: first for (setting, seed), first in of.items() if setting == name}
        if not mine:
            continue
        limits = []
        for seed, m in mine.items():
            always, r = of.get((name.split(", t ")[0].replace("adaptive", "always"), seed)), m.get("revise/keep_right")
            if "adaptive" in name and always and r is not None:
                p, d, f = (always[f"revise/{key}"] for key in ("before", "damage", "fix"))
                limits.append(p * d * r / ((1 - p) * f) if f else None)
        cells = [spread([m.get(f"revise/{key}") for m in mine.values()]) for key in names.values()]
        dropped = spread([sum(v or 0 for k, v in m.items() if k.startswith("drop/")) for m in mine.values()])
        lines.append(f"| {' | '.join([name, str(len(mine)), *cells, spread(limits), dropped])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 ... n-1 of each setting")
    parser.add_argument("--only", default="", help="only settings whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    args = parser.parse_args()

    study = STUDIES[args.study]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{args.study}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    there = {(r["setting"], r["seed"], r["command"]) for r in rows}
    prepare, settings = study.get("prepare", {}), study["settings"]
    waves = [{name: command} for name, command in prepare.items()]  # one may build on those before it
    waves.append({name: command for name, command in settings.items() if args.only in name})
    todo = [
        [
            (name, command, seed)
            for seed in range(args.seeds)
            for name, command in wave.items()
            if (name, seed, full_command(args.study, name, command)) not in there
            or (name in prepare and not kept(args.study, name, seed).exists())
        ]
        for wave in waves
    ]
    done, total = 0, sum(map(len, todo))
    with ThreadPoolExecutor(args.jobs) as pool:
        for wave in todo:
            for future in [pool.submit(run, args.study, name, command, seed, 1) for name, command, seed in wave]:
                row, done = future.result(), done + 1
                rows = [r for r in rows if (r["setting"], r["seed"]) != (row["setting"], row["seed"])] + [row]
                file.write_text("".join(json.dumps(r) + "\n" for r in rows))
                last = {k: round(v, 4) for k, v in row["last"].items() if k.startswith("eval/")}
                screen = f"{done}/{total}  {row['setting']}  seed {row['seed']}  {row['seconds']} s  {last}"
                print(screen, row["error"], flush=True)
    text = table(rows, prepare | settings)
    if args.study == "diagnose":
        text += "\n" + diagnose_table(rows, settings)
    if "goal" in study:
        text = pairs_table(rows, prepare) + "\n" + steps_table(rows, settings, study["goal"])
    if any(r.get("rounds") for r in rows):
        text += "\n" + revision_table(rows, settings)
    (RESULTS / f"{args.study}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

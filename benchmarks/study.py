"""Runs a study: each of its settings with several seeds, through the scripts' real command lines.

    python benchmarks/study.py lco                    # the table of docs/lco.md (about half an hour on 2 cores)
    python benchmarks/study.py lco --only kld --seeds 2

Every finished run is one JSON line in benchmarks/results/<study>.jsonl (its command, settings, seed, first and last
held-out accuracy); a run that is already there is not run again, so an interrupted study goes on where it was. At the
end the table is printed and written to benchmarks/results/<study>.md: median over seeds, with the lowest and highest.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# study -> (common arguments, {setting: command})
STUDIES = json.loads((ROOT / "benchmarks" / "studies.json").read_text())


def run(study: str, name: str, command: str, seed: int, threads: int) -> dict:
    """One run in a folder of its own that is thrown away; what it logged is kept."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        line = f"{command} {STUDIES[study]['arguments']} --seed {seed} --out {out}"
        started = time.time()
        done = subprocess.run(
            [sys.executable, *shlex.split(line)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        lines = out / "metrics.jsonl"
        metrics = [json.loads(text) for text in lines.read_text().splitlines()] if lines.exists() else []
    evaluated = [m for m in metrics if "eval/sampled" in m]
    held_out = [{k: v for k, v in m.items() if k == "step" or k.startswith("eval/")} for m in evaluated]
    return {
        "study": study,
        "setting": name,
        "seed": seed,
        "command": f"python {command} {STUDIES[study]['arguments']}",
        "ok": done.returncode == 0,
        "error": "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1],
        "seconds": round(time.time() - started, 1),
        "eval": held_out,
        "last": {k: v for k, v in (metrics or [{}])[-1].items() if not k.startswith("time/")},
        "diagnose": {
            key: round(statistics.mean(m[key] for m in metrics if key in m), 6)
            for key in sorted({k for m in metrics for k in m if k.startswith("diagnose/")})
        },
        "grad_norm_max": max((m["grad_norm"] for m in metrics if "grad_norm" in m), default=None),
    }


def table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: a line for each setting, median [lowest, highest] over seeds."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "–"

    header = ["setting", "seeds", "greedy after", "sampled after", "entropy at the end", "failed"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r for r in rows if r["setting"] == name]
        if mine:
            good = [r for r in mine if r["ok"]]
            greedy = spread([r["last"]["eval/pass@1"] for r in good])
            sampled = spread([r["last"]["eval/sampled"] for r in good])
            entropy = spread([r["last"]["policy/entropy"] for r in good if "policy/entropy" in r["last"]])
            lines.append(f"| {name} | {len(mine)} | {greedy} | {sampled} | {entropy} | {len(mine) - len(good)} |")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 ... n-1 of each setting")
    parser.add_argument("--only", default="", help="only settings whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    args = parser.parse_args()

    settings = STUDIES[args.study]["settings"]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{args.study}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    there = {(r["setting"], r["seed"], r["command"]) for r in rows}
    todo = [
        (name, command, seed)
        for seed in range(args.seeds)
        for name, command in settings.items()
        if args.only in name and (name, seed, f"python {command} {STUDIES[args.study]['arguments']}") not in there
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, args.study, name, command, seed, 1) for name, command, seed in todo]
        for i, future in enumerate(futures, 1):
            row = future.result()
            rows.append(row)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            last = row["last"]
            print(
                f"{i}/{len(todo)}  {row['setting']}  seed {row['seed']}  {row['seconds']} s  "
                f"{last.get('eval/pass@1')} {last.get('eval/sampled')} {row['error']}",
                flush=True,
            )
    text = table(rows, settings)
    if args.study == "diagnose":
        text += "\n" + diagnose_table(rows, settings)
    (RESULTS / f"{args.study}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

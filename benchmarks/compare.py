"""Two runs or more side by side: what differs in their arguments and their code, where they ended, and their curves.

python benchmarks/compare.py runs/a runs/b                              # metrics that all of them have
python benchmarks/compare.py runs/a runs/b --metrics reward/mean grad_norm --out compare.png
"""

import argparse
import difflib
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIRST = ["eval/pass@1", "eval/sampled", "eval/reward", "reward/mean", "loss/policy", "loss/total", "kl/ref"]
FIRST += ["policy/entropy", "grad_norm", "length/mean"]
OF_EVERY_RUN = ("out", "resume")
LONG = 40  # lines of a diff that are shown


def read(folder: Path) -> tuple[dict, list[dict], list[str]]:
    """Arguments, metrics and lines of code of a run."""
    files = [folder / name for name in ("args.json", "metrics.jsonl", "source.py")]
    for file in files:
        if not file.exists():
            raise SystemExit(
                f"{file} is not there; expected the folder of a run, with args.json, metrics.jsonl, source.py"
            )
    args, metrics, source = (file.read_text() for file in files)
    return json.loads(args)["args"], [json.loads(line) for line in metrics.splitlines()], source.splitlines()


def points(metrics: list[dict], name: str) -> list[tuple[int, float]]:
    return [(m["step"], m[name]) for m in metrics if m.get(name) is not None]


def differences(runs: dict) -> list[str]:
    """Arguments that are not alike in all runs, and the diff of each one's code from that of the first."""
    names = sorted({name for args, _, _ in runs.values() for name in args} - set(OF_EVERY_RUN))
    values = {name: [args.get(name) for args, _, _ in runs.values()] for name in names}
    lines = [f"--{name}: {' | '.join(map(str, v))}" for name, v in values.items() if any(x != v[0] for x in v)]
    (first, (_, _, code)), *others = runs.items()
    for label, (_, _, other) in others:
        diff = list(difflib.unified_diff(code, other, f"{first}/source.py", f"{label}/source.py", lineterm="", n=1))
        lines += diff[:LONG] + [f"... and {len(diff) - LONG} lines more"] * (len(diff) > LONG)
    return lines or ["the same arguments and the same code"]


def draw(runs: dict, names: list[str], out: Path) -> None:
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names):
        for label, (_, metrics, _) in runs.items():
            curve = points(metrics, name)
            axis.plot(*zip(*curve), label=label, linewidth=1.6, marker="o" if len(curve) < 12 else "", markersize=3.5)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7.5, frameon=False)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--metrics", nargs="+", default=FIRST, help="names in metrics.jsonl")
    parser.add_argument("--out", default="compare.png", help="the picture")
    args = parser.parse_args()
    runs = {name: read(Path(name)) for name in args.runs}
    names = [name for name in args.metrics if all(points(metrics, name) for _, metrics, _ in runs.values())]
    if not names:
        raise SystemExit(f"none of {', '.join(args.metrics)} is in all of these runs")
    print("\n".join(differences(runs)) + "\n")
    width = max(18, *map(len, runs)) + 2
    print("metric".ljust(20) + "".join(name.ljust(width) for name in runs))
    for name in names:
        ends = [points(metrics, name) for _, metrics, _ in runs.values()]
        told = [f"{curve[0][1]:.3f} -> {curve[-1][1]:.3f}" for curve in ends]
        print(name.ljust(20) + "".join(text.ljust(width) for text in told))
    draw(runs, names, Path(args.out))
    print(f"\n{args.out}")


if __name__ == "__main__":
    sys.exit(main())

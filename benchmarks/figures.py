"""Draws the pictures of README and docs from benchmarks/results: python benchmarks/figures.py"""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
COLORS = {"LCO": "#1f6fb4", "PPO": "#d1603d", "REINFORCE": "#7a7a7a", "LCO-MSE": "#2a9d6f"}


def rows_of(study: str) -> list[dict]:
    file = ROOT / "benchmarks" / "results" / f"{study}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def clean(axis) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(-0.02, 1.02)


def builtin() -> None:
    """Held-out accuracy of the bare commands over the run: median of the seeds, band from the lowest to the highest."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    rows = [r for r in rows_of("bare") if r["ok"]]
    for axis, key, title in zip(axes, ("eval/pass@1", "eval/sampled"), ("greedy decoding", "sampled at temperature 1")):
        for name, command in (("LCO", "lco.py"), ("PPO", "ppo_baseline.py")):
            curves = [[(e["step"], e[key]) for e in r["eval"]] for r in rows if r["setting"] == f"python {command}"]
            steps = [s for s, _ in curves[0]]
            values = list(zip(*[[v for _, v in c] for c in curves]))
            axis.plot(steps, [statistics.median(v) for v in values], color=COLORS[name], label=command, linewidth=2)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=COLORS[name], alpha=0.18)
        axis.set_title(f"held-out accuracy, {title}", fontsize=10, loc="left")
        axis.set_xlabel("step (256 samples each)")
        clean(axis)
    axes[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(IMAGES / "builtin.png", dpi=140)


def stability() -> None:
    """Accuracy at the end against the learning rate, for each loss: median and range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    rows = [r for r in rows_of("stability") if r["ok"]]
    names = list(dict.fromkeys(r["setting"].split(", lr ")[0] for r in rows))
    for axis, key, title in zip(axes, ("eval/pass@1", "eval/sampled"), ("greedy decoding", "sampled at temperature 1")):
        for i, name in enumerate(names):
            points = {}
            for r in rows:
                loss, lr = r["setting"].split(", lr ")
                if loss == name:
                    points.setdefault(float(lr) * (1 + 0.04 * (i - len(names) / 2)), []).append(r["last"][key])
            lrs = sorted(points)
            middle = [statistics.median(points[x]) for x in lrs]
            low = [m - min(points[x]) for m, x in zip(middle, lrs)]
            high = [max(points[x]) - m for m, x in zip(middle, lrs)]
            axis.errorbar(lrs, middle, yerr=[low, high], marker="o", capsize=3, label=name, linewidth=1.8)
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_title(f"held-out accuracy after 40 steps, {title}", fontsize=9.5, loc="left")
        clean(axis)
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(IMAGES / "stability.png", dpi=140)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    builtin()
    stability()

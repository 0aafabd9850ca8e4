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


# settings of the study `lco`, at its learning rate, that belong into the figure of the study `stability`
AT_2E4 = {
    "PPO": "PPO, clip 0.2",
    "REINFORCE": "REINFORCE",
    "LCO-KLD, negatives x100": "KLD, beta 1, negatives x100",
    "LCO-MSE": "MSE, beta 1",
    "LCO-LCH": "LCH, beta 1",
}


def clean(axis) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(-0.02, 1.02)


def builtin() -> None:
    """Held-out accuracy of the bare commands over the run: median of the seeds, band from the lowest to the highest."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    rows = [r for r in rows_of("bare") if r["ok"]]
    for axis, key, title in zip(axes, ("eval/greedy", "eval/sampled"), ("greedy decoding", "sampled at temperature 1")):
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
    rows = [(*r["setting"].split(", lr "), r["last"]) for r in rows_of("stability") if r["ok"]]
    rows += [(n, "2e-4", r["last"]) for n, s in AT_2E4.items() for r in rows_of("lco") if r["ok"] and r["setting"] == s]
    rates = sorted({float(lr) for _, lr, _ in rows})
    for axis, key, title in zip(axes, ("eval/greedy", "eval/sampled"), ("greedy decoding", "sampled at temperature 1")):
        for i, (name, color) in enumerate(zip(AT_2E4, ("#d1603d", "#7a7a7a", "#7fb2dd", "#2a9d6f", "#1f6fb4"))):
            points = {x: [last[key] for n, lr, last in rows if n == name and float(lr) == x] for x in rates}
            middle = [statistics.median(v) for v in points.values()]
            low = [m - min(v) for m, v in zip(middle, points.values())]
            high = [max(v) - m for m, v in zip(middle, points.values())]
            apart = [lr * (1 + 0.035 * (i - 2)) for lr in points]
            axis.errorbar(apart, middle, [low, high], marker="o", capsize=2, label=name, linewidth=1.8, color=color)
        axis.set_xscale("log")
        axis.set_xticks([1e-4, 2e-4, 4e-4, 8e-4], ["1e-4", "2e-4", "4e-4", "8e-4"])
        axis.minorticks_off()
        axis.set_xlabel("learning rate")
        axis.set_title(f"held-out accuracy after 40 steps, {title}", fontsize=9.5, loc="left")
        clean(axis)
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(IMAGES / "stability.png", dpi=140)


def convergence() -> None:
    """Greedy held-out accuracy over the steps for each reward model: median and range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True)
    rows = [r for r in rows_of("qrm") if r["ok"] and " + " in r["setting"]]
    colors = {
        "Q-RM, scalar head": "#1f6fb4",
        "Q-RM, LM head": "#7fb2dd",
        "Q-RM, LM head, no cross-entropy": "#8e6cc0",
        "LCO + Q-RM, LM head": "#c9a227",
        "ORM": "#d1603d",
        "step PRM": "#2a9d6f",
        "DPO": "#7a7a7a",
        "rule": "#222222",
    }
    for axis, method in zip(axes, ("PPO", "REINFORCE")):
        beside = "LCO + " if method == "PPO" else method
        names = dict.fromkeys(r["setting"] for r in rows if r["setting"].startswith((f"{method} + ", beside)))
        for name in names:
            curves = [[e["eval/greedy"] for e in r["eval"]] for r in rows if r["setting"] == name]
            steps = next([e["step"] for e in r["eval"]] for r in rows if r["setting"] == name)
            values = list(zip(*curves))
            label = name.removeprefix(f"{method} + ")
            color = colors[label]
            axis.plot(steps, [statistics.median(v) for v in values], color=color, label=label, linewidth=1.8)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.1)
        axis.axhline(0.8, color="#999", linewidth=0.8, linestyle=":")
        axis.set_title(f"{method}: held-out accuracy, greedy", fontsize=10, loc="left")
        axis.set_xlabel("step (128 samples each)")
        clean(axis)
    lines = axes[0].get_legend_handles_labels()
    axes[1].legend(*lines, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(IMAGES / "convergence.png", dpi=140)


def gamma() -> None:
    """ADPA at each gamma: held-out accuracy, and what the linear objective does to the student; median and range."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    rows = [(float(r["setting"].removeprefix("gamma ")), r["last"]) for r in rows_of("gamma") if r["setting"][0] == "g"]
    gammas = sorted({g for g, _ in rows})
    curves = (
        (axes[0], "eval/greedy", "greedy", "#1f6fb4"),
        (axes[0], "eval/sampled", "sampled", "#d1603d"),
        (axes[1], "policy/entropy", "entropy of the student, nats a token", "#2a9d6f"),
        (axes[1], "kl/start", "KL to the student at the start, nats a token", "#7a7a7a"),
    )
    for axis, key, label, color in curves:
        values = [[last[key] for g, last in rows if g == x] for x in gammas]
        axis.plot(gammas, [statistics.median(v) for v in values], color=color, label=label, marker="o", linewidth=1.8)
        axis.fill_between(gammas, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
        axis.set_xscale("log")
        axis.set_xticks(gammas, [f"{x:g}" for x in gammas])
        axis.minorticks_off()
        axis.set_xlabel("gamma")
    for key, style in (("eval/greedy", "--"), ("eval/sampled", ":")):
        teacher = statistics.median(r["last"][key] for r in rows_of("gamma") if r["setting"] == "teacher")
        axes[0].axhline(teacher, color="#555", linewidth=0.9, linestyle=style, label=f"teacher, {key[5:]}")
    clean(axes[0])
    axes[0].set_title("held-out accuracy after 80 steps", fontsize=10, loc="left")
    axes[1].set_title("in the student's own states", fontsize=10, loc="left")
    axes[1].set_yscale("log")
    axes[1].grid(alpha=0.25)
    axes[1].spines[["top", "right"]].set_visible(False)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGES / "gamma.png", dpi=140)


def limits() -> None:
    """Sampled accuracy against the learning rate and against the passes over a rollout: median and range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
    colors = ("#d1603d", "#e0a080", "#7a7a7a", "#7fb2dd", "#2a9d6f", "#1f6fb4")
    for axis, study, title in zip(axes, ("rates", "epochs"), ("learning rate / 1e-4", "passes over a rollout")):
        rows = [(*r["setting"].split(", "), r["last"].get("eval/sampled", 0.0)) for r in rows_of(study)]
        for i, (name, color) in enumerate(zip(dict.fromkeys(name for name, _, _ in rows), colors)):
            points = {}
            for n, where, value in rows:
                if n == name:
                    points.setdefault(int("".join(c for c in where if c.isdigit())), []).append(value)
            values = [points[x] for x in sorted(points)]
            middle = [statistics.median(v) for v in values]
            low = [m - min(v) for m, v in zip(middle, values)]
            high = [max(v) - m for m, v in zip(middle, values)]
            apart = [x * (1 + 0.03 * (i - 2.5)) for x in sorted(points)]
            axis.errorbar(apart, middle, [low, high], marker="o", capsize=2, label=name, linewidth=1.7, color=color)
        axis.set_xscale("log")
        ticks = (1, 3, 10, 30) if study == "rates" else (1, 2, 4, 8)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.set_xlabel(title)
        clean(axis)
    axes[0].set_title("held-out accuracy, sampled", fontsize=10, loc="left")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(IMAGES / "limits.png", dpi=140)
    plt.close(figure)


def revision() -> None:
    """SEFT: what a round does to answers of which a share p is right, and more and more unannotated prompts."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.3))
    first = {(r["setting"], r["seed"]): r["rounds"][0] for r in rows_of("base_rate") if r.get("rounds")}
    for how, color in (("adaptive", "#1f6fb4"), ("always", "#d1603d")):
        rounds = [m for (name, _), m in first.items() if name.endswith(how)]
        gains = [(m["revise/before"], m["revise/after"] - m["revise/before"]) for m in rounds]
        axes[0].scatter(*zip(*gains), color=color, label=how, s=18)
    axes[0].axhline(0, color="#555", linewidth=0.9)
    axes[0].set_title("gain of the answers in the first round", fontsize=10, loc="left")
    axes[0].set_xlabel("p, share of right answers before")
    points = []
    for (name, seed), m in first.items():
        if name.endswith("adaptive"):
            always = first[name.replace("adaptive", "always"), seed]
            p, d, f = (always[f"revise/{key}"] for key in ("before", "damage", "fix"))
            points.append((p * d * m["revise/keep_right"] / ((1 - p) * f), m["revise/keep_wrong"], name[:5]))
    for name, color in zip(("p 0.2", "p 0.5", "p 0.8"), ("#7fb2dd", "#1f6fb4", "#0b3557")):
        axes[1].scatter(*zip(*[(x, y) for x, y, n in points if n == name]), color=color, label=name, s=18)
    top = max(max(x, y) for x, y, _ in points) * 1.1 + 0.01
    axes[1].plot([0, top], [0, top], color="#555", linewidth=0.9, label="break-even")
    axes[1].set_title("k, share of wrong answers that are kept", fontsize=10, loc="left")
    axes[1].set_xlabel("k at break-even; below the line labels pay")
    rows = [(r["setting"].split(), r["last"]) for r in rows_of("unannotated") if r["ok"]]
    rows = [(int(words[0]), last["eval/sampled"]) for words, last in rows if words[-1] == "prompts"]
    numbers = sorted({n for n, _ in rows})
    values = [[v for n, v in rows if n == x] for x in numbers]
    axes[2].plot(numbers, [statistics.median(v) for v in values], color="#2a9d6f", marker="o", linewidth=1.8)
    axes[2].fill_between(numbers, [min(v) for v in values], [max(v) for v in values], color="#2a9d6f", alpha=0.15)
    axes[2].set_xscale("log")
    axes[2].set_xticks(numbers, map(str, numbers))
    axes[2].minorticks_off()
    axes[2].set_title("held-out accuracy, sampled", fontsize=10, loc="left")
    axes[2].set_xlabel("unannotated prompts, the same number of steps")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGES / "revision.png", dpi=140)
    plt.close(figure)


def draw_all() -> None:
    """Every picture whose studies are stored."""
    IMAGES.mkdir(exist_ok=True)
    for draw, *studies in (
        (builtin, "bare"),
        (stability, "stability", "lco"),
        (convergence, "qrm"),
        (limits, "rates", "epochs"),
        (gamma, "gamma"),
        (revision, "base_rate", "unannotated"),
    ):
        if all((ROOT / "benchmarks" / "results" / f"{study}.jsonl").exists() for study in studies):
            draw()


if __name__ == "__main__":
    draw_all()

"""Draws the pictures of the docs' results from benchmarks/results: python benchmarks/figures.py [limits gamma ...]

What the other programs of this folder share when they draw is here, too: colours, dashes and markers that differ also
in grey, names beside lines instead of legends over them, and SVG files that are the same whenever they are drawn again.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
STUDIES = json.loads((ROOT / "benchmarks" / "studies.json").read_text())
BLUE, ORANGE, GREEN, PURPLE, GREY, BLACK = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777", "#222222"
LOOK = {  # a name: what plot() needs to draw its line
    "PPO": dict(color=ORANGE, linestyle="-", marker="s"),
    "GRPO": dict(color=ORANGE, linestyle=":", marker="D"),
    "REINFORCE": dict(color=GREY, linestyle="--", marker="^"),
    "LCO-KLD": dict(color=BLUE, linestyle=":", marker="v"),
    "LCO-MSE": dict(color=GREEN, linestyle="--", marker="P"),
    "LCO-LCH": dict(color=BLUE, linestyle="-", marker="o"),
}
matplotlib.rcParams |= {
    "svg.hashsalt": "minalign", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "axes.titlesize": 10, "axes.titlelocation": "left", "savefig.facecolor": "white",
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "figure.constrained_layout.use": True,
}  # fmt: skip


def rows_of(study: str) -> list[dict]:
    file = ROOT / "benchmarks" / "results" / f"{study}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- what all pictures share -----------------------------------------------------------------------------------------


def save(figure, name: str, folder: Path | None = None) -> None:
    figure.savefig((folder or IMAGES) / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def apart(heights: list[float], gap: float) -> list[float]:
    """The places nearest to these rising heights that have at least this gap between neighbours."""
    blocks = []  # [mean of the heights less what the gaps below them take, how many]
    for i, height in enumerate(heights):
        blocks.append([height - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, n), (above, m) = blocks[-2:]
            blocks[-2:] = [[(mean * n + above * m) / (n + m), n + m]]
    means = [mean for mean, n in blocks for _ in range(n)]
    return [mean + i * gap for i, mean in enumerate(means)]


def name_lines(axis, points: float = 10.5) -> None:
    """Beside the last point of each labelled line, or as near as its neighbours allow: a piece of it, and its name."""
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    axis.get_xlim(), axis.get_ylim()  # limits that follow from the lines are only computed now
    fraction, place = axis.transAxes.inverted().transform, axis.get_position()  # as good as final
    ends = [fraction(axis.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1])))[1] for line in lines]
    order = sorted(range(len(lines)), key=lambda i: ends[i])
    width, height = (72 * inch for inch in axis.figure.get_size_inches() * (place.width, place.height))
    for i, y in zip(order, apart([ends[i] for i in order], points / height)):
        look = {name: getattr(lines[i], f"get_{name}")() for name in ("color", "linestyle", "linewidth", "marker")}
        x = 1 + 7 / width, 1 + 27 / width
        axis.plot(x, [y, y], transform=axis.transAxes, clip_on=False, markevery=[1], **look)
        name = lines[i].get_label()
        axis.text(x[1] + 6 / width, y, name, color=look["color"], transform=axis.transAxes, va="center", fontsize=8.5)


def band(axis, x: list, values: list[list[float]], name: str, **look) -> None:
    """The median of the values at each x, and a band from the lowest to the highest."""
    low, middle, high = ([of(v) for v in values] for of in (min, statistics.median, max))
    axis.plot(x, middle, label=name, **look)
    axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def bars(axis, points: dict[float, list[float]], shift: float, name: str, **look) -> None:
    """Medians joined by a line, each with a bar from the lowest to the highest; a little to the side on a log axis."""
    x = [at * (1 + shift) for at in points]
    low, middle, high = ([of(v) for v in points.values()] for of in (min, statistics.median, max))
    axis.plot(x, middle, label=name, **look)
    axis.vlines(x, low, high, color=look["color"], linewidth=1)


def ticks(axis, places, names=None) -> None:
    """A log axis with these ticks and no others."""
    axis.set_xscale("log")
    axis.set_xticks(list(places), names or [f"{x:g}" for x in places])
    axis.minorticks_off()


def accuracy(axis) -> None:
    axis.set_ylim(-0.02, 1.02)


# ---- the pictures ----------------------------------------------------------------------------------------------------

# settings of the study `lco`, at its learning rate, that belong into the figure of the study `stability`
AT_2E4 = {
    "PPO": "PPO, clip 0.2",
    "REINFORCE": "REINFORCE",
    "LCO-KLD, negatives x100": "KLD, beta 1, negatives x100",
    "LCO-MSE": "MSE, beta 1",
    "LCO-LCH": "LCH, beta 1",
}


def stability() -> None:
    """Accuracy at the end against the learning rate, for each loss: median and range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    rows = [(*r["setting"].split(", lr "), r["last"]) for r in rows_of("stability") if r["ok"]]
    rows += [(n, "2e-4", r["last"]) for n, s in AT_2E4.items() for r in rows_of("lco") if r["ok"] and r["setting"] == s]
    rates = sorted({float(lr) for _, lr, _ in rows})
    for axis, key, title in zip(axes, ("eval/greedy", "eval/sampled"), ("greedy", "sampled at temperature 1")):
        for i, name in enumerate(AT_2E4):
            points = {x: [last[key] for n, lr, last in rows if n == name and float(lr) == x] for x in rates}
            bars(axis, points, 0.03 * (i - 2), name, **LOOK[name.partition(",")[0]])
        ticks(axis, rates, ["1e-4", "2e-4", "4e-4", "8e-4"])
        accuracy(axis)
        axis.set_xlabel("learning rate")
        axis.set_title(f"held-out accuracy after 40 steps, {title}")
    name_lines(axes[1])
    save(figure, "stability")


def limits() -> None:
    """Sampled accuracy against the learning rate and against the passes over a rollout: median and range over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    for axis, study, places in zip(axes, ("rates", "epochs"), ((1, 3, 10, 30), (1, 2, 4, 8))):
        rows = [(*r["setting"].split(", "), r["last"].get("eval/sampled", 0.0)) for r in rows_of(study)]
        for i, (name, look) in enumerate(LOOK.items()):
            points = {}
            for n, where, value in rows:
                if n == name:
                    points.setdefault(int("".join(c for c in where if c.isdigit())), []).append(value)
            bars(axis, dict(sorted(points.items())), 0.03 * (i - 2.5), name, **look)
        ticks(axis, places)
        accuracy(axis)
    name_lines(axes[1])
    axes[0].set_title("held-out accuracy, sampled, after 24 steps")
    axes[0].set_xlabel("learning rate, in units of 1e-4")
    axes[1].set_title("the same after 9 steps")
    axes[1].set_xlabel("passes over each rollout")
    save(figure, "limits")


REWARDS = {  # of the study `qrm`: what trains the policy
    "Q-RM, scalar head": "Q-RM, scalar head",
    "Q-RM, LM head": "Q-RM, LM head",
    "Q-RM, LM head, no cross-entropy": "Q-RM, LM head,\nno cross-entropy",
    "ORM": "ORM",
    "step PRM": "step PRM",
    "DPO": "a DPO model as reward",
    "rule": "the task's own reward",
}


def convergence() -> None:
    """Greedy held-out accuracy over the steps, a panel for each reward: median and range over seeds."""
    figure, axes = plt.subplots(2, 4, figsize=(9.4, 4.6), sharex=True, sharey=True)
    looks = {
        "PPO": dict(color=ORANGE, linestyle="-"), "REINFORCE": dict(color=BLACK, linestyle="--"),
        "LCO": dict(color=BLUE, linestyle="-."),
    }  # fmt: skip
    curves = {}
    for row in rows_of("qrm"):
        if row["ok"] and " + " in row["setting"]:
            curves.setdefault(row["setting"], []).append([(e["step"], e["eval/greedy"]) for e in row["eval"]])
    for axis, (reward, title) in zip(axes.flat, REWARDS.items()):
        for setting, runs in curves.items():
            method, _, name = setting.partition(" + ")
            steps, values = [step for step, _ in runs[0]], list(zip(*[[y for _, y in run] for run in runs]))
            if name == reward:
                band(axis, steps, values, method, **looks[method])
            else:
                axis.plot(steps, [statistics.median(v) for v in values], color="#dddddd", linewidth=0.8, zorder=0)
        axis.set_title(title)
        accuracy(axis)
    for axis in axes[1]:
        axis.set_xlabel("step of 128 samples")
    axes[0, 3].xaxis.set_tick_params(labelbottom=True)
    axes[1, 3].axis("off")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines if line.get_label() in looks}
    axes[1, 3].legend([lines[name] for name in looks], looks, loc="upper left", frameon=False, handlelength=3)
    about = "Held-out accuracy, greedy:\nthe median of five seeds,\nand a band from the lowest\nto the highest. In light grey:\n"
    about += "medians of all other panels."
    axes[1, 3].text(0.02, 0.45, about, va="top", transform=axes[1, 3].transAxes)
    save(figure, "convergence")


def gamma() -> None:
    """ADPA at each gamma: held-out accuracy, and what the linear objective does to the student; median and range."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4))
    rows = [(float(r["setting"].removeprefix("gamma ")), r["last"]) for r in rows_of("gamma") if r["setting"][0] == "g"]
    gammas = sorted({g for g, _ in rows})
    for axis, key, name, look in (
        (axes[0], "eval/greedy", "greedy", LOOK["LCO-LCH"]),
        (axes[0], "eval/sampled", "sampled", LOOK["PPO"] | {"linestyle": "--"}),
        (axes[1], "policy/entropy", "entropy of\nthe student", LOOK["LCO-MSE"]),
        (axes[1], "kl/start", "KL to its start", LOOK["REINFORCE"] | {"linestyle": "-"}),
    ):
        band(axis, gammas, [[last[key] for g, last in rows if g == x] for x in gammas], name, **look)
    accuracy(axes[0])
    for axis in axes:
        ticks(axis, gammas)
        axis.set_xlabel("gamma")
    axes[1].set_yscale("log")
    axes[1].set_yticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    axes[1].minorticks_off()
    for key, color in (("eval/greedy", BLUE), ("eval/sampled", ORANGE)):
        teacher = statistics.median(r["last"][key] for r in rows_of("gamma") if r["setting"] == "teacher")
        label = f"the teacher, {key[5:]}"
        axes[0].plot([gammas[0], gammas[-1]], [teacher] * 2, color=color, linewidth=0.9, linestyle=":", label=label)
    axes[0].set_title("held-out accuracy after 80 steps")
    axes[1].set_title("in the student's own states, nats per token")
    for axis in axes:
        name_lines(axis)
    save(figure, "gamma")


def revision() -> None:
    """SEFT: what a round does to answers of which a share p is right, when labels pay, and more prompts."""
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.6))
    first = {(r["setting"], r["seed"]): r["rounds"][0] for r in rows_of("base_rate") if r.get("rounds")}
    for how, color, marker, fill, at, words in (
        ("adaptive", BLUE, "o", BLUE, 0.22, "● adaptive: keeps\n   what it judges right"),
        ("always", ORANGE, "s", "none", 0.12, "□ always: revises all"),
    ):
        rounds = [m for (name, _), m in first.items() if name.endswith(how)]
        gains = [(m["revise/before"], m["revise/after"] - m["revise/before"]) for m in rounds]
        axes[0].scatter(*zip(*gains), edgecolor=color, facecolor=fill, marker=marker, s=26)
        axes[0].text(0.02, at, words, color=color, transform=axes[0].transAxes)
    axes[0].axhline(0, color=BLACK, linewidth=0.9)
    axes[0].set_title("Does a round make answers better?")
    axes[0].set_ylabel("right answers after less before")
    axes[0].set_xlabel("right answers before the round")
    groups = {}
    for (name, seed), m in first.items():
        if name.endswith("adaptive"):
            always = first[name.replace("adaptive", "always"), seed]
            p, d, f = (always[f"revise/{key}"] for key in ("before", "damage", "fix"))
            at = p * d * m["revise/keep_right"] / ((1 - p) * f)
            groups.setdefault(name.partition(",")[0], []).append((at, m["revise/keep_wrong"]))
    beside = ((4, -14), (18, -2), (-42, 26))
    for (name, points), marker, color, shift in zip(groups.items(), "^oD", (GREEN, BLUE, PURPLE), beside):
        axes[1].scatter(*zip(*points), color=color, marker=marker, s=26)
        x, y = (statistics.fmean(point[i] for point in points) for i in (0, 1))
        words = name.replace("p 0", "0") + " right before"
        axes[1].annotate(words, (x, y), shift, textcoords="offset points", color=color)
    top = max(max(point) for points in groups.values() for point in points) * 1.1 + 0.01
    axes[1].fill_between([0, top], [0, top], color=BLUE, alpha=0.07, linewidth=0)
    axes[1].plot([0, top], [0, top], color=BLACK, linewidth=0.9)
    axes[1].text(top * 0.97, top * 0.5, "labels pay", color=BLUE, ha="right")
    axes[1].text(top * 0.03, top * 0.93, "labels cost", color=GREY)
    axes[1].set_ylim(-0.06, top)
    axes[1].set_title("Do labels pay?")
    axes[1].set_ylabel("wrong answers that are kept")
    axes[1].set_xlabel("what that share may be at most")
    rows = [(r["setting"].split(), r["last"]) for r in rows_of("unannotated") if r["ok"]]
    rows = [(int(words[0]), last["eval/sampled"]) for words, last in rows if words[-1] == "prompts"]
    numbers = sorted({n for n, _ in rows})
    band(axes[2], numbers, [[v for n, v in rows if n == x] for x in numbers], "sampled", color=GREEN, marker="P")
    ticks(axes[2], numbers)
    axes[2].set_title("Do more prompts help?")
    axes[2].set_ylabel("held-out accuracy, sampled")
    axes[2].set_xlabel("unannotated prompts, equal steps")
    save(figure, "revision")


def credit() -> None:
    """The mean score of a token around the first wrong one, for each reward model."""
    figure, axis = plt.subplots(figsize=(6.8, 3.4))
    record = json.loads((ROOT / "benchmarks" / "results" / "credit.json").read_text())
    colors, dashes = (BLUE, BLUE, ORANGE, GREEN, GREY), (":", "-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
    for (name, each), color, linestyle, marker in zip(record.items(), colors, dashes, "vos^D"):
        look = dict(color=color, linestyle=linestyle, marker=marker)
        axis.plot(range(-4, len(each["around"]) - 4), each["around"], label=name, **look)  # credit.py's AROUND
    axis.axvline(0, color=BLACK, linewidth=0.9, linestyle=":")
    axis.set_xlabel("tokens after the first wrong one")
    axis.set_title("mean score of a token in wrong answers, in standard deviations")
    name_lines(axis)
    save(figure, "credit")


def real() -> None:
    """SmolLM2: accuracy after each method, one mark per seed, and the median before."""
    figure, axes = plt.subplots(3, 2, figsize=(9.4, 10.4), gridspec_kw={"height_ratios": (13, 10, 8)})
    titles = {"real_rl": "LCO, PPO and REINFORCE", "real_text": "LCO and PPO: sentences"}
    titles |= {"real_distil_more": "Distillation", "real_qrm": "RL with reward models", "real_seft": "SEFT"}
    for axis, (name, title) in zip(axes.flat, titles.items()):
        study = STUDIES[name]
        names = {"teacher": "the teacher", "dckd": "DCKD"} if name == "real_distil_more" else {}
        ended = {s: [] for s in [*names, *study["settings"]]}
        for r in rows_of(name):
            if r["ok"] and r["setting"] in ended:
                ended[r["setting"]].append(r)
        ended = {s: rows for s, rows in ended.items() if rows}
        for y, rows in enumerate(ended.values()):
            for key, shift, color, look in (
                ("eval/greedy", 0.14, BLUE, dict(facecolor=BLUE, marker="o")),
                ("eval/sampled", -0.14, ORANGE, dict(facecolor="none", marker="s")),
            ):
                values = [r["last"][key] for r in rows]
                axis.scatter(values, [y - shift] * len(rows), s=18, zorder=3, edgecolor=color, **look)
                axis.vlines(statistics.median(values), y - shift - 0.14, y - shift + 0.14, color=BLACK, linewidth=1.2)
                before = statistics.median(r["eval"][0][key] for r in rows)
                axis.vlines(before, y - 0.4, y + 0.4, color=color, linestyle=":", linewidth=1.2)
        axis.set_yticks(range(len(ended)), [names.get(s, s) for s in ended])
        axis.set_ylim(len(ended) - 0.4, -0.6)
        axis.set_xlim(-0.02, 1.02 if name == "real_text" else 0.62)
        axis.set_title(title)
        axis.set_xlabel("held-out accuracy")
    axes.flat[-1].axis("off")
    legend = (BLUE, "● greedy"), (ORANGE, "□ sampled"), (BLACK, "| median"), (GREY, "┊ before")
    for line, (color, words) in enumerate(legend):
        axes.flat[-1].text(0.1, 0.8 - 0.15 * line, words, color=color)
    save(figure, "real")


PICTURES = {  # name: its studies
    stability: ("stability", "lco"), limits: ("rates", "epochs"), convergence: ("qrm",), gamma: ("gamma",),
    revision: ("base_rate", "unannotated"), credit: ("credit",),
    real: ("real_rl", "real_text", "real_distil_more", "real_qrm", "real_seft"),
}  # fmt: skip


def draw_all(names: list[str] | None = None) -> None:
    """Every picture whose studies are stored."""
    IMAGES.mkdir(exist_ok=True)
    for draw, studies in PICTURES.items():
        stored = all([*(ROOT / "benchmarks" / "results").glob(f"{study}.json*")] for study in studies)
        if stored and (not names or draw.__name__ in names):
            draw()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(draw.__name__ for draw in PICTURES)}; none: all")
    draw_all(parser.parse_args().names)

"""One figure for each method's page, and two of the README: python benchmarks/method_figures.py [lco seft ...]

They are drawn from the scripts' own losses, the built-in models, docs/credit.html (Q-RM) and, for SEFT, two answers of
a run of `seft.py` and `seft.py --stage evolve`, kept in benchmarks/results/seft_example.json.
"""

import argparse
import html
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before torch)
import adpa  # noqa: E402
import dpo  # noqa: E402
import lco  # noqa: E402
import lm  # noqa: E402
import ppo_baseline  # noqa: E402

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
EXAMPLE = ROOT / "benchmarks" / "results" / "seft_example.json"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777"
PROMPT = "7+15+8="  # its first token decides: 22 is right, 12 forgets the carry
matplotlib.rcParams |= {
    "svg.hashsalt": "minalign", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10, "axes.titlelocation": "left", "savefig.facecolor": "white", "lines.linewidth": 2,
}  # fmt: skip


def file_name(name: str) -> str:
    return f"{name}.svg" if name in ("readme", "family") else f"method-{name}.svg"


def save(figure, name: str) -> None:
    figure.savefig(FIGURES / file_name(name), metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
    print(f"wrote docs/figures/{file_name(name)}")


# ---- PPO -------------------------------------------------------------------------------------------------------------


def ppo() -> None:
    """PPO-1 against the ratio, for both signs of the advantage; where it is flat."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    ratio = torch.linspace(0.4, 1.7, 400)
    for axis, A in zip(axes, (0.5, -0.5)):
        one_by_one = [ppo_baseline.policy_loss(r.log(), torch.tensor(0.0), torch.tensor(A), "ppo", 0.2) for r in ratio]
        loss = torch.stack([total for total, _ in one_by_one])
        axis.plot(ratio, -A * ratio, color=GREY, linestyle="--", linewidth=1.3)
        axis.plot(ratio, loss, color=BLUE)
        flat = (1.2, 1.7) if A > 0 else (0.4, 0.8)
        axis.axvspan(*flat, color=ORANGE, alpha=0.12, linewidth=0)
        axis.text(sum(flat) / 2, -0.35 if A > 0 else 0.72, "no gradient", color=ORANGE, ha="center")
        axis.plot([1], [-A], "o", color=BLUE)
        axis.text(
            0.97 if A > 0 else 1.03, -A - 0.02, "start: r = 1", color=BLUE, ha="right" if A > 0 else "left", va="top"
        )
        end, side = (1.55, "right") if A > 0 else (0.55, "left")
        axis.text(end, -A * end - 0.015, "without the clip", color=GREY, ha=side, va="top")
        axis.margins(y=0.14)
        axis.set_title(
            f"A = {'+' if A > 0 else '−'}{abs(A)}: the token should become {'likelier' if A > 0 else 'less likely'}"
        )
        axis.set_xlabel("ratio r = π / π_old")
        axis.set_ylabel("loss PPO-1")
    save(figure, "ppo_baseline")


# ---- LCO -------------------------------------------------------------------------------------------------------------


def lco_figure() -> None:
    """The target, and the losses against the logit of the sampled token, for both signs of its advantage."""
    figure, axes = plt.subplots(1, 3, figsize=(9.3, 3.6), constrained_layout=True, width_ratios=[0.9, 1, 1])
    old = torch.tensor([0.61, 0.38, 0.01]).log()
    half = torch.tensor([0.0, 0.5, 0.0])
    bars = [("π_old", old.exp(), GREY, ""), ("π*", lco.target_logprobs(old, half, 1.0, "exp").exp(), BLUE, "//")]
    for i, (name, p, color, hatch) in enumerate(bars):
        x = [a + 0.38 * i - 0.19 for a in range(3)]
        axes[0].bar(x, p, 0.36, color=color, alpha=0.85, hatch=hatch, edgecolor="white")
        for at, height in zip(x, p.tolist()):
            axes[0].text(at, height + 0.01, f"{height:.2f}", ha="center", fontsize=9, color=color)
        axes[0].text(1.7, 0.58 - 0.07 * i, name, color=color, fontsize=11)
    axes[0].set_xticks(range(3), ["1", "2\nsampled, A = +0.5", "3"])
    axes[0].set_ylim(0, 0.7)
    axes[0].set_title(f"the target after “{PROMPT}”")
    axes[0].set_ylabel("probability")

    moved = torch.linspace(-2.6, 2.6, 521)
    for axis, A in zip(axes[1:], (0.5, -0.5)):
        z = old + torch.stack([torch.zeros_like(moved), moved, torch.zeros_like(moved)], 1)  # [521, 3]
        logp, target = z.log_softmax(-1), lco.target_logprobs(old, 2 * A * half, 1.0, "exp")
        gap = lco.target_gap(z[:, 1], old[1], torch.tensor(A), 1.0)
        ratio = (logp[:, 1] - old[1]).exp()
        surrogate = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.2))
        losses = {
            "PPO": (surrogate, ORANGE, "-"), "LCO-KLD": (lco.kld_loss(logp, target), BLUE, "-"),
            "LCO-MSE": (lco.square_loss(gap), GREEN, "--"), "LCO-LCH": (lco.log_cosh_loss(gap), PURPLE, "-."),
        }  # fmt: skip
        flat = (ratio > 1.2) if A > 0 else (ratio < 0.8)
        axis.axvspan(moved[flat].min(), moved[flat].max(), color=ORANGE, alpha=0.1, linewidth=0)
        for name, (loss, color, style) in losses.items():
            height = loss - loss.min()
            axis.plot(moved, height / height[260], color=color, linestyle=style, label=name)  # 260: not moved
        axis.axvline(A, color=GREY, linewidth=1, linestyle=":")
        axis.text(A, 3.85, " z*" if A > 0 else "z* ", color=GREY, ha="left" if A > 0 else "right", va="top")
        axis.plot([0], [1], "o", color="black", zorder=5)
        axis.annotate("start", (0, 1), (-0.12 if A > 0 else 0.12, 0.62), ha="right" if A > 0 else "left")
        side = 1 if A > 0 else -1
        axis.text(side * 1.6, 0.12, "PPO is flat", color=ORANGE, ha="center")
        axis.text(side * 1.95, 1.2, "LCO\npulls\nback", color=BLUE, ha="center", va="center")
        axis.set_ylim(-0.1, 4)
        axis.set_xlim(-2.6, 2.6)
        axis.set_title(f"the losses, A = {'+' if A > 0 else '−'}{abs(A)}")
        axis.set_xlabel("change of the sampled token's logit")
    axes[1].set_ylabel("loss above its lowest value (start = 1)")
    figure.legend(
        *axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, handlelength=3
    )
    save(figure, "lco")


# ---- DCKD and ADPA ---------------------------------------------------------------------------------------------------


def next_token(*names: str) -> tuple[list[str], list[torch.Tensor]]:
    """Tokens that some of the models give 0.1 % or more after the prompt, and their probabilities by each model."""
    tokenizer = lm.load_tokenizer("builtin")
    ids = torch.tensor([common.encode_prompt(tokenizer, PROMPT)])
    rows = []
    for name in names:
        model = transformers.AutoModelForCausalLM.from_pretrained(lm.model_path(name)).eval()
        with torch.no_grad():
            rows.append(model(ids).logits[0, -1].float().softmax(-1))
    keep = (torch.stack(rows).amax(0) > 1e-3).nonzero()[:, 0].tolist()
    return [tokenizer.decode([i]) for i in keep], [row[keep] / row[keep].sum() for row in rows]


def bars(axis, tokens, columns, unit="{:.2f}", size=9) -> None:
    """Grouped bars, their heights written above or below them, and a name for each group of colour in a legend."""
    width = 0.8 / len(columns)
    for i, (name, values, color, hatch) in enumerate(columns):
        x = [a + (i - (len(columns) - 1) / 2) * width for a in range(len(tokens))]
        axis.bar(x, values, width * 0.92, color=color, hatch=hatch, edgecolor="white", label=name)
        for at, height in zip(x, map(float, values)):
            below = height < 0
            axis.annotate(unit.format(height), (at, height), (0, -2 if below else 2), textcoords="offset points",
                          ha="center", va="top" if below else "bottom", fontsize=size, color=color)  # fmt: skip
    axis.set_xticks(range(len(tokens)), tokens)
    axis.axhline(0, color="black", linewidth=0.8)


def dckd() -> None:
    tokens, (teacher, student) = next_token("builtin-aligned", "builtin-small")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), constrained_layout=True)
    bars(axes[0], tokens, [("student π", student, GREY, ""), ("aligned teacher π_dpo", teacher, BLUE, "//")])
    axes[0].set_title(f"next token after “{PROMPT}”")
    axes[0].set_ylabel("probability")
    axes[0].legend(frameon=False, loc="upper left")
    axes[0].set_ylim(top=1.25)
    bars(axes[1], tokens, [("", teacher - student, ORANGE, "")], "{:+.2f}")
    axes[1].set_title("what KL(π_dpo ‖ π) asks for: π_dpo − π")
    axes[1].set_ylabel("minus the gradient in the logit")
    axes[1].margins(y=0.15)
    save(figure, "dckd")


def adpa_figure() -> None:
    tokens, (teacher, ref, student) = next_token("builtin-aligned", "builtin", "builtin-small")
    A = adpa.advantages(teacher.log()[None], ref.log()[None], 0)[0]
    asks = student * (A - (student * A).sum())
    kl = (student.log() + A).softmax(-1)
    opd = (ref.log() + A).softmax(-1)
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 4), constrained_layout=True, width_ratios=[1.15, 0.95, 1.15])
    columns = [("student π", student, GREY, ""), ("reference teacher π_ref", ref, ORANGE, "\\\\"),
               ("aligned teacher π_dpo", teacher, BLUE, "//")]  # fmt: skip
    bars(axes[0], tokens, columns, size=7.5)
    axes[0].set_title(f"next token after “{PROMPT}”")
    axes[0].set_ylabel("probability")
    bars(axes[1], tokens, [("advantage A", A, PURPLE, ""), ("minus the gradient", asks, GREEN, "//")], size=7.5)
    axes[1].set_title("A = log π_dpo − log π_ref")
    best = torch.nn.functional.one_hot(A.argmax(), len(tokens)).float()
    columns = [("ADPA-2: linear", best, GREEN, ""), ("ADPA-3: KL to student", kl, PURPLE, "\\\\"),
               ("ADPA-4: distillation", opd, BLUE, "//")]  # fmt: skip
    bars(axes[2], tokens, columns, size=7.5)
    axes[2].set_title("where each objective ends")
    for axis, limits in zip(axes, ((0, 1.3), (-2.7, 3.8), (0, 1.5))):
        axis.legend(frameon=False, fontsize=9, loc="upper left", borderaxespad=0.2)
        axis.set_ylim(*limits)
    save(figure, "adpa")


# ---- DPO -------------------------------------------------------------------------------------------------------------


def dpo_figure() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    margin = torch.linspace(-4, 6, 401, requires_grad=True)
    zero = torch.zeros_like(margin)
    for s, color, style in ((0.0, BLUE, "-"), (0.1, ORANGE, "--")):
        per_pair = torch.stack([dpo.dpo_loss(m, zero[0], zero[0], zero[0], 1.0, s)[0] for m in margin])
        (slope,) = torch.autograd.grad(per_pair.sum(), margin)
        x, y = margin.detach(), per_pair.detach()
        axes[0].plot(x, y, color=color, linestyle=style)
        axes[1].plot(x, -slope, color=color, linestyle=style)
        at = y.argmin()
        if s:
            axes[0].plot([x[at]], [y[at]], "o", color=color)
            axes[0].annotate("label smoothing 0.1:\nlowest at log 9 = 2.2", (x[at], y[at]), (2.0, 1.15), color=color,
                             arrowprops={"arrowstyle": "-", "color": color})  # fmt: skip
            axes[1].text(-3.9, 0.55, "smoothing 0.1", color=color)
    axes[0].plot([0], [torch.tensor(2.0).log()], "o", color="black")
    axes[0].annotate("start: log 2", (0, 0.69), (-0.3, 0.33), ha="right")
    axes[0].text(-3.4, 3.95, "DPO-1", color=BLUE)
    axes[1].text(-2.4, 0.97, "DPO-1: σ(−m), settled pairs count little", color=BLUE)
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("loss of a pair")
    axes[1].set_ylabel("pull on the margin")
    for axis in axes:
        axis.set_xlabel("margin m = difference of the implicit rewards")
    save(figure, "dpo")


# ---- Q-RM ------------------------------------------------------------------------------------------------------------


def qrm() -> None:
    """One wrong answer, its tokens coloured by what each reward model gives them; from docs/credit.html."""
    page = (ROOT / "docs" / "credit.html").read_text()
    answers = re.findall(r'<h3 class="([^"]*)">([^<]*?)\s*<small>.*?</h3><table>(.*?)</table>', page, re.DOTALL)
    names = {"truth: still right": "the truth: 1 while it is right", "Q-RM, LM head": "Q-RM, LM head (log φ)",
             "Q-RM, scalar head": "Q-RM, scalar head", "DPO log-ratio": "DPO's log-ratio"}  # fmt: skip
    for _, prompt, table in answers:  # noqa: B007
        lines = {}
        for name, cells in re.findall(r"<th>([^<]*)</th><td>(.*?)</td>", table, re.DOTALL):
            found = re.findall(r'title="[^"]*: (-?[0-9.]+)">(.*?)</span>', cells)
            lines[html.unescape(name)] = [float(score) for score, _ in found]
            tokens = [html.unescape(token) for _, token in found]
        truth = lines["truth: still right"]
        if 2 <= sum(truth) < len(truth):  # it begins right, and then slips
            break
    first_wrong = truth.index(0.0)
    figure, axis = plt.subplots(figsize=(8.8, 3.4), constrained_layout=True)
    for row, (name, title) in enumerate(names.items()):
        axis.text(-0.3, -row, title, ha="right", va="center")
        scores, low, high = lines[name], min(lines[name]), max(lines[name])
        for at, (token, score) in enumerate(zip(tokens, scores)):
            share = (score - low) / (high - low)  # 0: this row's worst token, 1: its best
            color = tuple((1 - share) * a + share * b for a, b in zip((0.96, 0.60, 0.42), (0.72, 0.86, 0.97)))
            axis.add_patch(plt.Rectangle((at, -row - 0.42), 0.96, 0.84, color=color, linewidth=0))
            axis.text(
                at + 0.48, -row + 0.1, token.replace("<eos>", "eos"), ha="center", va="center", family="monospace"
            )
            written = f"{score:.1f}".replace("-0.0", "0.0").replace("-", "−")
            axis.text(at + 0.48, -row - 0.27, written, ha="center", va="center", fontsize=8.5, color="#333333")
    axis.add_patch(plt.Rectangle((first_wrong - 0.02, -3.5), 1, 4, fill=False, color="black", linewidth=1.5))
    axis.text(first_wrong + 0.48, 0.62, "first wrong token", ha="center")
    axis.text(-0.3, 0.62, f"answer to {prompt}", ha="right", weight="bold")
    axis.text(0, -3.85, "blue: the best token of its line, orange: the worst", color="#444444")
    axis.set_xlim(-3.9, len(tokens) + 0.1)
    axis.set_ylim(-4, 0.9)
    axis.axis("off")
    save(figure, "qrm")


# ---- SEFT ------------------------------------------------------------------------------------------------------------


def seft() -> None:
    made = json.loads(EXAMPLE.read_text())
    figure, axis = plt.subplots(figsize=(9.4, 4.0), constrained_layout=True)
    box = {"boxstyle": "round,pad=0.45", "linewidth": 1.3}
    columns = [0, 2.6, 5.6, 8.6, 11.2]
    heads = ["a new prompt x", "1. policy: y0", "2. reviser: label", "3. reviser: y*", "4. policy learns"]
    for x, head in zip(columns, heads):
        axis.text(x, 1.75, head, ha="center", weight="bold", fontsize=9.5)
    arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}

    def put(x, y, text, color=GREY, **more):
        shade = matplotlib.colors.to_rgba(color, 0.10)
        return axis.text(
            x, y, text, ha="center", va="center", bbox=box | {"edgecolor": color, "facecolor": shade}, **more
        )

    for y, one in ((1, made["mended"]), (0, made["kept"])):
        major, minor, no = one["chances"]
        kept = one["label"] == 2
        right = GREEN if one["before"] else ORANGE
        put(columns[0], y, one["prompt"], family="monospace")
        put(columns[1], y, one["text"], right, family="monospace")
        axis.text(
            columns[1], y - 0.3, "right" if one["before"] else "wrong", color=right, ha="center", va="top", fontsize=9
        )
        put(columns[2], y, f"Major {major:.2f}\nMinor {minor:.2f}\nNo {no:.2f}", BLUE, fontsize=9)
        verdict = (
            f"{no:.3f} > t = {made['threshold']:.3f}: keep"
            if kept
            else f"{no:.3f} < t = {made['threshold']:.3f}: revise"
        )
        axis.text(columns[2], y - 0.36, verdict, ha="center", va="top", fontsize=9, color=BLUE)
        target = one["text"] if kept else one["revision"]
        put(columns[3], y, target, GREEN if one["after"] else ORANGE, family="monospace")
        if kept:
            note = f"the revision would have been\n{one['revision']}"
            axis.text(columns[3], y - 0.3, note, ha="center", va="top", fontsize=8.5, color=GREY)
        else:
            axis.text(columns[3], y - 0.3, "right", color=GREEN, ha="center", va="top", fontsize=9)
        put(columns[4], y, "x → y*\nby SFT", PURPLE, fontsize=9)
        for left, right_end in ((0.85, 1.45), (3.75, 4.75), (6.4, 7.45), (9.75, 10.5)):
            axis.annotate("", (right_end, y), (left, y), arrowprops=arrow)
    loop = {"arrowstyle": "->", "color": PURPLE, "linewidth": 1.4, "connectionstyle": "bar,fraction=-0.06"}
    axis.annotate("", (columns[1], -0.85), (columns[4], -0.85), arrowprops=loop)
    axis.text((columns[1] + columns[4]) / 2, -1.08, "next round: the policy that has learnt answers new prompts",
              ha="center", color=PURPLE, fontsize=9)  # fmt: skip
    axis.set_xlim(-0.9, 12)
    axis.set_ylim(-1.3, 2.0)
    axis.axis("off")
    save(figure, "seft")


# ---- README ----------------------------------------------------------------------------------------------------------


def readme() -> None:
    """PPO and LCO against passes over a rollout and the learning rate: median and range of ten seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.3), sharey=True, constrained_layout=True)
    panels = (("epochs", "{} epoch", (1, 2, 4, 8), "passes over each rollout"),
              ("rates", "lr x{}", (1, 3, 10, 30), "learning rate, in units of 1e-4"))  # fmt: skip
    for axis, (study, suffix, values, label) in zip(axes, panels):
        rows = [json.loads(line) for line in (ROOT / "benchmarks/results" / f"{study}.jsonl").read_text().splitlines()]
        for name, color, style, shift in (("PPO", ORANGE, "--", 0.98), ("LCO-LCH", BLUE, "-", 1.02)):
            points = []
            for value in values:
                setting = f"{name}, {suffix.format(value)}"
                points.append([r["last"]["eval/sampled"] for r in rows if r["setting"].removesuffix("s") == setting])
            middle = [statistics.median(point) for point in points]
            errors = [[m - min(p) for m, p in zip(middle, points)], [max(p) - m for m, p in zip(middle, points)]]
            at = [value * shift for value in values]
            axis.errorbar(at, middle, errors, color=color, linestyle=style, marker="o", capsize=3, markersize=5)
        axis.axhline(
            statistics.median(r["eval"][0]["eval/sampled"] for r in rows), color=GREY, linewidth=1, linestyle=":"
        )
        axis.set_xscale("log")
        axis.set_xticks(values, map(str, values))
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.set_ylim(0, 0.85)
    axes[0].set_ylabel("sampled held-out accuracy")
    axes[0].text(6.6, 0.69, "LCO", color=BLUE, ha="right", weight="bold")
    axes[0].text(6.6, 0.26, "PPO", color=ORANGE, ha="right", weight="bold")
    axes[0].text(1, 0.37, "before training", color=GREY)
    axes[1].text(12.5, 0.36, "LCO", color=BLUE, weight="bold")
    axes[1].text(6.4, 0.12, "PPO", color=ORANGE, ha="right", weight="bold")
    save(figure, "readme")


def family() -> None:
    """Which script goes on from which, and what is handed over."""
    figure, axis = plt.subplots(figsize=(9.6, 3.3), constrained_layout=True)
    places = {  # name: (x, y, what, colour)
        "ppo_baseline.py": (0.0, 2, "rewards, on-policy", ORANGE),
        "lco.py": (4.2, 2, "regression on the optimum", BLUE),
        "qrm.py": (8.4, 2, "reward model per token", GREEN), "dpo.py": (0.0, 0.4, "pairs; also SFT", ORANGE),
        "dckd.py": (4.2, 0.4, "a teacher's distribution", BLUE), "adpa.py": (8.4, 0.4, "a teacher's advantage", BLUE),
        "seft.py": (8.4, -1.1, "a reviser", GREEN), "evaluate.py": (0.0, -1.1, "any model, with intervals", GREY),
        "tasks": (4.2, -1.1, "common.py  lm.py  tasks.py", GREY),
    }  # fmt: skip
    for name, (x, y, what, color) in places.items():
        shade = matplotlib.colors.to_rgba(color, 0.1)
        text = f"{what}\nimported by every script" if name == "tasks" else f"{name}\n{what}"
        box = {"boxstyle": "round,pad=0.5", "facecolor": shade, "edgecolor": color}
        axis.text(x, y, text, ha="center", va="center", bbox=box, linespacing=1.5)

    def arrow(a, b, label, at, color=GREY, style="-", **more):
        look = {"arrowstyle": "->", "color": color, "linestyle": style, "linewidth": 1.5} | more
        axis.annotate("", b, a, arrowprops=look)
        axis.text(*at, label, ha="center", va="center", fontsize=9.5, color=color)

    arrow((1.25, 2), (2.75, 2), "another loss", (2.0, 2.2))
    arrow((1.25, 0.4), (2.85, 0.4), "+ teacher's KL", (2.05, 0.6))
    arrow((5.5, 0.4), (7.1, 0.4), "advantage\ninstead", (6.3, 0.72))
    arrow((7.1, 2), (5.6, 2), "--reward_model", (6.35, 2.2), GREEN, "--")
    arrow((0.0, 0.85), (0.0, 1.55), "  --reward_model, --reward_ref", (1.35, 1.2), GREEN, "--")
    axis.set_xlim(-1.5, 10)
    axis.set_ylim(-1.7, 2.6)
    axis.axis("off")
    save(figure, "family")


DRAW = {
    "ppo_baseline": ppo, "lco": lco_figure, "qrm": qrm, "dckd": dckd, "adpa": adpa_figure, "dpo": dpo_figure,
    "seft": seft, "readme": readme, "family": family,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which figures, of {', '.join(DRAW)}; none: all")
    args = parser.parse_args()
    for name in args.names or DRAW:
        DRAW[name]()


if __name__ == "__main__":
    main()

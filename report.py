"""What runs look like: curves and a page of one run, and several runs compared.

    python report.py RUN                    plot.png and report.html in the folder of the run
    python report.py RUN --follow           the same while it trains, again every 15 seconds
    python report.py RUN RUN [RUN ...]      compare.html: what differs, curves over each other, where they ended

A run whose settings differ from another one's in nothing but the seed belongs to the same group: the curve of a group
is the median over its runs, the band reaches from the lowest to the highest. Delete this file and nothing but plots and
pages is missing: a script writes metrics.jsonl by itself.
"""

import argparse
import base64
import difflib
import io
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

OF_EVERY_RUN = ("out", "resume", "device", "micro_batch", "rollout_rows", "save_every", "wandb")  # no result depends on
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 } img { max-width: 100% } small { color: #888 }
td, th { text-align: left; vertical-align: top; padding: .25em .7em; border-bottom: 1px solid #ddd;
         white-space: pre-wrap; font-size: 13px } code, pre { background: #f4f4f4; padding: .1em .3em }
"""
TOKENS = """
h3 { font: 600 15px monospace; margin: 1.4em 0 .2em; white-space: pre-wrap }
td, th { border: 0; padding: .1em .8em .1em 0 } th { font-weight: 400; text-align: right; color: #666 }
td { font: 16px/1.5 monospace } td span { padding: .12em .08em; border: 1px solid #eee }
"""


@dataclass
class Stored:
    """What a run folder holds."""

    folder: Path
    about: dict  # args.json: arguments, command, versions
    metrics: list[dict]  # one line per step
    samples: list[dict]  # rows {step, kind, prompt, completion, reward}
    source: list[str]  # lines of the script that made it

    @property
    def ended(self) -> bool:
        steps = self.about["args"].get("steps", 0)
        return bool(self.metrics) and self.metrics[-1]["step"] >= steps


def read(folder: Path) -> Stored:
    """The run in a folder. A last line that is still being written is left out."""

    def lines(name: str) -> list[dict]:
        text = (folder / name).read_text() if (folder / name).exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    for name in ("args.json", "metrics.jsonl", "source.py"):
        if not (folder / name).exists():
            sys.exit(f"report.py: error: {folder / name} is not there; expected the folder of a run")
    about, source = json.loads((folder / "args.json").read_text()), (folder / "source.py").read_text()
    return Stored(folder, about, lines("metrics.jsonl"), lines("samples.jsonl"), source.splitlines())


# ---- curves ----------------------------------------------------------------------------------------------------------


def points(metrics: list[dict], name: str) -> dict[int, float]:
    """{step: value} of a metric wherever it is known."""
    return {m["step"]: m[name] for m in metrics if m.get(name) is not None}


def panels(metrics: list[dict]) -> list[list[str]]:
    """Metrics that share a plot: those with the same prefix, unless one is far larger than another."""
    values = {}
    for line in metrics:
        for name, value in line.items():
            if value is not None and name != "step" and not name.startswith("time/"):
                values.setdefault(name, []).append(abs(value))
    size, order = {name: statistics.median(v) for name, v in values.items()}, {}
    for name in values:
        order.setdefault(name.split("/")[0], []).append(name)
    out = []
    for prefix in sorted(order, key=lambda p: (p != "eval", p != "reward", "/" not in order[p][0])):
        last = None
        for name in sorted(order[prefix], key=lambda n: -size[n]):
            if last is not None and size[name] > size[last] / 10:
                out[-1].append(name)
            else:
                out, last = [*out, [name]], name
    return out


def draw(figures: list[list[str]], groups: dict[str, list[list[dict]]], title: str = "") -> bytes:
    """A PNG with one plot per list of names. groups: {label: the metrics of its runs}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # names of folders may have a $

    columns = max(1, min(3, len(figures)))
    rows = max(1, math.ceil(len(figures) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False)
    for axis, names in zip(axes.flat, figures):
        for name in names:
            for label, runs in groups.items():
                curves = [points(metrics, name) for metrics in runs]
                steps = sorted(set().union(*curves))
                if not steps:
                    continue
                at = [[curve[s] for curve in curves if s in curve] for s in steps]
                middle = [statistics.median(values) for values in at]
                marker = {"marker": "o", "markersize": 3.5} if len(steps) < 12 else {}
                text = " ".join([label] * (len(groups) > 1) + [name] * (len(groups) == 1 or len(names) > 1))
                (line,) = axis.plot(steps, middle, label=text, linewidth=1.6, **marker)
                if len(curves) > 1:
                    axis.fill_between(steps, list(map(min, at)), list(map(max, at)), color=line.get_color(), alpha=0.15)
        axis.set_title(names[0] if len(names) == 1 else names[0].split("/")[0], fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7.5, frameon=False)
    for axis in list(axes.flat)[len(figures) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, dpi=130)
    plt.close(figure)
    return out.getvalue()


# ---- pages -----------------------------------------------------------------------------------------------------------


def write_page(path: Path, title: str, body: str, style: str = "", refresh: bool = False) -> None:
    """One file without links, the old one or the new one at any moment."""
    again = '<meta http-equiv="refresh" content="15">' * refresh
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{again}<title>{escape(title)}</title>'
    part = path.with_name(path.name + ".part")
    part.write_text(f"{head}<style>{STYLE}{style}</style><h1>{escape(title)}</h1>{body}</html>")
    part.replace(path)


def table(header: list, rows: list[list]) -> str:
    head = "".join(f"<th>{escape(str(h))}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def image(png: bytes) -> str:
    return f'<img alt="learning curves" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def text_of(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def write_report(folder: Path) -> Stored:
    """plot.png, and report.html: held-out metrics before and after, curves, samples and settings."""
    run = read(Path(folder))
    png = draw(panels(run.metrics), {run.folder.name: [run.metrics]}, run.folder.name)
    (run.folder / "plot.png").write_bytes(png)
    evaluated = [m for m in run.metrics if any(k.startswith("eval/") for k in m)] or [{}]
    first, last = evaluated[0], evaluated[-1]
    number = lambda x: "–" if x is None else f"{x:.4f}"  # noqa: E731
    ends = [[k, number(first[k]), number(last.get(k))] for k in first if k.startswith("eval/")]
    steps = sorted({s["step"] for s in run.samples})
    shown = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else ()
    rows = [
        [s["step"], s["kind"], text_of(s["prompt"]), s["completion"], f"{s['reward']:.3g}" if "reward" in s else ""]
        for s in run.samples
        if s["step"] in shown
    ]
    about = run.about
    body = [f"<p><code>{escape(about['command'])}</code></p>"]
    body += ["<h2>Before and after</h2>"]
    body += [table(["held-out metric", f"step {first.get('step')}", f"step {last.get('step')}"], ends)]
    body += ["<h2>Curves</h2>", image(png), "<h2>Samples</h2>"]
    body += [table(["step", "kind", "prompt", "completion", "reward"], rows), "<h2>Settings</h2>"]
    body += [table(["argument", "value"], [[k, v] for k, v in about["args"].items()])]
    made = f"world size {about['world']}, torch {about['torch']}, git {about['git']}, {about['time']}"
    write_page(run.folder / "report.html", run.folder.name, "".join(body) + f"<p>{escape(made)}</p>", "", not run.ended)
    return run


def token_page(path: Path, title: str, answers: list[dict], note: str = "") -> None:
    """One page of answers whose tokens are coloured by numbers, one colouring under the other.

    answers: rows {prompt, kind, tokens: [str], scores: {name: [float]}}. Each colouring is standardised over the page:
    blue is above its mean, red below, white at it. The number itself shows on hovering.
    """
    scale = {}
    for name in dict.fromkeys(name for answer in answers for name in answer["scores"]):
        values = [x for answer in answers for x in answer["scores"].get(name, [])]
        scale[name] = statistics.fmean(values), statistics.pstdev(values) + 1e-8

    def span(token: str, value: float, name: str) -> str:
        z = max(-2.0, min(2.0, (value - scale[name][0]) / scale[name][1])) / 2
        colour = (255 - 150 * z, 255 - 75 * z, 255) if z > 0 else (255, 255 + 135 * z, 255 + 150 * z)
        red, green, blue = map(round, colour)
        text = escape(token).replace("\n", "↵\n")
        return f'<span style="background:rgb({red},{green},{blue})" title="{name}: {value:.3f}">{text}</span>'

    blocks = []
    for answer in answers:
        lines = ""
        for name, scores in answer["scores"].items():
            spans = "".join(span(token, x, name) for token, x in zip(answer["tokens"], scores))
            lines += f"<tr><th>{escape(name)}</th><td>{spans}</td></tr>"
        kind = escape(answer["kind"])
        heading = f'<h3 class="{kind}">{escape(text_of(answer["prompt"]))} <small>{kind}</small></h3>'
        blocks.append(f"{heading}<table>{lines}</table>")
    how = """<p>Each line is the same answer, its tokens coloured by one kind of score:
<span style="background:rgb(105,180,255)">above</span> or <span style="background:rgb(255,120,105)">below</span> the
mean of that line over this page. Hover for the number. """
    write_page(path, title, f"{how}{escape(note)}</p>{''.join(blocks)}", TOKENS)


# ---- several runs ----------------------------------------------------------------------------------------------------


def compare(runs: list[Stored], out: Path) -> str:
    """compare.html; returns what the screen shows."""
    settings = [{k: v for k, v in run.about["args"].items() if k not in OF_EVERY_RUN} for run in runs]
    names = sorted(set.intersection(*map(set, settings)))
    differ = [name for name in names if any(s[name] != settings[0][name] for s in settings)]
    versions = [run.source for i, run in enumerate(runs) if run.source not in [r.source for r in runs[:i]]]
    together = {}
    for run, own in zip(runs, settings):
        key = json.dumps([own | {"seed": None}, versions.index(run.source)])
        together.setdefault(key, []).append(run)
    groups = {f"{m[0].folder}" + f" and {len(m) - 1} more" * (len(m) > 1): m for m in together.values()}
    lines = [f"{label}: {', '.join(str(run.folder) for run in members)}" for label, members in groups.items()]
    lines += [f"--{name}: {' | '.join(str(s[name]) for s in settings)}" for name in differ]
    for number, other in enumerate(versions[1:], 2):
        diff = difflib.unified_diff(versions[0], other, "code 1", f"code {number}", lineterm="", n=1)
        lines += diff
    same = [] if differ or versions[1:] else ["the same arguments and the same code"]

    figures = panels([m for run in runs for m in run.metrics])
    found = {label: [run.metrics for run in members] for label, members in groups.items()}
    shown = [name for names in figures for name in names if all(points(m[0], name) for m in found.values())]
    ends = [["metric", *groups]]
    for name in shown:
        row = [name]
        for members in found.values():
            last = [[*curve.values()][-1] for curve in (points(metrics, name) for metrics in members) if curve]
            spread = f" [{min(last):.3f}, {max(last):.3f}]" * (len(last) > 1)
            row.append(f"{[*points(members[0], name).values()][0]:.3f} -> {statistics.median(last):.3f}{spread}")
        ends.append(row)
    body = f"<pre>{escape(chr(10).join([*lines, *same]))}</pre>{table(ends[0], ends[1:])}"
    write_page(out, "Runs compared", body + image(draw([[name] for name in shown], found)))
    width = [max(len(row[i]) for row in ends) + 2 for i in range(len(ends[0]))]
    ends = ["".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in ends]
    return "\n".join([*lines, *same, "", *ends, "", str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--follow", action="store_true", help="write the page of one run again until the run ends")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page of a comparison")
    args = parser.parse_args()
    if len(args.runs) > 1:
        print(compare([read(folder) for folder in args.runs], args.out))
        return
    run = write_report(args.runs[0])
    print(run.folder / "report.html", flush=True)
    while args.follow and not run.ended:
        time.sleep(15)
        run = write_report(args.runs[0])


if __name__ == "__main__":
    main()

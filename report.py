"""What runs look like: curves and a page of one run, and several runs compared.

    python report.py RUN                    plot.png and report.html in the folder of the run
    python report.py RUN --follow           the same while it trains, again every 15 seconds
    python report.py RUN RUN [RUN ...]      compare.html: what differs, curves over each other, where they ended

Runs that differ in nothing but the seed are a group: its curve is the median over them, its band reaches from the
lowest to the highest. Without this file the scripts make no plots and pages, and train as before.
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

OF_EVERY_RUN = "out resume device micro_batch rollout_rows save_every track keep push_to_hub".split()  # not in results
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 } img { max-width: 100% } small { color: #888 }
td, th { text-align: left; vertical-align: top; padding: .25em .7em; border-bottom: 1px solid #ddd;
         white-space: pre-wrap; font-size: 13px } code, pre { background: #f4f4f4; padding: .1em .3em }
h3 { font: 600 15px monospace; margin: 1.4em 0 .2em; white-space: pre-wrap }
.tokens * { border: 0; font: 16px/1.5 monospace } .tokens th { text-align: right; color: #666 }
.tokens span { padding: .12em .08em; border: 1px solid #eee }
"""


@dataclass
class Stored:
    """What a run folder holds."""

    folder: Path
    about: dict  # args.json: arguments, command, versions
    metrics: list[dict]  # one line per step
    samples: list[dict]  # rows {step, kind, prompt, completion, reward}
    source: list[str]  # lines of the script that made it
    ended: bool


def read(folder: Path) -> Stored:
    """The run in a folder. A last line that is still being written is left out."""

    def lines(name: str) -> list[dict]:
        text = (folder / name).read_text() if (folder / name).exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    for name in ("args.json", "metrics.jsonl", "source.py"):
        if not (folder / name).exists():
            sys.exit(f"report.py: error: {folder / name} is not there; expected the folder of a run")
    about, source = json.loads((folder / "args.json").read_text()), (folder / "source.py").read_text()
    metrics = lines("metrics.jsonl")
    ended = bool(metrics) and metrics[-1]["step"] >= about["args"].get("steps", 0)
    return Stored(folder, about, metrics, lines("samples.jsonl"), source.splitlines(), ended)


def points(metrics: list[dict], name: str) -> dict[int, float]:
    """{step: value} of a metric wherever it is known."""
    return {m["step"]: m[name] for m in metrics if m.get(name) is not None}


def panels(metrics: list[dict]) -> list[list[str]]:
    """Metrics that share a plot: those with the same prefix, unless one is far larger than another."""
    size = {}
    for name in dict.fromkeys(name for line in metrics for name in line):
        values = [abs(line[name]) for line in metrics if line.get(name) is not None]
        if values and name != "step" and not name.startswith("time/"):
            size[name] = statistics.median(values)
    prefix = {name: name.split("/")[0] for name in size}
    order = ["eval", "reward", *sorted(prefix.values(), key=lambda p: p in size)]  # names without a prefix come last
    out = []
    for name in sorted(size, key=lambda n: (order.index(prefix[n]), -size[n])):
        if out and prefix[name] == prefix[out[-1][0]] and size[name] > size[out[-1][0]] / 10:
            out[-1].append(name)
        else:
            out.append([name])
    return out


def draw(figures: list[list[str]], groups: dict[str, list[list[dict]]], title: str = "") -> bytes:
    """A PNG with one plot per list of names. groups: {label: the metrics of its runs}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # names of folders may have a $
    columns, rows = min(3, len(figures)) or 1, math.ceil(len(figures) / 3) or 1
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
                text = name if len(groups) == 1 else label  # groups are compared one metric a plot
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


def write_page(path: Path, title: str, body: str, refresh: bool = False) -> None:
    """One file without links, the old one or the new one at any moment."""
    again = '<meta http-equiv="refresh" content="15">' * refresh
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{again}<title>{escape(title)}</title>'
    part = path.with_name(path.name + ".part")
    part.write_text(f"{head}<style>{STYLE}</style><h1>{escape(title)}</h1>{body}</html>")
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
    shown = [s for s in run.samples if s["step"] in (steps[0], steps[len(steps) // 2], steps[-1])]
    reward = lambda s: f"{s['reward']:.3g}" if "reward" in s else ""  # noqa: E731
    rows = [[s["step"], s["kind"], text_of(s["prompt"]), s["completion"], reward(s)] for s in shown]
    about, steps = run.about, [f"step {m.get('step')}" for m in (first, last)]
    sections = {
        "Before and after": table(["held-out metric", *steps], ends),
        "Curves": image(png),
        "Samples": table(["step", "kind", "prompt", "completion", "reward"], rows),
        "Settings": table(["argument", "value"], [[k, v] for k, v in about["args"].items()]),
    }
    body = "".join(f"<h2>{name}</h2>{part}" for name, part in sections.items())
    made = f"world size {about['world']}, torch {about['torch']}, git {about['git']}, {about['time']}"
    body = f"<p><code>{escape(about['command'])}</code></p>{body}<p>{escape(made)}</p>"
    write_page(run.folder / "report.html", run.folder.name, body, refresh=not run.ended)
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
        colour = f"105,180,255,{z:.2f}" if z > 0 else f"255,120,105,{abs(z):.2f}"
        text = escape(token).replace("\n", "↵\n")
        return f'<span style="background:rgba({colour})" title="{name}: {value:.3f}">{text}</span>'

    body = ""
    for answer in answers:
        kind = escape(answer["kind"])
        body += f'<h3 class="{kind}">{escape(text_of(answer["prompt"]))} <small>{kind}</small></h3>'
        body += '<table class="tokens">'
        for name, scores in answer["scores"].items():
            spans = "".join(span(token, x, name) for token, x in zip(answer["tokens"], scores))
            body += f"<tr><th>{escape(name)}</th><td>{spans}</td></tr>"
        body += "</table>"
    how = """<p>Each line is the same answer, its tokens coloured by one kind of score:
<span style="background:rgb(105,180,255)">above</span> or <span style="background:rgb(255,120,105)">below</span> the
mean of that line over this page. Hover for the number. """
    write_page(path, title, f"{how}{escape(note)}</p>{body}")


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
        lines += difflib.unified_diff(versions[0], other, "code 1", f"code {number}", lineterm="", n=1)
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

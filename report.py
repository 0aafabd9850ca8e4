"""What runs look like: curves and a page of one run, and several runs compared.

    python report.py RUN                    plot.png and report.html in the folder of the run
    python report.py RUN --follow           the same while it trains, again every 15 seconds
    python report.py RUN RUN [RUN ...]      compare.html: what differs, curves over each other, where they ended
    python report.py RUN RUN --chain        chain.html: the parts of one work, such as teacher and student, in order

Runs that differ in nothing but the seed are a group: a median, and a band from the lowest to the highest of them.
Without this file the scripts make no plots and pages, and train as before.
"""

import argparse
import base64
import difflib
import fcntl
import io
import json
import statistics
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

OF_EVERY_RUN = "out resume device micro_batch rollout_rows save_every track keep push_to_hub".split()  # not in results
HEADS = dict(answer="first answer", chances="chances of Major, Minor, No", completion="revision", dropped="dropped as")
STYLE = """
:root { color-scheme: light dark } h1, p, .tokens td { overflow-wrap: anywhere } small { color: #888 }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table, pre { display: block; overflow-x: auto } table { border-collapse: collapse; margin: 1em 0 }
td, th { text-align: left; vertical-align: top; padding: .25em .6em; border-bottom: 1px solid #8884; font-size: 13px;
         white-space: pre-wrap } .right { background: #59d3 } .wrong { background: #e823 } img { max-width: 100% }
h3 { font: 600 15px monospace; margin: 1.4em 0 .2em; white-space: pre-wrap } code, pre { background: #8882 }
.tokens { margin: 0 } .tokens * { border: 0; font: 16px/1.5 monospace } .tokens th { font-size: 13px }
.tokens td, p span { background: #fff; color: #222 } .tokens span { padding: .12em .08em; border: 1px solid #eee }
"""
LOOK = {  # of plots; names of folders may have a $
    "text.parse_math": False, "font.size": 8, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True,
    "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "none",
}  # fmt: skip
COLORS, DASHES = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777"], ["-", "--", "-.", ":"]


class Stored(NamedTuple):
    """What a run folder holds."""

    folder: Path
    about: dict  # args.json: arguments, command, versions
    metrics: list[dict]  # one line per step
    samples: list[dict]  # rows {step, kind, prompt, completion}, with a reward where something grades
    source: list[str]  # lines of the script that made it
    state: str  # ended, training or stopped, and at which step
    title: str  # folder and script, so that tabs of a browser differ


def read(folder: Path, own: bool = False) -> Stored:
    """The run in a folder; a last line that is still being written is left out. own: read by the run itself."""
    rows = lambda name: list(map(json.loads, (folder / name).read_text().split("\n")[:-1]))  # noqa: E731
    for name in ("args.json", "metrics.jsonl", "samples.jsonl", "source.py"):
        if not (folder / name).exists():
            raise SystemExit(f"report.py: error: {folder / name} is not there; expected the folder of a run")
    about, source = json.loads((folder / "args.json").read_text()), (folder / "source.py").read_text()
    metrics, steps = rows("metrics.jsonl"), about["args"].get("steps", 0)
    step = metrics[-1]["step"] if metrics else 0
    state = "ended" if step >= steps else "training" if not own and is_locked(folder) else "stopped"
    state, script = f"{state}: step {step} of {steps}", Path(about["command"].split()[0]).name
    title = f"{'/'.join(folder.resolve().parts[-2:])} · {script}"
    return Stored(folder, about, metrics, rows("samples.jsonl"), source.splitlines(), state, title)


def is_locked(folder: Path) -> bool:
    """Whether a process trains in a folder. Not for that process itself, whose lock ends when the file is closed."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def points(metrics: list[dict], name: str) -> dict[int, float]:
    """{step: value} of a metric wherever it is known."""
    return {m["step"]: m[name] for m in metrics if m.get(name) is not None}


def panels(metrics: list[dict]) -> list[list[str]]:
    """Metrics that share a plot: at most five with the same prefix, none far larger than another."""
    size = {}
    for name in dict.fromkeys(name for line in metrics for name in line):
        values = [abs(line[name]) for line in metrics if line.get(name) is not None]
        if values and name != "step" and not name.startswith("time/"):
            size[name] = statistics.median(values)
    prefix = {name: name.split("/")[0] for name in size}
    order = ["eval", "reward", *sorted(prefix.values(), key=lambda p: p in size)]  # names without a prefix come last
    out = []
    for name in sorted(size, key=lambda n: (order.index(prefix[n]), -size[n])):
        if out and len(out[-1]) < 5 and prefix[name] == prefix[out[-1][0]] and size[name] >= size[out[-1][0]] / 10:
            out[-1].append(name)
        else:
            out.append([name])
    return out


def draw(figures: list[list[str]], groups: dict[str, list[list[dict]]], file: Path | None = None) -> str:
    """An image for a page with one plot per list of names, also as a file. groups: {label: the metrics of its runs}."""
    import matplotlib.figure
    columns, rows, out = min(3, len(figures)) or 1, -(-len(figures) // 3) or 1, io.BytesIO()
    with matplotlib.rc_context(LOOK):
        figure = matplotlib.figure.Figure((3.6 * columns, 2.6 * rows), layout="constrained")
        for place, names in enumerate(figures, 1):
            axis = figure.add_subplot(rows, columns, place, xlabel="step", sharex=next(iter(figure.axes), None))
            axis.locator_params("x", integer=True, min_n_ticks=1)
            axis.set_prop_cycle(color=COLORS * len(DASHES), linestyle=DASHES * len(COLORS))
            axis.set_title(names[0] if len(names) == 1 else names[0].split("/")[0])
            for name in names:
                for label, runs in groups.items():
                    curves = [points(metrics, name) for metrics in runs]
                    at = {s: [curve[s] for curve in curves if s in curve] for s in sorted(set().union(*curves))}
                    text = name.split("/")[-1] if len(groups) == 1 else label  # groups: one metric per plot
                    middle, low, high = ([*map(of, at.values())] for of in (statistics.median, min, max))
                    (line,) = axis.plot([*at], middle, label=text, marker="o" if len(at) < 12 else None, ms=3.5)
                    axis.fill_between([*at], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.legend(fontsize=7, labelspacing=0.2).set_visible(len(axis.lines) > 1)
        figure.suptitle(next(iter(groups)) if file else "", fontsize=11, x=0.01, ha="left")
        figure.savefig(out, dpi=150)
    if file:
        file.write_bytes(out.getvalue())
    return f'<img alt="learning curves" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def write_page(path: Path, title: str, body: str, refresh: bool = False) -> None:
    """One file without links, the old one or the new one at any moment."""
    top = '<!doctype html><html lang="en"><meta charset="utf-8">' + '<meta http-equiv="refresh" content="15">' * refresh
    part = path.with_name(path.name + ".part")
    part.write_text(f"{top}<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{body}</html>")
    part.replace(path)


def table(header: list, rows: list[list]) -> str:
    marks = {"✓": ' class="right"', "✗": ' class="wrong"'}
    cell = lambda text, kind="td": f"<{kind}{marks.get(text[:1], '')}>{escape(text)}</{kind}>"  # noqa: E731
    lines = ["".join(cell(str(text)) for text in row) for row in rows]
    head = "".join(cell(text, "th") for text in header)
    return f"<table><tr>{'</tr><tr>'.join([head, *lines])}</tr></table>" if rows else ""


def text_of(value) -> str:
    if isinstance(value, list):
        return "".join(f"{x['role']}: {x['content']}\n" if isinstance(x, dict) else f"{x:.2f} " for x in value).strip()
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def samples_table(rows: list[dict], later: list[dict] = ()) -> str:
    """Rows of samples.jsonl, or later ones beside them. Grades are before their answers, as marks if all are 0 or 1."""
    rows, first = [*rows, *later], len(rows)
    shown = [{name: text_of(value) for name, value in row.items()} for row in rows]
    for answer, grade in (("answer", "before"), ("completion", "reward"), ("completion", "right")):
        marks = {0: "✗ ", 1: "✓ "} if {row.get(grade) for row in rows} <= {0, 1, None} else {}
        for row, new in zip(rows, shown):
            if new.pop(grade, ""):
                new[answer] = marks.get(row[grade], f"[{row[grade]:.3g}] ") + new[answer]
    if later:
        ab = [(a, b) for a, b in zip(shown, shown[first:]) if a["prompt"] == b["prompt"]]
        shown = [p[1] | {"step": "", "completion": ""} | {f"step {x['step']}": x["completion"] for x in p} for p in ab]
    names = [name for name in dict.fromkeys(n for row in shown for n in row) if any(row.get(name) for row in shown)]
    heads = HEADS if "answer" in names else {}  # a revision
    return table([heads.get(name, name) for name in names], [[r.get(n, "") for n in names] for r in shown])


def held_out(run: Stored) -> list[list[str]]:
    """[[metric, its first value, its last value], ...]"""
    curves = {name: points(run.metrics, name) for line in run.metrics for name in line if name.startswith("eval/")}
    return [[name, *(f"{c[at]:.4f}" for at in sorted({min(c), max(c)}))] for name, c in curves.items() if c]


def body_of(run: Stored) -> str:
    """Metrics and answers before and after, curves, samples and settings. The curves are plot.png, too."""
    held, other = ([s for s in run.samples if s["kind"].startswith("eval") == x] for x in (True, False))
    first, last = ([s for s in held if s["step"] == held[i]["step"]] for i in (0, -1))
    at, tokens = list(dict.fromkeys(s["step"] for s in other)), run.folder / "credit.html"
    sections = {
        "Before and after": table(["held out", "first", "last"], held_out(run)) + samples_table(first[:60], last[:60]),
        "Curves": run.metrics[1:] and draw(panels(run.metrics), {run.title: [run.metrics]}, run.folder / "plot.png"),
        "Token by token": tokens.read_text().partition("</h1>")[2].removesuffix("</html>") if tokens.exists() else "",
        "Samples": samples_table([s for s in other if s["step"] in (at[0], at[len(at) // 2], at[-1])]),
        "Settings": table(["argument", "value"], [*run.about["args"].items()]),
    }
    made = "world size {world}, torch {torch}, git {git}, {time}".format(**run.about)
    body = "".join(f"<h2>{name}</h2>{part}" for name, part in sections.items() if part)
    return f"<p><code>python {escape(run.about['command'])}</code></p><p>{run.state}</p>{body}<p>{escape(made)}</p>"


def write_report(folder: Path, own: bool = True) -> Stored:
    """plot.png and report.html. own: the run itself writes them."""
    run = read(Path(folder), own)
    write_page(run.folder / "report.html", run.title, body_of(run), refresh=run.state.startswith("training"))
    return run


def chain(runs: list[Stored], out: Path) -> str:
    """chain.html: held-out metrics of all parts, and their reports one below the other."""
    body = table(["part", "held out", "first", "last"], [[run.title, *row] for run in runs for row in held_out(run)])
    body += "".join(f"<h1>{i}. {escape(run.title)}</h1>{body_of(run)}" for i, run in enumerate(runs, 1))
    write_page(out, " → ".join(run.title for run in runs), body)
    return str(out)


def token_page(path: Path, title: str, answers: list[dict], note: str = "") -> None:
    """Answers, one line for each of their scores, which are standardised over the page and colour the tokens.
    answers: rows {prompt, kind, tokens: [str], scores: {name: [float]}}."""
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
        kind, lines = escape(answer["kind"]), ""
        for name, scores in answer["scores"].items():
            spans = "".join(span(token, x, name) for token, x in zip(answer["tokens"], scores))
            lines += f"<tr><th>{escape(name)}</th><td>{spans}</td></tr>"
        body += f'<h3 class="{kind}">{escape(text_of(answer["prompt"]))} <small>{kind}</small></h3>'
        body += f'<table class="tokens">{lines}</table>'
    how = """<p>Each line is the answer, coloured by a score: <span style="background:rgb(105,180,255)">above</span> or
<span style="background:rgb(255,120,105)">below</span> its mean over this page. Hover for the number. """
    write_page(path, title, f"{how}{escape(note)}</p>{body}")


def compare(runs: list[Stored], out: Path) -> str:
    """compare.html; returns what the screen shows."""
    settings = [{f"--{k}": v for k, v in run.about["args"].items() if k not in OF_EVERY_RUN} for run in runs]
    settings = [own | {k: v[:8] for k, v in r.about.get("watched", {}).items()} for own, r in zip(settings, runs)]
    differ = [n for n in sorted(set.intersection(*map(set, settings))) if any(s[n] != settings[0][n] for s in settings)]
    versions = [run.source for i, run in enumerate(runs) if run.source not in [r.source for r in runs[:i]]]
    together, code = {}, []
    for run, own in zip(runs, settings):
        same = [own[name] for name in differ if name != "--seed"]
        together.setdefault(json.dumps([same, versions.index(run.source)]), []).append(run)
    groups = {f"{m[0].folder}" + f" and {len(m) - 1} more" * (len(m) > 1): m for m in together.values()}
    lines = [f"{label}: {', '.join(str(run.folder) for run in members)}" for label, members in groups.items()]
    lines += [f"{name}: {' | '.join(str(s[name]) for s in settings)}" for name in differ]
    lines += [] if differ or versions[1:] else ["the same arguments, files and code"]
    for number, other in enumerate(versions[1:], 2):
        code += difflib.unified_diff(versions[0], other, "code 1", f"code {number}", lineterm="", n=1)
    figures = panels([m for run in runs for m in run.metrics])
    found = {label: [run.metrics for run in members] for label, members in groups.items()}
    shown = [name for names in figures for name in names if all(points(m[0], name) for m in found.values())]
    ends = [["metric", *groups]]
    for name in shown:
        ends.append([name])
        for members in found.values():
            last = [[*curve.values()][-1] for curve in (points(metrics, name) for metrics in members) if curve]
            spread = f" [{min(last):#.3g}, {max(last):#.3g}]" * (len(last) > 1)
            ends[-1].append(f"{[*points(members[0], name).values()][0]:#.3g} -> {statistics.median(last):#.3g}{spread}")
    body = f"<pre>{escape(chr(10).join(lines))}</pre>{table(ends[0], ends[1:])}"
    body += draw([[name] for name in shown], found) + f"<pre>{escape(chr(10).join(code))}</pre>"
    write_page(out, f"Compared: {', '.join(groups)}", body)
    width = [max(len(row[i]) for row in ends) + 2 for i in range(len(ends[0]))]
    ends = ["".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in ends]
    return "\n".join([*lines, *code, "", *ends, "", str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--follow", action="store_true", help="write the page of one run again until the run ends")
    parser.add_argument("--chain", action="store_true", help="reports of several runs on one page, not a comparison")
    parser.add_argument("--out", type=Path, help="the page of several runs, if not compare.html or chain.html")
    args = parser.parse_args()
    if args.chain or len(args.runs) > 1:
        several = chain if args.chain else compare
        return print(several([read(folder) for folder in args.runs], args.out or Path(f"{several.__name__}.html")))
    run = write_report(args.runs[0], own=False)
    print(run.folder / "report.html", flush=True)
    while args.follow and not run.state.startswith("ended"):
        time.sleep(15)
        run = write_report(args.runs[0], own=False)


if __name__ == "__main__":
    main()

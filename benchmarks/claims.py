"""The ledger of claims: what papers and our own docs say, and what our stored runs say to it.

    python benchmarks/claims.py                         # docs/claims.md, the figures, every marked number and table
    python benchmarks/claims.py --run lco-survival      # first the runs that this claim lacks (several ids, or all)
    python benchmarks/claims.py --time                  # what all runs of all claims take

benchmarks/claims.toml names for each claim a study of benchmarks/studies.json, the settings that are compared, a metric
and a direction; the verdict is computed here from benchmarks/results. Runs that are stored are not run again, so an
interrupted --run goes on where it was.

README and docs hold results in three ways, and a test compares each with what is stored:
    <!-- results: lco -->                   the table of a study (`diagnose 2`: its second one), up to <!-- end -->
    <!-- results: seft 2 without seeds -->  the same less columns that are alike in every row
    .96<!-- lco; PPO, clip 0.2; eval/greedy; median -->      a number, rounded as it is written: median, min, max, start
    benchmarks/quotes.toml                  words of a page, with {lco; PPO, clip 0.2; eval/greedy; median} for a number
"""

import argparse
import fnmatch
import json
import re
import statistics
import sys
import textwrap
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import figures  # noqa: E402
import study  # noqa: E402

ROOT = HERE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESAMPLES = 4000
VERDICTS = ("reproduced at this scale", "not", "not measured yet", "held by a test", "needs GPU", "needs a judge")
CREDIT = ("rank", "in answer", "in state")


@dataclass
class Claim:
    id: str
    source: str  # whose claim
    text: str
    study: str = ""
    ours: list[str] = field(default_factory=list)  # settings, with * as in file names
    against: dict[str, list[str]] = field(default_factory=dict)
    metric: str = "eval/sampled"
    better: str = "higher"
    statistic: str = "mean"  # over settings: mean, best (the best of them), spread (mean of their standard deviations)
    seeds: int = 5  # fewer of any setting: not measured yet
    verdict: str = ""  # given where nothing can be measured here, with a reason
    reason: str = ""
    test: str = ""  # the test that holds it
    switch: str = ""  # the switch of an authors' release whose effect it is


@dataclass
class Line:
    """A claim against one baseline."""

    claim: Claim
    name: str
    verdict: str
    ours: float = float("nan")
    theirs: float = float("nan")
    low: float = float("nan")  # interval of ours - theirs
    high: float = float("nan")
    note: str = ""
    seeds: int = 0  # the least of any setting


def load_claims() -> list[Claim]:
    return [Claim(**entry) for entry in tomllib.loads((HERE / "claims.toml").read_text())["claim"]]


# ---- stored runs -----------------------------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict]:
    """Stored runs of a study; those of `credit` are one row for each reward model and seed."""
    if name != "credit":
        return study.stored(name)
    file = study.RESULTS / "credit.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    return [
        {"setting": title, "seed": seed, "ok": True, "last": dict(zip(CREDIT, numbers))}
        for title, each in record.items()
        for seed, numbers in enumerate(each["seeds"])
    ]


def value(row: dict, metric: str) -> float | None:
    """A metric of a run; None where it has none.

    survives: 1 when sampled accuracy at the end is not below that of the start; spike: the largest gradient norm over
    the median one (none where most gradients are 0: a dead policy has nothing to learn from); steps to 80 %: the first
    evaluated step with that greedy accuracy, or one evaluation after the last; revise/...: of the first round. A run
    that stopped at numbers that are not finite has accuracy 0.
    """
    if not row["ok"]:
        broken = "not finite" in row["error"]
        return 0.0 if broken and (metric == "survives" or metric.startswith("eval/")) else None
    if metric == "seconds":
        return row["seconds"]
    if metric.startswith("revise/"):
        return row["rounds"][0].get(metric) if row.get("rounds") else None
    if metric == "survives":
        return float(row["last"]["eval/sampled"] >= row["eval"][0]["eval/sampled"])
    if metric == "spike":
        return row["grad_norm_max"] / row["grad_norm_median"] if row.get("grad_norm_median") else None
    if metric == "steps to 80 %":
        steps = [e["step"] for e in row["eval"]]
        return next((e["step"] for e in row["eval"] if e["eval/greedy"] >= 0.8), 2 * steps[-1] - steps[-2])
    return row["diagnose"].get(metric) if metric.startswith("diagnose/") else row["last"].get(metric)


def settings_of(claim: Claim, patterns: list[str]) -> list[str]:
    """The settings of the claim's study that match; a pattern without any is a mistake in claims.toml."""
    if claim.study == "credit":
        names = list(dict.fromkeys(row["setting"] for row in rows_of("credit")))
    else:
        known = study.STUDIES[claim.study]
        names = [*known["settings"], *known.get("prepare", {})]
    found = []
    for pattern in patterns:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise SystemExit(f"claims.toml: {claim.id}: {pattern!r} is no setting of the study {claim.study}")
        found += matching
    return found


def samples(claim: Claim, patterns: list[str]) -> tuple[list[np.ndarray], int]:
    """Values over seeds for each setting, and the smallest number of seeds among them."""
    rows, groups = rows_of(claim.study), []
    for name in settings_of(claim, patterns):
        values = [value(row, claim.metric) for row in rows if row["setting"] == name]
        groups.append(np.array([x for x in values if x is not None], float))
    return groups, min(map(len, groups))


# ---- verdicts --------------------------------------------------------------------------------------------------------


def statistic(groups: list[np.ndarray], kind: str, better: str) -> np.ndarray:
    """One number from settings [..., seeds] each."""
    if kind == "spread":
        return np.mean([g.std(-1, ddof=1) for g in groups], 0)
    means = np.stack([g.mean(-1) for g in groups])
    return means.mean(0) if kind == "mean" else means.max(0) if better == "higher" else means.min(0)


def bootstrap(ours, theirs, kind: str, better: str) -> tuple[float, float]:
    """The interval of 95 % of the difference, from seeds drawn again, each setting on its own."""
    rng = np.random.default_rng(0)

    def drawn(groups):
        return statistic([g[rng.integers(len(g), size=(RESAMPLES, len(g)))] for g in groups], kind, better)

    low, high = np.quantile(drawn(ours) - drawn(theirs), (0.025, 0.975))
    return float(low), float(high)


def judge(claim: Claim) -> list[Line]:
    """One line for each baseline. The rule is on the page: the interval of the difference lies on the claimed side."""
    if claim.verdict or claim.test:
        return [Line(claim, "", claim.verdict or "held by a test", note=claim.reason or f"`{claim.test}`")]
    lines = []
    for name, patterns in claim.against.items():
        if claim.study != "credit" and claim.study not in study.STUDIES:
            lines.append(Line(claim, name, "not measured yet", note=f"study `{claim.study}`"))
            continue
        (ours, n), (theirs, m) = samples(claim, claim.ours), samples(claim, patterns)
        if min(n, m) < claim.seeds:
            note = f"{min(n, m)} of {claim.seeds} seeds"
            lines.append(Line(claim, name, "not measured yet", note=note, seeds=min(n, m)))
            continue
        a, b = (float(statistic(g, claim.statistic, claim.better)) for g in (ours, theirs))
        low, high = bootstrap(ours, theirs, claim.statistic, claim.better)
        good, bad = (low > 0, high < 0) if claim.better == "higher" else (high < 0, low > 0)
        note = "" if good else "the opposite holds" if bad else "within the seeds"
        verdict = "reproduced at this scale" if good else "not"
        lines.append(Line(claim, name, verdict, a, b, low, high, note, min(n, m)))
    return lines


# ---- page ------------------------------------------------------------------------------------------------------------


MEASURED = {  # metrics in words
    "eval/sampled": "sampled accuracy",
    "eval/greedy": "greedy accuracy",
    "eval/pair_accuracy": "accuracy on held-out pairs",
    "survives": "share of runs that survive",
    "spike": "largest gradient norm over the median",
    "steps to 80 %": "steps to 80 % greedy accuracy",
    "diagnose/not_convex": "share of states",
    "diagnose/away_from_target": "share of states",
    "in state": "share of states",
    "revise/after": "share of right answers after the first round",
    "revise/auc": "AUC of the label No",
}
UNBROKEN = {ord(" "): "\u00a0", ord("-"): "\u2011"}  # lines of neighbouring cells stay side by side
COLUMNS = ("reproduced", "undecided", "the opposite holds", "not measured yet", "held by a test", "not possible here")


def number(x: float, sign: str = "") -> str:
    """As pages write it: .707, −.004, 26.4."""
    text = f"{x:{sign}.3f}" if abs(x) < 10 else f"{x:{sign}.1f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text).replace("-", "−")


def outcome(line: Line) -> str:
    """The column of the summary to which a comparison belongs."""
    if line.low == line.low:
        return MARKS[line.note][3]
    return "not possible here" if line.verdict.startswith("needs") else line.verdict


def measured(claim: Claim) -> str:
    what = MEASURED.get(claim.metric, claim.metric)
    what = {"mean": what, "best": f"{what} of the best setting", "spread": f"standard deviation of the {what}"}
    return f"{what[claim.statistic]}, {claim.seeds} seeds"


def heading(source: str) -> str:
    return f"Our own page [{source}]({source.removeprefix('docs/')})" if source.startswith("docs/") else source


def summary(lines: list[Line]) -> str:
    """Markdown: how many comparisons have which outcome, by source."""
    out = [f"| claims of | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for source in dict.fromkeys(line.claim.source for line in lines):
        mine = [outcome(line) for line in lines if line.claim.source == source]
        out.append(f"| {heading(source)} | {' | '.join(str(mine.count(c) or '–') for c in COLUMNS)} |")
    return "\n".join(out) + "\n"


def in_short(lines: list[Line]) -> str:
    good, unclear, bad = (sum(outcome(line) == column for line in lines) for column in COLUMNS[:3])
    return (
        f"{good + unclear + bad} comparisons were measured: {good} reproduce what is claimed, in {bad} the opposite "
        f"holds, and {unclear} are undecided, because seeds differ too much to tell."
    )


def comparisons(lines: list[Line]) -> str:
    """Markdown: a row for each claim, in it a line for each setting that it is compared with."""
    out = ["| claim | ours | compared with | difference | verdict |", "|---" * 5 + "|"]
    for claim in {line.claim.id: line.claim for line in lines}.values():
        mine = [line for line in lines if line.claim is claim]
        known = drawn(mine)
        rows = []
        for line in mine:
            if line in known:
                ends = f"[{number(line.low)}, {number(line.high)}]"
                about = f"{line.name} {number(line.theirs)}", f"{number(line.ours - line.theirs, '+')} {ends}"
            else:
                about = line.name, "–"
            rows.append([*about, outcome(line) if line in known else line.note])
        ours = number(known[0].ours) if known else "–"
        columns = ["<br>".join(cells).translate(UNBROKEN) for cells in zip(*rows)]
        out.append(f"| {claim.text}<br>*{measured(claim)}* | {ours} | {' | '.join(columns)} |")
    return "\n".join(out) + "\n"


def details(claims: list[Claim]) -> str:
    """Markdown, folded: the studies and settings behind a table."""
    out = ["<details><summary>Studies and settings, in the same order</summary>", ""]
    for claim in claims:
        ours, theirs = (", ".join(f"`{p}`" for p in ps) for ps in (claim.ours, sum(claim.against.values(), [])))
        switch = f" Switch: `{claim.switch}`." if claim.switch else ""
        out.append(f"- `{claim.id}`, study `{claim.study}`: {ours} against {theirs}.{switch}")
    return "\n".join([*out, "", "</details>"]) + "\n"


def page(lines: list[Line]) -> str:
    """docs/claims.md, whole."""
    text = ["# Claims", "", PREFACE.strip().format(in_short(lines)), "", "## Summary", "", summary(lines)]
    for source in dict.fromkeys(line.claim.source for line in lines):
        mine = [line for line in lines if line.claim.source == source]
        compared = [line for line in mine if line.name]
        text += [f"## {heading(source)}", ""]
        if drawn(mine):
            text += [f"![each claim, its differences and their intervals](images/{picture(source)}.svg)", ""]
        if compared:
            text += [comparisons(compared), details(list({line.claim.id: line.claim for line in compared}.values()))]
        given = [f"- {line.claim.text} **{line.verdict}**: {line.note}." for line in mine if not line.name]
        text += [*given, ""] if given else []
    text += ["## Time of a full re-run", "", "Two runs at a time, a thread each, on two cores:", ""]
    text.append(times([claim for claim in {line.claim.id: line.claim for line in lines}.values() if claim.study], 2))
    return "\n".join(text).rstrip() + "\n"


PREFACE = """
What the papers' abstracts and our own pages claim, and what the runs stored in this repository show. {}

Everything was measured on the built-in tasks with models of at most 0.7 million parameters, unless a heading says
otherwise: a verdict says nothing about another scale.

**How a verdict is reached.** Each setting was run with several seeds. *Ours* is the mean over them (and over the
settings, where a claim has several) of what the line in italics names; beside it stands the same number for what it is
compared with. The difference, ours minus theirs, has a 95 % interval by the bootstrap: 4,000 times, the seeds of each
setting are drawn again with replacement.

- **reproduced**: the whole interval lies on the claimed side of 0, which is the right side in the pictures.
- **undecided**: the interval contains 0.
- **the opposite holds**: the whole interval lies on the other side.
- **n of m seeds**: not measured yet.

An interval from five seeds is somewhat too narrow and one from two says little. About one in twenty intervals misses
the truth, so with this many claims some verdicts are wrong by chance.

A run *survives* if its sampled accuracy is not lower at the end than at the start. Where 80 % is never reached, the
number of steps is that of one evaluation after the last. GRPO is `ppo_baseline.py --advantage group`: the mean reward
of the group is subtracted, and the result is not divided by the standard deviation.

`python benchmarks/claims.py` writes this page and its pictures from `benchmarks/claims.toml` and `benchmarks/results`,
and a test compares them. `python benchmarks/claims.py --run ID` first runs what a claim lacks and continues where it
was interrupted; ids stand under each table. Those of the study `credit` are run by `python benchmarks/credit.py`.
"""


# ---- numbers in README and docs --------------------------------------------------------------------------------------

BLOCK = re.compile(r"(<!-- results: (?P<what>[^>]+?) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)
INLINE = re.compile(r"(?P<number>[0-9]*\.?[0-9]+)(?P<mark><!-- (?P<parts>[^;>]+(;[^;>]+){3}?) -->)")


def before_after(name: str) -> str:
    """Markdown: accuracy before and after, and the time, of each setting."""
    rows = [row for row in study.stored(name) if row["ok"]]
    seeds = len({row["seed"] for row in rows})
    header = [f"command, {seeds} seeds", "greedy before → after", "sampled before → after", "time"]
    out = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]

    def short(x: float) -> str:
        return f"{x:.3f}".removeprefix("0")

    for setting in study.STUDIES[name]["settings"]:
        mine, cells = [row for row in rows if row["setting"] == setting], [f"`{setting}`"]
        for metric in ("eval/greedy", "eval/sampled"):
            start = statistics.median(row["eval"][0][metric] for row in mine)
            after = [row["last"][metric] for row in mine]
            spread = f"{short(statistics.median(after))} [{short(min(after))}, {short(max(after))}]"
            cells.append(f"{short(start)} → {spread}")
        seconds = statistics.median(row["seconds"] for row in mine)
        out.append(f"| {' | '.join(cells)} | {seconds:.0f} s |")
    return "\n".join(out) + "\n"


def without(table: str, columns: list[str]) -> str:
    """A Markdown table less columns whose cells are all alike, so that they can be said once in the text.

    `explanations` is what follows a colon in the names of the settings.
    """
    header, _, *lines = table.strip().splitlines()
    rows = [line[2:-2].split(" | ") for line in (header, *lines)]
    for column in columns:
        if column == "explanations":
            rows = [[row[0].partition(":")[0], *row[1:]] for row in rows]
            continue
        i = rows[0].index(column)
        if len({row[i] for row in rows[1:]}) > 1:
            raise SystemExit(f"a page leaves the column {column!r} out, but its cells differ")
        rows = [row[:i] + row[i + 1 :] for row in rows]
    header, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *lines])


def block(what: str) -> str:
    """The text that belongs between markers."""
    what, _, columns = what.partition(" without ")
    if columns:
        return without(block(what), columns.split(", "))
    name, _, which = what.partition(" ")
    if what == "claims":
        return summary([line for claim in load_claims() for line in judge(claim)])
    if name == "credit":
        return (study.RESULTS / "credit.md").read_text()
    if which == "before and after":
        return before_after(name)
    parts = study.tables(name)
    return parts[int(which) - 1] if which else "\n".join(parts)


def stored_number(parts: str) -> float:
    """`study; setting; metric; median, min, max or start` from the stored rows."""
    name, setting, metric, kind = (part.strip() for part in parts.split(";"))
    rows = [row for row in rows_of(name) if row["setting"] == setting and row["ok"]]
    if not rows:
        raise SystemExit(f"<!-- {parts} -->: no stored run of {setting!r} in the study {name}")
    values = [row["eval"][0][metric] if kind == "start" else value(row, metric) for row in rows]
    return {"median": statistics.median, "start": statistics.median, "min": min, "max": max}[kind](values)


def rounded(x: float, like: str) -> str:
    """x with as many decimals as `like`, with a leading zero if that has one."""
    decimals = len(like.partition(".")[2])
    text = f"{x:.{decimals}f}"
    return text.removeprefix("0") if like.startswith(".") else text


def quotes(page: str) -> list[str]:
    """What benchmarks/quotes.toml has for a page, by its path from the root."""
    return tomllib.loads((HERE / "quotes.toml").read_text()).get(page, [])


def pattern(quote: str) -> re.Pattern:
    """The words of a quote, however the page breaks its lines, and a group for each number."""
    words = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in re.split(r"\{[^}]*\}", quote)]
    return re.compile("([0-9]*[.]?[0-9]+)".join(words))


def requote(text: str, quote: str) -> str:
    """A page with the numbers of one quote as they are stored."""
    found = list(pattern(quote).finditer(text))
    if len(found) != 1:
        raise SystemExit(f"benchmarks/quotes.toml: found {len(found)} times instead of once: {quote}")
    for i, parts in reversed(list(enumerate(re.findall(r"\{([^}]*)\}", quote), 1))):
        start, end = found[0].span(i)
        text = text[:start] + rounded(stored_number(parts), found[0][i]) + text[end:]
    return text


def refresh(text: str, page: str = "") -> str:
    """A page with every quoted or marked number and every marked table as it is stored."""
    for quote in quotes(page):
        text = requote(text, quote)
    text = BLOCK.sub(lambda m: f"{m[1]}\n{block(m['what']).strip()}\n\n{m['end']}", text)
    return INLINE.sub(lambda m: rounded(stored_number(m["parts"]), m["number"]) + m["mark"], text)


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture(source: str) -> str:
    """The name of the picture of one group of claims."""
    words = source.lower().partition("(")[0].removesuffix(".md")
    return "claims-" + re.sub("[^a-z]+", "-", words).strip("-")


def drawn(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.low == line.low]


MARKS = {  # verdict and note: (symbol, filled, color, words)
    "": ("o", True, figures.BLUE, "reproduced"),
    "within the seeds": ("o", False, figures.GREY, "undecided"),
    "the opposite holds": ("X", True, figures.ORANGE, "the opposite holds"),
}
UNITS = {"spike": "medians", "steps to 80 %": "steps"}  # of metrics that are no shares
LEFT, WRAP = -1.93, 50  # where claims begin, in widths of the axis; characters of a line


def draw(lines: list[Line], path: Path) -> None:
    """A table: each claim in words, what it is compared with, the difference in the claimed direction, the verdict.

    Shares and accuracies have the scale of the axis; another metric is drawn in units of its farthest end, and written.
    """
    lines = drawn(lines)
    far = max([0.1, *(abs(x) for line in lines if line.claim.metric not in UNITS for x in (line.low, line.high))])
    height, places, rules = 0.0, [], []  # in lines of text: of the table so far, of each comparison, between claims
    for claim in {line.claim.id: line.claim for line in lines}.values():
        mine, words = [line for line in lines if line.claim is claim], textwrap.wrap(claim.text, WRAP)
        places += [(line, height + i, words if i == 0 else []) for i, line in enumerate(mine)]
        height += max(len(mine), len(words)) + 0.7
        rules.append(height - 0.85)
    inches = 0.19 * (height + 1.2)
    figure = figures.plt.figure(figsize=(9.2, inches + 0.6), layout="none")
    axis = figure.add_axes([0.545, 0.6 / (inches + 0.6), 0.28, inches / (inches + 0.6)])
    across = dict(transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    for x, text, side in ((LEFT, "claim", "left"), (-0.03, "compared with", "right"), (1.04, "verdict", "left")):
        axis.text(x, -1.3, text, ha=side, weight="bold", **across)
    ends = [0.1]
    for line, y, words in places:
        sign, unit = 1 if line.claim.better == "higher" else -1, UNITS.get(line.claim.metric)
        scale = sign * (far / max(abs(line.low), abs(line.high), 1e-9) if unit else 1)
        low, middle, high = sorted(scale * x for x in (line.low, line.ours - line.theirs, line.high))
        symbol, filled, color, verdict = MARKS[line.note]
        for i, part in enumerate(words):
            axis.text(LEFT, y + i, part, **across)
        axis.text(-0.03, y, line.name, ha="right", **across)
        axis.plot([low, high], [y, y], color=color, solid_capstyle="butt", linewidth=2.4 if filled else 1.4)
        axis.plot([middle], [y], symbol, color=color, markerfacecolor=color if filled else "white", markersize=5.5)
        size = f", {line.ours - line.theirs:+.1f} {unit}" if unit else ""
        axis.text(1.04, y, verdict + size, color=color, **across)
        ends.append(-low)
    for y in (-0.75, *rules[:-1]):
        axis.plot([LEFT, 1.6], [y, y], transform=across["transform"], color="#cccccc", linewidth=0.6, clip_on=False)
    axis.axvline(0, color=figures.BLACK, linewidth=0.9)
    axis.set(xlim=(-1.08 * max(ends), 1.05 * far), ylim=(height - 0.4, -1.8), yticks=[])
    axis.locator_params(axis="x", nbins=6)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("difference in the claimed direction, with its interval of 95 %", fontsize=9)
    figures.save(figure, path.stem, path.parent)


# ---- commands --------------------------------------------------------------------------------------------------------


def wanted(claims: list[Claim]) -> dict[tuple[str, str], int]:
    """(study, setting) -> seeds, of all runs that these claims compare."""
    runs = {}
    for claim in claims:
        if claim.study in study.STUDIES:
            for name in settings_of(claim, [*claim.ours, *(p for ps in claim.against.values() for p in ps)]):
                runs[claim.study, name] = max(claim.seeds, runs.get((claim.study, name), 0))
    return runs


def run(claims: list[Claim], jobs: int) -> None:
    """What is missing, study by study."""
    runs = wanted(claims)
    for name, seeds in dict.fromkeys((name, seeds) for (name, _), seeds in runs.items()):
        some = [setting for (other, setting), n in runs.items() if other == name and n == seeds]
        print(f"---- study {name}: {len(some)} settings, {seeds} seeds", flush=True)
        study.measure(name, some, seeds, jobs)


def times(claims: list[Claim], jobs: int) -> str:
    """Markdown: what all runs take, from the seconds of those that are stored (CPU seconds, where they are known).

    Runs of a study that are not stored count as its mean.
    """
    runs, out, total = wanted(claims), ["| study | runs | stored | hours |", "|---|---|---|---|"], 0.0
    for name in dict.fromkeys(name for name, _ in runs):
        settings = {setting: seeds for (other, setting), seeds in runs.items() if other == name}
        prepared = study.needed(study.STUDIES[name], list(settings))
        settings |= {other: max(settings.values()) for other in prepared}
        rows = [r for r in study.stored(name) if r["setting"] in settings and r["seed"] < settings[r["setting"]]]
        count = sum(settings.values())
        seconds = statistics.mean(r.get("cpu_seconds", r["seconds"]) for r in rows) * count if rows else None
        total += seconds or 0
        hours = f"{seconds / 3600 / jobs:.1f}" if rows else "not known"
        out.append(f"| {name} | {count} | {len(rows)} | {hours} |")
    out.append(f"| all whose time is known, {jobs} at a time | | | {total / 3600 / jobs:.1f} |")
    return "\n".join(out) + "\n"


def write() -> list[Line]:
    """Everything that follows from the stored runs."""
    lines = [line for claim in load_claims() for line in judge(claim)]
    (ROOT / "docs" / "claims.md").write_text(page(lines))
    for source in dict.fromkeys(line.claim.source for line in lines):
        mine = [line for line in lines if line.claim.source == source]
        if drawn(mine):
            draw(mine, figures.IMAGES / f"{picture(source)}.svg")
    figures.draw_all()
    for name in study.STUDIES:
        if study.stored(name):
            (study.RESULTS / f"{name}.md").write_text("\n".join(study.tables(name)))
    for file in PAGES:
        old = file.read_text()
        new = refresh(old, file.relative_to(ROOT).as_posix())
        if new != old:
            file.write_text(new)
            print(f"wrote {file.relative_to(ROOT)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", default=[], help="ids of claims, or all: first run what they lack")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--time", action="store_true", help="only print what all runs take")
    args = parser.parse_args()
    claims = load_claims()
    unknown = set(args.run) - {claim.id for claim in claims} - {"all"}
    if unknown:
        parser.error(f"no such claim: {', '.join(sorted(unknown))}; there are {', '.join(c.id for c in claims)}")
    if args.time:
        print(times(claims, args.jobs))
        return
    run([claim for claim in claims if "all" in args.run or claim.id in args.run], args.jobs)
    print(summary(write()))


if __name__ == "__main__":
    main()

"""Runs a study: each of its settings with several seeds, through the scripts' real command lines.

    python benchmarks/study.py lco                    # the table of docs/lco.md (about half an hour on 2 cores)
    python benchmarks/study.py lco --only kld --seeds 2
    python benchmarks/study.py real --seeds 3         # SmolLM2-135M, after the three commands of docs/results/real.md

A study may have runs to `prepare`, once for each seed, whose folders are kept in runs/study; the commands of its
settings name them in braces, as in --reward_model {qrm}/model (`titles`: their names in tables). lco.py@moving_target
is lco.py with benchmarks/departures/moving_target.patch applied to a copy; `columns` adds metrics to the table; a study
with a `commit` runs the scripts as they were then, from the history of this repository. Every finished run is one JSON
line in benchmarks/results/<study>.jsonl (its command, settings, seed, held-out accuracy); a run that is already there
is not run again, so an interrupted study goes on where it was. At the end the table is printed and written to
benchmarks/results/<study>.md: median over seeds, with the lowest and highest.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# study -> common arguments, settings {name: command}, and perhaps runs to prepare {name: command}, its own or, where
# `prepare` is the name of another study, those of that one
STUDIES = json.loads((ROOT / "benchmarks" / "studies.json").read_text())
SHARED = {name: study["prepare"] for name, study in STUDIES.items() if isinstance(study.get("prepare"), str)}
for name, other in SHARED.items():
    STUDIES[name]["prepare"] = STUDIES[other]["prepare"]

# the mean reward of a --reward_file; here that is sentences.py alone, whose rewards are 0 and 1
AS_ACCURACY = {"eval/reward": "eval/greedy", "eval/reward_sampled": "eval/sampled"}


def kept(study: str, name: str, seed: int) -> Path:
    return ROOT / "runs" / "study" / f"{SHARED.get(study, study)}-{seed}" / name


def departed(names: list[str], folder: Path) -> Path:
    """A copy of the scripts in `folder`, with these patches of benchmarks/departures applied."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "diagnose.py", folder / "benchmarks")
    (folder / "builtin").symlink_to(ROOT / "builtin")
    for name in names:
        patch = ROOT / "benchmarks" / "departures" / f"{name}.patch"
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    return folder


def checked_out(commit: str, folder: Path) -> Path:
    """The files of a commit in `folder`."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
    if archive.returncode:
        raise SystemExit(
            f"this study needs commit {commit}, a clone with its history: {archive.stderr.decode().strip()}"
        )
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    return folder


def edit_distance(a: list, b: list) -> int:
    """Insertions, deletions and replacements between two sequences (Levenshtein), a row of the table at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (x != y)))
    return row[-1]


def edits_of(answers: list[dict]) -> dict[str, float | None]:
    """Mean edits in tokens between y0 and y* of the answers of a round that were revised, for Major and Minor."""
    found = {"major": [], "minor": []}
    for a in answers:
        if not a["fault"] and a["label"] in (0, 1):
            found[("major", "minor")[a["label"]]].append(edit_distance(a["ids"], a["target"]))
    return {f"revise/distance_{name}": statistics.mean(x) if x else None for name, x in found.items()}


def full_command(study: str, name: str, command: str) -> str:
    """As it is recorded: without seed and folders."""
    prepared = name in STUDIES[study].get("prepare", {})
    return f"python {command} {'' if prepared else STUDIES[study]['arguments']}".strip()


def read_samples(out: Path, n: int) -> list[list[str]]:
    """[prompt, greedy answer before, and after] of the first n held-out prompts that both have."""
    files = sorted(out.rglob("samples.jsonl"), key=lambda file: file.stat().st_mtime)[-1:]
    rows = [json.loads(text) for file in files for text in file.read_text().splitlines()] if n else []
    rows = [r for r in rows if r["kind"] in ("eval/greedy", "eval/reward")]
    prompts = {json.dumps(r["prompt"]): r for r in rows}
    both = []
    for prompt in list(prompts)[:n]:
        mine = [r["completion"] for r in rows if json.dumps(r["prompt"]) == prompt]
        last = prompts[prompt]["prompt"]
        both.append([last if isinstance(last, str) else last[-1]["content"], mine[0], mine[-1]])
    return both


def run(study: str, name: str, command: str, seed: int, threads: int) -> dict:
    """One run in a folder of its own, thrown away unless others build on it; what it logged is kept."""
    prepare = STUDIES[study].get("prepare", {})
    with tempfile.TemporaryDirectory() as folder:
        out = kept(study, name, seed) if name in prepare else Path(folder) / "run"
        shutil.rmtree(out, ignore_errors=True)
        Path(f"{out}.jsonl").unlink(missing_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        line = full_command(study, name, command).removeprefix("python ")
        line = line.format(**{other: kept(study, other, seed) for other in prepare}) + f" --seed {seed} --out {out}"
        started, screen = time.time(), Path(folder) / "stderr"
        with screen.open("w") as stderr:
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            script, *words = shlex.split(line)  # lco.py@name: with the patch of that name
            script, *patches = script.split("@")
            here, copy = ROOT, Path(folder) / "scripts"
            copy.mkdir()
            if "commit" in STUDIES[study]:
                here = checked_out(STUDIES[study]["commit"], copy)
            elif patches:
                here = departed(patches, copy)
            words = [sys.executable, here / script, *words]
            process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, env=env)
            _, status, usage = os.wait4(process.pid, 0)  # tells CPU time: other work cannot change that
            process.returncode = os.waitstatus_to_exitcode(status)
        shutil.rmtree(out / "checkpoint", ignore_errors=True)  # what others build on is out/model
        ok, errors = process.returncode == 0, screen.read_text().strip().splitlines()
        lines = sorted(out.rglob("metrics.jsonl"), key=lambda file: file.stat().st_mtime)[-1:]  # of its last stage
        metrics = [json.loads(text) for file in lines for text in file.read_text().splitlines()]
        metrics = [{AS_ACCURACY.get(key, key): value for key, value in m.items()} for m in metrics]
        rounds = [file.read_text().splitlines() for file in sorted(out.glob("rounds/*.jsonl"))]
        edits = [edits_of(list(map(json.loads, lines))) for lines in rounds]
        shown = read_samples(out, STUDIES[study].get("samples", 0))
    evaluated = [m for m in metrics if any(k.startswith("eval/") for k in m)]
    held_out = [{k: v for k, v in m.items() if k == "step" or k.startswith("eval/")} for m in evaluated]
    return {
        "study": study,
        "setting": name,
        "seed": seed,
        "command": full_command(study, name, command),
        "ok": ok,
        "error": "" if ok else (errors or ["it said nothing"])[-1],
        "seconds": round(time.time() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "eval": held_out,
        "last": {k: v for k, v in (metrics or [{}])[-1].items() if not k.startswith("time/")},
        "diagnose": {
            key: round(statistics.mean(m[key] for m in metrics if key in m), 6)
            for key in sorted({k for m in metrics for k in m if k.startswith("diagnose/")})
        },
        "rounds": [
            {k: v for k, v in m.items() if k == "step" or k.startswith(("revise/", "drop/"))} | more
            for m, more in zip([m for m in metrics if "revise/after" in m], edits)
        ],
        "samples": shown,
        "grad_norm_max": max((m["grad_norm"] for m in metrics if "grad_norm" in m), default=None),
        "grad_norm_median": statistics.median([m["grad_norm"] for m in metrics if "grad_norm" in m] or [0]),
    }


def spread(values) -> str:
    """Median [lowest, highest] of the values that are known; of one alone the value."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    ends = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
    return f"{statistics.median(values):.3f}{ends}"


def table(rows: list[dict], settings: dict[str, str], columns: dict[str, str], titles: dict[str, str]) -> str:
    """Markdown: a line for each setting, median [lowest, highest] over seeds; columns: {title: another metric}."""
    columns = {"entropy at the end": "policy/entropy"} | columns
    header = ["setting", "seeds", "greedy after", "sampled after", *columns, "failed"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r for r in rows if r["setting"] == name and ("eval/greedy" in r["last"] or not r["ok"])]
        if mine:
            good = [r for r in mine if r["ok"]]
            greedy = spread([r["last"]["eval/greedy"] for r in good])
            sampled = spread([r["last"]["eval/sampled"] for r in good])
            more = [spread([r["last"][k] for r in good if k in r["last"]]) for k in columns.values()]
            cells = [titles.get(name, name), len(mine), greedy, sampled, *more, len(mine) - len(good)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def pairs_table(rows: list[dict], names: dict[str, str], titles: dict[str, str]) -> str:
    """Markdown: held-out pair accuracy of the reward models that a study prepared."""
    lines = ["| reward model | seeds | held-out pair accuracy |", "|---|---|---|"]
    for name in names:
        values = [r["last"]["eval/pair_accuracy"] for r in rows if r["setting"] == name and r["ok"]
                  and "eval/pair_accuracy" in r["last"]]  # fmt: skip
        if values:
            lines.append(f"| {titles.get(name, name)} | {len(values)} | {spread(values)} |")
    return "\n".join(lines) + "\n"


def steps_table(rows: list[dict], settings: dict[str, str], goal: float) -> str:
    """Markdown: the first evaluated step at which greedy held-out accuracy is `goal` or more."""
    header = ["setting", "seeds", f"reached {goal:.0%}", "steps to it", "greedy at the end", "sampled at the end"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r for r in rows if r["setting"] == name and r["ok"]]
        if not mine:
            continue
        first = [next((e["step"] for e in r["eval"] if e["eval/greedy"] >= goal), float("inf")) for r in mine]
        words = [
            f"{x:.0f}" if x < float("inf") else "never" for x in (statistics.median(first), min(first), max(first))
        ]
        ends = [[r["last"][k] for r in mine] for k in ("eval/greedy", "eval/sampled")]
        spreads = map(spread, ends)
        reached = f"{sum(x < float('inf') for x in first)} of {len(mine)}"
        cells = [name, len(mine), reached, f"{words[0]} [{words[1]}, {words[2]}]", *spreads]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def diagnose_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: what benchmarks/diagnose.py logged, means over steps and seeds."""
    keys = [f"diagnose/{k}" for k in ("zero_gradient", "away_from_target", "not_convex", "least_eigenvalue")]
    header = ["setting", "no gradient", "away from the optimum", "not convex", "least eigenvalue"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r["diagnose"] for r in rows if r["setting"] == name]
        if mine:
            shares = " | ".join(f"{statistics.mean(m[k] for m in mine):.1%}" for k in keys[:3])
            lines.append(f"| {name} | {shares} | {statistics.mean(m[keys[3]] for m in mine):.2g} |")
    return "\n".join(lines) + "\n"


def rounds_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: held-out accuracy of the policy before and after each round, medians; the last one with its range."""

    def path(runs: list[dict], key: str) -> str:
        *before, last = list(zip(*[[e[key] for e in r["eval"]] for r in runs]))
        return " → ".join([*(f"{statistics.median(values):.3f}" for values in before), spread(last)])

    header = ["setting", "seeds", "greedy", "sampled", "failed"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [r for r in rows if r["setting"] == name and ("eval/greedy" in r["last"] or not r["ok"])]
        good = [r for r in mine if r["ok"]]
        if good:
            told = [path(good, key) for key in ("eval/greedy", "eval/sampled")]
            lines.append(f"| {' | '.join([name, str(len(mine)), *told, str(len(mine) - len(good))])} |")
    return "\n".join(lines) + "\n"


def short(values) -> str:
    """`spread` without the zero before the point: ten such columns fit a page."""
    return re.sub(r"\b0\.", ".", spread(values))


def first_rounds(rows: list[dict], name: str) -> dict[int, dict]:
    return {r["seed"]: r["rounds"][0] for r in rows if r["setting"] == name and r["ok"] and r.get("rounds")}


def revision_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: what the first round did to the answers, and whether its labels pay.

    Break-even: a share p of the answers is right; a reviser that always revises damages d of these and fixes f of the
    others. Labels that keep r of the right and k of the wrong ones pay if k < p d r / ((1 - p) f). p, d and f are those
    of the setting with `always` in the place of `adaptive`, of the same seed: its first round has the same answers.
    """
    names = {"right before": "before", "right after": "after", "fix": "fix", "damage": "damage", "AUC": "auc"}
    names |= {"r": "keep_right", "k": "keep_wrong"}
    header = ["first round", "seeds", *names, "k at break-even", "drop"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = first_rounds(rows, name)
        if not mine:
            continue
        limits, all_revised = [], first_rounds(rows, name.split(", t ")[0].replace("adaptive", "always"))
        for seed, m in mine.items():
            if "adaptive" in name and seed in all_revised and m.get("revise/keep_right") is not None:
                p, d, f = (all_revised[seed][f"revise/{key}"] for key in ("before", "damage", "fix"))
                limits.append(p * d * m["revise/keep_right"] / ((1 - p) * f) if f else None)
        cells = [short(m.get(f"revise/{key}") for m in mine.values()) for key in names.values()]
        dropped = short(sum(v or 0 for k, v in m.items() if k.startswith("drop/")) for m in mine.values())
        lines.append(f"| {' | '.join([name, str(len(mine)), *cells, short(limits), dropped])} |")
    return "\n".join(lines) + "\n"


def labels_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: the labels of the first round against the quality of the answers, and how much they were edited."""
    names = {"right of Major": "before_major", "of Minor": "before_minor", "of No": "before_no"}
    names |= {"share Major": "major", "Minor": "minor", "No": "no"}
    names |= {"edits Minor": "distance_minor", "edits Major": "distance_major"}
    header = ["first round", "seeds", *names]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in settings:
        mine = [m for m in first_rounds(rows, name).values() if m.get("revise/auc") is not None]
        if mine:
            cells = [short(m.get(f"revise/{key}") for m in mine) for key in names.values()]
            lines.append(f"| {' | '.join([name, str(len(mine)), *cells])} |")
    return "\n".join(lines) + "\n"


def revisers_table(rows: list[dict], names: dict[str, str], titles: dict[str, str]) -> str:
    """Markdown: the revisers on held-out pairs."""
    metrics = {"label AUC": "label_auc", "label accuracy": "label_accuracy", "fix": "fix", "damage": "damage"}
    header = ["reviser", "seeds", *metrics, "NLL of y_h"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in names:
        mine = [r["last"] for r in rows if r["setting"] == name and "eval/fix" in r["last"]]
        if mine:
            cells = [short(last.get(f"eval/{key}") for last in mine) for key in (*metrics.values(), "nll")]
            lines.append(f"| {' | '.join([titles.get(name, name), str(len(mine)), *cells])} |")
    return "\n".join(lines) + "\n"


def samples_table(rows: list[dict], settings: dict[str, str]) -> str:
    """Markdown: greedy answers to held-out prompts before and after training, with the first seed that has them."""
    lines = ["| setting | prompt | before | after |", "|---|---|---|---|"]
    for name in settings:
        mine = sorted((r for r in rows if r["setting"] == name and r.get("samples")), key=lambda r: r["seed"])[:1]
        for texts in (texts for r in mine for texts in r["samples"]):
            prompt, *answers = (
                " ".join(text.replace("|", "\\|").split()) for text in (texts[0].split("\n")[0], *texts[1:])
            )
            prompt = prompt if len(prompt) < 60 else "… " + " ".join(prompt.split()[-5:])
            lines.append(f"| {' | '.join([name, prompt, *(answer[:80] for answer in answers)])} |")
    return "\n".join(lines) + "\n"


def stored(name: str) -> list[dict]:
    """The rows of a study that are there."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tables(name: str) -> list[str]:
    """The tables of a study, from its stored rows."""
    study, rows = STUDIES[name], stored(name)
    prepare, settings, titles = study.get("prepare", {}), study["settings"], study.get("titles", {})
    if "goal" in study:
        made = [pairs_table(rows, prepare, titles)]
        made += [steps_table(rows, settings, study["goal"])] if settings else []
    elif any(r.get("rounds") for r in rows):
        made = [make(rows, settings) for make in (rounds_table, revision_table, labels_table)]
        made += [] if name in SHARED else [revisers_table(rows, prepare, titles)]
    else:
        made = [table(rows, prepare | settings, study.get("columns", {}), titles)]
        made += [diagnose_table(rows, settings)] if name == "diagnose" else []
    return made + ([samples_table(rows, settings)] if "samples" in study else [])


def needed(study: dict, wanted: list[str]) -> list[str]:
    """What has to be prepared for these settings, in order: what their commands name in braces, and so on."""
    prepare = study.get("prepare", {})
    found, left = set(wanted) & set(prepare), [(prepare | study["settings"])[name] for name in wanted]
    while left:
        new = set(re.findall(r"\{(\w+)\}", left.pop())) & set(prepare) - found
        found |= new
        left += [prepare[name] for name in new]
    return [name for name in prepare if name in found]


def measure(name: str, wanted: list[str], seeds: int, jobs: int) -> None:
    """The runs of these settings with seeds 0 ... seeds-1 that are not stored yet; then the study's tables."""
    study, rows = STUDIES[name], stored(name)
    RESULTS.mkdir(exist_ok=True)
    there = {(r["setting"], r["seed"], r["command"]) for r in [*rows, *stored(SHARED.get(name, name))]}
    prepare, settings = study.get("prepare", {}), study["settings"]
    waves = [{other: prepare[other]} for other in needed(study, wanted)]  # one may build on those before it
    waves.append({setting: settings[setting] for setting in wanted if setting in settings})
    todo = [
        [
            (setting, command, seed)
            for seed in range(seeds)
            for setting, command in wave.items()
            if (setting, seed, full_command(name, setting, command)) not in there
            or (setting in prepare and not kept(name, setting, seed).exists())
        ]
        for wave in waves
    ]
    done, total = 0, sum(map(len, todo))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for wave in todo:
                for future in [pool.submit(run, name, setting, command, seed, 1) for setting, command, seed in wave]:
                    row, done = future.result(), done + 1
                    rows = [r for r in rows if (r["setting"], r["seed"]) != (row["setting"], row["seed"])] + [row]
                    (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
                    last = {k: round(v, 4) for k, v in row["last"].items() if k.startswith("eval/")}
                    screen = f"{done}/{total}  {row['setting']}  seed {row['seed']}  {row['seconds']} s  {last}"
                    print(screen, row["error"], flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else an interrupted study would first finish all of its runs
            raise
    (RESULTS / f"{name}.md").write_text("\n".join(tables(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*sorted(STUDIES), "real"], help="real: the studies whose names begin so")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 ... n-1 of each setting")
    parser.add_argument("--only", default="", help="only settings whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    args = parser.parse_args()
    for name in [name for name in STUDIES if name == args.study or name.startswith("real_") and args.study == "real"]:
        study = STUDIES[name]
        wanted = [setting for setting in study["settings"] or study["prepare"] if args.only in setting]
        measure(name, wanted, args.seeds, args.jobs)
        print("\n".join(tables(name)))


if __name__ == "__main__":
    main()

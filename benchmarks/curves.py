"""The runs and pictures of docs/reading-your-curves.md: python benchmarks/curves.py

Eleven short runs of ppo_baseline.py on the built-in task, healthy ones and sick ones. What they logged is kept in
benchmarks/results/curves.jsonl; a run that is there is not run again.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import BLUE, GREEN, GREY, ORANGE, PURPLE, name_lines, plt, save  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "curves.jsonl"
COMMON = "ppo_baseline.py --advantage group --prompts_per_step 16 --steps 24 --eval_every 4 --test_rows 64"
RUNS = {  # name: what it changes; {constant} and {ones} are reward files
    "healthy": "--kl_coef 1e-6 --kl_estimator k3",
    "tiny steps, k1": "--kl_coef 1e-6 --kl_estimator k1 --lr 2e-6",
    "tiny steps, k3": "--kl_coef 1e-6 --kl_estimator k3 --lr 2e-6",
    "penalty 0.3": "--kl_coef 0.3 --kl_estimator k1",
    "wrong reward": "--kl_coef 1e-6 --kl_estimator k3 --reward_file {ones}",
    "rate x4": "--kl_coef 1e-6 --kl_estimator k3 --lr 8e-4",
    "constant reward": "--reward_file {constant}",
    "rate x0.001": "--lr 2e-7",
    "one update": "--minibatches 1",
    "four passes": "--epochs 4",
    "temperature 0.1": "--temperature 0.1",
}
REWARDS = {
    "constant": "def reward(prompts, completions, rows):\n    return [0.0 for _ in completions]\n",
    "ones": "def reward(prompts, completions, rows):\n    return [text.count('1') for text in completions]\n",
}
KL, REWARD, SPREAD = "distance from the start, kl/ref", "reward, reward/mean", "prompts that teach, reward/spread"
SAMPLED = "held-out accuracy, eval/sampled"
FIGURES = {  # picture: panels (title, metric, runs)
    "kl": [
        ("one run, its kl/ref by two estimators", "kl/ref", ["tiny steps, k1", "tiny steps, k3"]),
        (KL, "kl/ref", ["healthy", "rate x4", "wrong reward"]),
        (SAMPLED, "eval/sampled", ["healthy", "rate x4", "wrong reward"]),
    ],
    "penalty": [
        (KL, "kl/ref", ["healthy", "penalty 0.3"]),
        (REWARD, "reward/mean", ["healthy", "penalty 0.3"]),
        (SAMPLED, "eval/sampled", ["healthy", "penalty 0.3"]),
    ],
    "flat": [
        (REWARD, "reward/mean", ["healthy", "constant reward", "rate x0.001"]),
        (SPREAD, "reward/spread", ["healthy", "constant reward", "rate x0.001"]),
        ("size of the gradient, grad_norm", "grad_norm", ["healthy", "constant reward", "rate x0.001"]),
    ],
    "clip": [
        ("clipped tokens, policy/clip_fraction", "policy/clip_fraction", ["one update", "healthy", "four passes"]),
        ("|ratio − 1|, policy/ratio_gap", "policy/ratio_gap", ["one update", "healthy", "four passes"]),
        (SAMPLED, "eval/sampled", ["one update", "healthy", "four passes"]),
    ],
    "entropy": [
        ("nats per token, policy/entropy", "policy/entropy", ["healthy", "temperature 0.1", "rate x4"]),
        (SPREAD, "reward/spread", ["healthy", "temperature 0.1", "rate x4"]),
        ("held-out accuracy, eval/greedy", "eval/greedy", ["healthy", "temperature 0.1", "rate x4"]),
    ],
}
HEALTHY = dict(color=BLUE, linestyle="-", linewidth=2.4)  # in every picture the same
LOOK = {
    "healthy": HEALTHY, "tiny steps, k3": HEALTHY, "tiny steps, k1": dict(color=ORANGE, linestyle="--"),
    "penalty 0.3": dict(color=GREEN, linestyle="--"), "wrong reward": dict(color=ORANGE, linestyle="--"),
    "rate x4": dict(color=PURPLE, linestyle="-."), "constant reward": dict(color=ORANGE, linestyle="--"),
    "rate x0.001": dict(color=GREY, linestyle=":"), "one update": dict(color=GREEN, linestyle="-."),
    "four passes": dict(color=ORANGE, linestyle="--"), "temperature 0.1": dict(color=ORANGE, linestyle="--"),
}  # fmt: skip


def stored() -> dict[str, dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["run"]: row for row in map(json.loads, lines)}


def run(name: str, changes: str) -> dict:
    """One run in a folder that is thrown away; its metrics are kept."""
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder) / f"{key}.py" for key in REWARDS}
        for key, text in REWARDS.items():
            files[key].write_text(text)
        line, started = f"{COMMON} {changes.format(**files)} --out {folder}/run", time.time()
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        metrics = [json.loads(text) for text in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = {metric for panels in FIGURES.values() for _, metric, _ in panels} | {"eval/greedy", "eval/sampled"}
    return {
        "run": name,
        "command": f"python {COMMON} {changes}",
        "seconds": round(time.time() - started, 1),
        "metrics": [{k: round(v, 6) for k, v in m.items() if k in kept | {"step"} and v is not None} for m in metrics],
    }


def draw(name: str, panels: list) -> None:
    """One picture of panels side by side. The last one that shows the same runs names them."""
    rows = stored()
    figure, axes = plt.subplots(1, len(panels), figsize=(3.25 * len(panels), 2.8))
    named = {tuple(runs): axis for axis, (_, _, runs) in zip(axes, panels)}
    for axis, (title, metric, runs) in zip(axes, panels):
        for each in runs:
            points = [(m["step"], m[metric]) for m in rows[each]["metrics"] if metric in m]
            axis.plot(*zip(*points), label=each, marker="o" if metric.startswith("eval/") else None, **LOOK[each])
        axis.set_title(title)
        axis.set_xlabel("step")
        if named[tuple(runs)] is axis:
            name_lines(axis)
    save(figure, f"curves-{name}")


def main() -> None:
    for name, changes in RUNS.items():
        rows = stored()
        if rows.get(name, {}).get("command") != f"python {COMMON} {changes}":
            rows[name] = run(name, changes)
            RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
            print(f"{name}: {rows[name]['seconds']} s", flush=True)
    for name, panels in FIGURES.items():
        draw(name, panels)


if __name__ == "__main__":
    main()

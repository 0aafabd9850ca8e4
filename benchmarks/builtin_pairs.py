"""The pairs that seft.py makes of a built-in task, as a file for other scripts: pairs.jsonl in --out.

    python benchmarks/builtin_pairs.py --task strings --rows 2256 --out runs/pairs
    python dpo.py --model builtin --task strings --dataset runs/pairs/pairs.jsonl

With the same --seed, its first rows are those that `seft.py --task strings` trains on.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="chains", choices=("chains", "strings"), help="the built-in task")
    parser.add_argument("--rows", type=int, default=2256, help="number of pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--out", required=True, help="folder of pairs.jsonl")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    pairs = tasks.load_task(args.task).pairs(args.rows, args.seed)
    rows = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

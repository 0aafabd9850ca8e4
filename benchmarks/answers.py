"""Answers of a model in the files that the judges of AlpacaEval 2 and MT-Bench read; the judges are paid services.

    python benchmarks/answers.py --model M --format alpaca_eval --dataset alpaca_eval.json --max_new_tokens 2048
    python benchmarks/answers.py --model M --format mt_bench --dataset question.jsonl --max_prompt 3072 --max_new_tokens 1024

alpaca_eval   `instruction`, perhaps `dataset` -> alpaca_eval.json, in the order of the rows
mt_bench      `question_id`, `category`, `turns` -> <generator>.jsonl, in the order of the questions; a turn sees those
              before it

More in docs/evaluate.md; for many GPUs with torchrun, as evaluate.py.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  # before torch: it sets how OpenMP threads wait
import evaluate  # noqa: E402
import lm  # noqa: E402
import tasks  # noqa: E402
from common import arg, require  # noqa: E402


@dataclass
class Args:
    model: str = arg("builtin", "the model: a Hub name, a folder, or builtin, which comes with this repository")
    format: Literal["alpaca_eval", "mt_bench"] = arg("alpaca_eval", "answer --dataset in a file for that judge")
    dataset: str = arg("", "the questions: a Hub name or a .jsonl, .json or .parquet file")
    generator: str = arg("", "the model's name in the file; empty: made from --model")
    max_prompt: int = arg(512, "the longest prompt, in tokens", at_least=1)
    max_new_tokens: int = arg(512, "the longest answer, in tokens, EOS included", at_least=1)
    temperature: float = arg(1.0, "the temperature of answers for AlpacaEval; 0: greedy", at_least=0)
    out: str = arg("", "the run folder; empty: runs/<script>-<time>")
    seed: int = arg(0, "the seed of data order, sampling and new weights", at_least=0)
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "where the run takes place")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "the dtype of the computation; auto: bfloat16 on CUDA")
    rollout_rows: int = arg(256, "sequences that each rank generates at once", at_least=1)


BUILTIN = dict(max_prompt=24, max_new_tokens=24)
# MT-Bench decodes each category at its own temperature, and others at 0.7.
MT_BENCH = dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0, stem=0.1, humanities=0.1)


def load_questions(args, tokenizer) -> list[dict]:
    """Rows of --dataset with `turns` (texts) and `temperature`; the longest prompt that can come of them must fit."""
    rows, seen = tasks.read_rows(args.dataset), set()
    for i, row in enumerate(rows, 1):
        where = f"{args.dataset}: row {i}"
        if args.format == "alpaca_eval":
            row |= {"turns": [tasks.column(row, "instruction", where)], "temperature": args.temperature}
            if "dataset" in row:
                tasks.column(row, "dataset", where)
        else:
            name, turns = row.get("question_id"), row.get("turns")
            known = type(name) is int or (type(name) is str and name.isprintable())
            known = known and type(name) is type(rows[0]["question_id"]) and name not in seen
            require(known, f"{where}: 'question_id' is {name!r:.80}; expected a number, or text as in row 1, used once")
            seen.add(name)
            require(isinstance(turns, list) and turns, f"{where}: 'turns' is {turns!r:.80}; expected a list of texts")
            row["turns"] = [tasks.column({"turns": turn}, "turns", where) for turn in turns]
            category = tasks.column(row, "category", where) if row.get("category") else ""
            row["temperature"] = MT_BENCH.get(category, 0.7)
        turns = [x for turn in row["turns"] for x in (turn, ".")][:-1]
        chat = [{"role": ("user", "assistant")[j % 2], "content": text} for j, text in enumerate(turns)]
        longest = len(common.encode_prompt(tokenizer, chat)) + (len(row["turns"]) - 1) * args.max_new_tokens
        fits = longest <= args.max_prompt
        require(fits, f"{where}: its last prompt may have {longest} tokens, above --max_prompt {args.max_prompt}")
    return rows


def generator_name(args) -> str:
    """The model's name in an answer file, and for MT-Bench the name of that file."""
    name = (args.generator or args.model.strip("./")).replace("/", "-")
    usable = len(name.encode()) <= 200 and name.isprintable() and name not in ("metrics", "samples")
    require(usable, f"--generator {name!r:.80}: expected at most 200 letters that name a file of answers")
    return name


def answer_questions(args, questions: list[dict], tokenizer) -> tuple[list[list[dict]], float]:
    """The questions with their answers, as messages, and the share of answers that ended by themselves."""
    device = common.local_device(args.device)
    policy = lm.load_model(args.model, dtype=args.dtype, device=device, trainable=False)
    limits = args.max_prompt, args.max_new_tokens, args.temperature, args.rollout_rows
    sampling = lm.Sampling(policy, tokenizer, *limits)
    chats, ended = [[] for _ in questions], []
    for turn in range(max(len(q["turns"]) for q in questions)):
        now = [i for i, q in enumerate(questions) if turn < len(q["turns"])]
        for i in now:
            chats[i].append({"role": "user", "content": questions[i]["turns"][turn]})
        for temperature in sorted({questions[i]["temperature"] for i in now}):
            some = [i for i in now if questions[i]["temperature"] == temperature]
            prompts = {i: sampling.encode({"prompt": chats[i]}) for i in some}
            mine = evaluate.complete(replace(sampling, temperature=temperature), prompts, args.seed, [turn], device)
            for i, ids in common.gather(mine):
                chats[i].append({"role": "assistant", "content": common.decode(tokenizer, [ids])[0].strip()})
                ended.append(ids[-1] in lm.stop_ids(policy, tokenizer))
    return chats, sum(ended) / len(ended)


def write(folder: Path, name: str, args, questions: list[dict], chats: list[list[dict]]) -> Path:
    answers = [[m["content"] for m in chat if m["role"] == "assistant"] for chat in chats]
    if args.format == "alpaca_eval":
        file, rows = folder / "alpaca_eval.json", []
        for q, texts in zip(questions, answers):
            known = {key: q[key] for key in ("dataset", "instruction") if key in q}
            rows.append(known | {"output": texts[0], "generator": name})
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    else:  # its judge takes the model's name from the file's, and wants all questions in order
        file, rows = folder / f"{name}.jsonl", []
        for q, texts in sorted(zip(questions, answers), key=lambda pair: pair[0]["question_id"]):
            row = {"question_id": q["question_id"], "answer_id": f"{name}-{args.seed}-{q['question_id']}"}
            row |= {"model_id": name, "choices": [{"index": 0, "turns": texts}], "tstamp": round(time.time(), 3)}
            rows.append(row)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if common.rank() == 0:
        common.write_whole(file, text)
    return file


def main(args) -> None:
    require(args.dataset, f"--dataset is empty; expected questions for --format {args.format}")
    name, tokenizer = generator_name(args), lm.load_tokenizer(args.model)
    lm.fits_context(args.model, args.max_prompt + args.max_new_tokens)
    questions = load_questions(args, tokenizer)
    run = common.RunFolder(args, __file__)
    chats, finished = answer_questions(args, questions, tokenizer)
    file = write(run.path, name, args, questions, chats)
    run.samples(0, [{"kind": "answer", "prompt": chat[:-1], "completion": chat[-1]["content"]} for chat in chats])
    common.say(f"{len(questions)} questions, {finished:.0%} of the answers ended by themselves: {file}")


if __name__ == "__main__":
    args = common.parse_args(Args, BUILTIN)
    common.launch(lambda: main(args), args.device)

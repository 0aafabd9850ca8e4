"""evaluate.py: Pass@k and intervals against closed forms, the numbers of the other scripts, files, bad input."""

import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import common
import lm
import evaluate
import lco
import numpy as np
import pytest
import qrm
import tasks
from builtin import tasks as toys
from conftest import ROOT, TINY, flags, read_metrics, run_here, run_forked

sys.path.insert(0, str(ROOT / "benchmarks"))
import answers  # noqa: E402

import torch

FILES = [".lock", "args.json", "metrics.jsonl", "result.json", "samples.jsonl", "source.py"]
QUESTIONS = [
    {"question_id": 82, "category": "writing", "turns": ["1+2=", "3+4="]},
    {"question_id": 81, "category": "math", "turns": ["5+6=", "7+8="]},
    {"question_id": 83, "category": "math", "turns": ["9+9=", "1+1="]},
]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(out, **settings) -> dict:
    """An evaluation in this process; returns its result.json."""
    evaluate.evaluate(common.check_args(evaluate.Args(**settings, out=str(out))))
    return json.loads((Path(out) / "result.json").read_text())


def answer(out, **settings) -> None:
    """benchmarks/answers.py in this process."""
    answers.main(common.check_args(answers.Args(**settings, out=str(out))))


def values(result: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.fixture(scope="module")
def base(tiny_model) -> dict:
    return dict(model=tiny_model, max_prompt=24, max_new_tokens=12, test_rows=5, samples_per_prompt=4, rollout_rows=8)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_by_enumeration(n):
    """The share of all choices of k samples that contain a right one."""
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations([i < c for i in range(n)], k))
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_many_samples():
    """No overflow, nothing lost by cancellation: one right sample among many is found with chance k / n."""
    assert evaluate.pass_at_k(20_000, 1, 10_000) == 0.5
    assert evaluate.pass_at_k(10**9, 1, 1) == 1e-9
    assert evaluate.pass_at_k(5000, 4999, 2) == 1.0


@pytest.mark.parametrize(
    "c, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(c, n, low, high):
    """The table of Newcombe 1998 (Statistics in Medicine 17, method 3), and the mirror image."""
    assert evaluate.wilson(c / n, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluate.wilson(1 - c / n, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_solves_its_equation():
    """Its limits are the shares from which p is 1.96 standard errors away."""
    for p, n in ((0.3, 40), (0.01, 7), (0.9, 1319)):
        for limit in evaluate.wilson(p, n):
            assert abs(p - limit) == pytest.approx(1.959964 * math.sqrt(limit * (1 - limit) / n))


def test_independent_observations():
    """One value a group: their number. Copies in a group count once. Differing values of a group count for more."""
    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert evaluate.independent(values, range(7), 7) == pytest.approx(7)
    copies = [x for x in values for _ in range(5)]
    assert evaluate.independent(copies, [i // 5 for i in range(35)], 35) == pytest.approx(7)
    means = [0.4, 0.6, 0.5, 0.5, 0.4, 0.6, 0.5]
    assert evaluate.independent(means, range(7), 70) == 70
    assert evaluate.independent([1.0] * 9, [0, 0, 0, 1, 1, 1, 2, 2, 2], 9) == 3
    assert evaluate.independent([1.0, 0.0, 1.0], [0, 0, 0], 3) == 1


def test_interval_covers():
    """95 % of intervals contain the truth when samples of a prompt are alike, where counting each sample does not."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        skill = rng.beta(0.5, 0.8, size=60)
        means = (rng.binomial(8, skill) / 8).tolist()
        one, truth = evaluate.share(means, most=480), 0.5 / 1.3
        held += one["low"] <= truth <= one["high"]
        low, high = evaluate.wilson(sum(means) / 60, 480)
        naive += low <= truth <= high
    assert 0.925 < held / 400 < 0.975 and naive / 400 < 0.8


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    """The bare command with less to do: a run folder, a row of results, and no second run into the same folder."""
    less = flags(test_rows=12, samples_per_prompt=4, out=tmp_path / "run")
    screen = run_forked("evaluate.py", *less, "--k", "1", "2", "4").stdout
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == FILES
    row = json.loads((tmp_path / "run" / "result.json").read_text())
    assert row["model"] == "builtin" and row["task"] == "chains" and row["prompts"] == 12 and row["seed"] == 0
    assert {"git", "command", "versions", "seconds", "confidence"} <= row.keys()
    names = ["eval/greedy", "eval/sampled", "eval/pass@2", "eval/pass@4", "eval/answered"]
    assert list(row["metrics"]) == [*names, "length/finished"]
    for name, metric in row["metrics"].items():
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1 and metric["low"] < metric["high"]
        assert name in screen
    assert row["metrics"]["eval/sampled"]["value"] < row["metrics"]["eval/pass@4"]["value"]
    assert len(read(tmp_path / "run" / "samples.jsonl")) == 12 * 5
    assert read_metrics(tmp_path / "run") == [{"step": 0, **values(row)}]
    again = run_forked("evaluate.py", *less, expect=2).stderr
    assert "exists and is not empty" in again and "resume" not in again


def test_same_numbers_as_training(tiny_model, reward_file, tmp_path):
    """What a training script logs after its last step, evaluate.py finds in its model."""
    settings = TINY | dict(model=tiny_model, steps=2, save_every=5)
    of_file = {"reward_file": reward_file, "dataset": prompts_file(tmp_path)}
    long = [{"prompt": prompt} for prompt in ("12=", "1+2+3+4+5+6+7+8+9+1+2+3+4+5=", "13=", "14=")]
    with_long = of_file | {"dataset": write(tmp_path / "long.jsonl", read(of_file["dataset"]) + long)}
    for name, more in (("task", {}), ("reward", of_file), ("drop", with_long)):
        trained = run_here(lco, **settings | more, out=str(tmp_path / name))
        last = {k: v for k, v in read_metrics(trained)[-1].items() if k.startswith("eval/")}
        same = {k: settings[k] for k in ("max_prompt", "max_new_tokens", "test_rows")}
        found = run(tmp_path / f"{name}-found", model=str(trained / "model"), samples_per_prompt=1, **same | more)
        assert found["prompts"] == settings["test_rows"] - (name == "drop")
        assert last and last.items() <= {k: pytest.approx(v) for k, v in values(found).items()}.items()


def test_sizes_of_training(tiny_model, tmp_path):
    """`--model runs/x/model` needs no sizes: those of the run, else what the model's positions allow."""
    more = dict(test_rows=3, samples_per_prompt=1)
    trained = run_here(lco, **TINY | dict(model=tiny_model, steps=1), out=str(tmp_path / "run"))
    model = str(trained / "model")
    found = run(tmp_path / "a", model=model, **more)
    assert (found["max_prompt"], found["max_new_tokens"]) == (TINY["max_prompt"], TINY["max_new_tokens"])
    assert run(tmp_path / "b", model=model, max_new_tokens=7, **more)["max_prompt"] == TINY["max_prompt"]
    alone = shutil.copytree(model, tmp_path / "alone")
    found = run(tmp_path / "c", model=str(alone), **more)
    assert (found["max_prompt"], found["max_new_tokens"]) == (32, 32)
    found = run(tmp_path / "d", model=str(alone), max_prompt=40, **more)
    assert (found["max_prompt"], found["max_new_tokens"]) == (40, 24)


def test_held_out_as_in_training(tiny_model, reward_file, tmp_path):
    """Of a file, no row that the model was trained on counts as held out; of another file, 256 rows are."""
    data = prompts_file(tmp_path)
    settings = TINY | dict(model=tiny_model, steps=1, dataset=data, reward_file=reward_file, test_rows=3)
    model = str(run_here(lco, **settings, out=str(tmp_path / "run")) / "model")
    given, held_out = evaluate.with_sizes(evaluate.Args(model=model, dataset=data))
    assert (given.test_rows, given.test_dataset, held_out) == (3, "", 3)
    for same in (os.path.relpath(data), str(shutil.copy(data, tmp_path / "copy.jsonl"))):  # the file, spelled otherwise
        assert evaluate.with_sizes(evaluate.Args(model=model, dataset=same))[1] == 3
    assert given.long_prompts == "drop", "as in training"
    other, held_out = evaluate.with_sizes(evaluate.Args(model=model, dataset="other.jsonl"))
    assert (other.long_prompts, held_out) == ("error", 256)
    for other in (dict(test_dataset="other.jsonl"), dict(task="gsm8k")):
        assert evaluate.with_sizes(evaluate.Args(model=model, dataset=data, **other))[0].long_prompts == "error"
    assert evaluate.with_sizes(evaluate.Args(model=model, dataset=data, test_rows=5))[1] == 5
    pairs = dict(model=model, test_rows=5, pairs_out=str(tmp_path / "pairs.jsonl"))
    given, held_out = evaluate.with_sizes(evaluate.Args(**pairs, dataset=data))
    assert (given.test_rows, held_out) == (5, 3), "5 prompts are sampled, of those that training did not hold out"
    assert evaluate.with_sizes(evaluate.Args(**pairs, dataset="other.jsonl"))[1] == 5


def test_first_command_after_training(tmp_path):
    """A copy of the built-in model, as a training run leaves it: its 128 positions are enough."""
    (tmp_path / "run").mkdir()
    shutil.copytree(ROOT / "builtin" / "policy", tmp_path / "run" / "model")
    (tmp_path / "run" / "args.json").write_text(json.dumps({"args": {"max_prompt": 24, "max_new_tokens": 24}}))
    less = flags(test_rows=8, samples_per_prompt=1, out=tmp_path / "found")
    run_forked("evaluate.py", "--model", tmp_path / "run" / "model", *less)
    row = json.loads((tmp_path / "found" / "result.json").read_text())
    assert (row["max_prompt"], row["max_new_tokens"]) == (24, 24)


def test_without_packages_and_git(base, tmp_path, monkeypatch):
    """What an evaluation does not use need not be installed, and its work is not lost at the end."""
    from importlib import metadata

    known = metadata.distribution

    def distribution(name):
        if name in ("datasets", "math-verify"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = run(tmp_path / "run", **base)
    assert row["versions"]["datasets"] is None and row["versions"]["math-verify"] is None and row["versions"]["torch"]
    assert row["git"] is None


def prompts_file(folder: Path) -> str:
    return write(folder / "prompts.jsonl", [{"prompt": f"{i}+{i + 1}="} for i in range(20)])


def test_more_samples_keep_the_first(base, tmp_path):
    """Draw s of a prompt is the same for any number of samples and any batch size."""
    few, many = tmp_path / "few", tmp_path / "many"
    run(few, **base | dict(samples_per_prompt=2, rollout_rows=64))
    run(many, **base)
    kept = {}
    for folder in (few, many):
        rows = [row for row in read(folder / "samples.jsonl") if row["kind"] == "eval/sampled"]
        kept[folder] = {key: [r["completion"] for r in g] for key, g in itertools.groupby(rows, lambda r: r["prompt"])}
    assert len(kept[few]) == 5
    assert all(kept[few][prompt] == kept[many][prompt][:2] for prompt in kept[few])


def told(monkeypatch, tokenizer, greedy: list[str], sampled: list[list[str]]) -> None:
    """A policy that answers as told, prompt by prompt."""

    def complete(sampling, prompt_ids, samples, noise):
        by_prompt = [[text] for text in greedy] if noise is None else sampled
        return [common.encode_completion(tokenizer, text) for texts in by_prompt for text in texts]

    monkeypatch.setattr(lm.Sampling, "complete", complete)


def test_metrics_by_hand(gpt2_model, letter_tokenizer, monkeypatch, tmp_path):
    """GSM8K columns, answers that are told: 2 of 4 greedy; 0, 1, 2 and 4 of 4 samples right."""
    rows = [{"question": f"{i}+1?", "answer": f"so\n#### {i + 1}"} for i in range(4)]
    data = write(tmp_path / "test.jsonl", rows)
    right = [[str(i + 1) if s < c else "0" for s in range(4)] for i, c in enumerate((0, 1, 2, 4))]
    told(monkeypatch, letter_tokenizer, ["1", "no idea", "7", "4"], right)
    settings = dict(model=gpt2_model, test_dataset=data, max_prompt=40, max_new_tokens=8, long_prompts="truncate")
    found = values(run(tmp_path / "run", **settings, samples_per_prompt=4, k=[1, 2, 4]))
    assert found["eval/greedy"] == 0.5 and found["eval/answered"] == 0.75 and found["eval/sampled"] == 7 / 16
    assert found["eval/pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert found["eval/pass@4"] == 0.75 and found["length/finished"] == 1


def test_math_answers(gpt2_model, letter_tokenizer, monkeypatch, tmp_path):
    """MATH columns are graded by meaning."""
    rows = [{"problem": "half?", "solution": "\\boxed{\\frac{1}{2}}"}, {"problem": "one?", "solution": "\\boxed{1}"}]
    told(monkeypatch, letter_tokenizer, ["", ""], [[""], [""]])
    monkeypatch.setattr(common, "decode", lambda tokenizer, ids: ["so \\boxed{0.5}", "\\boxed{11}"])
    settings = dict(model=gpt2_model, test_dataset=write(tmp_path / "m.jsonl", rows), max_prompt=40, max_new_tokens=8)
    found = values(run(tmp_path / "run", **settings, samples_per_prompt=1, long_prompts="truncate"))
    assert found["eval/greedy"] == 0.5 and found["eval/answered"] == 1


def test_right_from_a_reward(base, reward_file, tmp_path):
    """Where only a reward file grades, Pass@k counts rewards from --right_from on; its mean is reported too."""
    settings = base | dict(dataset=prompts_file(tmp_path), reward_file=reward_file)
    found = values(run(tmp_path / "run", **settings, right_from=3.6))
    rows = [r for r in read(tmp_path / "run" / "samples.jsonl") if r["kind"] == "eval/sampled"]
    assert found["eval/sampled"] == pytest.approx(sum(r["reward"] >= 3.6 for r in rows) / 20)
    assert 0 < found["eval/sampled"] < 1
    assert found["eval/reward_sampled"] == pytest.approx(sum(r["reward"] for r in rows) / 20)


def test_stop(base, tmp_path, monkeypatch):
    """A signal ends an evaluation between two pieces with its own exit code, and nothing is left that looks whole."""
    monkeypatch.setattr(common, "_signal", 15)
    common._stop.set()
    try:
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "run", **base)
        assert stop.value.code == 128 + 15
    finally:
        common._stop.clear()
    assert not (tmp_path / "run" / "result.json").exists()


# ---- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["last", "mean", "mean, LM head", "sum"])
def test_pair_accuracy_by_hand(how, judges, tmp_path, capsys):
    """Each held-out pair alone: the mean of its tokens' scores, the last one, or the sum of log-ratios."""
    settings, margins = judges[how], []
    load = lambda name: lm.load_model(name, head="saved", trainable=False, device=torch.device("cpu"))  # noqa: E731
    model, tokenizer = load(settings["reward_model"]), lm.load_tokenizer(settings["model"])
    ref = load(settings["reward_ref"]) if "reward_ref" in settings else None
    for row in toys.preference_pairs(21, 0)[-5:]:
        scores = []
        for side in ("chosen", "rejected"):
            prompt = common.encode_prompt(tokenizer, row["prompt"])
            answer = common.encode_completion(tokenizer, row[side])
            with torch.no_grad():
                states = model(torch.tensor([prompt + answer])).logits[0]
                if how in ("last", "mean"):
                    tokens = states[len(prompt) :, 0]
                else:
                    tokens, at = 0, torch.arange(len(answer)) + len(prompt) - 1
                    for sign, one in ((1, model), (-1, ref))[: 1 + (ref is not None)]:
                        logp = one(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                        tokens = tokens + sign * logp[at, torch.tensor(answer)]
            scores.append({"l": tokens[-1], "m": tokens.mean(), "s": tokens.sum()}[how[0]].item())
        margins.append(scores[0] - scores[1])
    found = values(run(tmp_path / "run", **settings))
    assert found["eval/pair_accuracy"] == sum(x > 0 for x in margins) / 5
    assert found["eval/margin"] == pytest.approx(sum(margins) / 5, rel=1e-4, abs=1e-6)
    about = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (
        not about.keys() & {"model", "max_prompt", "samples_per_prompt"} and "sizes of" not in capsys.readouterr().out
    )
    whole = run(tmp_path / "all", **settings | {"test_pairs": 0})
    assert whole["prompts"] == 21 and len(read(tmp_path / "all" / "samples.jsonl")) == 21


@pytest.mark.parametrize("kind", [{}, {"head": "lm"}, {"objective": "orm"}], ids=str)
def test_pair_accuracy_is_what_was_logged(kind, judges, tiny_model, tmp_path):
    """Held-out pairs: the same accuracy and margin as qrm.py's last evaluation."""
    shared = dict(model=tiny_model, pairs=judges["last"]["pairs"], test_pairs=5, micro_batch=4)
    more = dict(max_prompt=24, max_new_tokens=24, pairs_per_step=4, lr=3e-3, eval_every=2)
    trained = run_here(qrm, **shared | more | kind, out=str(tmp_path / "qrm"))
    found = values(run(tmp_path / "run", **shared, reward_model=str(trained / "model")))
    last = read_metrics(trained)[-1]
    assert found["eval/pair_accuracy"] == last["eval/pair_accuracy"]
    assert found["eval/margin"] == pytest.approx(last["eval/margin"], rel=1e-4, abs=1e-6)


def test_language_model_without_a_reference(judges, tiny_model, tmp_path):
    """It has no score, unless its folder says so."""
    with pytest.raises(common.BadInput, match="give --reward_ref"):
        run(tmp_path / "run", **judges["last"] | {"reward_model": tiny_model})


# ---- pairs of the model's own samples --------------------------------------------------------------------------------


def test_pick_pairs():
    """Of each prompt a right and a wrong sample of the closest lengths; unfinished and empty ones are no answers."""
    rows = [("a", "12345", True), ("a", "1", False), ("a", "1234", False), ("b", "1", True), ("b", "2", True)]
    rows += [("c", "1", True), ("c", "", False)]
    rows = [dict(prompt=p, completion=c, right=r, ended=True) for p, c, r in rows]
    rows += [dict(prompt="d", completion="1", right=right, ended=right) for right in (True, False)]
    assert evaluate.pick_pairs(rows) == [dict(prompt="a", chosen="12345", rejected="1234")]


def test_pairs_out(tmp_path, capsys):
    """Pairs for qrm.py and dpo.py: training prompts, graded by the task, the same whoever samples them again."""
    settings = dict(max_prompt=24, max_new_tokens=24, test_rows=12, samples_per_prompt=8)
    files = [tmp_path / f"pairs-{i}.jsonl" for i in range(2)]
    for file in files:
        run(tmp_path / file.stem, **settings, pairs_out=str(file))
    pairs = tasks.load_pairs(str(files[0]))
    assert len(pairs) > 3 and files[0].read_text() == files[1].read_text()
    for pair in pairs:
        row = [{"prompt": pair["prompt"]}]
        assert toys.chain_correct([pair["chosen"]], row) == [True] != toys.chain_correct([pair["rejected"]], row)
        assert not toys.chain_is_held_out(pair["prompt"])
    assert f"{len(pairs)} pairs" in capsys.readouterr().out
    with pytest.raises(common.BadInput, match="expected a new file"):
        run(tmp_path / "again", **settings, pairs_out=str(files[0]))


def test_pairs_of_a_dataset(base, reward_file, tmp_path):
    """Prompts of a file: each once, none of the held-out ones."""
    more = dict(dataset=prompts_file(tmp_path), reward_file=reward_file, right_from=3.0, test_rows=5)
    run(tmp_path / "run", **base | more, pairs_out=str(tmp_path / "pairs.jsonl"))
    prompts = {row["prompt"] for row in read(tmp_path / "run" / "samples.jsonl")}
    assert len(prompts) == 5 and not prompts & {f"{i}+{i + 1}=" for i in range(15, 20)}


# ---- answer files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(gpt2_model) -> dict:
    return dict(model=gpt2_model, max_prompt=48, max_new_tokens=8, generator="mine")


def test_alpaca_eval(judged, tmp_path):
    """A JSON list of instruction, output, generator (and dataset, where it is known), in the order of the file."""
    asked = [{"instruction": "say 1", "dataset": "a", "output": "no"}, {"instruction": "say 2"}]
    data = tmp_path / "asked.json"
    data.write_text(json.dumps(asked))
    answer(tmp_path / "run", **judged, format="alpaca_eval", dataset=str(data), temperature=0)
    rows = json.loads((tmp_path / "run" / "alpaca_eval.json").read_text())
    assert [list(row) for row in rows] == [
        ["dataset", "instruction", "output", "generator"],
        ["instruction", "output", "generator"],
    ]
    assert [row["instruction"] for row in rows] == ["say 1", "say 2"] and {r["generator"] for r in rows} == {"mine"}
    assert all(isinstance(row["output"], str) and row["output"] != "no" for row in rows)


def test_mt_bench(judged, tmp_path):
    """FastChat's lines, sorted; math is greedy; the second answer is that to both questions and the first answer."""
    data = write(tmp_path / "question.jsonl", QUESTIONS)
    answer(tmp_path / "run", **judged, format="mt_bench", dataset=data)
    rows = read(tmp_path / "run" / "mine.jsonl")
    assert [row["question_id"] for row in rows] == [81, 82, 83]
    for row in rows:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"] and row["model_id"] == "mine"
        assert [choice["index"] for choice in row["choices"]] == [0] and len(row["choices"][0]["turns"]) == 2
    assert len({row["answer_id"] for row in rows}) == 3
    tokenizer = lm.load_tokenizer(judged["model"])
    model = lm.load_model(judged["model"], trainable=False, device=torch.device("cpu"))
    limits = judged["max_prompt"], judged["max_new_tokens"]
    first, second = rows[0]["choices"][0]["turns"]
    chat = [{"role": "user", "content": "5+6="}]
    for text in (first, second):
        prompt = common.encode_prompt(tokenizer, chat)[-limits[0] :]
        sampling = lm.Sampling(model, tokenizer, *limits, 1.0, 8)
        (ids,) = sampling.complete([prompt], 1, None)
        assert common.decode(tokenizer, [ids])[0].strip() == text
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "7+8="}]


def test_model_names_in_files(judged, tmp_path):
    """Without --generator the name comes from --model, and is one that a file may have."""
    data = write(tmp_path / "question.jsonl", QUESTIONS)
    answer(tmp_path / "run", **judged | {"generator": ""}, format="mt_bench", dataset=data)
    (file,) = set((tmp_path / "run").glob("*.jsonl")) - {
        tmp_path / "run" / n for n in ("metrics.jsonl", "samples.jsonl")
    }
    assert {row["model_id"] for row in read(file)} == {file.stem} and file.stem.endswith("-gpt2")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=[1, 8]), "--k [8]: expected numbers from 1 to --samples_per_prompt 4"),
        (dict(pairs="p.jsonl"), "--pairs and --reward_model go together"),
        (dict(reward_model="x"), "--pairs and --reward_model go together"),
        (dict(reward_ref="x"), "--reward_ref is about a --reward_model"),
        (dict(pairs="p.jsonl", reward_model="x", pairs_out="new.jsonl"), "expected no --pairs_out beside it"),
        (dict(pairs="p.jsonl", reward_model="x", dataset="q.jsonl"), "expected no --dataset beside it"),
        (dict(test_dataset="none.jsonl"), "there is no such file"),
        (dict(max_prompt=60), "--max_prompt + --max_new_tokens is 72"),
    ],
)
def test_wrong_values(changes, words, base, tmp_path, monkeypatch):
    """One sentence that names the argument, before any model is loaded and any folder is made."""
    monkeypatch.setattr(lm, "load_model", None)
    if "pairs" in changes:
        base = {"model": base["model"]}
    with pytest.raises(common.BadInput) as error:
        run(tmp_path / "run", **base | changes)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("alpaca_eval", {"prompt": "x"}, "row 2: 'instruction' is missing"),
        ("mt_bench", {"turns": ["a", "b"]}, "row 2: 'question_id' is None"),
        ("mt_bench", {"question_id": 1, "turns": "a"}, "row 2: 'turns' is 'a'"),
        ("mt_bench", {"question_id": 1, "turns": ["a" * 20, "b" * 20]}, "row 2: its last prompt may have"),
    ],
)
def test_wrong_questions(kind, row, words, judged, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "load_model", None)
    good = {"instruction": "1+1=", "question_id": 0, "turns": ["1", "2"]}
    data = write(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(common.BadInput) as error:
        answer(tmp_path / "run", **judged, format=kind, dataset=data)
    assert words in str(error.value) and "q.jsonl" in str(error.value)


def test_answers_need_questions(judged, tmp_path):
    with pytest.raises(common.BadInput, match="--dataset is empty"):
        answer(tmp_path / "run", **judged, format="mt_bench")
    with pytest.raises(common.BadInput, match="--format must be one of"):
        answer(tmp_path / "run", **judged, format="jsonl")


def test_long_prompts_are_refused(base, tmp_path):
    """By default no held-out row is left out in silence."""
    with pytest.raises(common.BadInput, match="--max_prompt 5"):
        run(tmp_path / "run", **base | {"max_prompt": 5})

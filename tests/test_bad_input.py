"""Every wrong argument or file gives one sentence that names it, what was found and what was expected."""

import json
import sys

import adpa
import common
import dckd
import dpo
import evaluate
import lco
import lm
import ppo_baseline
import pytest
import qrm
import seft
from conftest import ROOT, TINY, flags, run_here, run_forked

sys.path.insert(0, str(ROOT / "benchmarks"))
import answers  # noqa: E402

BOTH = (ppo_baseline, lco)


@pytest.fixture
def base(tiny_model, out) -> dict:
    return TINY | dict(model=tiny_model, out=out, steps=1)


@pytest.fixture
def refused(base, monkeypatch):
    """refused(script, [parts of the message], **changes): train() says so before a model is loaded."""

    def check(script, parts, **changes):
        monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            script.train(common.check_args(script.Args(**base | changes)))
        message = str(error.value)
        assert all(part in message for part in parts), message
        assert "\n" not in message and len(message) < 500
        return message

    return check


@pytest.mark.parametrize(
    "script, changes, parts",
    [
        (lco, dict(loss="mse", target="linear"), ["--target linear", "--loss kld"]),
        *((s, dict(advantage="group", samples_per_prompt=1), ["--advantage group", "at least 2"]) for s in BOTH),
        *((s, dict(advantage="token"), ["--advantage token needs --reward_file"]) for s in BOTH),
        *((s, dict(critic_warmup=2, advantage="gae"), ["--critic_warmup", "at most --steps"]) for s in BOTH),
        *((s, dict(critic_warmup=1, advantage="group"), ["--critic_warmup", "--advantage gae"]) for s in BOTH),
    ],
)
def test_combination_that_means_nothing(script, changes, parts, refused):
    refused(script, parts, **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        (dict(prompts_per_step=5, minibatches=3), ["--minibatches 3", "20 rows", "--prompts_per_step 5"]),
        (dict(minibatches=2, micro_batch=3), ["--micro_batch 3", "8 rows"]),
    ],
)
def test_geometry_that_does_not_divide(changes, parts, refused):
    refused(lco, [*parts, "does not divide"], **changes)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_model_folders(refused, tmp_path):
    """A folder that is not there, one without config.json, one without a tokenizer."""
    missing, empty, no_tokenizer = tmp_path / "missing", tmp_path / "empty", tmp_path / "no_tokenizer"
    empty.mkdir()
    no_tokenizer.mkdir()
    (no_tokenizer / "config.json").write_text('{"model_type": "llama"}')
    refused(lco, [f"model {missing}: no such folder"], model=str(missing))
    refused(lco, [f"model {empty}", "no config.json"], model=str(empty))
    refused(lco, [f"--model {no_tokenizer}", "no tokenizer"], model=str(no_tokenizer))


def test_a_classifier_is_no_reward_model(refused, tmp_path):
    """The usual kind of reward models has a head that is read nowhere here; --reward_ref would not help."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}')
    parts = ["is a LlamaForSequenceClassification", "expected token classification with one label"]
    refused(lco, parts, reward_model=str(tmp_path))


def test_hub_name_without_a_network(refused):
    refused(lco, ["--model minalign/nothing", "no tokenizer could be loaded"], model="minalign/nothing")


# ---- data ------------------------------------------------------------------------------------------------------------


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(role, content, **more) -> dict:
    return {"role": role, "content": content} | more


HALF = "1+1=\ud83d"  # half of a surrogate pair
USER, ANSWER = said("user", "1+1="), said("assistant", "2")

# Files that no script can read, whatever it looks for: name, content, what is said about it.
FILES = {
    "torn": ("x.jsonl", '{"prompt": "1+1="}\n{"prompt": "1+', "row 2 cannot be read (Unterminated"),
    "late_comma": ("x.jsonl", '{"prompt": "1+1=",}\n', "row 1 cannot be read ("),
    "single_quotes": ("x.jsonl", "{'prompt': '1+1='}\n", "row 1 cannot be read ("),
    "key_twice": ("x.jsonl", lines(USER) + '{"a": 1, "a": 2}', "row 2 cannot be read (one of the keys a, a is there"),
    "key_twice_inside": ("x.jsonl", '{"a": [{"b": 1, "b": 1}]}', "row 1 cannot be read (one of the keys b, b"),
    "deep": ("x.jsonl", "{}\n" + "[" * 100000, "row 2 cannot be read ("),
    "deep_json": ("x.json", "[" * 100000, "cannot be read ("),
    "long_number": ("x.jsonl", '{"a": ' + "1" * 5000 + "}", "row 1 cannot be read ("),
    "nul": ("x.jsonl", "\0\0\0\0", "row 1 cannot be read ("),
    "latin_1": ("x.jsonl", '{"prompt": "\xe9"}'.encode("latin-1"), "cannot be read ('utf-8' codec"),
    "utf_16": ("x.jsonl", lines(USER).encode("utf-16"), "cannot be read ('utf-8' codec"),
    "list": ("x.jsonl", json.dumps([USER]), "row 1 is a list; expected an object"),
    "number": ("x.jsonl", "{}\n3\n", "row 2 is a int"),
    "null": ("x.jsonl", "{}\nnull\n", "row 2 is a NoneType"),
    "text_json": ("x.json", '"1+1="', "row 1 is a str"),
    "torn_json": ("x.json", '[{"prompt": "1+1="}', "cannot be read ("),
    "indented_json": ("x.json", json.dumps(USER, indent=2), "row 1 cannot be read ("),
    "empty": ("x.jsonl", "", "it has no rows"),
    "blank": ("x.jsonl", "\n \n", "it has no rows"),
    "mark": ("x.jsonl", "\ufeff", "it has no rows"),
    "empty_json": ("x.json", "[]", "it has no rows"),
    "no_columns": ("x.jsonl", "{}\n{}\n", "it has the columns (none)"),
    "columns": ("x.jsonl", lines({"query": "1+1?"}), "it has the columns query"),
    "parquet": ("x.parquet", b"PAR1 no parquet PAR1", "cannot be read ("),
    "empty_parquet": ("x.parquet", b"", "cannot be read ("),
    "csv": ("x.csv", "prompt\n1+1=\n", "unknown extension '.csv'"),
    "gz": ("x.jsonl.gz", b"\x1f\x8b", "unknown extension '.gz'"),
    "missing": ("x.jsonl", None, "there is no such file"),
    "folder": ("x.jsonl/y", "", "it is a folder"),
}

# Who reads which rows from which argument: a script, the argument, what else is given, a row that is right.
TINIER = dict(dtype="float32", max_prompt=24, max_new_tokens=12)
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
SMALL = dict(steps=1, test_rows=1, prompts_per_step=1, micro_batch=2, **TINIER)
RL = dict(steps=1, test_rows=1, prompts_per_step=1, samples_per_prompt=2, minibatches=1, micro_batch=2, **TINIER)
MATH = {"problem": "1+1?", "solution": "\\boxed{2}"}
EVOLVE = SMALL | dict(dataset="GOOD_PAIRS", stage="evolve", revise="never", rounds=1)
READERS = {
    "ppo_baseline": (ppo_baseline, "dataset", RL, {"question": "1+1?", "answer": "#### 2"}),
    "lco": (lco, "dataset", RL | dict(reward_file="REWARD"), {"prompt": "1+1="}),
    "lco_math": (lco, "dataset", RL, MATH),
    "lco_test": (lco, "test_dataset", RL | dict(dataset="GOOD", reward_file="REWARD"), {"prompt": "1+1="}),
    "qrm": (qrm, "pairs", dict(steps=1, test_pairs=1, pairs_per_step=1, **TINIER), PAIR),
    "dpo": (dpo, "dataset", SMALL, PAIR),
    "sft": (dpo, "dataset", SMALL | dict(loss="sft"), {"prompt": "1+1=", "completion": "2"}),
    "dpo_test": (dpo, "test_dataset", SMALL | dict(dataset="GOOD_PAIRS", task="math"), MATH),
    "dckd": (dckd, "dataset", SMALL | dict(teacher="MODEL"), PAIR),
    "adpa": (adpa, "dataset", SMALL | dict(teacher="MODEL", ref_teacher="MODEL"), PAIR),
    "seft": (seft, "dataset", SMALL | dict(warmup_reviser_steps=1, reviser_steps=1), PAIR),
    "seft_prompts": (seft, "prompts", EVOLVE, {"prompt": "1+1="}),
    "evaluate": (evaluate, "dataset", dict(reward_file="REWARD", test_rows=1, **TINIER), {"prompt": "1+1="}),
    "evaluate_test": (evaluate, "test_dataset", dict(reward_file="REWARD", **TINIER), {"prompt": "1+1="}),
    "evaluate_pairs": (evaluate, "pairs", dict(reward_model="MODEL", reward_ref="MODEL", **TINIER), PAIR),
    "alpaca_eval": (answers, "dataset", dict(format="alpaca_eval", **TINIER), {"instruction": "1+1="}),
    "mt_bench": (answers, "dataset", dict(format="mt_bench", **TINIER), {"question_id": 7, "turns": ["1+1="]}),
}

# A row that is wrong, after two that are right: for which readers, what differs, what is said about row 3.
PROMPTS = ("lco", "lco_test", "seft_prompts", "evaluate", "evaluate_test")
PAIRS = ("qrm", "dpo", "dckd", "adpa", "seft", "evaluate_pairs")
FEW = ("lco", "evaluate_test"), ("qrm", "dpo"), ("sft",)
ROWS = [
    *((PROMPTS, {"prompt": value}, "'prompt' is missing or empty") for value in (None, "", [])),
    *((FEW[0], {"prompt": value}, f"'prompt' is a {type(value).__name__}") for value in (3, {}, True)),
    (PROMPTS, {"prompt": HALF}, "'prompt' has half of a surrogate pair"),
    (FEW[0], {"prompt": [said("user", HALF)]}, "'prompt' has half of a surrogate pair"),
    (FEW[0], {"prompt": ["1+1="]}, "has the message '1+1='"),
    (FEW[0], {"prompt": [said("user", None)]}, "has the message {'role': 'user', 'content': None}"),
    (FEW[0], {"prompt": [said("user", [{"type": "text", "text": "1+1="}])]}, "has the message"),
    (FEW[0], {"prompt": [said("human", "1+1=")]}, "expected role (system, user, assistant)"),
    (PROMPTS, {"prompt": [said("tool", "2")]}, "expected role (system, user, assistant)"),
    (PROMPTS, {"prompt": [said("user", "1+1=", tool_calls=[{"name": "add"}])]}, "no other keys"),
    (FEW[0], {"prompt": [said("user", "1+1=", name="Ann")]}, "no other keys"),
    (PROMPTS, {"prompt": [USER], "tools": [{"name": "add"}]}, "'tools' would go to the chat template"),
    (FEW[0], {"prompt": [USER], "documents": ["a"]}, "'documents' would go to the chat template"),
    (("ppo_baseline",), {"question": None}, "'question' is missing or empty"),
    (("ppo_baseline",), {"question": ["1+1?"]}, "'question' is a list"),
    (("ppo_baseline",), {"answer": ["2"]}, "'answer' is a list"),
    (("ppo_baseline",), {"answer": True}, "'answer' is a bool"),
    (("ppo_baseline",), {"question": HALF}, "'question' has half of a surrogate pair"),
    (("lco_math", "dpo_test"), {"problem": ""}, "'problem' is missing or empty"),
    (("lco_math", "dpo_test"), {"solution": {"a": 1}}, "'solution' is a dict"),
    *((PAIRS, {side: ""}, f"'{side}' is missing or empty") for side in ("chosen", "rejected")),
    *((FEW[1], {"chosen": value}, f"'chosen' is a {kind}") for value, kind in ((2, "int"), ({}, "dict"))),
    (PAIRS, {"prompt": None}, "'prompt' is missing or empty"),
    (PAIRS, {"chosen": HALF}, "'chosen' has half of a surrogate pair"),
    (PAIRS, {"chosen": [USER, ANSWER]}, "only one of 'chosen' and 'rejected' is text"),
    (FEW[1], {"chosen": [ANSWER], "rejected": [ANSWER]}, "'chosen' has 0 messages of prompt"),
    (FEW[1], {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "then user assistant"),
    (FEW[1], {"prompt": [USER], "chosen": [said("assistant", "")], "rejected": [ANSWER]}, "'content' is missing"),
    (FEW[1], {"chosen": [USER, USER], "rejected": [USER, ANSWER]}, "expected a prompt and one assistant message"),
    *((FEW[2], {"completion": value}, "'completion' is missing or empty") for value in (None, "", [])),
    (FEW[2], {"completion": [USER]}, "then user; expected a prompt and one assistant message"),
    (FEW[2], {"completion": [ANSWER, USER, ANSWER]}, "then assistant user assistant"),
    (FEW[2], {"messages": [ANSWER]}, "'messages' has 0 messages of prompt"),
    (FEW[2], {"messages": [USER]}, "expected a prompt and one assistant message"),
    (FEW[2], {"messages": [USER, said("assistant", "")]}, "'content' is missing or empty"),
    (FEW[2], {"messages": "1+1=2"}, "'messages' is a str"),
    (("alpaca_eval",), {"instruction": ""}, "'instruction' is missing or empty"),
    (("alpaca_eval",), {"instruction": HALF}, "'instruction' has half of a surrogate pair"),
    (("alpaca_eval",), {"dataset": HALF}, "'dataset' has half of a surrogate pair"),
    *((("mt_bench",), {"question_id": x}, "'question_id' is") for x in (None, "b", 1, True, 1.5, [1], "\ud83d")),
    *((("mt_bench",), {"turns": x}, "'turns' is") for x in (None, [], "1+1=", [""], [3], {})),
    (("mt_bench",), {"turns": [HALF]}, "'turns' has half of a surrogate pair"),
    (("mt_bench",), {"category": ["math"]}, "'category' is a list"),
]


@pytest.fixture
def unread(tiny_model, reward_file, tmp_path, monkeypatch):
    """unread(reader, path, parts): through the command line's arguments, before a model is loaded or a run begins."""
    monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(lm, "check_model", lambda *a, **k: None)
    good = write(tmp_path / "good.jsonl", [{"prompt": f"{i}+2="} for i in range(5)])
    pairs = write(tmp_path / "pairs.jsonl", [PAIR | {"prompt": f"{i}+2="} for i in range(5)])
    known = {"REWARD": reward_file, "MODEL": tiny_model, "GOOD": good, "GOOD_PAIRS": pairs}

    def check(reader, path, *parts):
        script, argument, settings, _ = reader
        settings = {name: known.get(value, value) for name, value in settings.items()}
        settings |= {"model": "builtin" if script is seft else tiny_model, "out": str(tmp_path / "run"), argument: path}
        args = common.parse_args(script.Args, script.BUILTIN, flags(**settings))
        with pytest.raises(common.BadInput) as error:
            run = {evaluate: "evaluate", answers: "main"}.get(script, "train")
            getattr(script, run)(args)
        message = str(error.value)
        assert all(part in message for part in (path, *parts)), message
        assert "\n" not in message and len(message) < 600 and not (tmp_path / "run").exists()

    return check


def test_files_that_cannot_be_read(unread, tmp_path):
    """Each by three scripts, and some by all: the file, the row, what was found and what was expected."""
    for kind, (name, content, part) in FILES.items():
        path = tmp_path / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        path = path.parent if kind == "folder" else path
        some = kind in ("torn", "key_twice", "empty", "columns", "missing")
        for reader in READERS if some else ("lco", "dpo", "evaluate_pairs"):
            if kind != "columns" or reader not in ("alpaca_eval", "mt_bench"):
                unread(READERS[reader], str(path), part, "expected")


@pytest.mark.parametrize("readers, change, part", ROWS)
def test_rows_that_are_wrong(readers, change, part, unread, tmp_path):
    """The third row of a file, by every script that reads such rows."""
    for reader in readers:
        row = READERS[reader][3]
        rows = [row | ({"question_id": i} if reader == "mt_bench" else {}) for i in range(2)]
        if "messages" in change:
            rows = [{"messages": [USER, ANSWER]}] * 2
        unread(READERS[reader], write(tmp_path / f"{reader}.jsonl", [*rows, row | change]), "row 3", part)


def test_more_rows_are_held_out_than_there_are(refused, tmp_path, reward_file):
    small = write(tmp_path / "small.jsonl", [{"prompt": "1+1="}] * 4)
    refused(lco, ["--test_rows 5", small, "4 rows"], dataset=small, reward_file=reward_file)


def test_no_row_has_an_answer(refused, tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", [{"question": f"{i}+1?", "answer": f"It is {i + 1}."} for i in range(9)])
    refused(lco, [path, "no row has an answer", "'#### '"], dataset=path)


def test_prompts_without_a_reward(refused, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}="} for i in range(9)])
    refused(lco, ["--reward_file is empty", path], dataset=path)


def test_dataset_for_a_task_that_makes_its_own(refused, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "1="}] * 9)
    refused(lco, [path, "--task chains"], task="chains", dataset=path)


@pytest.mark.parametrize("how", ["error", "drop", "truncate"])
def test_long_prompts(how, base, tmp_path, reward_file, capsys):
    """Prompts longer than --max_prompt are counted, and refused, dropped or truncated as asked."""
    sums = [f"{i}+{i}=" for i in range(1, 10)] + ["1+1+1+1+1+1+1=", "2+2+2+2+2+2+2="]
    sums += ["3+3+3+3+3+3=", "11=", "12=", "13=", "14="]
    path = write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in sums])
    changes = dict(dataset=path, reward_file=reward_file, max_prompt=6, long_prompts=how)
    found = "2 training and 1 held-out prompts are longer than 6 tokens"
    args = lco.Args(**base | changes)
    if how == "error":
        with pytest.raises(common.BadInput, match=f"--max_prompt 6: {found}"):
            lco.prepare(args)
        return
    task, tokenizer = lco.prepare(args)
    assert f"{found}, {'left out' if how == 'drop' else 'truncated'}" in capsys.readouterr().out
    assert (len(task.train), len(task.test)) == ((9, 4) if how == "drop" else (11, 5))
    run_here(lco, **base | changes)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert ("3+3+3+3+3+3=" in {json.loads(line)["prompt"] for line in lines}) == (how == "truncate")


def test_all_prompts_too_long(refused):
    """The endless built-in task has nothing to drop: a limit that its prompts exceed is refused."""
    refused(lco, ["--max_prompt 2"], max_prompt=2)


# ---- rewards ---------------------------------------------------------------------------------------------------------

SIGNATURE = "reward(prompts, completions, rows)"


REWARDS = {  # name of the file, its text, what is said about it
    "missing": ("mine.py", None, "there is no such file"),
    "folder": ("", "", "there is no such file"),
    "other_name": ("mine.py", "score = 1", "it has no function 'reward'"),
    "a_number": ("mine.py", "reward = 1", "it has no function 'reward'"),
    "built_in": ("mine.py", "reward = max", "it has reward("),
    "one_argument": ("mine.py", "def reward(completions): return []", "it has reward(completions)"),
    "of_trl": ("mine.py", "def reward(prompts, completions, answer, **more): return []", "answer, **more)"),
    "swapped": ("mine.py", "def reward(completions, prompts, rows): return []", "reward(completions, prompts, rows)"),
    "of_any_names": ("mine.py", "def reward(*args): return []", "reward(*args)"),
    "import": ("mine.py", "import nothing_of_this_name", "ModuleNotFoundError"),
    "syntax": ("mine.py", "def reward(", "SyntaxError"),
    "nul": ("mine.py", "x = 1\0", "null bytes"),
    "latin_1": ("mine.py", "x = '\xe9'".encode("latin-1"), "SyntaxError"),
    "two_lines": ("mine.py", "raise ValueError('a\\nb')", "ValueError (a b)"),
    "exit": ("mine.py", "import sys; sys.exit('no licence')", "SystemExit (no licence)"),
    "exit_0": ("mine.py", "import sys; sys.exit(0)", "SystemExit (0)"),
    "quit": ("mine.py", "quit()", "SystemExit"),
    "json": ("json.py", "def reward(prompts, completions, rows): return []", "another module has the name json"),
    "torch": ("torch.py", "def reward(prompts, completions, rows): return []", "another module has the name torch"),
    "tasks": ("tasks.py", "def reward(prompts, completions, rows): return []", "another module has the name tasks"),
}
REWARDED = {
    **{name: (script, "reward_file", RL, None) for name, script in (("ppo_baseline", ppo_baseline), ("lco", lco))},
    "dpo": (dpo, "reward_file", SMALL | dict(dataset="GOOD_PAIRS"), None),
    "dckd": (dckd, "reward_file", SMALL | dict(teacher="MODEL", dataset="GOOD_PAIRS"), None),
    "adpa": (adpa, "reward_file", SMALL | dict(teacher="MODEL", ref_teacher="MODEL", dataset="GOOD_PAIRS"), None),
    "seft": (seft, "reward_file", SMALL | dict(dataset="GOOD_PAIRS", reviser_steps=1), None),
    "evaluate": (evaluate, "reward_file", TINIER, None),
}


def test_reward_files_that_cannot_be_used(unread, tmp_path):
    """Each by one script, and one by each: nothing is silent, sys.exit(0) least of all."""
    for kind, (name, content, part) in REWARDS.items():
        path = tmp_path / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for reader in REWARDED if kind == "exit_0" else ["lco"]:
            expected = "expected another file name" if "another" in part else f"expected {SIGNATURE}"
            unread(REWARDED[reader], str(path), f"--reward_file {path}: ", part, expected)


@pytest.mark.parametrize(
    "result, parts",
    [
        ("[1.0]", ["returned 1 rewards", "16 rows"]),
        ("[float('nan')] * 16", ["row 1", "nan", "finite"]),
        ("[0.0] * 15 + [float('inf')]", ["row 16", "inf", "finite"]),
        ("None", ["NoneType", "expected a list"]),
        ("{}", ["dict", "expected a list"]),
        ("(0.0 for _ in rows)", ["generator", "expected a list"]),
        ("[1e39] * 16", ["row 1", "inf", "finite"]),
        ("[0.0] * 15 + [10**400]", ["row 16", "inf", "finite"]),
        ("[True] * 16", ["row 1", "bool", "expected a number"]),
        ("__import__('sys').exit('no key')", ["reward() called sys.exit('no key')"]),
        ("__import__('sys').exit(0)", ["reward() called sys.exit(0)"]),
        ("[[1.0] * 40 for _ in rows]", ["row 1", "40 numbers", "one for each token"]),
        ("quit()", ["sys.exit(None)"]),
        ("['good'] * 16", ["row 1", "str", "expected a number"]),
        ("[0.0] * 15 + [[0.0]]", ["row 16", "list", "expected one kind"]),
    ],
)
def test_reward_that_is_wrong(result, parts, base, tmp_path):
    """What a reward function returns is checked at its first call."""
    path = tmp_path / "mine.py"
    path.write_text(f"def reward(prompts, completions, rows):\n    return {result}\n")
    with pytest.raises(common.BadInput) as error:
        run_here(lco, **base | {"reward_file": str(path)})
    assert all(part in str(error.value) for part in [str(path), *parts]), str(error.value)


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", BOTH)
def test_existing_run_folder(script, refused, tmp_path):
    """A folder with anything in it is refused and left as it was; an empty one is welcome."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all of it")
    refused(script, [f"--out {tmp_path / 'run'} exists and is not empty", "--resume"])
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


# ---- through the command line ----------------------------------------------------------------------------------------


def test_command_line(base):
    """A wrong value: one line on the screen, exit code 2, no traceback."""
    done = run_forked("lco.py", *flags(**base | {"lr": -1}), expect=2)
    assert done.stderr.strip() == "lco.py: error: --lr must be at least 0, found -1.0"


def test_failure_on_the_command_line(base, tmp_path):
    """A reward function that raises is no wrong argument: its traceback is shown, exit code 1."""
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompts, completions, rows):\n    raise ValueError('the grader broke down')\n")
    done = run_forked("lco.py", *flags(**base | {"reward_file": path}), expect=1)
    assert "ValueError: the grader broke down" in done.stderr and "mine.py" in done.stderr

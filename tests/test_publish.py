"""What a run tells others: trackers, checkpoints that stay, last lines, the card of its model, the Hub."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import common
import dpo
import evaluate
import lco
import lm
import publish
import pytest
import seft
from conftest import TINY, read_metrics, run_here, run_script

import torch

STAND_IN = """
calls = []
def init(**given): calls.append(("init", given))
def log(values, step): calls.append(("log", step, values))
def finish(): calls.append(("finish",))
class Table:
    def __init__(self, columns, data, allow_mixed_types): self.columns, self.data = columns, data
"""


@pytest.fixture(scope="module")
def base(tiny_model, reward_file) -> dict:
    return TINY | dict(model=tiny_model, reward_file=reward_file, steps=2, eval_every=1)


def logged(folder) -> dict:
    """{(step, name): value} of what is known."""
    lines = read_metrics(folder, times=True)
    return {(line["step"], k): v for line in lines for k, v in line.items() if k != "step" and v is not None}


# ---- trackers --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["wandb", "trackio"])
def package(request, tmp_path, monkeypatch):
    """A module in the place of the package, which keeps what it is called with."""
    (tmp_path / "stand_ins").mkdir()
    (tmp_path / "stand_ins" / f"{request.param}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "stand_ins")
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param
    sys.modules.pop(request.param, None)


def test_a_tracker_gets_metrics_and_samples(package, base, out):
    """All that is in metrics.jsonl and samples.jsonl; a resumed run goes on under the same name."""
    folder = run_here(lco, 1, **base, out=out, track=package)
    run_here(lco, **base, out=out, track=package, resume=True)
    calls = sys.modules[package].calls
    first, second = (given for kind, *(given,) in (c for c in calls if c[0] == "init"))
    assert first["name"] == second["name"] and first["name"].startswith("run-") and first["resume"] == "allow"
    assert first["project"] == "minalign" and first["config"]["lr"] == base["lr"]
    assert [c[0] for c in calls].count("finish") == 2 and calls[-1] == ("finish",)
    sent = {(c[1], k): v for c in calls if c[0] == "log" for k, v in c[2].items()}
    tables = {key: sent.pop(key) for key in list(sent) if key[1].startswith("samples/")}
    assert sent == logged(folder)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {(r["step"], f"samples/{r['kind']}") for r in rows} == set(tables)
    shown = [r["completion"] for r in rows if (r["step"], r["kind"]) == (1, "train")]
    table = tables[1, "samples/train"]
    assert [row[table.columns.index("completion")] for row in table.data] == shown and len(shown) == 4


def test_tensorboard(base, out):
    """Its own reader finds every number and the samples; what a resumed run does again is not there twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_here(lco, 1, **base, out=out, track="tensorboard")
    run_here(lco, **base, out=out, track="tensorboard", resume=True)
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {(e.step, name): e.value for name in read.Tags()["scalars"] for e in read.Scalars(name)}
    assert found == pytest.approx(logged(folder), rel=1e-6)
    text = read.Tensors("samples/train/text_summary")[0].tensor_proto.string_val[0].decode()
    (row, *_) = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines() if '"train"' in line]
    assert f"    prompt: {row['prompt']}\n" in text


def test_only_rank_0_tracks(base, out, monkeypatch):
    monkeypatch.setattr(common, "rank", lambda: 1)
    monkeypatch.setattr(publish, "start", lambda *a: pytest.fail("another rank has a tracker"))
    run = common.Run(lco.Args(**base, out=out, track="tensorboard"), lco.__file__)
    run.log(0, {"eval/greedy": 0.5})
    assert run.tracker is None and not Path(out).exists()


@pytest.fixture
def refused(base, out, monkeypatch):
    """refused([parts of the message], **changes): before a model is loaded, and no folder is made."""

    def check(parts, **changes):
        monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
        with pytest.raises(common.BadInput) as error:
            lco.train(common.check_args(lco.Args(**base | dict(out=out) | changes)))
        message = str(error.value)
        assert all(part in message for part in parts) and "\n" not in message, message
        assert not Path(out).exists()

    return check


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed(kind, refused, monkeypatch, tmp_path):
    """A folder of that name, such as wandb leaves behind, is no package."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == kind]:
        monkeypatch.delitem(sys.modules, name)
    refused([f"--track {kind}: the package is not installed"], track=kind)
    (tmp_path / kind).mkdir()
    refused([f"--track {kind}: the package is not installed"], track=kind)


def test_a_copy_without_the_room(refused, monkeypatch):
    """What needs publish.py names it; test_scripts.py has a run without it."""
    there = common.importlib.util.find_spec
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: name != "publish" and there(name))
    refused(["need the file publish.py"], track="tensorboard")
    refused(["need the file publish.py"], push_to_hub="me/model")


# ---- checkpoints that stay -------------------------------------------------------------------------------------------


def saved(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (Path(folder) / "checkpoint").iterdir())


@pytest.fixture
def scores(monkeypatch):
    """Held-out accuracies, one for each evaluation from the one before the first step on."""
    left = []
    result = lambda *a: ({"eval/greedy": left.pop(0), "eval/sampled": 0.5}, [])  # noqa: E731
    monkeypatch.setattr(lm.Sampling, "evaluate", result)
    return left


def test_the_best_checkpoint_stays_and_is_the_model(base, out, scores, capsys):
    """Beside the newest, whenever it was; of equal ones the first. The model before training is no candidate."""
    settings = base | dict(steps=5, save_every=2, keep="best", out=out, lr=1e-2)
    scores += [0.9, 0.2, 0.1, 0.7, 0.7]
    run_here(lco, 4, **settings)
    assert saved(out) == [3, 4]
    damaged = shutil.copytree(out, f"{out}-damaged")
    file = Path(damaged) / "checkpoint" / "step-000003" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(common.BadInput, match="step-000003 is damaged: __0_0.distcp"):
        run_here(lco, **settings | dict(out=damaged), resume=True)
    scores += [0.6]
    run_here(lco, **settings, resume=True)
    assert saved(out) == [3, 5]
    said = capsys.readouterr().out
    assert "eval/greedy 0.900 -> 0.700" in said and "model/ is that of step 3" in said
    assert "| eval/greedy | 0.9000 | 0.7000 |" in (Path(out) / "model" / "README.md").read_text()
    from safetensors.torch import load_file

    models, optimizer = lco.build(lco.Args(**settings), torch.device("cpu"))
    exported = load_file(f"{out}/model/model.safetensors")
    for step, same in ((3, True), (5, False)):
        common.load_checkpoint(Path(out) / "checkpoint" / f"step-{step:06d}", models, optimizer)
        assert all(torch.equal(exported[k], v) for k, v in models["policy"].state_dict().items()) == same


def test_all_checkpoints_stay(base, out, scores):
    settings = base | dict(steps=4, save_every=2, keep="all", eval_every=9, out=out)
    scores += [0.9, 0.1]
    run_here(lco, 3, **settings)
    (Path(out) / "checkpoint" / "tmp-000004").mkdir()
    run_here(lco, **settings, resume=True)
    assert saved(out) == [2, 3, 4]
    with pytest.raises(common.BadInput, match="--keep was 'all' and is now 'last'"):
        run_here(lco, **settings | dict(keep="last"), resume=True)


def test_disk_use(tmp_path):
    """What is said at the start is what a checkpoint takes; LoRA saves its adapters alone."""
    sizes = {}
    for lora_rank, keep, held in ((0, "last", "1"), (0, "all", "all 2"), (2, "best", "at most 2")):
        models, optimizer = lco.build(lco.Args(dtype="float32", lora_rank=lora_rank), torch.device("cpu"))
        text = publish.disk_use(models, dict(keep=keep, steps=3, save_every=2))
        said = re.fullmatch(rf"disk: (\d+\.\d) MB per checkpoint; --keep {keep} keeps {held}, and one more .*", text)
        common.save_checkpoint(tmp_path / f"{lora_rank}{keep}", 1, models, optimizer)
        (file,) = (tmp_path / f"{lora_rank}{keep}").rglob("*.distcp")
        sizes[lora_rank] = float(said[1]), file.stat().st_size / 1e6
    assert sizes[0][0] == pytest.approx(sizes[0][1], rel=0.1) and sizes[0][0] > 7
    assert sizes[2][0] < sizes[0][0] / 10 and sizes[2][1] < sizes[0][1] / 10, sizes


def test_what_best_cannot_compare(base, out):
    """SEFT's reviser stage trains three models one after the other; a run without any of the metrics says so."""
    with pytest.raises(common.BadInput, match="--keep best: --stage reviser trains three models"):
        seft.train(seft.Args(stage="reviser", keep="best", out=out))
    run = common.Run(lco.Args(**base, out=out, keep="best"), lco.__file__)
    with pytest.raises(common.BadInput, match="none of the held-out metrics eval/greedy, eval/reward"):
        next(run.steps(torch.nn.Linear(1, 1), None, lambda: ({"kl/start": 0.0}, [])))


@pytest.mark.parametrize(
    "held_out, score",
    [
        ({"eval/nll": 3.0, "eval/reward": 0.2}, 0.2),
        ({"eval/nll": 3.0, "eval/pair_accuracy": 0.4}, 0.4),
        ({"eval/greedy": None, "eval/nll": 3.0}, -3.0),
    ],
)
def test_what_best_compares(held_out, score):
    """A grade before the accuracy on pairs, this before the NLL, of which less is better."""
    run = mock.Mock(settings={"keep": "best"}, best=common.Run.best, BY=common.Run.BY)
    common.Run._look_at(run, 7, held_out)
    assert run.best == (score, -7)


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A client that keeps what it is called with, in the place of huggingface_hub's."""
    import huggingface_hub

    api = mock.Mock()
    api.create_repo.side_effect = lambda name, **more: mock.Mock(
        repo_id=f"me/{name.rpartition('/')[2]}", __str__=lambda self: f"https://hub/{name}"
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **more: api)
    return api


def test_a_model_is_pushed_with_its_card(hub, base, out, capsys):
    """When the run has ended, and not before; into a private repository where there is none yet."""
    run_here(lco, 1, **base, out=out, push_to_hub="sums")
    assert not hub.create_repo.called and not hub.upload_folder.called
    there = []
    hub.upload_folder.side_effect = lambda folder_path, **more: there.extend(p.name for p in folder_path.iterdir())
    run_here(lco, **base, out=out, push_to_hub="sums", resume=True)
    hub.create_repo.assert_called_once_with("sums", private=True, exist_ok=True)
    (call,) = hub.upload_folder.call_args_list
    assert call.kwargs["repo_id"] == "me/sums" and call.kwargs["folder_path"] == Path(out) / "model"
    assert {"README.md", "config.json", "model.safetensors"} <= set(there)
    assert capsys.readouterr().out.splitlines()[-1] == "pushed to https://hub/sums"


def test_a_hub_that_fails_costs_nothing(hub, base, out, capsys):
    """At the end the model is in its folder, and the last line is the command that tries again."""
    hub.upload_folder.side_effect = ConnectionError("the network is down\nand more")
    folder = run_here(lco, **base, out=out, push_to_hub="me/sums")
    assert (folder / "model" / "model.safetensors").exists()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"not pushed (the network is down); again: hf upload me/sums {folder}/model"


def test_a_hub_without_a_login_is_refused(hub, refused):
    hub.whoami.side_effect = OSError("Token is required, but no token found.\nmore")
    refused(["--push_to_hub me/sums: Token is required, but no token found."], push_to_hub="me/sums")
    refused(["--push_to_hub a/b/c: ", "a/b/c"], push_to_hub="a/b/c")


RANKS = """
import json, sys
from unittest import mock

sys.path += sys.argv[2:]
import common, lco, lm
import huggingface_hub
from conftest import run_here

def main():
    scores, api = [0.1, 0.9, 0.2], mock.MagicMock()
    lm.Sampling.evaluate = lambda *a: ({"eval/greedy": scores.pop(0)}, [])
    api.upload_folder.side_effect = lambda **more: print(f"rank {common.rank()} of {common.world()} pushes", flush=True)
    huggingface_hub.HfApi = lambda **more: api
    run_here(lco, **json.load(open(sys.argv[1])))

common.launch(main, "cpu")
"""


def test_two_ranks(base, out, tmp_path):
    """All load the best checkpoint, one pushes, and the other waits for it."""
    (tmp_path / "driver.py").write_text(RANKS)
    (tmp_path / "settings.json").write_text(json.dumps(base | dict(out=out, keep="best", push_to_hub="me/sums")))
    done = run_script(tmp_path / "driver.py", tmp_path / "settings.json", Path(__file__).parent, ranks=2)
    assert done.stdout.count("pushes") == 1 and "rank 0 of 2 pushes" in done.stdout
    assert "eval/greedy 0.100 -> 0.900; model/ is that of step 1" in done.stdout and saved(out) == [1, 2]


def write_run(folder: Path, **settings) -> Path:
    """A folder as a run of dpo.py leaves it."""
    folder.mkdir()
    about = {"args": dict(model="builtin", steps=2) | settings, "command": "/somewhere/dpo.py --steps 2"}
    (folder / "args.json").write_text(json.dumps(about))
    (folder / "source.py").write_text(Path(dpo.__file__).read_text())
    lines = [{"step": s, "eval/nll": 0.5 - s / 10, "eval/new": None, "loss/dpo": 0.1} for s in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_card(tmp_path):
    """Names of the Hub are tags, files are not; the licence is left open."""
    folder = write_run(tmp_path / "run", model="Qwen/Qwen2.5-0.5B", dataset="trl-lib/pairs", reward_file="a/b.py")
    (tmp_path / "a").mkdir()
    text = publish.card(folder, "dpo", 2)
    tags = re.fullmatch(r"(?s)---\n(.*?)---\n\n# run\n.*", text)[1]
    assert 'base_model: ["Qwen/Qwen2.5-0.5B"]\ndatasets: ["trl-lib/pairs"]\n' in tags and "license" not in tags
    assert "\n    python dpo.py --steps 2\n" in text and "https://arxiv.org/abs/2305.18290" in text
    assert "| eval/nll | 0.5000 | 0.3000 |" in text and "eval/new" not in text and "- reward_file: `a/b.py`" in text
    bare = publish.card(write_run(tmp_path / "bare"), "dpo", 2)
    assert "base_model" not in bare and "datasets" not in bare and "- data: `the built-in task`" in bare
    text = publish.card(write_run(tmp_path / "gsm8k", task="gsm8k", dataset=""), "dpo", 2)
    assert 'datasets: ["openai/gsm8k"]' in text and "- dataset: `openai/gsm8k`" in text
    text = publish.card(write_run(tmp_path / "gym", task="gym:chain_sum", reward_file=""), "dpo", 2)
    assert "- task: `gym:chain_sum`" in text and "built-in" not in text


def test_a_card_that_was_changed_stays(base, out):
    """The owner's licence is still there when an ended run is resumed."""
    folder = run_here(lco, **base, out=out)
    card = folder / "model" / "README.md"
    assert f"- reward_file: `{base['reward_file']}`" in card.read_text() and "- step 2 of 2" in card.read_text()
    card.write_text("---\nlicense: mit\n---\n")
    run_here(lco, **base, out=out, resume=True)
    assert card.read_text() == "---\nlicense: mit\n---\n"


# ---- last lines ------------------------------------------------------------------------------------------------------


def test_last_lines(base, out, capsys):
    """Before and after, the time, the page, and a command that runs as it stands."""
    prompts = Path(out).with_name("prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(20)))
    with mock.patch.object(common.RunFolder, "report", lambda self: (self.path / "report.html").write_text("page")):
        lco.train(lco.Args(**base | dict(dataset=str(prompts), out=out)))
    ends = [read_metrics(out)[i]["eval/reward"] for i in (0, -1)]
    *_, first, page, last = capsys.readouterr().out.splitlines()
    assert re.match(rf"2 steps in 0:0\d:\d\d: eval/reward {ends[0]:.3f} -> {ends[1]:.3f}, ", first)
    assert page == f"report: {out}/report.html" and last.startswith("next: python evaluate.py ")
    words = shlex.split(last.removeprefix("next: python evaluate.py "))
    words += ["--samples_per_prompt", "2", "--out", f"{out}-2"]
    evaluate.evaluate(common.parse(evaluate.Args, evaluate.BUILTIN, words))
    assert read_metrics(f"{out}-2")[0]["eval/reward"] == pytest.approx(ends[1])


RL = dict(task="auto", dataset="", test_dataset="", reward_file="", test_rows=256, samples_per_prompt=8)
PAIRS = {name: value for name, value in RL.items() if name != "samples_per_prompt"}


@pytest.mark.parametrize(
    "settings, graded, words",
    [
        (RL, True, ""),
        (RL | dict(task="strings", test_rows=9), True, "--task strings --test_rows 9"),
        (RL | dict(dataset="openai/gsm8k"), True, "--dataset openai/gsm8k"),
        (RL | dict(temperature=0.7, seed=3, test_rows=1), True, "--test_rows 1 --temperature 0.7 --seed 3"),
        (RL | dict(dataset="p.jsonl", reward_file="r.py"), False, "--dataset p.jsonl --reward_file r.py"),
        (RL | dict(dataset="p.jsonl", reward_model="m"), False, "--dataset PROMPTS --reward_file REWARD"),
        (PAIRS, True, ""),
        (PAIRS | dict(dataset="x/pairs"), False, "--dataset PROMPTS --reward_file REWARD"),
        (PAIRS | dict(dataset="x/pairs", task="gsm8k"), True, "--task gsm8k"),
        (PAIRS | dict(dataset="x/pairs", task="math", test_dataset="t"), True, "--task math --test_dataset t"),
        (PAIRS | dict(dataset="p.jsonl", reward_file="r.py"), False, "--dataset p.jsonl --reward_file r.py"),
        (PAIRS | dict(dataset="p.jsonl", test_dataset="t"), True, "--test_dataset t"),
        (PAIRS | dict(dataset="p.jsonl", prompts="q.jsonl"), True, "--dataset q.jsonl"),
    ],
)
def test_the_command_that_evaluates(settings, graded, words):
    """--dataset of a script that learns from pairs holds pairs, and its --task has data of its own."""
    command = publish.evaluation(Path("runs/x"), settings, graded)
    assert command == f"python evaluate.py --model runs/x/model {words}".strip()

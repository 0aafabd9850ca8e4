"""Run folders: one process at a time, whole or named as not whole, and nothing in them is lost or trusted blindly."""

import importlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import typing
from pathlib import Path
from unittest import mock

import common
import evaluate
import lco
import lm
import pytest
import report
import tasks
from conftest import REWARD, TINY, flags, fork_script, read_metrics, run_here

import torch

ROOT = Path(common.__file__).parent


@pytest.fixture(scope="module")
def base(tiny_model, reward_file) -> dict:
    return TINY | dict(model=tiny_model, reward_file=reward_file, steps=2, eval_every=10)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """The folder of a run that was stopped after one step of two."""
    return run_here(lco, 1, **base, out=str(tmp_path_factory.mktemp("made") / "run"))


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "run")


def resume(base, run, **changes) -> Path:
    return run_here(lco, **base | {"out": str(run), "resume": True} | changes)


def refuse(base, run, *parts, **changes) -> None:
    """Going on is refused in one sentence with these parts, and no file of the folder but args.json is touched."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != "args.json"] if os.path.isdir(run) else []
    before = {p: p.read_bytes() for p in files}
    with pytest.raises(common.BadInput) as error:
        resume(base, run, **changes)
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message, message
    assert before == {p: p.read_bytes() for p in before}


# ---- one process -----------------------------------------------------------------------------------------------------


def test_one_process_at_a_time(base, run, tmp_path):
    """A second process is refused, with --resume and without, until the first one is dead, however it died."""
    (tmp_path / "new").mkdir()
    held, hold = os.pipe()
    child = os.fork()
    if child == 0:
        locks = [common._lock(run), common._lock(tmp_path / "new")]
        os.write(hold, b"." * len(locks))
        time.sleep(100)
        os._exit(0)
    try:
        os.read(held, 1)
        refuse(base, run, "--out", "another process is using it")
        refuse(base, tmp_path / "new", "another process is using it", resume=False)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert [line["step"] for line in read_metrics(resume(base, run))] == [0, 1, 2]
    run_here(lco, 1, **base, out=str(tmp_path / "new"))


@pytest.mark.parametrize("kind", ["a file", "below a file", "a dangling link", "too long"])
def test_out_that_cannot_be_a_folder(kind, base, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    long = tmp_path / ("x" * 300)
    out = {"a file": file, "below a file": file / "x", "a dangling link": link, "too long": long}[kind]
    refuse(base, out, f"--out {out}: ", resume=False)
    assert file.read_text() == "mine"


def test_a_run_that_logged_nothing_leaves_no_folder(base, tmp_path):
    """An error before the first line: exit code 2, one sentence, and the corrected command may use the name."""
    bad, data, log = tmp_path / "bad.py", tmp_path / "data.jsonl", tmp_path / "log"
    bad.write_text("def reward(prompts, completions, rows):\n    return []\n")
    data.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(20)))
    settings = base | {"out": tmp_path / "run", "dataset": data, "reward_file": bad}
    process = fork_script("lco.py", *flags(**settings), log=log)
    process.join(60)
    assert process.exitcode == 2 and "lco.py: error: " in log.read_text() and "Traceback" not in log.read_text()
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_killed_before_it_logged_is_begun_again(base, run):
    """Without --resume too: there is nothing to lose, but for a file of the user's."""
    shutil.rmtree(run / "checkpoint")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).write_text("")
    (run / "notes.txt").write_text("mine")
    refuse(base, run, "exists and is not empty", resume=False)
    (run / "notes.txt").unlink()
    run_here(lco, 1, **base | {"lr": 0.5}, out=str(run))


def test_nothing_but_its_own_files_is_removed(base, run):
    """Copies beside checkpoints and notes beside a model stay; what a killed run left goes, after the last step too."""
    mine = [run / "checkpoint" / "best", run / "checkpoint" / "step-000001-good", run / "model"]
    for folder in mine:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    resume(base, run)
    for name in ("tmp-000002", "step-000001"):
        (run / "checkpoint" / name).mkdir()
    before = (run / "model" / "model.safetensors").read_bytes()
    resume(base, run)
    assert all((folder / "notes.txt").read_text() == "mine" for folder in mine)
    assert sorted(p.name for p in (run / "checkpoint").iterdir()) == ["best", "step-000001-good", "step-000002"]
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert not list(run.glob("*.part"))


def test_all_files_have_the_same_mode(base, run):
    modes = {p.name: oct(p.stat().st_mode) for p in resume(base, run).rglob("*") if p.is_file()}
    assert len(set(modes.values())) == 1, modes


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_has_no_model(base, run):
    """It says so to whoever takes its folder for a model; the resumed run has one."""
    assert not (run / "model").exists()
    for name in (run, run / "model"):
        with pytest.raises(common.BadInput, match=re.escape(f"the run in {run} has not ended (--resume)")):
            lm.load_tokenizer(str(name))
    with pytest.raises(common.BadInput, match="has not ended"):
        evaluate.evaluate(evaluate.Args(model=str(run / "model"), dataset=""))
    resume(base, run)
    with pytest.raises(common.BadInput, match=re.escape(f"its model is {run}/model")):
        lm.load_tokenizer(str(run))
    lm.load_tokenizer(str(run / "model"))


def test_a_line_of_a_step_is_broken_by_a_terminal_only(tmp_path, monkeypatch, capsys):
    """Between metrics, never inside one; a file has one line per step."""
    run = mock.Mock(path=tmp_path, total=2, tracker=None, first=(0, 100.0))
    monkeypatch.setattr(common, "time", mock.Mock(time=lambda: 160.0))
    for columns, lines in (("", 1), ("40", 4)):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(columns), raising=False)
        common.RunFolder.log(run, 1, {"reward/mean": 0.5, "loss/policy": -7.5e-05, "eval/greedy": 0.125})
        shown = capsys.readouterr().out.rstrip("\n").split("\n")
        assert len(shown) == lines and max(map(len, shown)) <= int(columns or 200)
        text = "step 1/2  reward 0.5  loss/policy -7.5e-05  eval/greedy 0.125  60.00 s/step  0:01:00 left"
        assert "  ".join(line.strip() for line in shown) == text


def test_a_page_that_fails_does_not_cost_the_model(base, run, monkeypatch, capsys):
    monkeypatch.setattr(report, "write_report", mock.Mock(side_effect=ValueError("no such font")))
    lco.train(lco.Args(**base | {"out": str(run), "resume": True}))
    assert (run / "model" / "model.safetensors").exists()
    assert "no plot or page could be written (ValueError: no such font)" in capsys.readouterr().out


def test_names_with_mathtext(made, tmp_path):
    """A folder whose name is broken mathtext is drawn as it is."""
    run = shutil.copytree(made, tmp_path / "x$^$_{")
    report.write_report(run)
    assert (run / "plot.png").stat().st_size > 10_000


def test_second_signal_leaves_a_run_that_hangs(base, tmp_path):
    """reward() never returns: the first SIGTERM waits for the step, a second one a moment later does not."""
    hang, log = tmp_path / "hang.py", tmp_path / "log"
    hang.write_text("import time\ndef reward(prompts, completions, rows):\n    print('hanging', flush=True)\n")
    hang.write_text(hang.read_text() + "    time.sleep(1000)\n")
    process = fork_script("lco.py", *flags(**base | {"reward_file": hang, "out": tmp_path / "run"}), log=log)
    end = time.time() + 60
    while "hanging" not in (log.read_text() if log.exists() else "") and time.time() < end:
        time.sleep(0.05)
    for _ in range(2):  # at once, as torchrun and the user's shell may send it
        os.kill(process.pid, signal.SIGTERM)
    process.join(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def newest(run) -> Path:
    return run / "checkpoint" / "step-000001"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit(name, place, base, run):
    path = newest(run) / name
    flip(path, int(place * path.stat().st_size))
    refuse(base, run, f"checkpoint {newest(run)} is damaged: {name} is [{path.stat().st_size}, ")


def test_a_renamed_checkpoint(base, run):
    other = newest(run).rename(run / "checkpoint" / "step-000002")
    refuse(base, run, f"checkpoint {other} was saved after step 1")


@pytest.mark.parametrize("text", ["", '{"step": 1, "fil', "[]", "{}", '{"a": 12}', '{"step": 1, "files": {}}'])
@pytest.mark.parametrize("name", ["args.json", "manifest.json"])
def test_torn_descriptions(name, text, base, run):
    path = run / name if name == "args.json" else newest(run) / name
    path.write_text(text)
    refuse(base, run, name)


def test_a_checkpoint_that_would_run_code(base, run):
    """The index of a checkpoint is a pickle: one that calls anything but what torch writes there is refused."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run / "hacked"),)

    index = newest(run) / ".metadata"
    index.write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    manifest["files"][".metadata"] = common._size_and_hash(index)
    (newest(run) / "manifest.json").write_text(json.dumps(manifest))
    refuse(base, run, "the checkpoint's .metadata would run posix.mkdir")
    assert not (run / "hacked").exists()


def test_broken_weights_never_replace_a_checkpoint(base, run):
    """Weights that a step has blown up, NaN or not yet, are not saved, and the run ends with a sentence."""
    expected = "the weights after step {} are not finite or above 1e18, and are not saved"
    with pytest.raises(FloatingPointError, match=expected.format(1)):
        run_here(lco, **base | dict(lr=1e30, minibatches=1, save_every=1, out=str(run.parent / "new")))
    assert common.latest_checkpoint(run.parent / "new") is None
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for value in (float("nan"), float("inf"), -2e29):
        with torch.no_grad():
            model.weight[1, 2] = value
        with pytest.raises(FloatingPointError, match=expected.format(7)):
            common.save_checkpoint(run, 7, model, optimizer)
    assert common.latest_checkpoint(run) == (1, newest(run))


def test_a_model_of_nan(base, tiny_model, tmp_path):
    """Its logits are named, greedy or sampled, instead of an index out of range."""
    device = torch.device("cpu")
    model = lm.load_model(tiny_model, device=device)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    noise = common.uniforms(0, common.TRAIN, 0, [0], 4)
    for u in (None, noise):
        with pytest.raises(FloatingPointError, match="the logits of the model that answers are not finite"):
            lm.generate(model, [[3, 4]], max_new_tokens=4, noise=u, stop_ids=[2], pad_id=0)


def test_nothing_is_logged_that_is_not_json(run):
    folder = mock.Mock(path=run, total=2)
    with pytest.raises(FloatingPointError, match="eval/nll"):
        common.RunFolder.log(folder, 2, {"eval/nll": float("nan"), "loss/total": 1.0, "revise/auc": None})
    assert len(read_metrics(run)) == 2


@pytest.mark.parametrize("bytes_left", [1000, 100_000])
def test_a_full_disk_is_one_sentence(bytes_left, base, tmp_path):
    """No more than so many bytes fit into a file: of the arguments, or of a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
        with pytest.raises(BaseException) as error:
            run_here(lco, 1, **base, out=str(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = common._sentence(error.value)
    assert "\n" not in sentence and len(sentence) < 500 and str(tmp_path / "run") in sentence
    assert ("File too large" if bytes_left == 1000 else "MiB are free: ") in sentence


def test_other_errors_keep_their_place():
    assert not common._sentence(FileNotFoundError(2, "No such file", "x")) and not common._sentence(KeyError("x"))


# ---- what a resumed run reads ----------------------------------------------------------------------------------------


def test_changed_code_is_told_and_kept(base, tmp_path, capfd):
    """A script or reward file that was changed is named, the run goes on, and the old script stays beside the new."""
    script, reward = Path(shutil.copy(ROOT / "lco.py", tmp_path)), tmp_path / "reward.py"
    reward.write_text(REWARD)
    settings = base | {"reward_file": str(reward)}
    with mock.patch.object(lco, "__file__", str(script)):
        run = run_here(lco, 1, **settings, out=str(tmp_path / "run"))
        resume(settings, shutil.copytree(run, tmp_path / "same"))
        assert "WARNING" not in capfd.readouterr().err
        script.write_text(script.read_text() + "# changed\n")
        reward.write_text(REWARD + "# changed\n")
        resume(settings, run)
    assert f"WARNING: lco.py, --reward_file {reward} changed since the run in {run} began" in capfd.readouterr().err
    (old,) = run.glob("source-until-*.py")
    assert (run / "source.py").read_text() == old.read_text() + "# changed\n"


def test_what_a_reward_file_imports_is_watched(tmp_path, monkeypatch):
    """Modules beside it or below its folder, whether it is named by an absolute path or not; but no installed ones."""
    for name in ("beside_it", "parts/below_it", "site-packages/installed_beside_it", "never_imported"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("x = 1\n")
    reward = tmp_path / "with_imports.py"
    lines = ["import beside_it, parts.below_it, sys", "sys.path.append('site-packages')", "import installed_beside_it"]
    reward.write_text("\n".join(lines) + REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tasks.load_reward("with_imports.py")
    before = common._watch(Path(lco.__file__), {"reward_file": "with_imports.py"})
    own = {"--reward_file with_imports.py", "beside_it.py", "parts/below_it.py"}
    code = {"lco.py", "common.py", "lm.py", "gpu.py", "tasks.py", "graders.py", "builtin/tasks.py", "builtin/gym.py"}
    assert before.keys() == own | code
    (tmp_path / "parts" / "below_it.py").write_text("x = 2\n")
    after = common._watch(Path(lco.__file__), {"reward_file": str(reward)})
    assert [name for name in after if before.get(name, after[name]) != after[name]] == ["parts/below_it.py"]


def test_words_are_no_files(base, tmp_path, monkeypatch):
    """A folder with the name of a --loss is not what the argument means, even where it is that of the run."""
    monkeypatch.chdir(tmp_path)
    settings = base | dict(loss="lch", out="lch")
    run_here(lco, 1, **settings)
    assert run_here(lco, **settings, resume=True).joinpath("model").is_dir()
    words = {"task", "out", "push_to_hub", "ask", "then", "keep_threshold"}
    for script in map(importlib.import_module, ("ppo_baseline", "lco", "qrm", "dpo", "dckd", "adpa", "seft")):
        texts = {name for name, kind in typing.get_type_hints(script.Args).items() if kind is str}
        assert texts <= common.NAMES_FILES | words, "an argument that may or may not name a file"


def test_a_tilde_is_a_home(tmp_path, monkeypatch):
    """A shell does not expand --dataset=~/x.jsonl, and interactive.run() has none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text("{}")
    assert "--dataset ~/x.jsonl" in common._watch(Path(lco.__file__), {"dataset": "~/x.jsonl"})


def test_another_commit_of_a_hub_model_is_refused(base, run, tmp_path, monkeypatch):
    """A name of the Hub is compared by the commit that was fetched last."""
    ref = tmp_path / "models--org--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("a" * 40)
    monkeypatch.setattr(common, "HF_HUB_CACHE", str(tmp_path))
    about = json.loads((run / "args.json").read_text())
    about["args"]["model"] = "org/name"
    about["watched"] = common._watch(Path(lco.__file__), about["args"])
    assert "--model org/name" in about["watched"]
    (run / "args.json").write_text(json.dumps(about))
    ref.write_text("b" * 40)
    settings = about["args"] | {"out": str(run), "resume": True}
    with pytest.raises(common.BadInput, match="the content of --model org/name is not that with which"):
        common.Run(lco.Args(**settings), lco.__file__)


def test_changed_data_are_refused(base, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(20)))
    settings = base | {"dataset": str(data)}
    run = run_here(lco, 1, **settings, out=str(tmp_path / "run"))
    data.write_text(data.read_text().replace("7+1", "8+1"))
    refuse(settings, run, f"the content of --dataset {data} is not that with which")


def test_a_changed_model_is_refused(base, tiny_model, tmp_path):
    """A weight that differs is another model; a copy with a README is the same."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = base | {"model": str(model), "lora_rank": 4}
    run = run_here(lco, 1, **settings, out=str(tmp_path / "run"))
    (model / "README.md").write_text("hello")
    resume(settings, shutil.copytree(run, tmp_path / "same"))
    flip(model / "model.safetensors", -1)
    refuse(settings, run, f"the content of --model {model} is not that with which")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda lines: lines[:1], "steps that are missing: [1]"),
        (lambda lines: [], "steps that are missing: [0, 1]"),
        (lambda lines: [lines[0], '{"step": 1, "a\0\n', lines[1]], "damaged lines, taken out: 1"),
        (lambda lines: [*lines, "[1]\n", "\n"], "damaged lines, taken out: 2"),
    ],
)
def test_metrics_that_are_cut_or_damaged(damage, said, base, run, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(damage(lines)))
    resume(base, run)
    assert f"{run}/metrics.jsonl: {said}" in capsys.readouterr().out
    assert read_metrics(run)[-1]["step"] == 2


def test_missing_metrics(base, run, capsys):
    (run / "metrics.jsonl").unlink()
    resume(base, run)
    assert "metrics.jsonl: steps that are missing: [0, 1]" in capsys.readouterr().out


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lr", "1", "--steps", "3", "--lr", "2"], "--lr is given twice"),
        (["--resume", "--resume"], "--resume is given twice"),
        (["--seed", str(2**64)], f"--seed must be below 2**63, found {2**64}"),
        (["--steps", "9" * 400], "--steps must be below 2**63, found 999"),
    ],
)
def test_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_args(lco.Args, lco.BUILTIN, words)
    assert stop.value.code == 2 and message in capsys.readouterr().err

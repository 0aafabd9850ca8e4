"""benchmarks/departures: each patch applies to the scripts as they are, is small, and does what the study measures."""

import dataclasses
import importlib
import importlib.util
import itertools
import math
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import common
import pytest
from conftest import ROOT, read_metrics, run_here

import torch

sys.path.insert(0, str(ROOT / "benchmarks"))
import study  # noqa: E402

PATCHES = sorted((ROOT / "benchmarks" / "departures").glob("*.patch"))


@pytest.fixture
def patched(tmp_path):
    """patched(name): the script that a patch changes, with it applied, as a module."""

    def load(name: str):
        script = next(p for p in PATCHES if p.stem == name).read_text().splitlines()[0].removeprefix("--- a/")
        (tmp_path / name).mkdir()
        file = study.departed([name], tmp_path / name) / script
        spec = importlib.util.spec_from_file_location(f"patched_{name}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there for their types
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_applies(patch):
    changed = [line for line in patch.read_text().splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) <= 15
    subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", [name for name, each in study.STUDIES.items() if "commit" not in each])
def test_scripts_take_the_commands_of_studies(name, patched):
    """Each command of a study, with its patch applied, is one that the script of today understands."""
    each, modules = study.STUDIES[name], {}
    prepare = each.get("prepare", {})
    for setting, command in (prepare | each["settings"]).items():
        line = study.full_command(name, setting, command).removeprefix("python ")
        script, *words = shlex.split(line.format(**{other: other for other in prepare}))
        script, *patches = script.split("@")
        if script == "benchmarks/diagnose.py":
            script, *words = words
        if script.startswith("benchmarks/"):
            continue
        for patch in patches or [script.removesuffix(".py")]:
            if patch not in modules:
                modules[patch] = patched(patch) if patches else importlib.import_module(patch)
            common.parse_args(modules[patch].Args, modules[patch].BUILTIN, words)


def test_a_study_of_an_earlier_commit(tmp_path):
    """The scripts that its commands name, and the stages that they ask for, are those of that commit."""
    for name, each in study.STUDIES.items():
        if "commit" in each:
            (tmp_path / name).mkdir()
            folder = study.checked_out(each["commit"], tmp_path / name)
            for command in (each["prepare"] | each["settings"]).values():
                script, *words = shlex.split(command)
                source = (folder / script).read_text()
                assert all(f"    {word[2:]}: " in source for word in words if word.startswith("--")), command


def test_moving_target(patched):
    """The target starts from the current logits: the gap is -A / beta at any z, never nearer to a target."""
    lco = patched("moving_target")
    z, old, A = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(lco.target_gap(z, old, A, 0.5), -A / 0.5)


def test_signed_means(patched):
    """The mean over tokens with A > 0 plus the mean over the others, once divided by N."""
    lco = patched("signed_means")
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    batch = {"mask": mask, "rewards": torch.tensor([[1.0], [0], [0], [1]]) * (mask.cumsum(1) == 1)}
    lco.estimate_advantages(batch, lco.Args(samples_per_prompt=2))
    per_token, up = torch.randn(4, 4), mask & (batch["advantages"] > 0)
    expected = per_token[up].mean() + per_token[mask & ~up].mean()
    torch.testing.assert_close((per_token * batch["token_weight"]).sum() / mask.sum(), expected)


def test_not_centred_and_value_weight(patched):
    ppo = patched("not_centred")
    x, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2).bool()
    torch.testing.assert_close(ppo.whiten(x, mask), x)
    ppo, batch = patched("value_weight"), {"mask": mask, "rewards": x, "values": torch.full((1, 2), 100.0)}
    ppo.estimate_advantages(batch, ppo.Args(advantage="token"))
    torch.testing.assert_close(batch["advantages"], x - 1)


@pytest.mark.parametrize("name", ["old_topk", "balanced_fill", "signed_means"])
def test_a_patched_script_trains(name, patched, tmp_path):
    lco, run = patched(name), tmp_path / "run"
    words = "--loss kld --negative_beta_scale 1 --steps 1 --prompts_per_step 4 --samples_per_prompt 4 --test_rows 4"
    args = common.parse_args(lco.Args, lco.BUILTIN, [*words.split(), "--out", str(run)])
    run_here(lco, **dataclasses.asdict(args))
    assert (run / "model").exists() and (run / "source.py").read_text() == Path(lco.__file__).read_text()


def test_labels_of_other_rules(patched):
    """The gap alone moves with a habit of copying; hardness never says No and splits at the median."""
    gap, hardness = patched("seft_gap"), patched("seft_hardness")
    assert gap.need(-1.0, -2.0, -0.5, -3.0) == 1.0 and gap.need(-1.0, 1.0, 2.5, -3.0) == -2.0
    assert hardness.need(-1.0, 0.0, 0.0, 0.0) == 1.0
    assert hardness.labels_of([0.0, 0.2, 3.0], [0.1, 0.2, 3.0]) == [hardness.MINOR, hardness.MINOR, hardness.MAJOR]


SEFT = "--builtin_pairs 40 --test_rows 4 --prompts_per_step 4 --unannotated 8"
SEFT += " --warmup_reviser_steps 2 --reviser_steps 1"
SEFT_STAGES = {
    "seft_plain": ["--stage reviser", "--stage evolve --revise always --reviser builtin"],
    "seft_direct": ["--stage evolve --revise always --reviser builtin"],
    "seft_gold": ["--stage evolve --revise never --gold_slip 0.5"],
    "seft_flip": ["--stage reviser --flip 0.5"],
    "seft_from_start": ["--stage reviser"],
    "seft_order": ["--stage evolve --revise never --order hard_to_easy"],
    "seft_pairs_threshold": ["--stage evolve --reviser builtin"],
}


@pytest.mark.parametrize("name", SEFT_STAGES)
def test_patched_seft_trains(name, patched, tmp_path):
    """Each in this process, with the arguments that the studies give it."""
    seft = patched(name)
    for i, words in enumerate(SEFT_STAGES[name]):
        argv = [*SEFT.split(), "--steps", "2", *words.split(), "--out", str(tmp_path / f"run-{i}")]
        with mock.patch.object(common.RunFolder, "report"):
            seft.train(common.parse_args(seft.Args, seft.BUILTIN, argv))
        lines = read_metrics(tmp_path / f"run-{i}")
        assert all(x is None or math.isfinite(x) for line in lines for x in line.values())
        assert ("loss/label" in lines[-1]) == ("reviser" in words.split() and name != "seft_plain")


def test_edits():
    """Against the recursive definition, on strings of up to 3 letters over 2; unfit and kept answers do not count."""

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = [list(w) for n in range(4) for w in itertools.product([1, 2], repeat=n)]
    assert all(study.edit_distance(a, b) == slow(a, b) for a in words for b in words)
    fates = [(0, None, [1, 3]), (0, None, [1, 3, 4]), (0, "echo", [9] * 9), (2, None, [1, 2])]
    answers = [dict(label=label, fault=fault, ids=[1, 2], target=target) for label, fault, target in fates]
    assert study.edits_of(answers) == {"revise/distance_major": 1.5, "revise/distance_minor": None}

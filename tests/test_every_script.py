"""What holds for every script: 2 ranks are 1, a stop changes nothing, and check.py passes, or finds what is broken.

One table of jobs; a job runs once on one rank and once on two, and all that is compared comes from these runs.
"""

import functools
import importlib
import json
import math
import re
import sys
from pathlib import Path

import adpa
import check
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
from builtin import tasks as toys
from conftest import REWARD, ROOT, TINY, assert_same_metrics, check_here, read_metrics, run_here, run_forked

sys.path.insert(0, str(ROOT / "benchmarks"))
import answers  # noqa: E402

import torch  # noqa: E402

# Held-out rows do not divide among 2 ranks. Words in capitals: see `files`.
SMALL = dict(model="MODEL", max_prompt=24, max_new_tokens=24, micro_batch=4, eval_every=2, lr=3e-4)
PAIRS = SMALL | dict(steps=3, prompts_per_step=4, test_rows=5, dataset="PAIRS")
RL = TINY | dict(model="MODEL", reward_file="REWARD", lr=3e-4)
SEFT = SMALL | dict(steps=4, rounds=2, prompts_per_step=4, max_prompt=18, max_new_tokens=20, test_rows=5, eval_every=10)
SEFT |= dict(builtin_pairs=12, unannotated=16, reviser_lr=1e-3, calibration=4, ask="==", labels=["++", "+=", "=+"])
SEFT |= dict(lora_rank=0, warmup_reviser_steps=2, reviser_steps=2, keep_threshold="0.3")
EVAL = dict(model="MODEL", max_prompt=24, max_new_tokens=12, test_rows=5, samples_per_prompt=4, rollout_rows=8)
RATE = dict(pairs="PREFERENCES", test_pairs=5, micro_batch=2)
BASE = {  # of each script: settings, and to what relative error and floor two ranks agree; Adam amplifies rounding
    ppo_baseline: (RL, 1e-5, 1e-6),
    lco: (RL, 1e-5, 1e-6),
    qrm: (SMALL | dict(warmup_steps=1, pairs="PREFERENCES", pairs_per_step=4, test_pairs=5, lr=3e-3), 1e-4, 1e-5),
    dpo: (PAIRS, 2e-5, 1e-6),
    dckd: (PAIRS | dict(teacher="builtin"), 2e-5, 1e-6),
    adpa: (PAIRS | dict(teacher="builtin", ref_teacher="builtin-small"), 2e-5, 1e-6),
    seft: (SEFT | dict(stage="evolve", reviser="builtin"), 3e-4, 1e-6),
    evaluate: (dict(model="MODEL"), 1e-4, 1e-6),
    answers: (dict(model="GPT2", max_prompt=48, max_new_tokens=8, generator="mine"), 1e-4, 1e-6),
}
JOBS = {  # name: script, what it changes
    "ppo": (ppo_baseline, dict(steps=4, advantage="gae", critic_warmup=2, kl_coef=0.1)),
    "kld": (lco, dict(loss="kld", advantage="group")),
    "mse": (lco, dict(loss="mse", advantage="gae", beta=2.0)),
    "lco lora": (lco, dict(loss="kld", advantage="group", epochs=2, lora_rank=4, kl_coef=0.1)),
    "sparse": (lco, dict(loss="mse", advantage="group", samples_per_prompt=2, steps=6, reward_file="SPARSE")),
    "qrm": (qrm, {}),
    "qrm lm": (qrm, dict(head="lm")),
    "orm": (qrm, dict(objective="orm")),
    "qrm lora": (qrm, dict(head="lm", lora_rank=4)),
    "dpo": (dpo, dict(nll=0.5)),
    "dpo lora": (dpo, dict(lora_rank=4)),
    "sft": (dpo, dict(loss="sft")),
    "dckd": (dckd, {}),
    "adpa": (adpa, dict(refresh_every=2, state_temperature=1.0)),
    "adpa lora": (adpa, dict(lora_rank=4)),
    "opd": (adpa, dict(objective="opd", refresh_every=1, state_temperature=1.0)),
    "reviser": (seft, dict(stage="reviser", reviser="", model="builtin")),
    "evolve": (seft, dict(keep_threshold="auto", pair_share=0.5)),
    "evolve lora": (seft, dict(lora_rank=4)),
    "accuracy": (evaluate, EVAL),
    "rate orm": (evaluate, RATE | dict(reward_model="ORM")),
    "rate dpo": (evaluate, RATE | dict(reward_model="DPO", reward_ref="MODEL")),
    "mt_bench": (answers, dict(format="mt_bench", dataset="QUESTIONS")),
}
TRAINED = [name for name, (script, _) in JOBS.items() if script not in (evaluate, answers)]
# A signal in one prompt of two: often on one rank alone, where both must update the policy, and often on none.
SPARSE = f"""{REWARD.replace("reward(", "varied(")}
def reward(prompts, completions, rows):
    return [x * (sum(map(ord, p)) % 2) for x, p in zip(varied(prompts, completions, rows), prompts)]
"""
QUESTIONS = [{"question_id": i, "category": "math" * (i % 2), "turns": [f"{i}+2=", "3+4="]} for i in (82, 81, 83)]
DRIVER = """
import importlib, json, sys
sys.path += sys.argv[2:]
import common
from conftest import run_here

def main():
    for script, stop_after, settings in json.load(open(sys.argv[1])):
        run_here(importlib.import_module(script), stop_after, **settings)

common.launch(main, "cpu")
"""


def written(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tiny_model, gpt2_model, reward_file, few_pairs, judges, tmp_path_factory) -> dict:
    """What stands for the words in capitals."""
    home = tmp_path_factory.mktemp("files")
    (home / "sparse.py").write_text(SPARSE)
    known = dict(MODEL=tiny_model, GPT2=gpt2_model, REWARD=reward_file, SPARSE=str(home / "sparse.py"), PAIRS=few_pairs)
    known |= dict(ORM=judges["last"]["reward_model"], DPO=judges["sum"]["reward_model"])
    known |= dict(PREFERENCES=judges["last"]["pairs"])
    return known | dict(QUESTIONS=written(home / "questions.jsonl", QUESTIONS))


@pytest.fixture(scope="module")
def settings_of(files):
    """settings_of(name, **changes): all settings of a job."""

    def settings(name: str, **changes) -> dict:
        script, more = JOBS[name]
        whole = BASE[script][0] | more | changes
        return {key: files.get(value, value) if isinstance(value, str) else value for key, value in whole.items()}

    return settings


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(settings_of, tmp_path_factory):
    """alone(name): the run folder of a job on one rank."""
    home = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda name: run_here(JOBS[name][0], **settings_of(name), out=str(home / name)))


@pytest.fixture(scope="module")
def two_ranks(settings_of, tmp_path_factory):
    """Run folders of all jobs, of one in bfloat16 and of one that was stopped, from a single torchrun on two ranks."""
    home = tmp_path_factory.mktemp("two_ranks")
    jobs = [(JOBS[name][0].__name__, None, settings_of(name, out=str(home / name))) for name in JOBS]
    jobs.append(("lco", None, settings_of("kld", out=str(home / "bfloat16"), dtype="bfloat16")))
    jobs.append(("ppo_baseline", 2, settings_of("ppo", out=str(home / "stopped"))))
    (home / "driver.py").write_text(DRIVER)
    (home / "jobs.json").write_text(json.dumps(jobs))
    run_forked(home / "driver.py", home / "jobs.json", ROOT / "tests", ROOT / "benchmarks", ranks=2, timeout=600)
    return home


@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_are_one(name, alone, two_ranks):
    """1 process = 2 ranks in every metric, and in every answer of an evaluation."""
    one, two = alone(name), two_ranks / name
    _, relative, floor = BASE[JOBS[name][0]]
    assert_same_metrics(read_metrics(one), read_metrics(two), relative, floor)
    if name in TRAINED:
        return
    rows = [[json.loads(x) for x in (run / "samples.jsonl").read_text().splitlines()] for run in (one, two)]
    rows = [[{k: v for k, v in row.items() if k != "margin"} for row in some] for some in rows]
    assert rows[0] == rows[1] and len(rows[0]) >= 2
    if name != "mt_bench":
        found = [json.loads((run / "result.json").read_text())["metrics"] for run in (one, two)]
        assert found[0].keys() == found[1].keys()
        assert all(found[0][k] == pytest.approx(found[1][k], rel=1e-4, abs=1e-6) for k in found[0])


def test_rewards_have_a_signal(alone):
    """Where nothing is to be learnt, ranks agree on nothing; with a sparse signal some steps have no update."""
    for name in ("ppo", "kld", "mse", "lco lora"):
        assert read_metrics(alone(name))[1]["reward/spread"] > 0.5
    assert {line["policy/updates"] for line in read_metrics(alone("sparse"))[1:]} >= {0.0, 1.0}


def test_bfloat16_on_two_ranks(two_ranks):
    """bfloat16 under FSDP2 runs, and every metric is finite."""
    lines = read_metrics(two_ranks / "bfloat16")
    assert len(lines) == 4
    assert all(value is None or math.isfinite(value) for line in lines for value in line.values())


def test_two_rank_checkpoint_resumes_on_one(settings_of, alone, two_ranks):
    """A checkpoint of 2 ranks goes on on 1 rank as if it had never been 2."""
    assert len(read_metrics(two_ranks / "stopped")) == 3
    parts = run_here(ppo_baseline, **settings_of("ppo", out=str(two_ranks / "stopped"), resume=True))
    assert_same_metrics(read_metrics(alone("ppo")), read_metrics(parts))


# ---- resume ----------------------------------------------------------------------------------------------------------


def kept(run: Path) -> dict[str, bytes]:
    """The files of a run folder that know no clock."""
    names = ("samples.jsonl", "needs-*.jsonl", "rounds/*", "model/*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for name in names for path in run.glob(name)}


def assert_a_stop_changes_nothing(script, settings: dict, whole: Path, stops, out: str) -> None:
    for i, stop in enumerate([*stops, None]):
        parts = run_here(script, stop, **settings | dict(out=out, resume=i > 0))
        assert stop is None or len(read_metrics(parts)) == stop + 1
    assert read_metrics(whole) == read_metrics(parts)
    assert kept(whole) == kept(parts) and "model/model.safetensors" in kept(parts)


@pytest.mark.parametrize("name", TRAINED)
def test_stopped_after_each_step(name, settings_of, alone, out):
    """run(n) = n runs of one step, each resumed from the last, to the last bit of every metric and weight."""
    steps = read_metrics(alone(name))[-1]["step"]
    assert steps >= 3
    assert_a_stop_changes_nothing(JOBS[name][0], settings_of(name), alone(name), range(1, steps), out)


@pytest.mark.parametrize("name", ["lco lora", "dpo lora", "adpa lora", "evolve lora"])
def test_adapters_in_bfloat16_stopped(name, settings_of, out, tmp_path):
    """FSDP settles in the first forward what is trained, also where that is the reference's, without adapters."""
    settings = settings_of(name, dtype="bfloat16")
    whole = run_here(JOBS[name][0], **settings, out=str(tmp_path / "whole"))
    assert_a_stop_changes_nothing(JOBS[name][0], settings, whole, [1], out)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Large enough that operators split their work among threads.
LARGE = dict(steps=4, eval_every=4, test_rows=8)
LARGE_RL = LARGE | dict(prompts_per_step=8, samples_per_prompt=8, minibatches=2, warmup_steps=1)
TWO_THREADS = {
    ppo_baseline: LARGE_RL,
    lco: LARGE_RL,
    qrm: dict(pairs_per_step=32, epochs=2, test_pairs=8, eval_every=4),
    dckd: LARGE | dict(prompts_per_step=32),
    adpa: LARGE | dict(prompts_per_step=32),
    dpo: LARGE | dict(prompts_per_step=32),
    seft: LARGE | dict(stage="evolve", reviser="builtin", unannotated=96, builtin_pairs=64, calibration=8),
}


@pytest.mark.parametrize("script", TWO_THREADS, ids=lambda script: script.__name__)
def test_two_threads(script, two_threads, tmp_path):
    """With a user's default, not the one thread of other tests: run(4) = run(2) + resume(2), to the last bit."""
    settings = script.BUILTIN | TWO_THREADS[script]
    if script is qrm:
        settings |= dict(pairs=written(tmp_path / "pairs.jsonl", toys.preference_pairs(80, 0)))
    whole = run_here(script, **settings, out=str(tmp_path / "whole"))
    assert read_metrics(whole)[-1]["step"] == 4
    assert_a_stop_changes_nothing(script, settings, whole, [2], str(tmp_path / "parts"))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, roles",
    [
        *((name, roles) for name in ("ppo", "kld") for roles in (
            dict(reward_model="GPT2", reward_ref="GPT2"), dict(reward_model="MODEL", reward_ref="GPT2"))),
        ("dckd", dict(teacher="GPT2")),
        ("adpa", dict(teacher="GPT2")),
        ("adpa", dict(ref_teacher="GPT2")),
        ("evolve", dict(reviser="GPT2")),
        ("reviser", dict(reviser="GPT2", model="MODEL")),
        ("rate dpo", dict(reward_ref="GPT2", reward_model="MODEL")),
    ],
    ids=str,
)  # fmt: skip
def test_tokenizers_that_differ(name, roles, settings_of, files, out, monkeypatch):
    """Models that are compared token by token must have one vocabulary; said before a model is loaded."""
    monkeypatch.setattr(lm, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    message = re.escape(f"the tokenizers of {files['MODEL']} and {files['GPT2']} differ in")
    with pytest.raises(common.BadInput, match=message):
        run_here(JOBS[name][0], **settings_of(name, **roles), out=out)
    assert not Path(out).exists()


# ---- check.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["qrm", "dpo", "dckd", "adpa", "seft", "seft --task strings"])
def test_check_of_the_bare_command(script, capsys):
    """On the built-in model and task; that of lco.py is run from the command line in test_scripts.py."""
    name, *argv = script.split()
    script = importlib.import_module(name)
    check.Checks(script, common.parse_args(script.Args, script.BUILTIN, argv)).run()
    assert "all checks passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, changes",
    [
        ("ppo", {}),
        ("ppo", dict(loss="reinforce", advantage="reward", critic_warmup=0)),
        ("ppo", dict(lora_rank=4, dtype="bfloat16")),
        ("lco lora", dict(dtype="bfloat16")),
        ("kld", dict(advantage="gae", kl_coef=0.1)),
        ("mse", {}),
        ("kld", dict(loss="lch", advantage="token", reward_model="DPO", reward_ref="MODEL")),
        ("qrm lm", {}),
        ("accuracy", {}),
        ("rate orm", {}),
    ],
    ids=str,
)
def test_check_passes(name, changes, settings_of, capsys):
    check_here(JOBS[name][0], **settings_of(name, **changes))
    assert "all checks passed" in capsys.readouterr().out


def test_check_of_long_answers(settings_of, tmp_path, capsys):
    """check.py takes answers as long as those of training, and needs no external model, whose rounds it leaves out."""
    rows = [{"prompt": f"{i}+1=", "chosen": "1+" * 20, "rejected": "2+" * 20} for i in range(24)]
    pairs = dict(dataset=written(tmp_path / "long.jsonl", rows), max_prompt=8, max_new_tokens=50)
    check_here(dpo, **settings_of("dpo", **pairs))
    other = dict(model="builtin", external_model="builtin-small", external_rounds=1)
    check_here(seft, **settings_of("evolve", **other))
    assert capsys.readouterr().out.count("all checks passed") == 2


def replaced(monkeypatch, place, name, make) -> None:
    """make(the real function) stands in its place."""
    monkeypatch.setattr(place, name, make(getattr(place, name)))


def mean_of_a_micro_batch(script, monkeypatch):
    names = {ppo_baseline: "policy_objective", lco: "kld_objective", qrm: "pair_objective", seft: "weighted_nll"}

    def mean(real):
        def objective(*given):
            loss, metrics = real(*given)
            rows = [len(x["mask"]) for x in given if isinstance(x, dict) and "mask" in x] or [len(given[0])]
            return loss / rows[0], metrics

        return objective

    replaced(monkeypatch, script, names.get(script, "objective"), mean)


def leave_out_eos(script, monkeypatch):
    """Where answers are written down, and where they are sampled."""
    monkeypatch.setattr(common, "encode_completion", lambda t, text, *_: t(text, add_special_tokens=False)["input_ids"])
    if script in (ppo_baseline, lco):
        cut = lambda real: lambda p, completions, *rest: real(p, [c[:-1] or c for c in completions], *rest)  # noqa: E731
        replaced(monkeypatch, common, "make_batch", cut)


def shift_the_frozen_models(script, monkeypatch):
    def shifted(real):
        def read(model, batch):
            hidden = real(model, batch)
            return hidden if any(p.requires_grad for p in model.parameters()) else hidden.roll(1, 1)

        return read

    replaced(monkeypatch, lm, "completion_hidden", shifted)


def keep_dropout(script, monkeypatch):
    def load(real):
        def load_model(*args, **kwargs):
            model = real(*args, **kwargs)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.1
            return model

        return load_model

    replaced(monkeypatch, lm, "load_model", load)


def ignore_the_mask(script, monkeypatch):
    whole = lambda real: lambda m, attention_mask, **x: real(m, attention_mask=torch.ones_like(attention_mask), **x)  # noqa: E731
    replaced(monkeypatch, lm, "_final_hidden", whole)


def count_from_the_padding(script, monkeypatch):
    columns = lambda ids: torch.arange(ids.shape[1]).expand_as(ids)  # noqa: E731
    absolute = lambda real: lambda m, position_ids, **x: real(m, position_ids=columns(position_ids), **x)  # noqa: E731
    replaced(monkeypatch, lm, "_final_hidden", absolute)


def sample_from_the_top(script, monkeypatch):
    top = lambda logits: logits.masked_fill(logits < logits.topk(3).values[:, -1:], -1e9)  # noqa: E731
    replaced(monkeypatch, lm, "_pick", lambda real: lambda logits, *rest: real(top(logits), *rest))


def forget_the_optimizer(script, monkeypatch):
    def load(path, model, optimizer):
        state = {"model": common.get_model_state_dict(model)}
        common.dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state["model"])

    monkeypatch.setattr(common, "load_checkpoint", load)


def remember_other_logits(script, monkeypatch):
    scaled = lambda real: lambda *args: {name: 1.1 * weight for name, weight in real(*args).items()}  # noqa: E731
    replaced(monkeypatch, script, "evaluate_models", scaled)


def labels_of_the_batch(script, monkeypatch):
    """Normalised over a batch in the place of the three labels."""

    def mixed(real):
        def judge(reviser, answers, *rest):
            real(reviser, answers, *rest)
            for a, chances in zip(answers, torch.tensor([a.chances for a in answers]).softmax(0).tolist()):
                a.chances = chances

        return judge

    replaced(monkeypatch, script, "judge", mixed)


def keep_a_copy(script, monkeypatch):
    def copied(real):
        def revise(reviser, answers, *rest):
            real(reviser, answers, *rest)
            for a in answers:
                a.target = list(a.target)

        return revise

    replaced(monkeypatch, script, "revise", copied)


GPT2, WRITES = dict(model="GPT2"), dict(model="builtin")
FAULTS = [  # what is broken, what check.py finds, in which jobs, what they change
    (mean_of_a_micro_batch, "gradient ignores micro-batches", ("ppo", "kld", "qrm", "dpo", "dckd", "adpa"), {}),
    (mean_of_a_micro_batch, "gradient ignores micro-batches", ("evolve",), WRITES),
    (leave_out_eos, "EOS is inside the loss", ("ppo", "kld", "qrm", "dpo", "dckd", "adpa", "reviser"), {}),
    (shift_the_frozen_models, "a model is at distance 0 from itself", ("dckd", "adpa"), {}),
    (keep_dropout, "dropout is off", ("kld",), GPT2),
    (count_from_the_padding, "policy: padding and batch size", ("kld",), GPT2),
    (ignore_the_mask, "(policy|reward): padding and batch size", ("kld", "qrm", "dpo", "accuracy", "rate orm"), {}),
    (sample_from_the_top, "the sampler is the policy", ("kld", "accuracy"), {}),
    (forget_the_optimizer, "resuming changes nothing", ("kld",), {}),
    (remember_other_logits, ".*KL = 0 at the start", ("kld",), {}),
    (labels_of_the_batch, "labels are scored as a distribution", ("evolve",), WRITES),
    (keep_a_copy, "No keeps an answer as it is", ("evolve",), WRITES),
]
PLANTED = [(fault, found, name, changes) for fault, found, names, changes in FAULTS for name in names]


@pytest.mark.parametrize("fault, found, name, changes", PLANTED, ids=[f"{x[0].__name__}-{x[2]}" for x in PLANTED])
def test_check_finds(fault, found, name, changes, settings_of, monkeypatch, capsys):
    """check.py leaves with 1 at the first thing that is broken, and names it."""
    fault(JOBS[name][0], monkeypatch)
    with pytest.raises(SystemExit) as stop:
        check_here(JOBS[name][0], **settings_of(name, **changes))
    screen = capsys.readouterr().out
    assert stop.value.code == 1 and "all checks passed" not in screen
    assert re.search(rf"FAIL +{found}", screen), screen

"""The sampler is the policy: recomputed activations do not change it, and planted faults are found in any precision."""

from unittest import mock

import lm
import lco
import ppo_baseline
import pytest
from conftest import TINY, check_here, read_metrics, run_here

import torch

SCRIPTS = {"ppo_baseline": ppo_baseline, "lco": lco}
SMALL = TINY | dict(model="builtin", steps=1, max_new_tokens=24)
LOSSES = {"ppo_baseline": ["ppo"], "lco": ["kld", "mse", "lch"]}


@pytest.mark.parametrize("name", ["ppo_baseline", "lco"])
def test_recomputed_activations_change_nothing(name, tmp_path):
    """Transformers drops the KV cache of layers that recompute while they are in training mode."""
    runs = [
        read_metrics(run_here(SCRIPTS[name], **SMALL, activation_checkpointing=flag, out=str(tmp_path / str(flag))))
        for flag in (False, True)
    ]
    assert runs[0] == runs[1]
    assert runs[0][0]["eval/sampled"] > 0


def test_sampling_leaves_the_mode_as_it_was():
    model = lm.load_model("builtin", device=torch.device("cpu"))
    for mode in (True, False):
        model.train(mode)
        lm.generate(model, [[1, 2]], max_new_tokens=2, stop_ids=[0], pad_id=0)
        assert model.training is mode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, loss", [(name, loss) for name, losses in LOSSES.items() for loss in losses])
def test_a_healthy_run_is_not_stopped(name, loss, dtype, tmp_path):
    """Two minibatches, so that the first one is compared with the rollout policy."""
    lines = read_metrics(run_here(SCRIPTS[name], **SMALL | dict(steps=2, loss=loss, dtype=dtype, out=str(tmp_path))))
    for line in lines[1:]:
        assert line["policy/sampler_gap"] < lm.ON_POLICY[dtype] / 5


def hotter(model, prompt_ids, real=lm.generate, **settings):
    """A sampler at another temperature than the one that is trained."""
    return real(model, prompt_ids, **settings | {"temperature": 2.0})


def with_dropout(*given, real=lm.load_model, **settings):
    """A model whose dropout was left on, behind both halves of each layer."""
    model = real(*given, **settings)
    for layer in model.base_model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda m, i, o: torch.nn.functional.dropout(o, 0.1, m.training))
    return model


@pytest.mark.parametrize("fault", [("generate", hotter), ("load_model", with_dropout)], ids=lambda fault: fault[0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_planted_faults_stop_a_run(name, dtype, fault, tmp_path):
    settings = SMALL | dict(dtype=dtype, out=str(tmp_path / "run"))
    with mock.patch.object(lm, *fault), pytest.raises(RuntimeError, match="differs from the rollout policy"):
        run_here(SCRIPTS[name], **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [("generate", hotter), ("load_model", with_dropout)], ids=lambda fault: fault[0])
def test_planted_faults_fail_the_preflight(dtype, fault, capsys):
    with mock.patch.object(lm, *fault), pytest.raises(SystemExit):
        check_here(lco, **SMALL | dict(dtype=dtype))
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and ("sampler" in failed[0] or "padding" in failed[0] or "micro-batches" in failed[0])

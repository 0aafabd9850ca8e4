"""benchmarks/speed.py measures the same work on both sides."""

import sys
from types import SimpleNamespace

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed  # noqa: E402


def test_planned_lengths():
    """One of each row, the longest among them; unequal ones are a quarter of it on average, as an exponential's are."""
    assert speed.plan_lengths("equal", 3, 8) == [8, 8, 8]
    lengths = speed.plan_lengths("unequal", 64, 64)
    assert len(lengths) == 64 and max(lengths) == 64 and min(lengths) >= 2
    assert sum(lengths) / 64 == pytest.approx(16, rel=0.1) and lengths != sorted(lengths)


def test_slope():
    assert speed.slope([(x, 3 * x**1.5) for x in (1, 2, 5, 9)]) == pytest.approx(1.5)


@pytest.mark.parametrize("greedy", [True, False])
def test_both_sides_of_a_rollout_do_the_same(greedy):
    """Worker processes: our sampler and Hugging Face's make as many tokens as planned; greedy ones are identical."""
    args = SimpleNamespace(threads=1, peers="")
    lengths = speed.plan_lengths("unequal", 6, 12)
    order = dict(prompts=speed.make_prompts("builtin", 6, 9), lengths=lengths, greedy=greedy)
    said = {}
    for side in ("rollout", "hugging_face"):
        worker = speed.Worker(f"test {side}", dict(side=side, model=speed.model_folder("builtin")), args)
        for method in ("dynamic", "generate_batch") if side == "hugging_face" else ("ours",):
            said[method] = worker.ask(order | {"method": method})
        worker.close()
    for answer in said.values():
        assert answer["tokens"]["new"] == sum(lengths) and answer["seconds"] > 0
        assert answer["tokens"] == said["ours"]["tokens"] and answer["completions"] == said["ours"]["completions"]

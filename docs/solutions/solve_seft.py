"""Solutions of docs/seft.md: python docs/solutions/solve_seft.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

import seft  # noqa: E402


def exercise_1() -> None:
    """1. A bonus c is in l(y_l -> y_l) and in l(y_h -> y_h). The one-sided gap loses c, the need loses and gains it.
    The numbers of the page contain c = .4. Without a bonus rewriting is better by .3: from c = .3 on the gap says
    No."""
    up, stay, keep, down = -0.5, -0.8, -0.5, -0.9  # without any bonus: rewriting is better than copying by .3
    for c in (0.0, 0.2, 0.4):
        gap, value = up - (stay + c), seft.need(up, stay + c, keep + c, down)
        print(f"   bonus {c}: one-sided gap {gap:+.2f}, need {value:.2f}")
        assert abs(value - 0.7) < 1e-9 and (gap > 0) == (c < 0.3)


def exercise_2() -> None:
    """2. Always: p (1 - d) + (1 - p) f. Labels save p d r and lose (1 - p) f k. With k = .05, below break-even
    (.0924), they pay; with k = .15 they do not."""
    p, d, f, r = 0.42, 0.15, 0.87, 0.74
    rng = np.random.default_rng(0)
    right = rng.random(1_000_000) < p
    revised = np.where(right, rng.random(len(right)) >= d, rng.random(len(right)) < f)
    edge = p * d * r / ((1 - p) * f)
    for k in (0.05, 0.15):
        keep = rng.random(len(right)) < np.where(right, r, k)
        with_labels = np.where(keep, right, revised).mean()
        print(f"   k {k}: {with_labels:.4f} with labels, {revised.mean():.4f} without; break-even at {edge:.4f}")
        assert (with_labels > revised.mean()) == (k < edge)
        assert abs(with_labels - revised.mean() - (p * d * r - (1 - p) * f * k)) < 0.002


def exercise_3() -> None:
    """3. Keeping the first answer wins one, keeping the second loses one: the threshold lies between .6 and .9. If the
    first one is wrong, too, keeping never wins anything, and a threshold of 1 keeps nothing."""
    chances, revised = [0.9, 0.6, 0.2], [0.0, 1.0, 1.0]
    good, bad = (seft.best_threshold(chances, [first, 0.0, 1.0], revised) for first in (1.0, 0.0))
    print(f"   thresholds {good} and {bad}")
    assert good == 0.75 and bad == 1.0


if __name__ == "__main__":
    for exercise in (exercise_1, exercise_2, exercise_3):
        print(exercise.__doc__.strip(), "\n")
        exercise()

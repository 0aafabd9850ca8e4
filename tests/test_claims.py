"""benchmarks/claims.py: verdicts on made-up runs; marked numbers of README and docs are those that are stored."""

import importlib.util
import re
import sys
import tomllib

import numpy as np
import pytest
from conftest import ROOT


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


claims = load("claims")
study = claims.study
PAGES = {page.relative_to(ROOT).as_posix(): page for page in claims.PAGES}


@pytest.fixture(scope="module")
def lines():
    return [line for claim in claims.load_claims() for line in claims.judge(claim)]


# ---- what is stored is what is written -------------------------------------------------------------------------------


def test_page_is_current(lines):
    """docs/claims.md is what the stored runs say."""
    current = (ROOT / "docs" / "claims.md").read_text() == claims.page(lines)
    assert current, "docs/claims.md is out of date: run python benchmarks/claims.py"


@pytest.mark.parametrize("name", PAGES)
def test_numbers_are_those_of_the_stored_runs(name):
    """Every quoted number, every marked table and number of README and docs."""
    text = PAGES[name].read_text()
    fresh = claims.refresh(text, name)
    wrong = [(a, b) for a, b in zip(text.splitlines(), fresh.splitlines()) if a != b]
    assert fresh == text, f"{name}: run python benchmarks/claims.py\n{wrong[:3]}"


def test_quotes_are_of_pages():
    known = tomllib.loads((ROOT / "benchmarks" / "quotes.toml").read_text())
    assert set(known) <= set(PAGES) and all("{" in quote for page in known.values() for quote in page)


@pytest.mark.parametrize("name", [name for name in study.STUDIES if study.stored(name)])
def test_tables_of_results(name):
    """benchmarks/results/<study>.md is the table of its rows, and each row is of the command as it stands."""
    assert (study.RESULTS / f"{name}.md").read_text() == "\n".join(study.tables(name))
    known = study.STUDIES[name].get("prepare", {}) | study.STUDIES[name]["settings"]
    for row in study.stored(name):
        stale = row["command"] != study.full_command(name, row["setting"], known.get(row["setting"], ""))
        assert not stale, f"{name}: {row['setting']}: stored for another command"


def test_no_table_of_results_without_markers():
    """A cell like `.977 [.953, .977]` in a table is generated or quoted."""
    cell = re.compile(r"^\|.*\d*\.\d+ \[\d*\.\d+, \d*\.\d+\]", re.MULTILINE)
    for name, page in PAGES.items():
        if name != "docs/claims.md":  # generated as a whole
            rest = claims.BLOCK.sub("", page.read_text())
            for quote in claims.quotes(name):
                rest = claims.pattern(quote).sub("", rest)
            assert not cell.search(rest), f"{name}: {cell.search(rest)[0]}"


def test_a_changed_number_is_found():
    """In a table, in a sentence, in a quote, and with other rounding."""
    page = PAGES["docs/results/lco.md"].read_text()
    name = "docs/results/lco.md"
    for old, new in (("0.965 [", "0.966 ["), ("(.730 against", "(.731 against")):
        assert page.count(old) > 0 and claims.refresh(page.replace(old, new, 1), name) == page
    quote = "from {stability; PPO, lr 4e-4; eval/greedy; start} to {stability; PPO, lr 4e-4; eval/greedy; min} at worst"
    assert claims.requote("It fell from .2\nto 0.3 at worst.", quote) == "It fell from .2\nto 0.2 at worst."
    with pytest.raises(SystemExit, match="0 times instead of once"):
        claims.requote("It fell from .2 to 0.2.", quote)
    setting = "stability; PPO, lr 4e-4; eval/greedy; min"
    for written, expected in ((".1", ".2"), ("0.5", "0.2"), (".99999", ".21875"), ("7", "0")):
        assert claims.refresh(f"{written}<!-- {setting} -->") == f"{expected}<!-- {setting} -->"
    with pytest.raises(SystemExit, match="no stored run"):
        claims.refresh("1<!-- stability; PPO, lr 7; eval/greedy; min -->")


def test_columns_left_out():
    """Only those that are alike in every row."""
    table = "| setting | seeds | after |\n|---|---|---|\n| a | 5 | .1 [.0, .2] |\n| b | 5 | – |\n"
    short = "| setting | after |\n|---|---|\n| a | .1 [.0, .2] |\n| b | – |"
    long = table.replace("| b |", "| b: the other |")
    assert claims.without(table, ["seeds"]) == short == claims.without(long, ["seeds", "explanations"])
    assert claims.block("lco") != claims.block("lco without seeds")
    with pytest.raises(SystemExit, match="'after'"):
        claims.without(table, ["seeds", "after"])


# ---- claims.toml -----------------------------------------------------------------------------------------------------


def test_claims_are_whole(lines):
    """Ids are unique, names exist, directions and statistics are known, and a verdict without runs has its reason."""
    all_claims = claims.load_claims()
    assert len({claim.id for claim in all_claims}) == len(all_claims)
    for claim in all_claims:
        assert claim.better in ("higher", "lower") and claim.statistic in ("mean", "best", "spread"), claim.id
        kinds = [bool(claim.study), bool(claim.verdict), bool(claim.test)]
        assert sum(kinds) == 1 and bool(claim.reason) == bool(claim.verdict), claim.id
        assert not claim.verdict or claim.verdict in ("needs GPU", "needs a judge"), claim.id
        assert not claim.test or (ROOT / claim.test).exists(), claim.id
        assert not claim.study or (claim.ours and claim.against), claim.id
    assert {line.verdict for line in lines} <= set(claims.VERDICTS)
    sources = {claim.source for claim in all_claims}
    assert all(any(name in source for source in sources) for name in ("LCO", "Q-RM", "ADPA", "SEFT"))


def test_every_switch_of_a_release_has_a_claim():
    """The switches and patches for LCO's released code, as its docs page lists them."""
    page = PAGES["docs/results/lco.md"].read_text()
    table = page.split("## The authors' released code, switch by switch")[1].split("\n## ")[0]
    switches = set(re.findall(r"\| `(--[^`]+|\w+\.patch)` \|", table))
    assert len(switches) == 4 and switches <= {claim.switch for claim in claims.load_claims()}


def test_stability_has_ten_seeds():
    """Learning rates x1, x3, x10, x30 and 1, 2, 4, 8 epochs of each method, with at least ten seeds."""
    for claim in claims.load_claims():
        assert claim.study not in ("rates", "epochs") or claim.seeds >= 10, claim.id
    assert {name.rpartition(" ")[2] for name in study.STUDIES["rates"]["settings"]} == {"x1", "x3", "x10", "x30"}
    assert {name.split()[-2] for name in study.STUDIES["epochs"]["settings"]} == {"1", "2", "4", "8"}
    methods = [{name.split(",")[0] for name in study.STUDIES[s]["settings"]} for s in ("rates", "epochs")]
    assert methods[0] == methods[1] >= {"PPO", "GRPO", "REINFORCE", "LCO-KLD", "LCO-MSE", "LCO-LCH"}


# ---- verdicts on made-up runs ----------------------------------------------------------------------------------------


def row(setting: str, seed: int, end: float, **more) -> dict:
    start = [{"step": s, "eval/greedy": a, "eval/sampled": a} for s, a in ((0, 0.4), (5, 0.6), (10, end))]
    spikes = dict(grad_norm_max=3.0, grad_norm_median=1.5, seconds=30.0, error="", diagnose={})
    about = dict(setting=setting, seed=seed, command="", ok=True, eval=start, last=start[-1])
    return about | spikes | more


@pytest.fixture
def told(monkeypatch):
    """told(**settings): a study `made` with these accuracies over seeds; returns a claim on a against b."""

    def tell(a: list[float], b: list[float], **claim):
        rows = [row(name, i, x) for name, values in (("a", a), ("b", b)) for i, x in enumerate(values)]
        monkeypatch.setattr(study, "STUDIES", {"made": {"arguments": "", "settings": {"a": "x.py", "b": "y.py"}}})
        monkeypatch.setattr(study, "stored", lambda name: rows)
        base = dict(id="c", source="s", text="t", study="made", ours=["a"], against={"B": ["b"]})
        return claims.Claim(**base | claim)

    return tell


HIGH, LOW, WIDE = [0.9, 0.91, 0.92, 0.9, 0.89], [0.5, 0.52, 0.49, 0.5, 0.51], [0.2, 0.9, 0.4, 0.95, 0.1]


@pytest.mark.parametrize(
    "a, b, changes, verdict, note",
    [
        (HIGH, LOW, {}, "reproduced at this scale", ""),
        (LOW, HIGH, {}, "not", "the opposite holds"),
        (LOW, HIGH, dict(better="lower"), "reproduced at this scale", ""),
        (LOW, WIDE, {}, "not", "within the seeds"),
        (LOW, WIDE, dict(statistic="spread", better="lower"), "reproduced at this scale", ""),
        (HIGH, HIGH, {}, "not", "within the seeds"),
        (HIGH[:4], LOW, {}, "not measured yet", "4 of 5 seeds"),
        (HIGH, LOW, dict(seeds=10), "not measured yet", "5 of 10 seeds"),
        (HIGH, LOW, dict(study="other"), "not measured yet", "study `other`"),
        (HIGH, [0.3] * 5, dict(metric="survives"), "reproduced at this scale", ""),
        (HIGH, LOW, dict(metric="steps to 80 %", better="lower"), "reproduced at this scale", ""),
    ],
)
def test_verdict(a, b, changes, verdict, note, told):
    (line,) = claims.judge(told(a, b, **changes))
    assert (line.verdict, line.note) == (verdict, note)


def test_bootstrap_interval():
    """Of a mean it is close to the normal interval; it is the same each time; equal values leave no width."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 0.5, 200), rng.normal(0, 0.3, 100)
    low, high = claims.bootstrap([a], [b], "mean", "higher")
    middle, half = a.mean() - b.mean(), 1.96 * np.sqrt(a.var() / 200 + b.var() / 100)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.01)
    assert claims.bootstrap([a], [b], "mean", "higher") == (low, high)
    assert claims.bootstrap([np.ones(5)], [np.zeros(3)], "best", "higher") == (1, 1)


def test_statistics():
    """mean over settings; the best of them in the claimed direction; the mean of their deviations."""
    groups = [np.array([0.0, 2.0]), np.array([5.0, 5.0])]
    assert claims.statistic(groups, "mean", "higher") == 3
    assert (claims.statistic(groups, "best", "higher"), claims.statistic(groups, "best", "lower")) == (5, 1)
    assert claims.statistic(groups, "spread", "lower") == pytest.approx(2**0.5 / 2)


def test_metrics_of_a_run():
    good, bad = row("a", 0, 0.9), row("a", 0, 0.3)
    assert (claims.value(good, "survives"), claims.value(bad, "survives")) == (1, 0)
    assert (claims.value(good, "steps to 80 %"), claims.value(bad, "steps to 80 %")) == (10, 15)
    assert claims.value(good, "spike") == 2 and claims.value(good, "eval/greedy") == 0.9
    broken = row("a", 0, 0.9, ok=False, error="FloatingPointError: not finite: {'grad_norm': nan}", last={})
    assert claims.value(broken, "eval/sampled") == 0 == claims.value(broken, "survives")
    assert claims.value(broken, "spike") is None
    assert claims.value(broken | {"error": "KeyError: 'x'"}, "eval/sampled") is None


def test_setting_that_does_not_exist(told):
    claim = told(HIGH, LOW, ours=["c*"])
    with pytest.raises(SystemExit, match=re.escape("'c*' is no setting of the study made")):
        claims.judge(claim)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_run_goes_on_where_it_was(monkeypatch, tmp_path):
    """Only what is missing is run, with what it builds on; the rows are stored one by one, the tables at the end."""
    settings = {"a": "x.py --teacher {base}/model", "b": "y.py", "c": "z.py"}
    made = {"arguments": "--few", "prepare": {"base": "w.py", "other": "v.py"}, "settings": settings}
    monkeypatch.setattr(study, "STUDIES", {"made": made})
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "kept", lambda name, setting, seed: tmp_path / f"{setting}-{seed}")
    ran = []

    def run(name, setting, command, seed, threads):
        ran.append((setting, seed))
        if len(ran) == 4:
            raise KeyboardInterrupt
        (tmp_path / f"{setting}-{seed}").mkdir(exist_ok=True)
        whole = row(setting, seed, 0.9, command=study.full_command(name, setting, command))
        return whole | {"last": whole["last"] | {"eval/sampled": 0.9}}

    monkeypatch.setattr(study, "run", run)
    claim = claims.Claim("c", "s", "t", study="made", ours=["a"], against={"B": ["b"]}, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        claims.run([claim], jobs=1)
    stored = {(r["setting"], r["seed"]) for r in study.stored("made")}
    assert stored == {("base", 0), ("base", 1), ("a", 0)}
    claims.run([claim], jobs=1)
    names = {(name, seed) for name in ("a", "b", "base") for seed in (0, 1)}
    assert {(r["setting"], r["seed"]) for r in study.stored("made")} == names
    assert all(ran.count(each) == 1 for each in stored) and (tmp_path / "made.md").exists()
    assert "| made | 6 | 6 | 0.1 |" in claims.times([claim], jobs=1)


def test_times():
    """A full re-run: every study with its number of runs; those never run have no invented time."""
    text = claims.times(claims.load_claims(), 2)
    assert "| rates | 240 |" in text
    for name in study.STUDIES:
        if f"| {name} |" in text and not study.stored(name):
            assert re.search(rf"\| {name} \| \d+ \| 0 \| not known \|", text)


def test_pictures(lines, tmp_path):
    """The stored picture of each group has its claims, what they are compared with, and its verdicts."""
    for source in dict.fromkeys(line.claim.source for line in lines):
        mine = claims.drawn([line for line in lines if line.claim.source == source])
        if not mine:  # nothing measured yet
            continue
        stored = (claims.figures.IMAGES / f"{claims.picture(source)}.svg").read_text()
        words = re.findall(r"<!-- (.*?) -->", stored)
        for claim in (line.claim for line in mine):
            assert all(part in words for part in claims.textwrap.wrap(claim.text, claims.WRAP)), claim.id
        verdicts = [word.partition(",")[0] for word in words]
        assert all(words.count(line.name) >= [x.name for x in mine].count(line.name) for line in mine)
        for note, (_, _, _, verdict) in claims.MARKS.items():
            assert verdicts.count(verdict) == sum(line.note == note for line in mine), (source, verdict)


def test_a_picture_points_in_the_claimed_direction(monkeypatch, tmp_path):
    """Where less is better a lower number is right of 0; steps are drawn on a scale of their own, and written."""
    drawn = []
    monkeypatch.setattr(claims.figures, "save", lambda figure, name, folder: drawn.append(figure))
    less = claims.Claim("a", "s", "Less.", study="made", ours=["a"], against={"B": ["b"]}, better="lower")
    steps = claims.Claim("b", "s", "Steps.", study="made", ours=["a"], against={"B": ["b"]}, metric="steps to 80 %")
    lines = [
        claims.Line(less, "B", "reproduced at this scale", 0.2, 0.5, -0.4, -0.2),
        claims.Line(steps, "C", "not", 10.0, 30.0, -25.0, -15.0, "the opposite holds"),
    ]
    claims.draw(lines, tmp_path / "made.svg")
    (axis,) = drawn[0].axes
    shown = [list(line.get_xdata()) for line in axis.lines]
    assert any(x == pytest.approx([0.2, 0.4]) for x in shown) and any(x == pytest.approx([0.3]) for x in shown)
    assert any(x == pytest.approx([-0.4, -0.24]) for x in shown), "15 of 25 steps, on the scale of 0.4"
    texts = [text.get_text() for text in axis.texts]
    assert "reproduced" in texts and "the opposite holds, -20.0 steps" in texts

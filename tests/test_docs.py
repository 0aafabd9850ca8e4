"""What the pages teach is true: functions exist, worked examples are recomputed, solutions run, links hold."""

import importlib
import importlib.util
import json
import re
import sys
import tomllib

import pytest
from conftest import ROOT

import adpa
import common
import dckd
import dpo
import lco
import lm
import ppo_baseline
import qrm
import seft

import torch

METHODS = ("ppo_baseline", "lco", "qrm", "dpo", "dckd", "adpa", "seft")
DOCS = ROOT / "docs"
MARKDOWN = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text() for path in MARKDOWN}


def page(name: str) -> str:
    return TEXT[f"docs/{name}.md"]


def section(text: str, title: str) -> str:
    """Of a page, from a heading that begins with this title up to the next one."""
    return re.search(rf"(?ms)^## {title}.*?(?=^## |\Z)", text)[0]


def logs(*p: float) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


def numbers(*values, digits: int = 4) -> str:
    """As the pages write them: .1206, −.1226, 1.2465."""
    texts = []
    for value in torch.cat([torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in values]).tolist():
        text = f"{abs(value):.{digits}f}".removeprefix("0")
        texts.append(("−" if value < 0 and float(f"{value:.{digits}f}") else "") + text)
    return ", ".join(texts)


# ---- the shape of a page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_page_is_whole(name):
    text = page(name)
    assert len(text.splitlines()) <= 150
    for title in (
        "The problem",
        "Derivation",
        "The algorithm",
        "One ",
        "What to watch",
        "What goes wrong",
        "What differs",
    ):
        assert section(text, title), title
    assert len(re.findall(r"(?m)^[123]\. ", section(text, "Exercises"))) == 3 and section(text, "Results")
    assert (
        f"figures/method-{name}.svg" in text and f"results/{name}.md" in text and f"solutions/solve_{name}.py" in text
    )


@pytest.mark.parametrize("name", METHODS)
def test_functions_of_the_algorithm_exist(name):
    """Each `f()` of a method's page is a function of its script, each `lm.f()` one of lm.py."""
    here = importlib.import_module(name)
    named = set(re.findall(r"`((?:lm\.|common\.)?\w+)\(\)`", page(name)))
    assert len(named) >= 3
    for function in named:
        room, _, short = function.rpartition(".")
        assert callable(getattr({"lm": lm, "common": common, "": here}[room], short, None)), function


def test_links_lead_somewhere():
    """Files exist, and headings that are linked to."""

    def anchors(text: str) -> set[str]:
        titles = [re.sub(r"[`*$]", "", t).strip().lower() for t in re.findall(r"(?m)^#+ (.+)$", text)]
        return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}

    for name, text in TEXT.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:|mailto:", target):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(path.read_text()), f"{name}: {target}"


def test_formulas_survive_markdown():
    """GitHub reads Markdown before formulas: no escaped punctuation, no emphasis, no bars that split a table's cell."""
    for name, text in TEXT.items():
        for formula in re.findall(r"\$\$(.+?)\$\$|(?<![\w$`])\$([^$\n]+?)\$(?!\w)", re.sub(r"(?m)^    .*$", "", text)):
            formula = formula[0] or formula[1]
            bad = re.search(r"\\[^a-zA-Z]|\*|\}_|<|>|\|", formula)
            assert not bad, f"{name}: {bad[0]} in {formula}"
            assert formula.count("{") == formula.count("}"), f"{name}: {formula}"


def docs_run():
    spec = importlib.util.spec_from_file_location("docs_run", ROOT / "benchmarks" / "docs_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_can_be_typed():
    """A line of a command has no comment, which zsh would pass on as arguments; where people start it fits the box."""
    narrow = ["README.md", "AGENTS.md", *(f"docs/{name}.md" for name in (*METHODS, "first-steps"))]
    for name, text in TEXT.items():
        for line in "\n".join(docs_run().commands(text)).splitlines():
            assert not re.search(r"(^|\s)#", line), f"{name}: {line}"
            assert name not in narrow or len(line) <= 98, f"{name}: {line}"


def test_commands_name_programs_that_exist():
    """Whatever is run is a file of this repository; a page with an indented block has the commands that it shows."""
    found = [command for text in TEXT.values() for command in docs_run().commands(text)]
    programs = {name for command in found for name in re.findall(r"(?:python|=\d) ([\w/]+\.py)", command)}
    assert {"lco.py", "check.py", "benchmarks/study.py"} <= programs
    assert all((ROOT / program).exists() for program in programs)


def test_docs_run(tmp_path):
    """Commands keep what an earlier one defined, are cut as promised, and are stopped at the limit."""
    run = docs_run()
    text = "Words.\n\n    f() {\n      echo $X\n    }\n    X=a \\\n    && f\n\n    ls | wc -l\n"
    assert run.commands(text) == ["f() {\n  echo $X\n}", "X=a \\\n&& f", "ls | wc -l"]
    assert run.shorten("OMP_NUM_THREADS=1 python qrm.py --steps 900 --out runs/x && cp a b") == (
        "OMP_NUM_THREADS=1 python qrm.py --steps 2 --out runs/x --eval_every 2 --pairs_per_step 4 && cp a b"
    )
    shell = run.Shell("bash", tmp_path, tmp_path / "log")
    assert [shell.run(command, 30) for command in ("X=3", '[ "$X" = 3 ]', "false")] == [0, 0, 1]
    assert shell.run("echo $X", 30) == 0 and (tmp_path / "log").read_text() == "3\n"
    assert shell.run("sleep 30", 0.2) == 124 and shell.run("true", 30) == 0
    shell.process.communicate()


# ---- worked examples -------------------------------------------------------------------------------------------------

OLD, STUDENT, TEACHER = logs(0.61, 0.38, 0.01), logs(0.56, 0.43, 0.01), logs(0.07, 0.88, 0.05)


def example_lco() -> list[str]:
    A = torch.tensor([[0.0, 0.5, 0.0]]).double()
    target = lco.target_logprobs(OLD, A, 1.0, "exp")
    z = OLD.clone().requires_grad_()
    kld = lco.kld_loss(z.log_softmax(-1), target).sum()
    gap = lco.target_gap(z[0, 1], OLD[0, 1], 0.5, 1.0)
    found = [numbers((OLD + A).exp().sum()), numbers(target.exp())]
    found.append(f"{numbers(kld.detach())}; {numbers(torch.autograd.grad(kld, z, retain_graph=True)[0])}")
    for loss in (lco.square_loss(gap), lco.log_cosh_loss(gap)):
        slope = torch.autograd.grad(loss, z, retain_graph=True)[0][0, 1]
        found.append(f"{numbers(loss.detach())}; {numbers(slope)}")
    new = target[0, 1:2].clone().requires_grad_()
    loss, _ = ppo_baseline.policy_loss(new, OLD[0, 1:2], torch.tensor([0.5]).double(), "ppo", 0.2)
    assert torch.autograd.grad(loss, new)[0] == 0
    ratio = numbers((new - OLD[0, 1]).exp().detach())
    return [
        *found,
        f"$\\pi(2) = {numbers(target[0, 1].exp())}$, ratio {ratio}",
        f"| {numbers(loss.detach())}, gradient 0",
    ]


def example_ppo_baseline() -> list[str]:
    found = []
    for A, ratio in ((0.5, 1.0), (0.5, 1.3), (-0.5, 1.3), (-0.5, 0.7)):
        logprob = torch.tensor(ratio).double().log().requires_grad_()
        loss, _ = ppo_baseline.policy_loss(logprob, torch.tensor(0.0), torch.tensor(A), "ppo", 0.2)
        slope = torch.autograd.grad(loss, logprob)[0]
        plain, clipped = -A * ratio, -A * min(max(ratio, 0.8), 1.2)
        cells = [numbers(x, digits=2) for x in (plain, clipped, loss.detach(), slope)]
        found.append(f"| {'+' if A > 0 else '−'}.5 | {ratio} | {' | '.join(cells)} |")
    values, mask = torch.tensor([[0.4, 0.5, 0.8]]).double(), torch.ones(1, 3, dtype=torch.bool)
    advantages, _ = ppo_baseline.gae(torch.tensor([[0.0, 0.0, 1.0]]).double(), values, mask, 1.0, 0.95)
    return [*found, numbers(advantages.flip(1))]


def example_qrm() -> list[str]:
    better, worse = (torch.tensor(scores).double().requires_grad_() for scores in (
        [[-0.10, -0.02, -0.01, -0.01, -0.01, -0.05, -0.01, -0.03]],
        [[-4.00, -0.02, -0.01, -0.01, -0.01, -0.05, -0.01, -0.05]],
    ))  # fmt: skip
    mask = torch.ones(1, 8, dtype=torch.bool)
    means = [qrm.answer_score(x, mask, "qrm") for x in (better, worse)]
    loss, _ = qrm.pair_loss(*means, 0.2, 2.0)
    slope = torch.autograd.grad(loss, worse, retain_graph=True)[0][0, 0]
    delta = torch.zeros(1, requires_grad=True)
    start, _ = qrm.pair_loss(delta, torch.zeros(1), 0.2, 2.0)
    at_0 = numbers(start.detach(), torch.autograd.grad(start, delta)[0])
    written = [
        f"| {numbers(x.detach(), digits=2)} | {numbers(mean.detach())} |" for x, mean in zip((better, worse), means)
    ]
    return [*written, numbers((means[0] - means[1]).detach()), numbers(loss.detach()), numbers(slope), at_0]


def example_dpo() -> list[str]:
    values = torch.tensor([-0.60, -1.80]).double().requires_grad_()
    ref = torch.tensor([-1.10, -0.80]).double()
    found = []
    for s in (0.0, 0.1):
        loss, metrics = dpo.dpo_loss(values[:1], values[1:], ref[:1], ref[1:], 0.1, s)
        slope = torch.autograd.grad(loss, values, retain_graph=True)[0]
        found.append((loss.detach(), slope, metrics["dpo/margin"]))
    (loss, slope, margin), (smooth, smooth_slope, _) = found
    rewards = 0.1 * (values.detach() - ref)
    written = [f"| {numbers(rewards[i])} |" for i in (0, 1)]
    written += [f"$m$ | {numbers(margin)} |", f"{numbers(loss)}; {numbers(torch.tensor(2.0).log())}"]
    written += [f"| {numbers(-slope[0] / 0.1)} |", numbers(slope)]
    return [*written, f"{numbers(smooth)}, {numbers(-smooth_slope[0] / 0.1)}"]


def example_dckd() -> list[str]:
    z, one, zero = STUDENT.clone().requires_grad_(), torch.ones(1).double(), torch.zeros(1).double()
    nll, kl = (dckd.dckd_loss(z, TEACHER, torch.tensor([1]), a, b, 0.0, 1.0)[0] for a, b in ((one, zero), (zero, one)))
    found = [numbers(nll.detach()), numbers(kl.detach())]
    found += [numbers(torch.autograd.grad(x, z, retain_graph=True)[0]) for x in (kl, nll)]
    whole = [
        dckd.dckd_loss(z, TEACHER, torch.tensor([1]), a, b, 0.1, 0.1)[0].detach() for a, b in ((one, zero), (zero, one))
    ]
    return [*found, numbers(*whole)]


def example_adpa() -> list[str]:
    A, z = adpa.advantages(TEACHER, OLD, 0), STUDENT.clone().requires_grad_()
    loss = adpa.adpa_loss(z.log_softmax(-1), A).sum()
    found = [numbers(A), numbers(-loss.detach()), numbers(-torch.autograd.grad(loss, z)[0])]
    found += [numbers((STUDENT + A).softmax(-1)), numbers(adpa.opd_loss(STUDENT, OLD, A, 1.0))]
    assert adpa.kl_loss((STUDENT + A).log_softmax(-1), STUDENT, A, 1.0).abs().max() < 1e-12
    return found


def example_seft() -> list[str]:
    up, stay, keep, down = -0.5, -0.4, -0.1, -0.9
    value = seft.need(up, stay, keep, down)
    (label,) = seft.labels_of([value], [value, 0.2, 0.4, 1.1])
    edge = 0.42 * 0.15 * 0.74 / ((1 - 0.42) * 0.87)
    written = f"{numbers(up, digits=2)}, {numbers(stay, keep, down, digits=2)}"
    return [
        written,
        f"{numbers(up - stay)}: No",
        numbers(value),
        f"| {seft.NAMES[label].capitalize()} (",
        numbers(edge),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_worked_example(name):
    """Every number of the example is what the script's own functions return."""
    text = section(page(name), "One ")
    for found in globals()[f"example_{name}"]():
        assert found in text, f"docs/{name}.md has no {found}"


@pytest.mark.parametrize("name", METHODS)
def test_solutions(name, capsys):
    spec = importlib.util.spec_from_file_location(f"solve_{name}", DOCS / "solutions" / f"solve_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for number in (1, 2, 3):
        exercise = getattr(module, f"exercise_{number}")
        assert exercise.__doc__.startswith(f"{number}. ")
        exercise()
    assert capsys.readouterr().out


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_pictures():
    """Of each method, whole, with a white ground; SEFT's answers are graded as the task grades them."""
    for name in METHODS:
        text = (DOCS / "figures" / f"method-{name}.svg").read_text()
        assert text.rstrip().endswith("</svg>") and "#ffffff" in text
    made = json.loads((ROOT / "benchmarks" / "results" / "seft_example.json").read_text())
    from builtin import tasks as toys

    for one in (made["mended"], made["kept"]):
        row = {"prompt": one["prompt"]}
        assert toys.chain_correct([one["text"], one["revision"]], [row, row])[0] == one["before"]
        assert seft.decide(one["chances"], made["threshold"]) == one["label"]


# ---- the notebook ----------------------------------------------------------------------------------------------------


def test_notebook(capsys, monkeypatch):
    """docs/lco.ipynb is a notebook by its format, and its cells run from top to bottom, as its text says."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(DOCS)
    notebook = json.loads((DOCS / "lco.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and notebook["metadata"]["kernelspec"]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    space = {}
    for cell in notebook["cells"]:
        known = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == known | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "docs/lco.ipynb", "exec"), space)
    losses, chances = zip(*space["path"])
    goal = space["target"].exp()[0, space["sampled"]].item()
    assert losses[0] > losses[1] > losses[2] and chances[0] < chances[1] < chances[2] < goal < chances[2] + 0.05
    assert space["ppo"][-1] == space["ppo"].min() and space["kld"][-1] > space["kld"][space["start"]]
    assert "odds of `2` grew by 1.6487" in capsys.readouterr().out
    space["plt"].close("all")


# ---- the package -----------------------------------------------------------------------------------------------------


def test_versions_agree():
    """pyproject.toml has the ranges, requirements.txt one version of each, in its range; all pages name one release."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    ranges = {r.name: r.specifier for r in map(Requirement, wanted)}
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    assert set(pins) == set(ranges)
    for name, version in pins.items():
        assert Version(version) in ranges[name] and "<" not in str(ranges[name]), name
    assert f"torch {pins['torch']} " in TEXT["README.md"] and f"torch {pins['torch']} " in page("first-steps")
    release = project["version"]
    assert f"version: {release}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())[1] == release
    here = ".".join(map(str, sys.version_info[:2]))
    assert Version(here) in Requirement(f"python{project['requires-python']}").specifier


def test_readme_is_one_screen():
    text = TEXT["README.md"]
    assert len(text.splitlines()) <= 100 and "<!--" not in text
    assert "`common.py`, `lm.py` and `tasks.py`" in " ".join(text.split("\n\n")[1].split())
    assert (
        "pip install -r requirements.txt && pytest" in text
        and "pip install -r requirements.txt && python lco.py" in text
    )


def test_agents_names_every_room():
    """The map has every Python file of the root, and no other."""
    table = section((ROOT / "AGENTS.md").read_text(), "Rooms")
    assert set(re.findall(r"`(\w+\.py)`", table)) == {path.name for path in ROOT.glob("*.py")}

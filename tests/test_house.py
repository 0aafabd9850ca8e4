"""The house is clean: rooms do not know each other, copies are equal, the family diffs and help sentences are current.

python tests/test_house.py --write        regenerate docs/diffs
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import re
import subprocess
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = ("ppo_baseline", "lco", "qrm", "dpo", "dckd", "adpa", "seft", "evaluate")
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES if (ROOT / f"{name}.py").exists()]
FAMILIES = [("ppo_baseline", "lco"), ("dpo", "dckd"), ("dckd", "adpa")]
DIFF_BUDGET = {"ppo_baseline--lco": 170, "dpo--dckd": 90, "dckd--adpa": 140}  # changed lines
BUDGET = {  # lines of a room; when it outgrows them, something in it wants to leave
    "ppo_baseline": 400, "lco": 494, "qrm": 420, "dpo": 300, "dckd": 300, "adpa": 380, "check": 289, "report": 286,
    "tasks": 510, "graders": 350, "cpu": 130, "gpu": 300, "common": 1136, "lm": 1212, "seft": 721, "evaluate": 321,
    "publish": 166, "interactive": 55,
}  # fmt: skip
DIFFS = {
    ROOT / "docs" / "diffs" / f"{a}--{b}.diff": (ROOT / f"{a}.py", ROOT / f"{b}.py")
    for a, b in FAMILIES
    if (ROOT / f"{a}.py").exists() and (ROOT / f"{b}.py").exists()
}
PAPER_NAMES = re.compile(
    "(advantage|beta|clip|teacher|student|reviser|critic|ppo|lco|dpo|qrm|dckd|adpa|seft|reinforce|grpo|gae|surrogate"
    "|distil|distill|distillation)s?"
)
# The same name, with the meaning or the choices of each method.
METHOD_ARGUMENTS = {"stage", "objective", "loss", "advantage", "beta", "gamma", "steps", "kl_estimator"}
METHOD_ARGUMENTS |= {"pairs", "reward_model", "reward_ref", "test_pairs"}  # trained in qrm.py, rated in evaluate.py
METHOD_ARGUMENTS |= {"epochs", "lr"}  # of rollouts or pairs, of a policy or a reward model
METHOD_ARGUMENTS |= {"max_prompt", "max_new_tokens", "test_rows", "long_prompts"}  # evaluate.py takes those of training
METHOD_ARGUMENTS |= {"test_dataset"}  # where it is empty, prompts are held out of rows, or of pairs


def method(path: Path) -> list[str]:
    """The lines of a script from its method section on: neither header nor arguments."""
    lines = path.read_text().splitlines(keepends=True)
    return lines[next(i for i, line in enumerate(lines) if line.startswith("# ---- the method")) :]


def make_diff(a: Path, b: Path) -> str:
    return "".join(difflib.unified_diff(method(a), method(b), a.name, b.name))


def changed_lines(diff: str) -> int:
    return sum(line[0] in "+-" and not line.startswith(("+++", "---")) for line in diff.splitlines() if line)


@functools.cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@functools.cache
def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def repository_files() -> list[Path]:
    """What git tracks or would track."""
    listed = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in out.splitlines() if (ROOT / name).is_file()]


def test_scripts_do_not_import_each_other():
    """Scripts know common, lm and tasks; these know common; common knows only what it can do without."""
    own = {path.stem for path in ROOT.glob("*.py")}
    for path in SCRIPTS:
        assert imports(path) & own <= {"common", "lm", "tasks"}, path.name
    assert imports(ROOT / "tasks.py") & own <= {"common"}
    assert not imports(ROOT / "graders.py") & own
    assert imports(ROOT / "common.py") & own <= {"cpu"}
    for name in ("publish", "interactive"):
        assert imports(ROOT / f"{name}.py") & own <= {"common"}
    assert imports(ROOT / "lm.py") & own <= {"common", "gpu"}
    assert not imports(ROOT / "cpu.py") & own


def test_rooms():
    """No utils.py, no helpers.py."""
    rooms = {"common", "lm", "tasks", "graders", "cpu", "gpu", "report", "check", "publish", "interactive"}
    assert {path.stem for path in ROOT.glob("*.py")} <= {*rooms, *NAMES}


def test_rooms_keep_to_their_budgets():
    for name, most in BUDGET.items():
        lines = len((ROOT / f"{name}.py").read_text().splitlines())
        assert lines <= most, f"{name}.py has {lines} lines, at most {most}"


def test_family_diffs_keep_to_their_budgets():
    for name, most in DIFF_BUDGET.items():
        lines = changed_lines((ROOT / "docs" / "diffs" / f"{name}.diff").read_text())
        assert lines <= most, f"{name}.diff has {lines} changed lines, at most {most}"


def test_losses_take_tensors_and_numbers():
    """No loss, target or estimator of the method sections takes `args` or a model."""
    for name in ("ppo_baseline", "lco", "qrm", "dpo", "dckd", "adpa"):
        source = (ROOT / f"{name}.py").read_text()
        first, last = (
            source[: source.index(mark)].count("\n") for mark in ("# ---- the method", "# ---- one optimizer")
        )
        for node in functions(ROOT / f"{name}.py").values():
            if first < node.lineno < last and node.name != "estimate_advantages":
                taken = {a.arg for a in node.args.args}
                assert not taken & {"args", "model", "models", "policy"}, f"{name}.py: {node.name}({', '.join(taken)})"


def test_order_of_a_file():
    """Header, arguments, method, one optimizer step, the run, what the loop needs."""
    for name in ("ppo_baseline", "lco", "qrm", "dpo", "dckd", "adpa"):
        source = (ROOT / f"{name}.py").read_text()
        marks = ["class Args", "BUILTIN =", "# ---- the method", "# ---- one optimizer step", "# ---- the run"]
        marks += ["def train(args)", "# ---- what the loop needs"]
        places = [source.index(mark) for mark in marks]
        assert places == sorted(places), name


def test_common_knows_no_method():
    """No name of a method in the code of common.py and lm.py; their comments may use the words."""
    found = []
    for file in ("common.py", "lm.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
            words = re.findall(r"[a-z]+", name.lower()) if isinstance(name, str) else []
            found += [f"{file}:{node.lineno}: {name}" for word in words if PAPER_NAMES.fullmatch(word)]
    assert not found, found


def test_common_takes_plain_values():
    """Only what stores or checks all arguments of a run is given an `args` object."""
    takers = {
        node.name
        for node in ast.walk(ast.parse((ROOT / "common.py").read_text()))
        if isinstance(node, ast.FunctionDef) and "args" in [a.arg for a in node.args.args]
    }
    assert takers <= {"__init__", "check_args"}


def test_copies_are_equal():
    """Functions marked `# same in: a.py b.py` are identical by AST, and are marked in each of those files."""
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        for name, node in functions(path).items():
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            tag = re.fullmatch(r"# same in: (.+)", lines[first - 2].strip())
            if not tag:
                continue
            files = tag[1].split()
            assert path.name in files, f"{path.name}: {name}"
            for other in files:
                assert (ROOT / other).exists(), f"{path.name}: {name} is marked as the same in {other}"
                twin = functions(ROOT / other).get(name)
                assert twin and ast.dump(twin) == ast.dump(node), f"{name} differs between {path.name} and {other}"
                assert f"# same in: {tag[1]}" in (ROOT / other).read_text()


def test_family_diffs_are_current():
    """docs/diffs holds what tells a method from its trunk, from the method section on."""
    for file, (a, b) in DIFFS.items():
        current = file.exists() and file.read_text() == make_diff(a, b)
        assert current, f"{file.relative_to(ROOT)} is out of date: run python tests/test_house.py --write"


def test_every_argument_has_a_help_sentence():
    for path in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(path.stem).Args):
            help = field.metadata.get("help", "")
            assert help and not help.endswith("."), f"{path.name} --{field.name}: {help!r}"


def test_one_vocabulary_of_arguments():
    """An argument of the same name has the same type and the same sentence in every script."""
    seen = {}
    for path in SCRIPTS:
        cls = importlib.import_module(path.stem).Args
        types = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name in METHOD_ARGUMENTS:
                continue
            entry = (types[field.name], type(field.default), field.metadata["help"])
            assert seen.setdefault(field.name, entry) == entry, f"{path.name} --{field.name}"


def test_built_in_changes_name_arguments():
    for path in SCRIPTS:
        module = importlib.import_module(path.stem)
        assert set(module.BUILTIN) <= {field.name for field in dataclasses.fields(module.Args)}, path.name


def test_equation_tags_are_in_the_docs():
    """Each tag like PPO-1 of a script is explained on its docs page."""
    for path in SCRIPTS:
        tags = set(re.findall(r"\b[A-Z]{3,4}-[0-9]+\b", path.read_text()))
        page = ROOT / "docs" / f"{path.stem}.md"
        assert not page.exists() or {t for t in tags if t not in page.read_text()} == set(), page.name


def test_equation_tables():
    """Each row `| TAG | equation | function |` of a docs page names functions of its script that carry the tag."""
    for path in SCRIPTS:
        source, rows = path.read_text(), []
        for line in (ROOT / "docs" / f"{path.stem}.md").read_text().splitlines():
            tags = re.match(r"\| ([A-Z]{3,4}-[0-9]+(, [A-Z]{3,4}-[0-9]+)*) \|", line)
            tags = tags[1].split(", ") if tags else []
            names = re.findall(r"`(\w+)`", line.rsplit("|", 2)[1]) if tags else []
            rows += [(tags, names)] if tags else []
        assert rows, path.name
        for tags, names in rows:
            known = {name: ast.get_source_segment(source, node) for name, node in functions(path).items()}
            assert names and set(names) <= set(known), f"{path.name}: {names}"
            for tag in tags:
                assert any(tag in known[name] for name in names), f"{path.name}: {tag} is not in {names}"


def test_nothing_is_shifted_in_a_script():
    """Shift once, at the batch boundary: no [:, 1:] and no [:, :-1] in a script."""
    for path in SCRIPTS:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(r"\[:, *1:|\[:, *:-1\]", line), f"{path.name}:{number}: {line.strip()}"


def test_no_shortcuts_of_one_machine():
    """No .cuda(), no sentinel repair, no path of the machine where a line was written."""
    here = Path(__file__).resolve()
    for path in repository_files():
        if path == here or path.suffix not in (".py", ".md", ".toml", ".txt", ".diff", "") or path.name == "LICENSE":
            continue
        text = path.read_text()
        if path.suffix == ".py":
            assert ".cuda()" not in text and "nan_to_num" not in text, path.name
        found = re.search(r"(?<![\w.])/(work|home|root|tmp|Users|mnt)/\w+", text)
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_main_loop_fits_a_screen():
    """At most 80 lines, at most 4 levels deep."""

    def depth(node) -> int:
        blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
        return max((depth(child) for child in ast.iter_child_nodes(node)), default=0) + isinstance(node, blocks)

    for path in SCRIPTS:
        if "train" in functions(path):
            loops = [node for node in functions(path)["train"].body if isinstance(node, ast.For)]
            for loop in loops:
                assert loop.end_lineno - loop.lineno < 80, f"{path.name}: {loop.end_lineno - loop.lineno + 1} lines"
                assert depth(loop) <= 4, path.name


def test_lines_are_short():
    for path in ROOT.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    for file, (a, b) in DIFFS.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(make_diff(a, b))
        print(f"wrote {file.relative_to(ROOT)}")

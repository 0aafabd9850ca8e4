"""What a run tells others: a tracker, its last lines on the screen, the card of its model, the Hub.

common.py imports this file where it is there. Without it there is none of that, and runs are the same.
"""

import ast
import importlib.util
import json
import math
import re
import shlex
from datetime import timedelta
from pathlib import Path

from common import BadInput, require


def start(folder: Path, settings: dict):
    """The tracker of a run, or None. What could not end well is refused here, before a model is loaded."""
    track, name = settings["track"], settings["push_to_hub"]
    if track != "none":
        spec = importlib.util.find_spec(track)  # a folder that wandb has made is found too, but has no origin
        require(spec and spec.origin, f"--track {track}: the package is not installed (pip install {track})")
    if name:
        import huggingface_hub as hub

        try:
            hub.utils.validate_repo_id(name)
            hub.HfApi().whoami()
        except Exception as error:
            raise BadInput(f"--push_to_hub {name}: {_reason(error)}") from error
    return Tracker(folder, settings) if track != "none" else None


class Tracker:
    """Metrics and samples for wandb, trackio or TensorBoard, opened by the first of them: a run that fails before
    leaves nothing there."""

    def __init__(self, folder: Path, settings: dict):
        self.kind, self.folder, self.settings, self.home = settings["track"], folder, settings, None

    def _open(self, step: int) -> None:
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.home = SummaryWriter(self.folder / "tensorboard", purge_step=step)
        else:
            self.home = importlib.import_module(self.kind)
            began = int((self.folder / ".lock").stat().st_mtime)  # stays when the run is resumed
            name = re.sub(r"[^\w.-]", "-", f"{self.folder.name}-{began}")
            own = dict(id=name, dir=str(self.folder), reinit="finish_previous") if self.kind == "wandb" else {}
            self.home.init(project="minalign", name=name, config=self.settings, resume="allow", **own)

    def log(self, step: int, metrics: dict) -> None:
        if not self.home:
            self._open(step)
        known = {name: value for name, value in metrics.items() if value is not None}
        if self.kind != "tensorboard":
            return self.home.log(known, step=step)
        for name, value in known.items():
            self.home.add_scalar(name, value, step)
        self.home.flush()

    def samples(self, step: int, samples: list[dict]) -> None:
        """One table for each kind of sample."""
        if not self.home:
            self._open(step)
        for kind in dict.fromkeys(row["kind"] for row in samples):
            rows = [row for row in samples if row["kind"] == kind]
            if self.kind == "tensorboard":  # Markdown, where indented text stays as it is
                text = "\n\n".join("\n".join(f"{name}: {value}" for name, value in row.items()) for row in rows)
                self.home.add_text(f"samples/{kind}", "    " + text.replace("\n", "\n    "), step)
                continue
            cells = [[value if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
            table = self.home.Table(columns=list(rows[0]), data=cells, allow_mixed_types=True)
            self.home.log({f"samples/{kind}": table}, step=step)

    def close(self) -> None:
        if self.home:
            self.home.close() if self.kind == "tensorboard" else self.home.finish()


def disk_use(models, settings: dict) -> str:
    """What a checkpoint takes: the trained weights, and for each of them two moments of Adam."""
    size = 3 * sum(p.numel() * p.element_size() for p in models.parameters() if p.requires_grad)
    keep, saves = settings["keep"], math.ceil(settings["steps"] / settings["save_every"])
    held = {"last": "1", "best": "at most 2", "all": f"all {saves}"}[keep]
    return f"disk: {size / 1e6:,.1f} MB per checkpoint; --keep {keep} keeps {held}, and one more while it saves"


def before_after(folder: Path, step: int) -> dict[str, tuple[float, float]]:
    """{held-out metric: its value before training and after this step}, where both are known."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], next(line for line in lines if line["step"] == step)
    return {k: (v, last[k]) for k, v in first.items() if k.startswith("eval/") and None not in (v, last.get(k))}


def end(folder: Path, step: int, seconds: float, then: str) -> None:
    """The last lines on the screen, and model/ to the Hub. step: the one that model/ is of."""
    settings, found = json.loads((folder / "args.json").read_text())["args"], before_after(folder, step)
    of = "" if step == settings["steps"] else f"; model/ is that of step {step}"
    changes = ", ".join(f"{name} {before:.3f} -> {after:.3f}" for name, (before, after) in found.items())
    print(f"{settings['steps']} steps in {timedelta(seconds=round(seconds))}: {changes}{of}")
    if (folder / "report.html").exists():
        print(f"report: {folder / 'report.html'}")
    print(f"next: {then or evaluation(folder, settings, 'eval/greedy' in found)}", flush=True)
    if settings["push_to_hub"]:
        print(push(folder / "model", settings["push_to_hub"]), flush=True)


def evaluation(folder: Path, settings: dict, graded: bool) -> str:
    """The command that evaluates model/ on the task of the run. In capitals: what only its user has."""
    usual = dict(task="auto", dataset="", test_dataset="", reward_file="", test_rows=256, temperature=1.0, seed=0)
    words = {name: settings.get(name, value) for name, value in usual.items()}
    pairs = "samples_per_prompt" not in settings and (words["task"] != "auto" or words["test_dataset"])
    words["dataset"] = settings.get("prompts") or ("" if pairs else words["dataset"])  # not the pairs themselves
    if not graded and not words["reward_file"]:
        words = {"dataset": "PROMPTS", "reward_file": "REWARD"}
    given = [w for name, value in words.items() if value != usual[name] for w in (f"--{name}", str(value))]
    return shlex.join(["python", "evaluate.py", "--model", str(folder / "model"), *given])


def card(folder: Path, script: str, step: int) -> str:
    """model/README.md: how the model was made, and what came of it. Its licence is left to its owner."""
    about, header = json.loads((folder / "args.json").read_text()), ast.parse((folder / "source.py").read_text())
    settings, header = about["args"], ast.get_docstring(header)
    if settings.get("task") == "gsm8k" and not settings.get("dataset"):
        settings["dataset"] = "openai/gsm8k"
    paper = "https://arxiv.org/abs/" + re.search(r"arXiv:([\d.]+\d)", header)[1]
    sources = ("dataset", "pairs", "prompts", "test_dataset", "reward_file", "reward_model", "teacher", "reviser")
    data = {name: settings[name] for name in sources if settings.get(name)}
    if settings.get("task", "").startswith("gym:"):
        data["task"] = settings["task"]
    data = data or {"data": "the built-in task"}
    tags = {"library_name": "transformers", "tags": ["minalign", script]}
    for tag, names in (("base_model", ["model"]), ("datasets", sources[:4])):
        found = [settings.get(name, "").partition(":")[0] for name in names]  # NAME:SPLIT
        tags[tag] = [x for x in found if re.fullmatch(r"[\w.-]+/[\w.-]+", x) and not Path(x).exists()]  # Hub names
    rows = [f"| {name} | {before:.4f} | {after:.4f} |" for name, (before, after) in before_after(folder, step).items()]
    return "\n".join([
        "---", *(f"{tag}: {json.dumps(value)}" for tag, value in tags.items() if value), "---", "",
        f"# {folder.name}", "", header.splitlines()[0],
        f"Made by {script}.py of minalign (docs/{script}.md). Paper: {paper}", "",
        f"    python {script}.py {about['command'].partition(' ')[2]}", "",
        f"- base model: `{settings['model']}`",
        *(f"- {name}: `{value}`" for name, value in data.items()), f"- step {step} of {settings['steps']}", "",
        "| held-out metric | before | after |", "|---|---|---|", *rows, "",
        "No licence is stated yet: add `license:` at the top, one that those of the base model and the data allow.", "",
    ])  # fmt: skip


def push(model: Path, name: str) -> str:
    """model/ to a repository on the Hub. A failure costs nothing: the model is in its folder."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="minalign")
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=model, commit_message="model of minalign")
        return f"pushed to {url}"
    except Exception as error:
        return f"not pushed ({_reason(error)}); again: {shlex.join(['hf', 'upload', name, str(model)])}"


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""What all scripts share: whatever could break or speed up a run, and could never change a result.

Contents
    1. ranks         one process or many, started the same way, ended together
    2. arguments     the command line, and errors that say what to change
    3. seeds         noise as a function of (seed, step, row), never of the number of ranks
    4. batches       prompts and completions as tokens and padded tensors
    5. run folder    metrics, samples, plot, report
    6. checkpoints   atomic, resumable on any number of ranks, exported in Hugging Face format

What is computed with a language model is in lm.py. Shapes: B sequences, P prompt positions, T completion positions.

Nothing here knows a method. A line that could change a number in a paper belongs in a script.
"""

import os

# On a GPU the shapes of rollouts and updates alternate, which would leave holes in the memory that is kept.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

try:
    import cpu  # before torch: it sets how OpenMP threads wait
except ModuleNotFoundError:  # delete cpu.py and only speed changes
    cpu = None

import argparse
import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib.util
import inspect
import json
import math
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import typing
import warnings
from collections import Counter
from dataclasses import MISSING, asdict, field, fields
from datetime import timedelta
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub.constants import HF_HUB_CACHE
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record

# ---- 1. ranks --------------------------------------------------------------------------------------------------------

_stop = threading.Event()  # set by SIGTERM or SIGINT; ranks agree on it once a step
_signal, _first_signal = 0, 0.0  # which one asked for an early end, and when
_store = None  # shared by all ranks; holds the message of the rank that failed first


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    require(dist.is_initialized(), "there is no rank yet: interactive.run(lco, steps=10) starts one")
    return dist.get_world_size()


def local_device(device: str) -> torch.device:
    """The device of this rank: `auto` takes CUDA where there is one; `cuda` becomes cuda:LOCAL_RANK."""
    one_of(device=(device, ("auto", "cpu", "cuda")))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    require(kind == "cpu" or torch.cuda.is_available(), "--device cuda: torch sees no CUDA device")
    if kind == "cuda":
        # Modulo: some schedulers show each process one device, whatever its LOCAL_RANK.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def ranks_of_node() -> int:
    """Ranks on each node where torchrun started equally many on several nodes; else all ranks (one node)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    return local if set(gather([local])) == {local} and world() % local == 0 else world()


def compute_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is bfloat16 on CUDA, where float32 takes up to 15 times as long, and float32 on a CPU."""
    one_of(dtype=(dtype, ("auto", "float32", "bfloat16")))
    return dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def launch(main, device: str = "auto") -> None:
    """Start this rank, run main(), end the process. Inside another program: interactive.run().

    Started by torchrun or alone: the code path is the same. A failing rank prints its error, tells the others through
    the store and leaves at once; torchrun then closes the rest. SIGTERM and SIGINT ask for a save and a clean end.
    """
    if "WORLD_SIZE" in os.environ:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:  # some schedulers set WORLD_SIZE in every job: without an address, ranks would wait for each other
            found = f"WORLD_SIZE is set but {' and '.join(missing)} not: start with torchrun, or unset WORLD_SIZE"
            print(f"{Path(sys.argv[0]).name}: error: {found}", file=sys.stderr)
            sys.exit(2)
    join(device, alone="WORLD_SIZE" not in os.environ)
    code = 0
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _on_signal)
        prepare(device)
        record(main)()
        dist.barrier()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        code, sentence = 2 if isinstance(error, BadInput) else 1, _sentence(error)
        if code == 1 and _store_says_failed():
            print(f"rank {rank()}: stopping because another rank failed ({type(error).__name__})", file=sys.stderr)
        else:
            _store.set("failed", f"rank {rank()}: {error}")
            told = f"{Path(sys.argv[0]).name}: error: {sentence}"
            print(told if sentence else f"rank {rank()} failed:\n{traceback.format_exc()}", file=sys.stderr)
    if code and rank() == 0:
        _remove_unused_folder()
    sys.stdout.flush()
    sys.stderr.flush()
    if code or world() > 1:
        os._exit(code)  # a normal exit right after a gloo collective aborts in about one run of ten
    dist.destroy_process_group()


def join(device: str, alone: bool) -> None:
    """Make this process a rank: of those that torchrun started, or the only one."""
    global _store
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    given = dict(store=dist.HashStore(), rank=0, world_size=1) if alone else dict(timeout=timedelta(minutes=30))
    dist.init_process_group(backend, **given)
    _store = dist.distributed_c10d._get_default_store()
    _store.set(f"joined {rank()}", "")
    if rank() == 0:  # may host the store, without which the others could not join
        _store.wait([f"joined {other}" for other in range(world())])
    importlib.import_module("transformers.utils.logging").disable_progress_bar()


def prepare(device: str) -> None:
    """What makes this process fast."""
    if cpu and local_device(device).type == "cpu":
        cpu.keep_freed_memory()
    elif importlib.util.find_spec("gpu"):
        importlib.import_module("gpu").prepare()


def _sentence(error: BaseException) -> str | None:
    """An error in one sentence where the user's files, disk or settings explain it; None where its place matters."""
    if isinstance(error, (BadInput, FloatingPointError)):
        return str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    if full or isinstance(error, CheckpointException) or "(os error 28)" in str(error):
        reason, place = str(error).strip().splitlines()[-1][:200], _folder or Path.cwd()
        return f"writing to {place} failed, where {shutil.disk_usage(place).free / 2**20:.0f} MiB are free: {reason}"


def _store_says_failed() -> bool:
    try:
        return _store.check(["failed"])
    except Exception:  # the store's host is gone, so somebody failed
        return True


def _on_signal(number, frame) -> None:
    """First signal: finish the step, save, leave. Second one, or a rank that has failed: leave now."""
    global _signal, _first_signal
    if _stop.is_set():  # torchrun and schedulers may send one signal twice, within a moment
        if number == signal.SIGINT or time.monotonic() - _first_signal > 1:
            os._exit(128 + number)
        return
    if rank() == 0:  # not print(), which may be what was interrupted
        os.write(2, b"\nstopping after this step, with a checkpoint; a second signal stops at once, without one\n")
    _signal, _first_signal = number, time.monotonic()
    _stop.set()
    # torchrun sends the same SIGTERM when a peer died. Then there is no next step to wait for.
    threading.Thread(target=lambda: _store_says_failed() and os._exit(1), daemon=True).start()


def stop_requested(device: torch.device) -> bool:
    """True on all ranks as soon as one of them was asked to stop."""
    return bool(all_max(_stop.is_set(), device))


def leave_stopped(text: str) -> None:
    """Say it and end all ranks with 128 + the number of the signal that asked for it; 128 where none did."""
    number = int(all_max(_signal, torch.device("cpu")))
    say(text)
    dist.barrier()
    raise SystemExit(128 + number)


def all_sum(values: dict, device: torch.device) -> dict[str, float]:
    """Sums of scalars over all ranks, in float64 and in one collective. Every rank must bring the same keys."""
    keys = sorted(values)
    total = torch.stack([torch.as_tensor(values[k], dtype=torch.float64).detach().to(device) for k in keys])
    dist.all_reduce(total)
    return dict(zip(keys, total.tolist()))


def gather(rows: list) -> list:
    """The lists of all ranks as one, in the order of the ranks, on every rank."""
    parts = [None] * world()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def all_max(value: float, device: torch.device) -> float:
    """The largest value over all ranks."""
    most = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def all_equal(x: torch.Tensor) -> bool:
    """Whether the entries of x on all ranks are the same number, but for rounding."""
    most, least = (sign * all_max((sign * x).max(), x.device) for sign in (1, -1))
    return most - least <= 1e-6 * max(abs(most), abs(least))


def moments(x: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Mean and variance of the unmasked entries of x on all ranks, in float64."""
    x = (x * mask).double()
    sums = all_sum({"n": mask.sum(), "x": x.sum(), "xx": x.square().sum()}, x.device)
    mean = sums["x"] / sums["n"]
    return mean, max(sums["xx"] / sums["n"] - mean**2, 0.0)


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def stop_unless_finite(values: dict) -> None:
    """Raise on every rank alike: the values must be global ones."""
    bad = {k: float(v) for k, v in values.items() if not math.isfinite(float(v))}
    if bad:
        raise FloatingPointError(f"not finite: {bad}; the last checkpoint stays as it was")


# ---- 2. arguments ----------------------------------------------------------------------------------------------------


_HERE = Path(__file__).resolve().parent / "builtin"
BUILTIN = {"builtin": _HERE / "policy", "builtin-small": _HERE / "small", "builtin-strings": _HERE / "strings"}
BUILTIN["builtin-aligned"] = _HERE / "aligned"  # builtin after dpo.py


class BadInput(ValueError):
    """A wrong argument or file. Its message is one sentence: what, where, what was found, what was expected."""


def arg(default, help: str, at_least: float | None = None, at_most: float | None = None):
    """A field of Args: its default, the sentence that is its manual, and the values that are legal."""
    metadata = {"help": help, "at_least": at_least, "at_most": at_most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_args(cls, builtin: dict, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from the command line, with legal values; else one line and exit code 2."""
    try:
        return parse(cls, builtin, sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(cls, builtin: dict, argv: list[str]):
    """The defaults of `cls` are for real models. With a built-in model, and --model is one by default, `builtin`
    replaces the defaults of the arguments that are not given. BadInput where there is an error.
    """
    parser = _Parser(usage="%(prog)s [--name value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups, types, comments = {}, typing.get_type_hints(cls), _comments(cls)
    for f in fields(cls):
        comment = comments.get(f.name, "arguments")
        group = groups[comment] if comment in groups else groups.setdefault(comment, parser.add_argument_group(comment))
        default = f.default if f.default is not MISSING else f.default_factory()
        legal = [f"default: {default!r}"] if default not in ("", []) else []
        legal += [f"{word} {f.metadata[key]}" for key, word in _LIMITS.items() if f.metadata[key] is not None]
        kind, options = types[f.name], {"metavar": ""}
        if typing.get_origin(kind) is typing.Literal:
            legal[:0] = [", ".join(map(str, typing.get_args(kind)))]
            kind = type(default)
        elif typing.get_origin(kind) is list:
            kind, options = typing.get_args(kind)[0], {"metavar": "VALUE", "nargs": "*"}
        elif kind is bool:
            kind, options = _boolean, {"metavar": "true|false", "nargs": "?", "const": True}
        help = f.metadata["help"] + f" ({'; '.join(legal)})" * bool(legal)
        group.add_argument(f"--{f.name}", type=kind, help=help.replace("%", "%%"), **options)
    given, unknown = parser.parse_known_args(argv)
    given, name = vars(given), "".join(unknown[:1]).partition("=")[0]
    require(not unknown, f"unknown argument {name}" + _nearest(name.lstrip("-"), types, "--"))
    names = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for name in {name for name in names if names.count(name) > 1}:
        raise BadInput(f"{name} is given twice")
    args = cls(**given)
    if args.model in BUILTIN:
        args = cls(**builtin | given)
    if args.model == "builtin" and f"builtin-{getattr(args, 'task', '')}" in BUILTIN:  # its own alphabet
        args.model = f"builtin-{args.task}"
    if args.dtype == "auto":
        kind = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
        args.dtype = compute_dtype("auto", torch.device(kind))
        if os.environ.get("RANK", "0") == "0":
            print(f"--dtype auto: {args.dtype} on {kind}", flush=True)
    return check_args(args)


def check_args(args):
    """The same arguments, or an error that names the first one whose value is not legal."""
    types = typing.get_type_hints(type(args))
    for f in fields(args):
        value = getattr(args, f.name)
        require(not isinstance(value, int) or abs(value) < 2**63, f"--{f.name} must be below 2**63, found {value}")
        if typing.get_origin(types[f.name]) is typing.Literal:
            one_of(**{f.name: (value, typing.get_args(types[f.name]))})
        for key, word in _LIMITS.items():
            limit, sign = f.metadata[key], 1 if key == "at_least" else -1
            inside = limit is None or (math.isfinite(value) and sign * value >= sign * limit)
            require(inside, f"--{f.name} must be {word} {limit}, found {value}")
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"--{f.name} must be a finite number, found {value}")
    return args


_LIMITS = {"at_least": "at least", "at_most": "at most"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def _nearest(word: str, words, prefix: str = "") -> str:
    near = difflib.get_close_matches(word.lower(), map(str, words), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _boolean(word: str) -> bool:
    if word.lower() not in ("false", "true"):
        raise argparse.ArgumentTypeError(f"must be one of true, false, found {word!r}")
    return word.lower() == "true"


@lru_cache
def _comments(cls) -> dict[str, str]:
    """The comment that each field of a dataclass stands under."""
    comment, found = "", {}
    for line in inspect.getsource(cls).splitlines():
        if match := re.fullmatch(r"    # (.+)", line):
            comment = match[1]
        elif match := re.match(r"    (\w+): ", line):
            found[match[1]] = comment
    return found


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


def one_of(**choices) -> None:
    """one_of(loss=(value, allowed)): the value is one of those allowed."""
    for name, (value, allowed) in choices.items():
        near = _nearest(str(value), allowed)
        require(value in allowed, f"--{name} must be one of {', '.join(map(str, allowed))}; found {value!r}" + near)


def split_evenly(prompts: int, samples: int, minibatches: int, micro_batch: int) -> str:
    """The derived sizes of a step in words, or an error that names what does not divide."""
    require(prompts % world() == 0, f"--prompts_per_step {prompts} does not divide among {world()} ranks")
    rows = prompts * samples // world()
    require(
        rows % minibatches == 0,
        f"--minibatches {minibatches} does not divide the {rows} rows of a rank "
        f"(--prompts_per_step {prompts} x --samples_per_prompt {samples} / {world()} ranks)",
    )
    part = rows // minibatches
    micro = min(micro_batch, part)
    require(part % micro == 0, f"--micro_batch {micro} does not divide the {part} rows of a rank in a minibatch")
    return (
        f"{prompts} prompts x {samples} samples = {prompts * samples} rows per step on {world()} rank(s); "
        f"{minibatches} minibatch(es) of {part} rows per rank in {part // micro} micro-batch(es) of {micro}"
    )


# ---- 3. seeds --------------------------------------------------------------------------------------------------------

TRAIN, EVAL = 0, 1  # streams of noise that never meet


def uniforms(seed: int, stream: int, step: int, rows, columns: int) -> torch.Tensor:
    """Noise in [0, 1), [len(rows), columns], fp32, on the CPU; row i depends on (seed, stream, step, rows[i]) alone.

    So a rollout is the same for any batch size and any number of ranks, and a checkpoint needs no random state.
    """
    noise = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, row, step, stream])).random(columns, np.float32)
        for row in rows
    ]
    return torch.from_numpy(np.stack(noise))


def minibatch_rows(seed: int, step: int, epoch: int, rows_total: int, minibatches: int) -> list[list[int]]:
    """The local row numbers of each minibatch of this rank.

    Every run of `minibatches` neighbouring rows gives one row to each minibatch, in an order drawn from
    (seed, step, epoch): so the global minibatches hold the same rows on any number of ranks, and all ranks have equally
    many of them.
    """
    rng = np.random.default_rng([seed, step, epoch])
    order = rng.permuted(np.arange(rows_total).reshape(-1, minibatches), axis=1)
    mine = np.array_split(order, world())[rank()] - rank() * (rows_total // world())
    return [mine[:, m].tolist() for m in range(minibatches)]


# ---- 4. batches ------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, prompt: str | list[dict], changes: Counter | None = None) -> list[int]:
    """Ids of a prompt: text as it is, messages through the chat template (joined by newlines where there is none).

    If the last message is the assistant's, it is the beginning of the answer, which is continued. Text may have been
    rendered elsewhere: of two tokens that begin a sequence one is kept, and none that ends an answer. `changes` counts
    such prompts.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        text = "\n".join(m["content"] for m in prompt)
        ids = tokenizer(text if prompt[-1]["role"] == "assistant" else text + "\n")["input_ids"]
    else:
        begun, where = prompt[-1]["role"] == "assistant", getattr(prompt, "where", "a prompt in messages")
        how = dict(add_generation_prompt=not begun, continue_final_message=begun, tokenize=True, return_dict=True)
        try:
            ids = tokenizer.apply_chat_template(prompt, **how)["input_ids"]
        except Exception as error:  # templates raise errors of many kinds
            reason = " ".join(str(error).split())
            raise BadInput(f"{where}: the chat template refuses its messages ({reason})") from error
        require(
            ids[-1] not in end_tokens(tokenizer),
            f"{where}: the chat template ends the prompt with {tokenizer.decode(ids[-1:])!r}, which ends an answer; "
            "expected one that begins the assistant's turn",
        )
    begin, end = 0, len(ids)
    while end - begin > 1 and ids[begin] == ids[begin + 1] == tokenizer.bos_token_id:
        begin += 1
    while end - begin > 1 and ids[end - 1] in end_tokens(tokenizer):
        end -= 1
    if changes is not None:
        changes["prompts began twice with BOS, one kept"] += begin > 0
        changes["prompts ended with EOS, taken off"] += end < len(ids)
    return ids[begin:end]


def encode_completion(tokenizer, text: str, prompt: str | list[dict] = (), changes: Counter | None = None) -> list[int]:
    """Ids of an answer as the policy would have sampled it: the text, then one token that ends it.

    The answer to messages ends as the chat template ends it, an answer to text with EOS or the end that it brings.
    """
    ids, ends = tokenizer(text, add_special_tokens=False)["input_ids"], end_tokens(tokenizer)
    blank = (i for i, token in enumerate(ids) if token in ends and not decode(tokenizer, [ids[i:]])[0].strip())
    length = next(blank, len(ids))  # from an end of its own on, with nothing but white space behind it
    if changes is not None:
        changes["answers had an end of their own, none added"] += length < len(ids)
    own_end = ids[length] if length < len(ids) else tokenizer.eos_token_id
    return ids[:length] + [own_end if isinstance(prompt, str) else answer_end(tokenizer)]


def answer_end(tokenizer) -> int:
    """The token with which the chat template ends the assistant's turn; EOS if it has none, or there is no template."""
    return _answer_end(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _answer_end(tokenizer, chat_template: str) -> int:
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the answer"}]
    try:
        tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("the answer")[2]
    except Exception:  # no template, or one that refuses these two
        return tokenizer.eos_token_id
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in special), tokenizer.eos_token_id)


def end_tokens(tokenizer) -> tuple[int, int]:
    return tokenizer.eos_token_id, answer_end(tokenizer)


def changed(changes: Counter) -> str:
    """What was changed, as the end of a note: '; 3 prompts began twice with BOS, one kept'."""
    return "".join(f"; {count} {what}" for what, count in changes.items() if count)


def encode_pairs(
    tokenizer, pairs: list[dict], max_prompt: int, max_new_tokens: int, sides=("chosen", "rejected")
) -> tuple[list[dict], str]:
    """Rows {prompt, chosen, rejected} with `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of int) added.

    sides: the columns that hold answers. Rows that are longer than a limit, or whose two answers are the same tokens,
    are left out; the note counts them.
    """
    rows, long, same, changes = [], 0, 0, Counter()
    for pair in pairs:
        ids = {"prompt_ids": encode_prompt(tokenizer, pair["prompt"], changes)}
        answers = [encode_completion(tokenizer, pair[side], pair["prompt"], changes) for side in sides]
        ids |= {f"{side}_ids": answer for side, answer in zip(sides, answers)}
        longest = max(map(len, answers))
        if len(ids["prompt_ids"]) > max_prompt or longest > max_new_tokens:
            long += 1
        elif answers[1:] == answers[:1]:
            same += 1
        else:
            rows.append(pair | ids)
    require(bool(rows), f"no pair is left: {long} of {len(pairs)} are too long, {same} have two equal answers")
    note = f"{len(rows)} pairs" + (f"; {long} too long, left out" if long else "")
    return rows, note + (f"; {same} with two equal answers, left out" if same else "") + changed(changes)


def decode(tokenizer, completion_ids: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(completion_ids, skip_special_tokens=True) if completion_ids else []


def make_batch(prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_id: int, device) -> dict:
    """Prompts padded on the left [B, P], completions on the right [B, T]. Masks come from lengths, not from ids."""
    P, T = max(map(len, prompt_ids)), max(map(len, completion_ids))
    batch = {
        "prompt_ids": torch.tensor([[pad_id] * (P - len(p)) + p for p in prompt_ids]),
        "prompt_mask": torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompt_ids]),
        "completion_ids": torch.tensor([c + [pad_id] * (T - len(c)) for c in completion_ids]),
        "mask": torch.tensor([[True] * len(c) + [False] * (T - len(c)) for c in completion_ids]),
    }
    return {k: v.to(device) for k, v in batch.items()}


def take(batch: dict, rows: list[int]) -> dict:
    """Some rows of a batch, cut to the longest prompt and the longest completion among them.

    Every entry is [B], or [B, P] with a name that starts with `prompt`, or [B, T, ...].
    """
    index = torch.tensor(rows, device=batch["mask"].device)
    P = int(batch["prompt_mask"][index].sum(1).max())
    T = int(batch["mask"][index].sum(1).max())
    out = {}
    for k, v in batch.items():
        v = v[index]
        out[k] = v if v.dim() == 1 else v[:, v.shape[1] - P :] if k.startswith("prompt") else v[:, :T]
    return out


# ---- 5. run folder ---------------------------------------------------------------------------------------------------

ON_SCREEN = ("reward/mean", "loss/", "kl/", "policy/kl_old", "policy/logit_gap", "length/mean", "revise/", "eval/")
_folder = None  # of this process's run
FREE_TO_CHANGE = {"out", "resume", "device", "micro_batch", "rollout_rows", "save_every", "track", "push_to_hub"}
NAMES_FILES = {"model", "teacher", "ref_teacher", "reviser", "external_model", "reward_model", "reward_ref"}
NAMES_FILES |= {"dataset", "pairs", "prompts", "test_dataset", "reward_file"}


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class RunFolder:
    """args.json, source.py, metrics.jsonl, samples.jsonl, plot.png, report.html, checkpoint/, model/. Rank 0 writes.

    One process at a time: its rank 0 holds a lock on .lock, which the kernel frees when it dies.
    """

    def __init__(self, args, script: str):
        name = Path(script).stem
        self.path = Path(from_rank_0(args.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")).expanduser()
        self.settings = settings = asdict(args)
        self.total = settings.get("steps", 0)  # a script without steps has no --resume either
        self.first = self.tracker = None
        self.script, self.started = Path(script), time.time()
        require(args.out or not settings.get("resume"), "--resume needs --out, the folder of the run to go on with")
        problem = None
        if rank() == 0:
            try:
                self._open(Path(script))
            except (BadInput, OSError) as error:
                problem = str(error) if isinstance(error, BadInput) else f"--out {self.path}: {error.strerror}"
        problem = from_rank_0(problem)
        require(problem is None, problem)
        if ranks_of_node() < world():
            _require_shared(self.path)
        say(f"run folder: {self.path}")

    def _open(self, script: Path) -> None:
        """Make the folder this process's, or refuse what would mix two runs."""
        global _folder
        path, settings = self.path, self.settings
        if settings.get("track", "none") != "none" or settings.get("push_to_hub"):
            require(importlib.util.find_spec("publish"), "--track and --push_to_hub need the file publish.py")
            self.tracker = importlib.import_module("publish").start(path, settings)  # refuses what is missing
        resume, hint = settings.get("resume", False), ", or give --resume" if "resume" in settings else ""
        for locked in (False, True):  # what another process did before the lock was ours shows the second time
            used = _is_used(path)
            known = resume and (path / "args.json").exists()
            require(known or not used, f"--out {path} exists and is not empty: choose another folder{hint}")
            if not locked:
                self.lock = _lock(path)
        _folder, source, watched = path, path / "source.py", _watch(script, settings)
        changed = self._changes(stored(path / "args.json"), watched) if used else []
        if changed:
            found = f"WARNING: {', '.join(changed)} changed since the run in {path} began; it goes on with the new code"
            if script.name in changed and source.exists():
                source.rename(path / time.strftime("source-until-%Y%m%d-%H%M%S.py"))
                found += ", and the old script is kept as source-until-*.py"
            print(found, file=sys.stderr)
        for name in ("metrics.jsonl", "samples.jsonl"):
            (path / name).touch()
        write_whole(source, script.read_text())
        about = dict(args=settings, command=shlex.join(sys.argv), world=world(), git=_git_commit(), watched=watched)
        about |= dict(torch=torch.__version__, versions=_versions(), time=time.strftime("%Y-%m-%d %H:%M:%S"))
        write_whole(path / "args.json", json.dumps(about, indent=2) + "\n")

    def _changes(self, before: dict, watched: dict) -> list[str]:
        """Names of code that has changed since a run wrote `before`; other settings, data or models are refused."""
        for key in self.settings.keys() - FREE_TO_CHANGE:
            require(
                before["args"].get(key) == self.settings[key],
                f"--resume {self.path}: --{key} was {before['args'].get(key)!r} and is now {self.settings[key]!r}; "
                "a resumed run keeps its settings",
            )
        changed = [key for key, digest in before.get("watched", {}).items() if watched.get(key, digest) != digest]
        data = ", ".join(key for key in changed if not key.endswith(".py"))
        require(not data, f"--resume {self.path}: the content of {data} is not that with which the run began")
        return changed

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`: the checkpoint that the run goes on from was written there."""
        if rank() != 0:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            lines = (self.path / name).read_text(errors="replace").split("\n")[:-1]  # the last one may be torn
            steps = [_step_of(line) for line in lines]
            kept = [line + "\n" for line, at in zip(lines, steps) if at is not None and at <= step]
            write_whole(self.path / name, "".join(kept))
            gap = [at for at in range(step + 1) if at not in steps and name == "metrics.jsonl"]
            for what, lost in (("damaged lines, taken out", steps.count(None)), ("steps that are missing", gap)):
                if lost:
                    print(f"{self.path / name}: {what}: {lost}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line into metrics.jsonl and one on the screen, broken only by a terminal that is narrower."""
        stop_unless_finite({name: value for name, value in metrics.items() if value is not None})
        if rank() != 0:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.tracker:
            self.tracker.log(step, metrics)
        self.first = self.first or (step, time.time())
        pace = (time.time() - self.first[1]) / max(1, step - self.first[0])
        left = timedelta(seconds=int(pace * (self.total - step)))
        names = [k for start in ON_SCREEN for k in metrics if k.startswith(start) and metrics[k] is not None]
        shown = [f"step\0{step}/{self.total}", *(f"{k.removesuffix('/mean')}\0{metrics[k]:.4g}" for k in names)]
        shown += [f"{pace:.2f}\0s/step", f"{left}\0left"] * (step > self.first[0])
        width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 10**6
        text = textwrap.fill("  ".join(shown), width, subsequent_indent="  ", break_on_hyphens=False)
        print(text.replace("\0", " "), flush=True)

    def samples(self, step: int, samples: list[dict]) -> None:
        """Rows {kind, prompt, completion, reward} into samples.jsonl."""
        if rank() == 0:
            with (self.path / "samples.jsonl").open("a") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
            if self.tracker:
                self.tracker.samples(step, samples)

    def report(self) -> None:
        """plot.png and report.html, if report.py is there."""
        self._with("report", lambda report: report.write_report(self.path))

    def token_page(self, name: str, title: str, answers: list[dict]) -> None:
        """A page of answers with coloured tokens, if report.py is there; see report.token_page()."""
        self._with("report", lambda report: report.token_page(self.path / name, title, answers))

    def _with(self, room: str, write):
        """write(module) on rank 0, if the room is there."""
        if rank() == 0 and importlib.util.find_spec(room):
            try:
                return write(importlib.import_module(room))
            except (Exception, SystemExit) as error:  # a page must never cost the model
                print(f"{self.path}: no plot or page could be written ({type(error).__name__}: {error})", flush=True)


class Run(RunFolder):
    """What happens around the loop of a script: evaluation, log, checkpoints, an early end.

    run = Run(args, __file__)                              refuses a folder that is in use, before a model is loaded
    for step in run.steps(models, optimizer, evaluate):    goes on from a checkpoint, or evaluates first
        run.lap("update")                                  time/update: the seconds since the last lap
        run.end_step(metrics, samples)                     logs; evaluates and saves when it is time
    run.finish(policy, tokenizer)                          model/ and report.html; after an early end no model/

    --keep best compares evaluations by the first metric of BY that they have; -1: the lower the better.
    """

    BY = {"eval/greedy": 1, "eval/reward": 1, "eval/pair_accuracy": 1, "eval/nll": -1}
    stop_after = None  # tests end a run after this step, as a signal would
    step, stopped = -1, False
    best = -1e99, 0  # a score and its step, negative, so that the earlier of two equal ones is larger

    def steps(self, models, optimizer, evaluate):
        """The numbers of the steps that are left. evaluate() -> (metrics, samples) runs on all ranks."""
        self.models, self.optimizer, self.evaluate = models, optimizer, evaluate
        self._with("publish", lambda publish: say(publish.disk_use(models, self.settings)))
        self.start = self._resume() if self.settings["resume"] else 0
        if self.start == 0:
            held_out, examples = evaluate()
            self._look_at(0, held_out)
            self.samples(0, examples)
            self.log(0, held_out)
        for self.step in range(self.start, self.total):
            self.laps = {}
            self.began = self.last = time.perf_counter()
            yield self.step
            if self.stopped:
                return

    def lap(self, name: str) -> None:
        """time/<name>: seconds since the last lap of this step; time/step: since its beginning."""
        now = time.perf_counter()
        self.laps |= {f"time/{name}": now - self.last, "time/step": now - self.began}
        self.last = now

    def end_step(self, metrics: dict, samples: list[dict] = (), evaluate: bool = False) -> None:
        """evaluate: also where --eval_every would not."""
        step, last = self.step + 1, self.step + 1 == self.total
        self.samples(step, samples)
        if last or evaluate or step % self.settings["eval_every"] == 0:
            held_out, examples = self.evaluate()
            metrics = metrics | held_out
            self.samples(step, examples)
            self._look_at(step, held_out)
        self.log(step, metrics | self.laps)
        asked = stop_requested(next(self.models.parameters()).device) or step == self.stop_after
        self.stopped = asked and not last
        if last or self.stopped or self.best[1] == -step or step % self.settings["save_every"] == 0:
            save_checkpoint(self.path, step, self.models, self.optimizer, self._kept(step), self.best)

    def _look_at(self, step: int, held_out: dict) -> None:
        """Is it the best step? The model before the first one is none of the run's, and only shows what is compared."""
        if self.settings["keep"] == "best":
            name = next((name for name in self.BY if held_out.get(name) is not None), None)
            require(name, f"--keep best: this run has none of the held-out metrics {', '.join(self.BY)}")
            self.best = max(self.best, (self.BY[name] * held_out[name], -step)) if step else self.best

    def _kept(self, newest: int):
        """The steps whose checkpoints stay."""
        return {"last": {newest}, "best": {newest, -self.best[1]}, "all": range(newest + 1)}[self.settings["keep"]]

    def take_best(self) -> int:
        """With --keep best, load the best weights, unless the run was stopped; returns the step of what is loaded."""
        at = -self.best[1] or self.total
        if at < self.total and not self.stopped:
            load_checkpoint(verified(self._checkpoint(at)), self.models, self.optimizer)
        return at

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoint" / f"step-{step:06d}"

    def finish(self, policy, tokenizer, then: str = "") -> None:
        """A run has ended when it has model/. One that was stopped exports nothing and leaves with an exit code.

        With --keep best, model/ is the best one. then: the command on the last line, else that which evaluates model/.
        """
        at = self.take_best()
        if not self.stopped:
            card = self._with("publish", lambda publish: publish.card(self.path, self.script.stem, at))
            export_model(self.path / "model", policy, tokenizer, card or "")
        self.report()
        if self.tracker:
            self.tracker.close()
        if not self.stopped:
            seconds = time.time() - self.started
            self._with("publish", lambda publish: publish.end(self.path, at, seconds, then))
            if self.settings["push_to_hub"] and world() > 1:  # a barrier would not wait as long as the Hub may take
                _store.set("pushed", "") if rank() == 0 else _store.wait(["pushed"], timedelta(days=1))
        else:
            words = sys.argv + ([] if self.settings["out"] else ["--out", str(self.path)])
            command = re.sub(r"(?i) --resume[ =]false", "", shlex.join(words))
            command += " --resume" * (not self.settings["resume"])
            nodes = " --nnodes=... --rdzv_..." * (ranks_of_node() < world())  # as before
            launcher = f"torchrun --nproc_per_node={ranks_of_node()}{nodes}" if world() > 1 else "python"
            leave_stopped(
                f"stopped after step {self.step + 1} of {self.total}: {self.path} has its checkpoint, and no model/ "
                f"before the last step; to go on: {launcher} {command}"
            )

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns the step to go on with."""
        step, path = latest_checkpoint(self.path) or (0, None)
        if path:
            load_checkpoint(path, self.models, self.optimizer)
            self.best = tuple(stored(path / "manifest.json", "files").get("best") or self.best)
            if 0 < -self.best[1] < step:
                verified(self._checkpoint(-self.best[1]))  # now, and not after all steps
            _remove_other_checkpoints(path.parent, self._kept(step))  # which the run was removing when it was killed
            say(f"resumed from {path}")
        self.cut(step if path else -1)
        return step


def _require_shared(folder: Path, seconds: float = 30) -> None:
    """Raise unless all ranks see the folder of rank 0: each writes its shards of a checkpoint there."""
    mark = folder / f"seen-by-all-ranks-{from_rank_0(time.time_ns())}.part"
    if rank() == 0:
        mark.touch()
    dist.barrier()
    end = time.monotonic() + seconds  # file systems of a network need a moment
    while not (seen := mark.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    blind = [r for r, sees in enumerate(gather([seen])) if not sees]
    if rank() == 0:
        mark.unlink()
    require(not blind, f"--out {folder}: ranks {blind} do not see it; with several nodes it must be on shared storage")


def write_whole(path: Path, text: str) -> None:
    """The file is the old one or the new one at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def kept(path: Path, make, *given) -> list:
    """The rows of a file of JSON lines. Where there is none, make(*given) returns each rank's share of its rows.

    So a resumed run goes on with what the models of an earlier step made.
    """
    if not from_rank_0(path.exists()):
        rows = gather(make(*given))
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
        dist.barrier()
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}): remove it, and it will be made again") from error


def _versions() -> dict[str, str | None]:
    """Of Python and of the packages that may decide a result; None where one is not installed."""
    found = {"python": sys.version.split()[0]} | dict.fromkeys(("torch", "transformers", "datasets", "math-verify"))
    for name in list(found)[1:]:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def stored(path: Path, key: str = "args", kind: type = dict) -> dict:
    """The content of a JSON file that a run has written, with something of this kind under `key`."""
    try:
        content = json.loads(path.read_text())
        whole = isinstance(content[key], kind) and bool(content[key])
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    require(whole, f"{path} is missing or damaged: expected JSON with '{key}'")
    return content


def unfinished(folder: Path) -> str:
    """What to add where a model is expected in a folder that has none: perhaps it is that of a run."""
    for run in (folder, folder.parent):
        if (run / "args.json").exists():
            ended = (run / "model").exists()
            return f"; its model is {run}/model" if ended else f"; the run in {run} has not ended (--resume)"
    return ""


_NEW = {".lock", "args.json", "source.py", "metrics.jsonl", "samples.jsonl"}  # what a run has before it logs


def _is_used(path: Path) -> bool:
    """Whether a folder has anything else than what a run leaves that never logged a step."""
    files = list(path.iterdir()) if path.is_dir() else []
    old = [p for p in files if p.suffix == ".jsonl" and p.stat().st_size or p.name not in _NEW and p.suffix != ".part"]
    return bool(old) or bool(files) and path / ".lock" not in files


def _remove_unused_folder() -> None:
    """A run that failed before it logged anything leaves no folder."""
    if _folder and not _is_used(_folder):
        shutil.rmtree(_folder, ignore_errors=True)


def _lock(folder: Path):
    """Make a folder and hold it until the file that is returned is closed, or this process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock(), it is not inherited by a reward's workers
    except OSError as error:
        require(error.errno not in (errno.EAGAIN, errno.EACCES), f"--out {folder}: another process is using it")
        print(f"{folder}: this file system has no locks: do not start a second run in it", file=sys.stderr)
    return file


def _watch(script: Path, settings: dict) -> dict[str, str]:
    """Hashes of what a resumed run must find as it was: code, and the files and models that arguments name."""
    code = (script.name, "common.py", "lm.py", "gpu.py", "tasks.py", "graders.py", "builtin/tasks.py", "builtin/gym.py")
    files = {name: script.parent / name for name in code}
    for name, value in settings.items():
        if value and name in NAMES_FILES:
            here, on_hub = BUILTIN.get(value, Path(value).expanduser()), f"models--{value.replace('/', '--')}/refs/main"
            files[f"--{name} {value}"] = here if os.path.exists(here) else Path(HF_HUB_CACHE, on_hub)  # its commit
    if settings.get("reward_file"):
        reward = Path(settings["reward_file"]).resolve()
        imported = [Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())]
        own = [path for path in imported if reward.parent in path.parents and path.suffix == ".py" and path != reward]
        files |= {f"{path.relative_to(reward.parent)}": path for path in own if "site-packages" not in path.parts}
    return {name: digest(path) for name, path in files.items() if os.path.exists(path)}


def digest(path: Path) -> str:
    """Of a file, or of a model in a folder: sizes and contents, of which 32 MiB at both ends stand for a large file."""
    sha, some = hashlib.sha256(), 2**25  # a model takes a moment, and trained weights differ everywhere
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file == path or file.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors"):
            with file.open("rb") as content:
                size = content.seek(0, os.SEEK_END)
                sha.update(f"{file.relative_to(path)} {size}\n".encode())
                for start in (0, max(some, size - some)):
                    content.seek(start)
                    sha.update(content.read(some))
    return sha.hexdigest()


def _step_of(line: str) -> int | None:
    """The step of a logged line; None if it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):  # there is no git here
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# ---- 6. checkpoints --------------------------------------------------------------------------------------------------


_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)  # LoRA: the frozen body is not saved again


def save_checkpoint(folder: Path, step: int, model, optimizer, keep=(), best=None) -> None:
    """folder/checkpoint/step-<n>, whole or not there: written beside, renamed, and only then are older ones removed.

    keep: the older steps that stay. best: what a resumed run must know of them.
    All ranks write their shards, so with several nodes the folder must be on a file system that they share.
    """
    home = Path(folder) / "checkpoint"
    temporary, target = home / f"tmp-{step:06d}", home / f"step-{step:06d}"
    if all_max(not _weights_are_sound(model), next(model.parameters()).device):
        found = f"the weights after step {step} are not finite or above 1e18, and are not saved"
        raise FloatingPointError(f"{found}: an earlier checkpoint stays as it was; a smaller --lr may help")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _begin_state(optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    with warnings.catch_warnings(action="ignore"):  # that one process is a short process group
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=temporary)
    own = [*temporary.glob(f"__{rank()}_*")] + [temporary / ".metadata"] * (rank() == 0)
    files = dict(gather([(path.name, _size_and_hash(path)) for path in own]))
    if rank() == 0:
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files, "best": best}))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _remove_other_checkpoints(home, {step, *keep})
    dist.barrier()


def _weights_are_sound(model) -> bool:
    """Whether no trained weight of this rank is NaN, or so large that its square overflows."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters() if p.requires_grad]
    ends = [torch.stack(torch.aminmax(part.detach())) for part in parts if part.numel()]
    return not ends or float(torch.stack(ends).abs().max()) < 1e18


def _size_and_hash(path: Path) -> list:
    if not path.exists():
        return [0, "nothing"]
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _remove_other_checkpoints(home: Path, keep) -> None:
    """What runs have made in checkpoint/, but for the steps in `keep`, and nothing else."""
    for old in home.iterdir() if rank() == 0 else []:
        made = re.fullmatch(r"(step|tmp)-(\d{6,})", old.name)
        if made and (made[1] == "tmp" or int(made[2]) not in keep):
            shutil.rmtree(old, ignore_errors=True)


def _begin_state(optimizer) -> None:
    """Adam's state of the parameters that it has not updated yet, as its first update would make it.

    Else get_state_dict makes it with an update of its own, which counts as one, or leaves it out.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                count = torch.zeros((), device=p.device)  # where a fused Adam keeps it
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": count, **zeros}


def latest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest checkpoint of a run folder, verified; None when there is none. All ranks call it."""
    found = (Path(folder) / "checkpoint").glob("step-*")
    steps = {int(path.name[5:]): path for path in found if re.fullmatch(r"step-\d{6,}", path.name)}
    if not steps:
        return None
    step, newest = max(steps.items())
    return step, verified(newest)


def verified(path: Path) -> Path:
    """A checkpoint with every byte of it checked. All ranks call it: each checks its share of the files."""
    manifest = stored(path / "manifest.json", "files")
    saved, files = manifest.get("step"), sorted(manifest["files"].items())
    own = saved == int(path.name[5:])
    require(own, f"checkpoint {path} was saved after step {saved}: give the folder its name back")
    found = [(name, _size_and_hash(path / name), expected) for name, expected in files[rank() :: world()]]
    wrong = gather([f"{name} is {has}, expected {expected}" for name, has, expected in found if has != expected])
    require(not wrong, f"checkpoint {path} is damaged: {'; '.join(wrong[:1])}")
    return path


class _Index(pickle.Unpickler):
    """Reads a checkpoint's .metadata, a pickle: with nothing in it but what torch writes there, it runs no code."""

    known = re.compile(
        r"torch\.distributed\.checkpoint\.(metadata\.(_MEM_FORMAT_ENCODING|[A-Z]\w+)|filesystem\._StorageInfo)|"
        r"pathlib\.(_local\.)?PosixPath|torch\.(Size|serialization\._get_layout|bool|b?float\d+|u?int\d+)"
    )

    def find_class(self, module, name):
        known = self.known.fullmatch(f"{module}.{name}")
        require(known, f"the checkpoint's .metadata would run {module}.{name}, which torch does not write")
        return super().find_class(module, name)


def load_checkpoint(path: Path, model, optimizer) -> None:
    """Model and optimizer as they were, on any number of ranks. No file in it can run code: see _Index."""
    with (path / ".metadata").open("rb") as file:
        _Index(file).load()
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    state = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings(action="ignore"):
        dcp.load(state, checkpoint_id=path)
    parts = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    set_state_dict(model, optimizer, **parts, options=_OPTIONS)


def export_model(folder: Path, model, tokenizer, card: str = "") -> None:
    """folder/: Hugging Face format, loads with from_pretrained; adapters are merged. card: its README.md."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        state = _merge_adapters(model, state)
        # A tied head is the embedding under another name, and would be written twice.
        if model.config.tie_word_embeddings:
            for key in set(getattr(model, "_tied_weights_keys", None) or []) & state.keys():
                del state[key]
        state = {key: x.float() if x.is_floating_point() else x for key, x in state.items()}
        with torch.device("meta"):
            skeleton = type(model)(model.config)  # has no adapters, so that save_pretrained writes a whole model
        if model.can_generate():
            skeleton.generation_config = model.generation_config
        work = Path(f"{folder}.part")
        shutil.rmtree(work, ignore_errors=True)
        skeleton.save_pretrained(work, state_dict=state)
        tokenizer.save_pretrained(work)
        if card and not (folder / "README.md").exists():  # which its owner may have changed
            (work / "README.md").write_text(card)
        files = [file for file in work.rglob("*") if file.is_file()]
        for file in files:  # safetensors gives its files to their owner alone
            file.chmod((work / "config.json").stat().st_mode)
        if folder.exists():  # an ended run that was resumed: the same files again, beside what was added to them
            for file in files:
                place = folder / file.relative_to(work)
                place.parent.mkdir(exist_ok=True)
                file.replace(place)
            shutil.rmtree(work)
        else:
            work.rename(folder)
    dist.barrier()


def _merge_adapters(model, state: dict) -> dict:
    """W + scaling * B @ A for each adapted layer (Conv1D keeps its weight transposed), under the original names."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return dict(state)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    merged = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for name, layer in layers.items():
        update = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
        update = layer.scaling["default"] * (update.T if layer.fan_in_fan_out else update)
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + update
    return merged

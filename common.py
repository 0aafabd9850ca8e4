"""What all scripts share: whatever could break or speed up a run, and could never change a result.

Contents
    1. ranks         one process or many, started the same way, ended together
    2. arguments     the command line, and errors that say what to change
    3. seeds         noise as a function of (seed, step, row), never of the number of ranks
    4. models        loading, LoRA, FSDP2, final hidden states
    5. batches       prompts and completions as padded tensors; the only place where anything is shifted
    6. rollout       our sampler
    7. vocabulary    losses over [N, V] logits that never exist at once
    8. run folder    metrics, samples, plot, report
    9. checkpoints   atomic, resumable on any number of ranks, exported in Hugging Face format

Shapes: B sequences, P prompt positions, T completion positions, H hidden width, V vocabulary, N unmasked tokens.

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
import copy
import functools
import gc
import importlib.util
import inspect
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
import weakref
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils._pytree import tree_map

# ======================================================================================================================
# 1. ranks
# ======================================================================================================================

_stop = threading.Event()  # set by SIGTERM or SIGINT; ranks agree on it once a step
_signal = _exit_code = 0  # the signal that asked for an early end; what the process returns after one
_store = None  # shared by all ranks; holds the message of the rank that failed first


def rank() -> int:
    return dist.get_rank()


def world() -> int:
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
    """Start this rank, run main(), end it.

    Started by torchrun or alone: the code path is the same. A failing rank prints its error, tells the others through
    the store and leaves at once; torchrun then closes the rest. SIGTERM and SIGINT ask for a save and a clean end.
    """
    global _store
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" in os.environ:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:  # some schedulers set WORLD_SIZE in every job: without an address, ranks would wait for each other
            found = f"WORLD_SIZE is set but {' and '.join(missing)} not: start with torchrun, or unset WORLD_SIZE"
            print(f"{Path(sys.argv[0]).name}: error: {found}", file=sys.stderr)
            sys.exit(2)
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _store = dist.distributed_c10d._get_default_store()
    from transformers.utils import logging

    logging.disable_progress_bar()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)

    code = 0
    try:
        if cpu and local_device(device).type == "cpu":
            cpu.keep_freed_memory()
        elif importlib.util.find_spec("gpu"):
            import gpu

            gpu.prepare()
        record(main)()
        dist.barrier()
        code = _exit_code
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BadInput as error:
        code = 2
        _store.set("failed", "bad input")
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    except BaseException as error:
        code = 1
        if _store_says_failed():
            print(f"rank {rank()}: stopping because another rank failed ({type(error).__name__})", file=sys.stderr)
        else:
            _store.set("failed", f"rank {rank()}: {error}")
            print(f"rank {rank()} failed:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code or world() > 1:
        os._exit(code)  # a normal exit right after a gloo collective aborts in about one run of ten
    dist.destroy_process_group()


def _store_says_failed() -> bool:
    try:
        return _store.check(["failed"])
    except Exception:  # the store's host is gone, so somebody failed
        return True


def _on_signal(number, frame) -> None:
    """First signal: finish the step, save, leave. Second one, or a rank that has failed: leave now."""
    global _signal
    if _stop.is_set() and number == signal.SIGINT:
        os._exit(130)
    if rank() == 0:  # not print(), which may be what was interrupted
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once, without one\n")
    _signal = number
    _stop.set()
    # torchrun sends the same SIGTERM when a peer died. Then there is no next step to wait for.
    threading.Thread(target=lambda: _store_says_failed() and os._exit(1), daemon=True).start()


def stop_requested(device: torch.device) -> bool:
    """True on all ranks as soon as one of them was asked to stop."""
    flag = torch.tensor(float(_stop.is_set()), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


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


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def stop_unless_finite(values: dict) -> None:
    """Raise on every rank alike: the values must be global ones."""
    bad = {k: float(v) for k, v in values.items() if not math.isfinite(float(v))}
    if bad:
        raise FloatingPointError(f"not finite: {bad}")


# The largest mean |ratio - 1| of two evaluations of one policy. Healthy kernels in bfloat16 reach .02 to .04.
ON_POLICY = {"float32": 1e-3, "bfloat16": 0.1}


def stop_unless_on_policy(gap: float, dtype: str, device: torch.device) -> None:
    """Raise when the first minibatch does not see the policy that made the rollout. gap: mean |pi / pi_old - 1|."""
    _stop_if_apart(gap, ON_POLICY[compute_dtype(dtype, device)], "the first minibatch of a rollout")


def _stop_if_apart(gap: float, limit: float, who: str) -> None:
    if not gap <= limit:
        raise RuntimeError(
            f"{who} differs from the rollout policy by {gap:.2g} (limit {limit:.2g}): "
            "log-probabilities depend on padding, batch size or dropout, or weights changed in between; try check.py"
        )


def sampler_gap(per_token, batch: dict, sampled: list[list[float]], dtype: str, rows: int = 16) -> float:
    """Mean |pi / sampler - 1| over the tokens of the first rows of each rank: is the sampler the policy?

    per_token(batch) returns the log-probabilities [B, T] of the training forward; sampled: those of the sampler, per
    row. Raises when the gap is larger than rounding explains. In bfloat16 that depends on how open the policy is, for
    an error e of a logit moves log p by (1 - p) e: gap / mean (1 - p) is .02 to .06 for healthy kernels, .15 to .23 if
    the sampler's temperature is 0.9 instead of 1, and .3 or more with dropout of 0.05 (docs/gpu.md).
    """
    some = take(batch, list(range(min(rows, len(sampled)))))
    drawn = torch.zeros_like(some["mask"], dtype=torch.float32)
    drawn[some["mask"]] = torch.tensor([x for row in sampled[:rows] for x in row], device=drawn.device)
    with torch.no_grad():
        ratio = (per_token(some) - drawn).exp()[some["mask"]]
    open_ = (1 - drawn.exp())[some["mask"]].sum()
    sums = all_sum({"n": ratio.numel(), "gap": (ratio - 1).abs().sum(), "open": open_}, drawn.device)
    gap, limit = sums["gap"] / sums["n"], ON_POLICY["float32"]
    if compute_dtype(dtype, drawn.device) == "bfloat16":
        limit = 0.2 * sums["open"] / sums["n"] + 0.005
    _stop_if_apart(gap, limit, "the training forward")
    return gap


# ======================================================================================================================
# 2. arguments
# ======================================================================================================================


class BadInput(ValueError):
    """A wrong argument or file. Its message is one sentence: what, where, what was found, what was expected."""


def arg(default, help: str, at_least: float | None = None, at_most: float | None = None):
    """A field of Args: its default, the sentence that is its manual, and the values that are legal."""
    metadata = {"help": help, "at_least": at_least, "at_most": at_most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_args(cls, builtin: dict, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from the command line, with legal values.

    The defaults of `cls` are for real models. With a built-in model, and --model is one by default, `builtin` replaces
    the defaults of the arguments that are not given.
    """
    parser = _Parser(usage="%(prog)s [--name value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups, types = {}, typing.get_type_hints(cls)
    for f in fields(cls):
        comment = _comments(cls).get(f.name, "arguments")
        group = groups[comment] if comment in groups else groups.setdefault(comment, parser.add_argument_group(comment))
        default = f.default if f.default is not MISSING else f.default_factory()
        legal = [f"default: {default!r}"] if default not in ("", []) else []
        legal += [f"{word} {f.metadata[key]}" for key, word in _LIMITS.items() if f.metadata[key] is not None]
        kind, options = types[f.name], {"metavar": ""}
        if typing.get_origin(kind) is typing.Literal:
            legal[:0] = [", ".join(map(str, typing.get_args(kind)))]
            kind = type(default)
        elif typing.get_origin(kind) is list:
            kind, options["nargs"] = typing.get_args(kind)[0], "*"
        elif kind is bool:
            kind, options = _boolean, options | {"nargs": "?", "const": True}
        help = f.metadata["help"] + f" ({'; '.join(legal)})" * bool(legal)
        group.add_argument(f"--{f.name}", type=kind, help=help.replace("%", "%%"), **options)
    given = vars(parser.parse_args(argv))
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
    try:
        return check_args(args)
    except BadInput as error:
        parser.error(str(error))


def check_args(args):
    """The same arguments, or an error that names the first one whose value is not legal."""
    types = typing.get_type_hints(type(args))
    for f in fields(args):
        value = getattr(args, f.name)
        if typing.get_origin(types[f.name]) is typing.Literal:
            one_of(**{f.name: (value, typing.get_args(types[f.name]))})
        for key, word in _LIMITS.items():
            limit, sign = f.metadata[key], 1 if key == "at_least" else -1
            inside = limit is None or (math.isfinite(value) and sign * value >= sign * limit)
            require(inside, f"--{f.name} must be {word} {limit}, found {value}")
    return args


_LIMITS = {"at_least": "at least", "at_most": "at most"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError(word)
    return word.lower() == "true"


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
        require(value in allowed, f"--{name} must be one of {', '.join(map(str, allowed))}; found {value!r}")


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
        f"{prompts} prompts x {samples} samples = {prompts * samples} rows a step on {world()} rank(s); "
        f"{minibatches} minibatch(es) of {part} rows a rank in {part // micro} micro-batch(es) of {micro}"
    )


# ======================================================================================================================
# 3. seeds
# ======================================================================================================================

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


# ======================================================================================================================
# 4. models
# ======================================================================================================================

_HERE = Path(__file__).resolve().parent / "builtin"
SMALL = 2**26  # parameters of a model that is run on a few tokens before a run begins
BUILTIN = {"builtin": _HERE / "policy", "builtin-small": _HERE / "small", "builtin-strings": _HERE / "strings"}
BUILTIN["builtin-aligned"] = _HERE / "aligned"  # builtin after dpo.py


def model_path(name: str) -> str:
    """Where the model lies: a built-in one, a Hub name or a folder."""
    if name in BUILTIN:
        folder = BUILTIN[name]
        require(folder.exists(), f"the built-in model is missing: expected the folder {folder}")
        return str(folder)
    folder = Path(name)
    if folder.is_dir():
        require((folder / "config.json").exists(), f"--model {name}: the folder has no config.json")
    else:
        local = name.startswith((".", "/", "~")) or name.count("/") > 1
        require(not local, f"--model {name}: no such folder")
    return name


# Code that comes with a model from the Hub runs with all rights of the user, so it is refused unless this is set to 1.
TRUST_REMOTE_CODE = os.environ.get("TRUST_REMOTE_CODE") == "1"


def _from_pretrained(cls, what: str, name: str, **options):
    try:
        return cls.from_pretrained(model_path(name), trust_remote_code=TRUST_REMOTE_CODE, **options)
    except BadInput:
        raise
    except Exception as error:  # whatever a library of readers raises about a file
        raise BadInput(f"--model {name}: no {what} could be loaded ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_tokenizer(name: str):
    """The tokenizer of a model, with a padding token (whose identity never matters: masks come from lengths).

    Scripts load the tokenizers of all their models before they make a folder, so what cannot be used is refused here.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", name)
    require(tokenizer.eos_token_id is not None, f"--model {name}: its tokenizer has no end-of-sequence token")
    rows = load_config(name).get_text_config().vocab_size
    text = {f"{key}_token" for key in ("bos", "eos", "unk", "sep", "cls", "mask")}
    special = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    never = {token for key, token in special.items() if key not in text}  # padding, places of images: not in a text
    outside = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows and token not in never}
    require(
        not outside,
        f"--model {name}: its tokenizer has {len(outside)} tokens without an embedding, for example "
        f"{min(outside, key=outside.get, default='')!r} (id {min(outside.values(), default=0)}, {rows} embeddings)",
    )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    check_model(name)
    return tokenizer


def load_config(name: str):
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, "configuration", name)


def fits_context(name: str, tokens: int) -> None:
    """Raise when the model has fewer positions than `tokens`, those of the longest prompt and completion."""
    config = load_config(name)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or tokens
    require(tokens <= limit, f"--max_prompt + --max_new_tokens is {tokens}: {name} has {limit} positions")


def same_tokenizer(name_a: str, a, name_b: str, b) -> None:
    """Raise unless both tokenizers give every string the same id."""
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    differ = [t for t in vocab_a.keys() | vocab_b.keys() if vocab_a.get(t) != vocab_b.get(t)]
    require(
        not differ,
        f"the tokenizers of {name_a} and {name_b} differ in {len(differ)} entries, for example "
        f"{min(differ, default='')!r}: models that are compared token by token must share one",
    )


def load_model(
    name: str,
    *,
    head: str = "lm",
    dtype: str = "auto",
    device: torch.device,
    lora_rank: int = 0,
    trainable: bool = True,
    activation_checkpointing: bool = False,
    seed: int = 0,
):
    """A model whose trained weights are fp32, dropout off, sharded with FSDP2 where that changes anything.

    The weights stay a memory map of the file, in its dtype, until their block is sharded: ranks of a node share it, and
    a device holds its shards and one block. Weights that are not trained are kept in the dtype of the computation.

    head: `lm` for a causal language model; `scalar` for the same body with a linear head to one number, which starts
    at 0 unless the folder has one (token classification with one label); `saved`: whichever of both the folder has.
    dtype: of the computation (with bfloat16, trained weights and their gradients stay fp32 all the same).
    lora_rank: > 0 trains low-rank adapters of that rank on all linear layers of the body (and the scalar head).
    """
    gc.collect()  # FSDP's states and models are cycles: without this, models that are no longer used keep their memory
    torch.cuda.empty_cache()
    dtype = compute_dtype(dtype, device)
    check_model(name, head)
    torch.manual_seed(seed)  # new weights (adapters, heads) are the same on every rank
    model, file_dtype = _load(name, head)
    head = "scalar" if has_scalar_head(model.config) else "lm"
    _fp32_buffers(model)
    model.requires_grad_(trainable)
    if trainable and lora_rank:
        from peft import LoraConfig

        body = model.base_model.named_modules(prefix=model.base_model_prefix)  # without the LM head or scalar head
        targets = [name for name, module in body if _is_linear(module)]
        adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, target_modules=targets)
        with _as_fp32(model):
            model.add_adapter(adapters)
        if head == "scalar":
            scalar_head(model).requires_grad_(True)
    if trainable and activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # before transformers 5.20: gradient_...
        (enable or model.gradient_checkpointing_enable)()
    # Under adapters, weights that bfloat16 would round stay fp32: they are exported.
    exact = not trainable or file_dtype == getattr(torch, dtype)
    return wrap(model.train(trainable), dtype, device, frozen=dtype if exact else "float32")


def wrap(model, dtype: str, device: torch.device, frozen: str = "float32"):
    """A transformers model as scripts know it: with final_hidden, and sharded. frozen: the dtype of frozen weights."""
    model.final_hidden = functools.partial(_final_hidden, weakref.proxy(model))  # no cycle
    model.pack_limit = _pack_limit(model.config)
    return _shard(model, device, dtype, frozen)


def _load(name: str, head: str):
    """A model as a map of its file, with the head that load_model promises, and the dtype of the file.

    Every tensor of the file has a place and every weight is in the file, or the model is refused. A new scalar head
    alone may be missing, and then it starts at 0.
    """
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    config = load_config(name)
    why = _unsupported(config)
    require(not why, f"--model {name}: {why}")
    new = not has_scalar_head(config)
    scalar = head == "scalar" or head == "saved" and not new
    for part in configs(config):  # dropout and the like: off
        for key, value in vars(part).items():
            if isinstance(value, float) and "drop" in key:
                setattr(part, key, 0.0)
    if scalar:
        config.num_labels, config.classifier_dropout = 1, 0.0
    dtype = _file_dtype(name)
    options = dict(config=config, dtype=dtype, use_safetensors=True)
    with quiet_transformers():  # it would warn of what is refused below
        cls = AutoModelForTokenClassification if scalar else AutoModelForCausalLM
        model, found = _from_pretrained(cls, "model", name, output_loading_info=True, **options)
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    if scalar and new:
        head_names = {name for name, module in model.named_children() if module is scalar_head(model)}
        missing = {key for key in missing if key.split(".")[0] not in head_names}
        unexpected = {key for key in unexpected if key.startswith(model.base_model_prefix + ".")}  # no LM head
        for parameter in scalar_head(model).parameters():
            torch.nn.init.zeros_(parameter)
    for keys, what in ((missing, "missing in its files"), (unexpected, "of its files without a place in the model")):
        require(not keys, f"--model {name}: {len(keys)} tensor(s) {what}, for example {min(keys, default='')}")
    model.config.architectures = [type(model).__name__]  # what it is now, not what its folder held
    model.config.dtype = model.config.get_text_config().dtype = torch.float32
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and "drop" in key:
                setattr(module, key, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, dtype


def configs(config) -> list:
    """A configuration and those inside it."""
    inner = [getattr(config, key, None) for key in config.sub_configs]
    return [config, *(c for part in inner if hasattr(part, "sub_configs") for c in configs(part))]


def _unsupported(config) -> str | None:
    """Why a model cannot be used, as far as its configuration tells."""
    for part in configs(config):
        quantised = getattr(part, "quantization_config", None)
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
            return f"its weights are quantised ({getattr(method, 'value', method)}): take the model they were made from"
        values = [vars(part), *(x for x in vars(part).values() if isinstance(x, dict))]
        for key, value in (item for each in values for item in each.items()):
            if "experts" in str(key) and "per_tok" not in str(key) and type(value) is int and value > 1:
                return f"it is a mixture of experts ({key}={value}), which is not supported"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder: only decoders are supported"
    return None


@functools.cache
def check_model(name: str, head: str = "saved") -> None:
    """Raise unless the model is whole and is used here as it was made: see _load(), _check_logits() and _check_body().

    head: as for load_model(). Tensors are maps of the files; of a large model only the LM head is read.
    """
    model, _ = _load(name, head)
    kinds = {type(layer).__name__ for layer in _cache_layers(model.config) if not _is_attention(layer)}
    state = kinds or getattr(model, "_is_stateful", False)
    require(not state, f"--model {name}: it has layers with a recurrent state, which are not supported")
    experts = {type(m).__name__ for m in model.modules() if re.search("Experts?$|Router|SparseMoe", type(m).__name__)}
    require(not experts, f"--model {name}: it is a mixture of experts ({min(experts, default='')}), not supported")
    small = sum(p.numel() for p in model.parameters()) < SMALL
    if small:
        _fp32_buffers(model)
        model.float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if not has_scalar_head(model.config):
            _check_logits(name, model.eval())
        if small:
            _check_body(name, model.eval())


def _check_logits(name: str, model) -> None:
    """Raise unless logits are hidden @ W.T: for large random hidden states in place of those of the body."""
    output, body = model.get_output_embeddings(), model.base_model
    require(output is not None, f"--model {name}: it has no LM head")
    has_bias = getattr(output, "bias", None) is not None
    require(not has_bias, f"--model {name}: an LM head with a bias is not supported (logits here are hidden @ W.T)")
    weight, ids = output.weight, torch.arange(4)[None]
    hidden = torch.randn(1, 4, weight.shape[1], dtype=weight.dtype)
    hidden = hidden * (1000 / F.linear(hidden, weight).abs().max().clamp_min(1e-6)).clamp_max(1e4)  # where caps bend
    used = []

    class Output:
        last_hidden_state = hidden

        def __getattr__(self, _):
            return None

        def __getitem__(self, i):
            return hidden if i == 0 else ()

    body.forward = lambda *args, **inputs: used.append(1) or Output()
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise BadInput(f"--model {name}: its logits cannot be computed ({_first_line(error)})") from error
    finally:
        del body.forward
    if not used:  # its forward goes around base_model
        logits, hidden = model(input_ids=ids, use_cache=False).logits, body(input_ids=ids, use_cache=False)[0]
    product = F.linear(hidden, weight).float()
    same = logits.shape == product.shape and (logits.float() - product).norm() <= 5e-3 * product.norm()
    text = vars(model.config.get_text_config())
    named = [(key, text[key]) for key in text if re.search("logit|lm_head|scale_", key) and text[key]]
    hint = ", ".join(f"{key}={value}" for key, value in named)
    require(same, f"--model {name}: its logits are not hidden @ W.T, which is not supported ({hint or 'see its code'})")


def _check_body(name: str, model) -> None:
    """Raise unless a token sees those before it and no others, whether padded on the left or read through a cache."""
    body, n = model.base_model, 4
    ids = torch.randint(min(64, model.config.get_text_config().vocab_size), (1, n + 3))
    padded = F.pad(ids[:, :n], (2, 0))
    mask = torch.tensor([[0, 0] + [1] * n])
    try:
        whole = body(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(n + 3)[None])[0]
        cache = new_cache(model.config)
        read = dict(past_key_values=cache, use_cache=True)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        found = [body(input_ids=padded, attention_mask=mask, position_ids=position, **read)[0][:, 2:]]
        cache.batch_repeat_interleave(2)
        for t in range(n, n + 3):
            mask = F.pad(mask, (0, 1), value=1)
            token, at = ids[:, t : t + 1].expand(2, 1), torch.full((2, 1), t)
            found.append(body(input_ids=token, attention_mask=mask.expand(2, -1), position_ids=at, **read)[0][1:])
        found = torch.cat(found, 1)
    except Exception as error:
        raise BadInput(f"--model {name}: it cannot be decoded token by token ({_first_line(error)})") from error
    for part, what in ((slice(n), "depend on padding or later tokens"), (slice(n, None), "change with its cache")):
        error = (found[:, part] - whole[:, part]).norm() / whole[:, part].norm()
        require(error < 1e-3, f"--model {name}: its hidden states {what} (by {error:.1e}), which is not supported")


def _file_dtype(name: str) -> torch.dtype:
    """The dtype of the tensors of a model; float32 where they have several."""
    from transformers.utils import cached_file

    def found(file: str) -> str | None:
        return cached_file(model_path(name), file, _raise_exceptions_for_missing_entries=False)

    files, index = ["model.safetensors"], found("model.safetensors.index.json")
    if index and not found(files[0]):
        files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    dtypes = set()
    for path in filter(None, map(found, files)):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        dtypes |= {tensor["dtype"] for key, tensor in header.items() if key != "__metadata__"}
    dtypes = {dtype for dtype in dtypes if "F" in dtype}
    return {("BF16",): torch.bfloat16, ("F16",): torch.float16}.get(tuple(dtypes), torch.float32)


def _fp32_buffers(model) -> None:
    """Buffers that no file holds (rotary frequencies, embedding scales) are made anew in fp32."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for module in map(model.get_submodule, owners):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name in module._non_persistent_buffers_set:
                setattr(module, name, buffer.float())
        module._is_hf_initialized = False
    model.initialize_weights()  # skips all parameters: they are marked as loaded


@contextlib.contextmanager
def _as_fp32(model):
    """Inside, all weights are empty fp32 stand-ins, so that peft draws its adapters in fp32."""
    weights = {p: p.data for p in model.parameters() if p.is_floating_point()}
    for p, data in weights.items():
        p.data = torch.zeros((), device=data.device).expand(data.shape)
    yield
    for p, data in weights.items():
        p.data = data


def _is_linear(module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's name for the same


def has_scalar_head(config) -> bool:
    """Whether a checkpoint brings a linear head to one number (else it is a language model)."""
    return any(name.endswith("ForTokenClassification") for name in config.architectures or [])


def scalar_head(model) -> torch.nn.Linear:
    """The linear layer to one number of a model loaded with head='scalar'."""
    return model.score if hasattr(model, "score") else model.classifier


def _cache_layers(config) -> list:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config).layers


def _is_attention(layer) -> bool:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _pack_limit(config) -> float:
    """The longest row in which _read may pack completions; 0 where layers do not take a mask of its own making."""
    layers = _cache_layers(config)
    if config._attn_implementation != "sdpa" or getattr(config, "alibi", False) or not all(map(_is_attention, layers)):
        return 0
    return min((layer.sliding_window for layer in layers if layer.is_sliding), default=math.inf)


def _final_hidden(model, input_ids, attention_mask, position_ids, past_key_values=None):
    return model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=past_key_values is not None,
    ).last_hidden_state


def _shard(model, device: torch.device, dtype: str, frozen: str):
    """FSDP2, one group per block. One fp32 process is bit-equal without it, and a small model up to 70 % faster.

    Weights that are trained become fp32, the others `frozen`: each group after it was sharded, so that neither the host
    nor the device ever holds more than the shards and one group in the dtype of the file.
    """

    always_fp32 = set()

    def settle(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            return tensor.to(device)  # buffers keep their dtype
        kept = "float32" if tensor.requires_grad or tensor in always_fp32 else frozen
        return tensor.to(device, getattr(torch, kept))

    if world() == 1 and dtype == "float32":
        return model._apply(settle)
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    blocks = set(model._no_split_modules or [])
    mesh = _mesh(device.type, _ranks_of_shards(model, device))
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)._apply(settle)
    if hasattr(model, "score") or hasattr(model, "classifier"):  # one number out of thousands: always fp32
        head = fully_shard(scalar_head(model), mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))
        always_fp32 = set(head.parameters())
    fully_shard(model, mesh=mesh, mp_policy=policy)  # embeddings, final norm and head stay together: tied weights live
    model._apply(settle)
    register_fsdp_forward_method(model, "final_hidden")
    return model


def _ranks_of_shards(model, device: torch.device) -> int:
    """Over how many ranks weights are sharded: those of a node where that leaves memory free, else all of them.

    Within a node, gathering weights does not wait for the network, which then carries gradients alone. Weights with
    Adam's state may take a third of a device: there may be a second model like this one.
    """
    node = ranks_of_node()
    body = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.base_model.parameters())
    free = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return from_rank_0(node if 1 < node and body / node < free / 3 else world())


@functools.cache
def _mesh(kind: str, shards: int):
    """Replicas over nodes of shards within them; one dimension where all ranks share one copy."""
    if shards == world():
        return dist.init_device_mesh(kind, (shards,))
    return dist.init_device_mesh(kind, (world() // shards, shards), mesh_dim_names=("replicate", "shard"))


def accumulate_over(models, pieces: list):
    """The micro-batches of one optimizer step, in turn. Gradients cross from node to node with the last one alone."""
    for i, piece in enumerate(pieces):
        for module in models.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(i + 1 == len(pieces), recurse=False)
        yield piece


@contextlib.contextmanager
def gathered(*models):
    """All parameters whole on every rank meanwhile, so that ranks may run different numbers of forwards."""
    shards = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    for m in shards:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in shards:
            m.set_reshard_after_forward(m not in models, recurse=False)
            m.reshard()


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before LoRA."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


@contextlib.contextmanager
def reference(models):
    """The policy as it was at the start: its frozen copy models["ref"], or the policy without its adapters."""
    if "ref" in models:
        yield models["ref"]
    else:
        with adapters_off(models["policy"]) as policy:
            yield policy


@contextlib.contextmanager
def quiet_transformers():
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def head_weight(model) -> torch.Tensor:
    """W of the LM head [V, H]: logits are hidden @ W.T. Take it after each forward: FSDP2 makes it whole there."""
    return model.get_output_embeddings().weight


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [N, H] @ weight.T as fp32 [N, V]; on CUDA bfloat16 products are summed in fp32 and never rounded."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return F.linear(hidden, weight).float()


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ======================================================================================================================
# 5. batches
# ======================================================================================================================


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
            ids[-1] not in _ends(tokenizer),
            f"{where}: the chat template ends the prompt with {tokenizer.decode(ids[-1:])!r}, which ends an answer; "
            "expected one that begins the assistant's turn",
        )
    begin, end = 0, len(ids)
    while end - begin > 1 and ids[begin] == ids[begin + 1] == tokenizer.bos_token_id:
        begin += 1
    while end - begin > 1 and ids[end - 1] in _ends(tokenizer):
        end -= 1
    if changes is not None:
        changes["prompts began twice with BOS, one kept"] += begin > 0
        changes["prompts ended with EOS, taken off"] += end < len(ids)
    return ids[begin:end]


def encode_completion(tokenizer, text: str, prompt: str | list[dict] = (), changes: Counter | None = None) -> list[int]:
    """Ids of an answer as the policy would have sampled it: the text, then one token that ends it.

    The answer to messages ends as the chat template ends it, an answer to text with EOS or the end that it brings.
    """
    ids, ends = tokenizer(text, add_special_tokens=False)["input_ids"], _ends(tokenizer)
    length = len(ids)
    while length and ids[length - 1] in ends:
        length -= 1
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


def _ends(tokenizer) -> tuple[int, int]:
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


def micro_batches(batch: dict, rows: list[int], size: int, together: int = 1) -> list[dict]:
    """`rows` in pieces of `size`, in the order that leaves least to read.

    together: every so many neighbours in `rows` are one unit, and stay in one piece and in their order.
    """
    return [take(batch, piece) for piece in _pieces(batch, rows, size, together)]


def map_rows(fn, batch: dict, size: int) -> dict:
    """fn(micro) -> {name: [b, t, ...]} on micro-batches of all rows; back in order as [B, T, ...], 0 in the padding."""
    B, T = batch["mask"].shape
    whole = {}
    for rows in _pieces(batch, list(range(B)), size):
        for name, part in fn(take(batch, rows)).items():
            if name not in whole:
                whole[name] = part.new_zeros(B, T, *part.shape[2:])
            whole[name][rows, : part.shape[1]] = part
    return whole


def _pieces(batch: dict, rows: list[int], size: int, together: int = 1) -> list[list[int]]:
    """Neighbours in length together, so that little is padding, or the samples of a prompt, which _read packs."""
    shape, total = _row_shapes(batch), Counter()
    for r in rows:
        total[shape[r][2]] += shape[r][1]
    units = [rows[i : i + together] for i in range(0, len(rows), together)]
    by_length = sorted(units, key=lambda unit: (max(sum(shape[r][:2]) for r in unit), unit))
    by_prompt = sorted(units, key=lambda unit: (total[shape[unit[0]][2]], shape[unit[0]][2], unit))
    orders = [[r for unit in order for r in unit] for order in (by_length, by_prompt)]
    orders = [[order[i : i + size] for i in range(0, len(rows), size)] for order in orders]
    return min(orders, key=lambda order: sum(min(_work([shape[r] for r in piece])) for piece in order))


def _row_shapes(batch: dict) -> list[tuple[int, int, int]]:
    """Of each row: tokens of its prompt, tokens of its completion, and a number that names its prompt."""
    prompts = batch["prompt_ids"].masked_fill(~batch["prompt_mask"], -1)
    group = prompts.unique(dim=0, return_inverse=True)[1]
    return torch.stack([batch["prompt_mask"].sum(1), batch["mask"].sum(1), group], 1).tolist()


def _work(shapes: list[tuple[int, int, int]]) -> tuple[float, float]:
    """What it costs to read these rows one by one, and packed: positions, and the more the longer a row is.

    (Attention to 4096 positions costs about as much as the rest of a layer.)
    """
    prompts, completions, groups = zip(*shapes)
    total = dict(zip(groups, prompts))
    for group, length in zip(groups, completions):
        total[group] += length
    sizes = (len(shapes), max(prompts) + max(completions)), (len(total), max(total.values()))
    return tuple(rows * length * (1 + length / 4096) for rows, length in sizes)


def completion_hidden(model, batch: dict) -> torch.Tensor:
    """[B, T, H]: the final hidden state at [b, t] is the one that predicts completion token t."""
    return _read(model, model.final_hidden, batch)[:, :-1]


def completion_scalars(model, batch: dict, after: bool = False) -> torch.Tensor:
    """[B, T], fp32: the scalar head at the state before completion token t; after: at the token itself."""
    scalars = _read(model, lambda **inputs: model(**inputs, use_cache=False).logits, batch)[..., 0].float()
    return scalars[:, 1:] if after else scalars[:, :-1]


def policy_logprobs(model, batch: dict, temperature: float = 1.0):
    """log-probabilities of the completion tokens, and entropies: [B, T], 0 where masked. Alike for pi, pi_old, ref."""
    mask = batch["mask"]
    hidden, ids = completion_hidden(model, batch)[mask], batch["completion_ids"][mask]  # [N, H], [N]
    flat = token_logprobs(hidden, head_weight(model), ids, temperature)
    return tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x) for x in flat)


def token_scores(model, batch: dict, ref=None) -> torch.Tensor:
    """The score that a reward model gives each completion token, [B, T], fp32; 0 where masked.

    A scalar head is read at the token itself, which it has seen. An LM head gives the log-probability of the token,
    less that by `ref` where there is one.
    """
    if has_scalar_head(model.config):
        return completion_scalars(model, batch, after=True) * batch["mask"]
    scores = policy_logprobs(model, batch)[0]
    return scores if ref is None else scores - policy_logprobs(ref, batch)[0]


def answer_scores(scores: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """[B] from the scores of tokens [B, T]: their `mean`, their `sum`, or that of the `last` one."""
    if how == "last":
        return scores.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    return (scores * mask).sum(1) / (mask.sum(1) if how == "mean" else 1)


def score_of(name: str, ref: str) -> str:
    """How the score of an answer comes from its tokens: as its folder says; the sum for a log-ratio to `ref`."""
    require(name, "--reward_ref is the reference of a --reward_model: give both")
    config = load_config(name)
    if ref:
        require(not has_scalar_head(config), f"--reward_ref: {name} has a scalar head, and so no log-probabilities")
        return "sum"
    known = getattr(config, "reward_score", "last" if has_scalar_head(config) else None)
    require(known, f"--reward_model {name} is a language model: give --reward_ref, the model that it was aligned from")
    return known


def scored_by(models, how: str, tokenizer, max_prompt: int, micro_batch: int):
    """reward(prompts, completions, rows) of a task without one: the score of models["reward"] for each answer."""

    @torch.no_grad()
    def reward(prompts, completions, rows) -> list[float]:
        judges = {name: models[name] for name in ("reward", "reward_ref") if name in models}
        with gathered(*judges.values()):  # ranks may have different numbers of rows in an evaluation, or none
            if not rows:
                return []
            prompt_ids = [encode_prompt(tokenizer, prompt)[-max_prompt:] for prompt in prompts]
            ids, device = [row["completion_ids"] for row in rows], next(judges["reward"].parameters()).device
            batch = make_batch(prompt_ids, ids, tokenizer.pad_token_id, device)
            one = lambda micro: {"x": token_scores(judges["reward"], micro, judges.get("reward_ref"))}  # noqa: E731
            scores = map_rows(one, batch, micro_batch)["x"]
        return answer_scores(scores, batch["mask"], how).tolist()

    return reward


def _read(model, forward, batch: dict) -> torch.Tensor:
    """forward(...) at the last token of each prompt and at each token of its completion, [B, 1 + T, ...].

    Where it spares an eighth of the work, rows with the same prompt are read as one: the prompt, then their completions
    one after another, each of which sees the prompt and itself.
    """
    (B, P), T = batch["prompt_ids"].shape, batch["completion_ids"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    real = torch.cat([batch["prompt_mask"], batch["mask"]], 1)
    position = (real.cumsum(1) - 1).clamp_min(0)  # left padding must not move a position
    shapes = _row_shapes(batch)
    plain, packed = _work(shapes)
    n, m, group = torch.tensor(shapes, device=ids.device).T
    start = n + ((group[:, None] == group).tril(-1) * m).sum(1)  # where a completion begins in the row of its prompt
    G, S = int(group.max()) + 1, int((start + m).max())
    if packed > 7 / 8 * plain or model.pack_limit < S:
        states = forward(input_ids=ids, attention_mask=real.long(), position_ids=position)
        return states[:, P - 1 :]
    column = torch.arange(T, device=ids.device)
    place = torch.cat([position[:, :P], start[:, None] + column], 1)
    owner = torch.arange(1, B + 1, device=ids.device)[:, None] * (torch.arange(P + T, device=ids.device) >= P)
    to = group[:, None].expand_as(real)[real], place[real]
    ids, position, owner = (ids.new_zeros(G, S).index_put(to, x[real]) for x in (ids, position, owner))
    sees = ((owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])).tril()  # owner 0: the prompt
    states = forward(input_ids=ids, attention_mask=sees[:, None], position_ids=position)
    at = torch.cat([n[:, None] - 1, start[:, None] + column], 1).clamp_max(S - 1)
    # Not states[group[:, None], at], whose backward pass adds up a row that is read twice in the order threads arrive.
    return F.embedding(S * group[:, None] + at, states.flatten(0, 1))


# ======================================================================================================================
# 6. rollout
# ======================================================================================================================


def stop_ids(model, tokenizer) -> list[int]:
    """All tokens that end a completion: the tokenizer's, its chat template's, and those of the generation settings."""
    extra = model.generation_config.eos_token_id
    extra = [] if extra is None else extra if isinstance(extra, list) else [extra]
    return sorted({*_ends(tokenizer), *extra})


class _Pulse:
    """Shows that a long rollout is alive: every 20 seconds a line with the tokens so far, and their rate."""

    def start(self) -> None:
        self.began = self.last = time.perf_counter()
        self.tokens = 0

    def beat(self, tokens: int) -> None:
        self.tokens, now = self.tokens + tokens, time.perf_counter()
        if now - self.last > 20:
            self.last = now
            say(f"  generating: {self.tokens:,} tokens so far, {self.tokens / (now - self.began):,.0f} per second")


pulse = _Pulse()


def generate(
    model,
    prompt_ids: list[list[int]],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    noise: torch.Tensor | None = None,
    stop_ids: list[int],
    pad_id: int,
    rows_at_once: int = 256,
    return_logprobs: bool = False,
):
    """`samples` completions of each prompt, in the order of the prompts; each ends with a stop token or is cut.

    noise: uniforms [len(prompt_ids) * samples, max_new_tokens], one per token; None decodes greedily.
    return_logprobs: also the log-probability of each token in the distribution that it was drawn from, as lists.
    Sampling inverts the whole distribution at `temperature`: no top-k, no top-p, no banned token, so the policy that
    samples is the policy that is trained.
    """
    pulse.start()
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    at_once = max(1, rows_at_once // samples)
    completions, logprobs = ([[]] * (len(prompt_ids) * samples) for _ in range(2))
    most = min(at_once, len(order)) * samples
    with gathered(model), _sampling(model), cpu.fast_decoding(model, most) if cpu else contextlib.nullcontext():
        limits = max_new_tokens, temperature, stop_ids, pad_id
        decode = _decoder(model, most, max(map(len, prompt_ids), default=0) + max_new_tokens, *limits)
        for i in range(0, len(order), at_once):
            piece = order[i : i + at_once]
            rows = [p * samples + s for p in piece for s in range(samples)]
            u, prompts = None if noise is None else noise[rows], [prompt_ids[p] for p in piece]
            done = decode(prompts, samples, u)
            for row, completion, logprob in zip(rows, *done):
                completions[row], logprobs[row] = completion, logprob
    return (completions, logprobs) if return_logprobs else completions


def _decoder(model, rows, length, max_new_tokens, temperature, stop_ids, pad_id):
    """decode(prompt_ids, samples, noise): with CUDA graphs on a GPU (gpu.py), else the reference."""
    if next(model.parameters()).is_cuda and model.pack_limit >= length and importlib.util.find_spec("gpu"):
        import gpu

        return gpu.Decoder(model, rows, length, max_new_tokens, temperature, stop_ids, pad_id)
    return partial(_generate, model, max_new_tokens, temperature, stop_ids, pad_id)


@contextlib.contextmanager
def _sampling(model):
    """No gradients, and evaluation mode: in training mode transformers drops the cache of layers that recompute."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def new_cache(config):
    """An empty KV cache."""
    from transformers.cache_utils import DynamicCache

    return (cpu.roomy_cache if cpu else DynamicCache)(config=config)


def _generate(model, max_new_tokens, temperature, stop_ids, pad_id, prompt_ids, samples, noise):
    """The readable reference of decoding: completions and the log-probabilities of their tokens, as lists."""
    device = next(model.parameters()).device
    head = model.get_output_embeddings() if device.type == "cpu" else lambda h: logits_of(h, head_weight(model))
    batch = make_batch(prompt_ids, [[pad_id]] * len(prompt_ids), pad_id, device)
    attention = batch["prompt_mask"].long()
    position = attention.cumsum(1) - 1
    stop = torch.tensor(stop_ids, device=device)
    cache = new_cache(model.config)
    hidden = model.final_hidden(
        input_ids=batch["prompt_ids"],
        attention_mask=attention,
        position_ids=position.clamp_min(0),
        past_key_values=cache,
    )
    # The prompt of a group is read once; its cache is then repeated for each sample.
    if samples > 1:
        cache.batch_repeat_interleave(samples)
    logits = head(hidden[:, -1]).repeat_interleave(samples, 0)
    attention = attention.repeat_interleave(samples, 0)
    position = position[:, -1:].repeat_interleave(samples, 0)
    noise = None if noise is None else noise.to(device)

    rows = torch.arange(len(logits), device=device)  # the rows still in the cache
    alive = torch.ones(len(logits), dtype=torch.bool, device=device)
    tokens = torch.full((len(logits), max_new_tokens), pad_id, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    lengths = torch.full((len(logits),), max_new_tokens, device=device)
    for t in range(max_new_tokens):
        token, logprob = _pick(logits, temperature, None if noise is None else noise[rows, t])
        tokens[rows, t], logprobs[rows, t] = token, logprob  # what follows an ended row is cut off at the end
        ended = alive & torch.isin(token, stop)
        lengths[rows[ended]] = t + 1
        alive &= ~ended
        left = int(alive.sum())
        pulse.beat(left)
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= 0.75 * len(alive):  # drop finished rows; each time costs one copy of the cache
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, alive, token, attention, position = (x[keep] for x in (rows, alive, token, attention, position))
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
        position = position + 1
        hidden = model.final_hidden(
            input_ids=token[:, None], attention_mask=attention, position_ids=position, past_key_values=cache
        )
        logits = head(hidden[:, -1])
    return _cut(tokens, lengths), _cut(logprobs, lengths)


def _cut(rows: torch.Tensor, lengths: torch.Tensor) -> list[list]:
    return [row[:n] for row, n in zip(rows.tolist(), lengths.tolist())]


def _pick(logits: torch.Tensor, temperature: float, u: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability, [B] each: the inverse of the cumulative distribution at u in [0, 1).

    Without u the largest logit, whose log-probability is 0: greedy decoding always takes it.
    """
    if u is None:
        return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.float32)
    probability = (logits.float() / temperature).softmax(-1)
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that a token of probability 0 is never chosen.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, target, right=True)
    return token[:, 0], probability.gather(-1, token)[:, 0].log()


@dataclass
class Sampling:
    """A policy with its tokenizer and limits: rollouts of this rank's share of a step, and held-out accuracy."""

    policy: torch.nn.Module
    tokenizer: object
    max_prompt: int
    max_new_tokens: int
    temperature: float
    rows_at_once: int

    def encode(self, row: dict) -> list[int]:
        return encode_prompt(self.tokenizer, row["prompt"])[-self.max_prompt :]

    def complete(self, prompt_ids, samples: int, noise, return_logprobs: bool = False):
        return generate(
            self.policy,
            prompt_ids,
            samples=samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            noise=noise,
            stop_ids=stop_ids(self.policy, self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            rows_at_once=self.rows_at_once,
            return_logprobs=return_logprobs,
        )

    def rollout(self, rows: list[dict], samples: int, seed: int, step: int):
        """This rank's share of `rows` (those of the whole step), `samples` completions each, one after the other.

        Returns lists of equal length: rows, prompt ids, completion ids, whether each completion ended by itself, and
        the log-probabilities that the sampler gave its tokens.
        """
        share = len(rows) // world()
        rows = rows[rank() * share : (rank() + 1) * share]
        prompt_ids = [self.encode(row) for row in rows]
        first = rank() * share * samples
        noise = uniforms(seed, TRAIN, step, range(first, first + share * samples), self.max_new_tokens)
        completion_ids, sampled = self.complete(prompt_ids, samples, noise, return_logprobs=True)
        ends = set(stop_ids(self.policy, self.tokenizer))
        finished = [c[-1] in ends for c in completion_ids]
        return _repeat(rows, samples), _repeat(prompt_ids, samples), completion_ids, finished, sampled

    def evaluate(self, task, seed: int) -> tuple[dict[str, float], list[dict]]:
        """Held-out metrics, greedy and sampled (with the same noise each time), and some of this rank's samples.

        eval/pass@1 and eval/sampled where the task knows right from wrong, else eval/reward and eval/reward_sampled;
        eval/answered is the share of greedy completions that have an answer at all.
        """
        mine = list(range(rank(), len(task.test), world()))
        rows = [task.test[i] for i in mine]
        prompt_ids = [self.encode(row) for row in rows]
        greedy, sampled = ("eval/pass@1", "eval/sampled") if task.correct else ("eval/reward", "eval/reward_sampled")
        sums, samples = {"n": float(len(rows))}, []
        for name in (greedy, sampled):
            noise = uniforms(seed, EVAL, 0, mine, self.max_new_tokens) if name == sampled and mine else None
            ids = self.complete(prompt_ids, 1, noise)
            texts = decode(self.tokenizer, ids)
            if task.correct:
                grades = task.correct(texts, rows)
            else:
                with_ids = [row | {"completion_ids": c} for row, c in zip(rows, ids)]
                grades = task.reward([row["prompt"] for row in rows], texts, with_ids)
            grades = [float(sum(g)) if isinstance(g, list) else float(g) for g in grades]
            sums[name] = sum(grades)
            if task.answered and name == greedy:
                sums["eval/answered"] = sum(task.answered(texts))
            for row, text, grade in list(zip(rows, texts, grades))[:4]:
                samples.append({"kind": name, "prompt": row["prompt"], "completion": text, "reward": grade})
        sums = all_sum(sums, next(self.policy.parameters()).device)
        n = sums.pop("n")
        return {name: total / n for name, total in sums.items()}, samples


def rollout_metrics(batch, task_rewards: list, finished: list[bool], samples: int) -> dict[str, float]:
    """Global means over completions, prompts and tokens of a rollout."""
    mask = batch["mask"]
    task_reward = torch.tensor([sum(s) if isinstance(s, list) else s for s in task_rewards], dtype=torch.float64)
    by_prompt = task_reward.view(-1, samples)
    sums = {
        "rows": len(task_rewards),
        "tokens": mask.sum(),
        "reward/mean": task_reward.sum(),
        "reward/spread": (by_prompt.amax(1) > by_prompt.amin(1)).sum() * samples,
        "length/mean": mask.sum(),
        "length/finished": sum(finished),
    }
    if "kl" in batch:
        sums["kl/ref"] = batch["kl"].sum()
    if "values" in batch:
        returns, error = batch["returns"][mask].double(), (batch["returns"] - batch["values"])[mask].double()
        sums |= {"r": returns.sum(), "rr": returns.square().sum(), "e": error.sum(), "ee": error.square().sum()}
    sums = all_sum(sums, mask.device)
    rows, tokens = sums.pop("rows"), sums.pop("tokens")
    metrics = {k: v / rows for k, v in sums.items() if k.split("/")[0] in ("reward", "length")}
    if "kl" in batch:
        metrics["kl/ref"] = sums["kl/ref"] / tokens
    if "values" in batch:
        variance, unexplained = (sums[k + k] / tokens - (sums[k] / tokens) ** 2 for k in "re")
        metrics["critic/explained_variance"] = 1 - unexplained / variance if variance > 1e-12 else None
    return metrics


def _repeat(rows: list, times: int) -> list:
    return [row for row in rows for _ in range(times)]


# ======================================================================================================================
# 7. vocabulary
# ======================================================================================================================


def _chunk(weight: torch.Tensor, mib: int | None) -> int:
    """Tokens whose fp32 logits take `mib` MiB: by default 64 on CPUs (below 32 the heap fragments), 256 on GPUs."""
    mib = mib if mib is not None else 256 if weight.is_cuda else 64
    return max(1, mib * 2**20 // (4 * weight.shape[0]))


def _fused(fn, weight: torch.Tensor):
    """fn compiled on CUDA, where a loss over the vocabulary is bound by its passes over memory; else fn."""
    if weight.is_cuda and importlib.util.find_spec("gpu"):
        import gpu

        return gpu.fused(fn)
    return fn


def _sum_like(x: torch.Tensor) -> torch.Tensor:
    """Zeros to which products of many chunks are added: fp32 on CUDA, so that bfloat16 is rounded to only once."""
    return torch.zeros_like(x, dtype=torch.float32 if x.is_cuda else x.dtype)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    try:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError):
        total += torch.mm(a, b, out_dtype=total.dtype)


def over_vocabulary(fn, heads, columns, temperature: float = 1.0, chunk_mib: int | None = None):
    """fn(*logits, *columns) without ever holding [N, V]: tokens in chunks, and nothing of a chunk is kept.

    heads: pairs (hidden [N, H], W [V, H]); each gives fn one fp32 tensor of logits [n, V], divided by `temperature`.
    columns: tensors [N, ...], cut like the hidden states.
    fn returns tensors (in tuples, lists, dicts); those with a token dimension are concatenated, scalars are summed.
    Where a head takes gradients, fn returns a pair (loss, such tensors). The loss is a scalar and alone differentiable;
    its gradients are taken on the way forward, chunk by chunk, so that no logits are computed twice.
    chunk_mib: fp32 logits of one head in one chunk; None: by device.
    """
    rows, fn = _chunk(heads[0][1], chunk_mib), _fused(fn, heads[0][1])
    needed = [i for i, head in enumerate(heads) if torch.is_grad_enabled() and any(x.requires_grad for x in head)]
    gradients = {
        i: [zeros(x) if x.requires_grad else None for zeros, x in zip((torch.zeros_like, _sum_like), heads[i])]
        for i in needed
    }

    def piece(n: slice):
        logits = [logits_of(h.detach()[n], w.detach()).div_(temperature) for h, w in heads]
        leaves = [logits[i].requires_grad_() for i in needed]
        out = fn(*logits, *(x[n] for x in columns))
        for i, slope in zip(needed, torch.autograd.grad(out[0], leaves) if needed else []):
            (hidden, weight), (to_hidden, to_weight) = heads[i], gradients[i]
            slope = slope.div_(temperature).to(weight.dtype)
            if to_hidden is not None:
                to_hidden[n] = slope @ weight.detach()
            if to_weight is not None:
                _add_product(to_weight, slope.T, hidden.detach()[n])
        return tree_map(torch.Tensor.detach, out)

    parts = [piece(slice(i, i + rows)) for i in range(0, max(1, len(heads[0][0])), rows)]
    whole = tree_map(lambda *c: torch.cat(c) if c[0].dim() else torch.stack(c).sum(0), *parts)
    if not needed:
        return whole
    pairs = [(x, g) for i in needed for x, g in zip(heads[i], gradients[i]) if g is not None]
    return _WithGradients.apply(whole[0], *(x for x, _ in pairs), *(g for _, g in pairs)), whole[1]


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known: (value, *inputs, *gradients) -> value."""

    @staticmethod
    def forward(ctx, value, *inputs_and_gradients):
        half = len(inputs_and_gradients) // 2
        ctx.save_for_backward(*inputs_and_gradients[half:])
        ctx.dtypes = [x.dtype for x in inputs_and_gradients[:half]]
        return value.clone()

    @staticmethod
    def backward(ctx, slope):  # scaled in fp32: a factor rounded to bfloat16 would bias every gradient alike
        gradients = [(g.float() * slope).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return None, *gradients, *[None] * len(gradients)


def token_logprobs(hidden, weight, ids, temperature: float = 1.0, chunk_mib: int | None = None):
    """log-probabilities of `ids` [N] and entropies (nats, no gradient) [N], fp32, exact over the whole vocabulary."""
    return _TokenLogprobs.apply(hidden, weight, ids, temperature, _chunk(weight, chunk_mib))


def _read_logits(z, ids):
    """logsumexp, log-probability of `ids` and entropy of logits [n, V], [n] each."""
    total = z.logsumexp(-1)
    logprob = z.gather(-1, ids[:, None])[:, 0] - total
    p = (z - total[:, None]).exp_()
    return total, logprob, total - torch.linalg.vecdot(p, z)


def _logprob_slope(z, ids, total, slope):
    """slope * d log p(ids) / d z = slope * (onehot(ids) - p), [n, V]."""
    p = z.sub_(total[:, None]).exp_()
    return p.mul_(-slope[:, None]).scatter_add_(-1, ids[:, None], slope[:, None])


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities that any loss may weigh, whose slopes are known in the backward pass alone.

    d log p(a) / d z = onehot(a) - p, so the backward pass needs p alone, which is exp(z - logsumexp).
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, rows):
        logprobs, entropy, total = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        read = _fused(_read_logits, weight)
        for i in range(0, len(hidden), rows):
            n = slice(i, i + rows)
            total[n], logprobs[n], entropy[n] = read(logits_of(hidden[n], weight).div_(temperature), ids[n])
        ctx.save_for_backward(hidden, weight, ids, total)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, slope, _):
        hidden, weight, ids, total = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = _sum_like(weight) if ctx.needs_input_grad[1] else None  # LoRA trains no head
        slope_of = _fused(_logprob_slope, weight)
        for i in range(0, len(hidden), ctx.rows):
            n = slice(i, i + ctx.rows)
            z = logits_of(hidden[n], weight).div_(ctx.temperature)
            to_z = slope_of(z, ids[n], total[n], slope[n]).div_(ctx.temperature).to(weight.dtype)
            to_hidden[n] = to_z @ weight
            if to_weight is not None:
                _add_product(to_weight, to_z.T, hidden[n])
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None, None, None


# ======================================================================================================================
# 8. run folder
# ======================================================================================================================

ON_SCREEN = ("reward/mean", "loss/", "kl/", "policy/kl_old", "policy/logit_gap", "length/mean", "revise/", "eval/")
FREE_TO_CHANGE = {"out", "resume", "device", "micro_batch", "rollout_rows", "save_every", "wandb"}


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class RunFolder:
    """args.json, source.py, metrics.jsonl, samples.jsonl, plot.png, report.html, checkpoint/, model/. Rank 0 writes."""

    def __init__(self, args, script: str):
        name = Path(script).stem
        self.path = Path(from_rank_0(args.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        settings = asdict(args)
        resume = settings.get("resume", False)  # a script without steps has none of these
        self.settings, self.total = settings, settings.get("steps", 0)
        self.first = self.tracker = None
        files = [p.name for p in self.path.iterdir() if p.suffix != ".part"] if self.path.is_dir() else []
        files = from_rank_0(files)
        require(not resume or args.out, "--resume needs --out, the folder of the run to go on with")
        if resume and "args.json" in files:
            before = from_rank_0(json.loads((self.path / "args.json").read_text())["args"] if rank() == 0 else None)
            for key in settings.keys() - FREE_TO_CHANGE:
                require(
                    before.get(key) == settings[key],
                    f"--resume {self.path}: --{key} was {before.get(key)!r} and is now {settings[key]!r}; "
                    "a resumed run keeps its settings",
                )
        else:
            hint = ", or give --resume" if "resume" in settings else ""
            require(not files, f"--out {self.path} exists and is not empty: choose another folder{hint}")
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
        if ranks_of_node() < world():
            _require_shared(self.path)
        say(f"run folder: {self.path}")
        if rank() != 0:
            return
        if settings.get("wandb"):
            require(importlib.util.find_spec("wandb") is not None, "--wandb: the package wandb is not installed")
            import wandb

            self.tracker = wandb.init(project="minalign", name=self.path.name, config=settings, resume="allow")
        about = {"args": settings, "command": " ".join(sys.argv), "world": world(), "git": _git_commit()}
        about |= {"torch": torch.__version__, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_whole(self.path / "args.json", json.dumps(about, indent=2) + "\n")
        shutil.copy(script, self.path / "source.py")
        for name in ("metrics.jsonl", "samples.jsonl"):
            (self.path / name).touch()

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`: the checkpoint that the run goes on from was written there."""
        if rank() == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                lines = (self.path / name).read_text().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]  # the last one may be torn
                write_whole(self.path / name, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line into metrics.jsonl and one on the screen. Values must be finite or None (not known)."""
        if rank() != 0:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.tracker:
            self.tracker.log({k: v for k, v in metrics.items() if v is not None}, step=step)
        self.first = self.first if self.first is not None else (step, time.time())
        done, seconds = step - self.first[0], time.time() - self.first[1]
        pace = seconds / done if done else 0.0
        left = int(pace * (self.total - step))
        names = [k for start in ON_SCREEN for k in metrics if k.startswith(start) and metrics[k] is not None]
        shown = [f"{k.removesuffix('/mean')} {metrics[k]:.4g}" for k in names]
        eta = f"{pace:.2f} s/step  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left" if done else ""
        print(f"step {step}/{self.total}  " + "  ".join([*shown, eta]), flush=True)

    def samples(self, step: int, samples: list[dict]) -> None:
        """Rows {kind, prompt, completion, reward} into samples.jsonl."""
        if rank() == 0:
            with (self.path / "samples.jsonl").open("a") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

    def report(self) -> None:
        """plot.png and report.html, if report.py is there."""
        if rank() == 0 and importlib.util.find_spec("report"):
            import report

            report.write_report(self.path)

    def token_page(self, name: str, title: str, answers: list[dict]) -> None:
        """A page of answers with coloured tokens, if report.py is there; see report.token_page()."""
        if rank() == 0 and importlib.util.find_spec("report"):
            import report

            report.token_page(self.path / name, title, answers)


class Run(RunFolder):
    """What happens around the loop of a script: evaluation, log, checkpoints, an early end.

    run = Run(args, __file__)                              refuses a folder that is in use, before a model is loaded
    for step in run.steps(models, optimizer, evaluate):    goes on from a checkpoint, or evaluates first
        run.lap("update")                                  time/update: the seconds since the last lap
        run.end_step(metrics, samples)                     logs; evaluates and saves when it is time
    run.finish(policy, tokenizer)                          model/ and report.html; after an early end, how to go on
    """

    stop_after = None  # tests end a run after this step, as a signal would
    step, stopped = -1, False

    def steps(self, models, optimizer, evaluate):
        """The numbers of the steps that are left. evaluate() -> (metrics, samples) runs on all ranks."""
        self.models, self.optimizer, self.evaluate = models, optimizer, evaluate
        self.start = self._resume() if self.settings["resume"] else 0
        if self.start == 0:
            held_out, examples = evaluate()
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
        self.log(step, metrics | self.laps)
        device = next(self.models.parameters()).device
        self.stopped = (stop_requested(device) or step == self.stop_after) and not last
        if last or self.stopped or step % self.settings["save_every"] == 0:
            save_checkpoint(self.path, step, self.models, self.optimizer)

    def finish(self, policy, tokenizer) -> None:
        global _exit_code
        export_model(self.path / "model", policy, tokenizer)
        self.report()
        if self.stopped:
            number = int(all_max(_signal, torch.device("cpu")))
            _exit_code = 128 + number if number else 0
            words = sys.argv + ([] if self.settings["out"] else ["--out", str(self.path)])
            words += [] if "--resume" in words else ["--resume"]
            say(
                f"stopped after step {self.step + 1} of {self.total}, whose checkpoint and model are in {self.path}; "
                f"to go on: python {shlex.join(words)}"
            )

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns the step to go on with."""
        newest = latest_checkpoint(self.path)
        if newest is None:
            self.cut(-1)
            return 0
        step, path = newest
        load_checkpoint(path, self.models, self.optimizer)
        self.cut(step)
        say(f"resumed from {path}")
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


def write_for_all(path: Path, text: str) -> None:
    """write_whole() by rank 0; the other ranks go on when the file is there. Call it on all ranks."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    dist.barrier()


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        out = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:  # there is no git here
        return None
    return out.stdout.strip() or None



# ======================================================================================================================
# 9. checkpoints
# ======================================================================================================================


def _options(**more) -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True, strict=False, **more)  # LoRA: the frozen body is not saved again


def save_checkpoint(folder: Path, step: int, model, optimizer) -> None:
    """folder/checkpoint/step-<n>, whole or not there: written beside, renamed, and only then is the older one removed.

    All ranks write their shards, so with several nodes the folder must be on a file system that they share.
    """
    home = Path(folder) / "checkpoint"
    temporary, target = home / f"tmp-{step:06d}", home / f"step-{step:06d}"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _begin_state(optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_options())
    with _quiet_dcp():
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=temporary)
    dist.barrier()
    if rank() == 0:
        sizes = {p.name: p.stat().st_size for p in temporary.iterdir()}
        (temporary / "manifest.json").write_text(json.dumps(sizes))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        for old in home.iterdir():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


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
    """(step, path) of the newest checkpoint of a run folder, checked file by file; None when there is none."""
    steps = sorted((Path(folder) / "checkpoint").glob("step-*"))
    if not steps:
        return None
    newest = steps[-1]
    manifest = newest / "manifest.json"
    require(manifest.exists(), f"checkpoint {newest} has no manifest.json: it is not whole")
    for name, size in json.loads(manifest.read_text()).items():
        found = (newest / name).stat().st_size if (newest / name).exists() else 0
        require(found == size, f"checkpoint {newest} is truncated: {name} has {found} bytes, expected {size}")
    return int(newest.name.split("-")[1]), newest


def load_checkpoint(path: Path, model, optimizer) -> None:
    """Model and optimizer as they were, on any number of ranks.

    Tensors are read with weights_only, but torch keeps their index (.metadata) as a pickle: resume only what you trust.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_options())
    state = {"model": model_state, "optimizer": optimizer_state}
    with _quiet_dcp():
        dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(),
    )


@contextlib.contextmanager
def _quiet_dcp():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that one process is a short process group
        yield


def export_model(folder: Path, model, tokenizer) -> None:
    """folder/: Hugging Face format, loads with from_pretrained; adapters are merged into the weights."""
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
        shutil.rmtree(folder, ignore_errors=True)
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


def estimate_memory(
    models: dict, *, rows: int, micro_batch: int, rollout_rows: int, max_prompt: int, max_new_tokens: int, dtype: str
) -> tuple[bool, str]:
    """The peak of a rank with `rows` completions a step, in words."""
    device = next(iter(models.values())).device
    sizes = dict(rows=rows, micro_batch=micro_batch, rollout_rows=rollout_rows, new_tokens=max_new_tokens)
    parts = memory_parts(
        models,
        **sizes,
        tokens=max_prompt + max_new_tokens,
        shards=min(_ranks_of_shards(m, device) for m in models.values()),
        dtype=compute_dtype(dtype, device),
        chunk_mib=256 if device.type == "cuda" else 64,
    )
    words = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return True, f"about {peak_memory(parts) / 2**30:.1f} GiB a rank: {words}"


def peak_memory(parts: dict[str, float]) -> float:
    """The largest of loading, rollout and update; `state` is there all the time."""
    loading, rollout = parts["loading"], parts["whole weights"] + parts["KV cache"] + parts["sampling"]
    update = parts["embeddings and head"] + parts["activations"] + parts["vocabulary"] + parts["kept states"]
    return parts["state"] + max(loading, rollout, update)


def memory_parts(
    models: dict,
    *,
    shards: int,
    rows: int,
    micro_batch: int,
    rollout_rows: int,
    tokens: int,
    new_tokens: int,
    dtype: str,
    chunk_mib: int,
) -> dict[str, float]:
    """Bytes of a rank by what holds them; the first model is the policy. Models may be on the meta device.

    state: shards of weights, and of gradients and Adam's two moments (fp32) where they are trained.
    loading: the group with the embeddings before it is sharded, in 2 bytes (bfloat16 files).
    whole weights, KV cache, sampling: of a rollout, where FSDP copies weights (more than one rank, or bfloat16).
    embeddings and head: FSDP's root group, whole: weights, gradients, what the reduction reads, the head's gradient in
    fp32, the head of the rollout policy; of models that are not trained, the weights. Also one block, gathered ahead.
    activations: counted layer by layer; with recomputation the input of each layer, and one layer.
    """
    width, fsdp = 2 if dtype == "bfloat16" else 4, shards > 1 or dtype == "bfloat16"
    first = next(iter(models.values()))
    config = first.config.get_text_config()
    at_once, kept = micro_batch * tokens, dict.fromkeys(("state", "roots", "activations"), 0.0)
    for model in models.values():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
        in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
        root, block = total - in_blocks, in_blocks / max(1, len(blocks))
        kept["state"] += (16 * trained + width * (total - trained)) / shards
        whole_root = trained == total
        kept["roots"] += fsdp * (root * (2 * width + 4 * whole_root if whole_root else width) + 2 * width * block)
        if trained:
            text = model.config.get_text_config()
            layer = kept_per_token(model, dtype) / text.num_hidden_layers
            recomputed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
            inputs = text.num_hidden_layers * text.hidden_size * width
            kept["activations"] += at_once * (inputs + layer if recomputed else layer * text.num_hidden_layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    matrix = config.vocab_size * config.hidden_size
    alive = min(rows, rollout_rows)
    policy = sum(p.numel() for p in first.parameters())
    return {
        "state": kept["state"],
        "loading": 2 * fsdp * first.get_input_embeddings().weight.numel(),
        "whole weights": fsdp * width * policy,
        "KV cache": 2 * config.num_hidden_layers * heads * head * width * alive * tokens,
        "sampling": 16 * alive * config.vocab_size,
        "embeddings and head": kept["roots"] + 6 * matrix,
        "activations": kept["activations"],
        "vocabulary": 15 * min(chunk_mib * 2**20, 4 * config.vocab_size * micro_batch * new_tokens),
        "kept states": rows * new_tokens * config.hidden_size * width,
    }


def kept_per_token(model, dtype: str) -> float:
    """Bytes that the body keeps of each token for the backward pass, counted on a copy without storage."""
    kept, S, config = {}, 8, copy.deepcopy(model.config)

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    def plain(rope: dict) -> dict:  # other kinds look at the positions, which here have no values
        return {k: plain(v) if isinstance(v, dict) else "default" if k == "rope_type" else v for k, v in rope.items()}

    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):
        text.rope_parameters = plain(text.rope_parameters)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        body = type(model)(config).to(getattr(torch, dtype)).base_model
        inputs = dict(input_ids=torch.zeros(1, S, dtype=torch.long), position_ids=torch.arange(S)[None])
        inputs["attention_mask"] = torch.ones(1, 1, S, S, dtype=torch.bool)  # of this shape: it is not looked at
        out = body(**inputs, use_cache=False)
    weights = {p.untyped_storage()._cdata for p in body.parameters()}
    del out  # until here it kept the graph, and so the storages, alive
    return sum(size for key, size in kept.items() if key not in weights) / S

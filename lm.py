"""Language models: whatever is computed with one, exactly and alike on CPUs and GPUs, alone and sharded.

Contents
    1. loading       tokenizers, weights, LoRA
    2. refusing      models that would be computed wrongly here
    3. sharding      FSDP2
    4. reading       final hidden states of completions; prompts that several rows share are read once
    5. vocabulary    losses over [N, V] logits that never exist at once
    6. rollout       our sampler, and the check that it is the policy
    7. rewards       of reward models, per token and per answer

Shapes: B sequences, P prompt positions, T completion positions, H hidden width, V vocabulary, N unmasked tokens.

Nothing here knows a method.
"""

import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import (  # before torch: it sets how threads wait
    BUILTIN,
    EVAL,
    TRAIN,
    BadInput,
    all_sum,
    compute_dtype,
    cpu,
    decode,
    encode_prompt,
    end_tokens,
    from_rank_0,
    make_batch,
    rank,
    ranks_of_node,
    require,
    say,
    take,
    unfinished,
    uniforms,
    world,
)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils._pytree import tree_map

# ---- 1. loading ------------------------------------------------------------------------------------------------------


def model_path(name: str) -> str:
    """Where the model lies: a built-in one, a Hub name or a folder."""
    if name in BUILTIN:
        folder = BUILTIN[name]
        require(folder.exists(), f"the built-in model is missing: expected the folder {folder}")
        return str(folder)
    folder = Path(name)
    if folder.is_dir():
        require((folder / "config.json").exists(), f"model {name}: the folder has no config.json{unfinished(folder)}")
    else:
        local = name.startswith((".", "/", "~")) or name.count("/") > 1 or unfinished(folder)
        require(not local, f"model {name}: no such folder{unfinished(folder)}")
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
    if trainable:
        for key in ("aligned_from", "reward_score", "reward_objective"):  # not true of what is trained from it
            vars(model.config).pop(key, None)
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
    if not scalar:  # files with a head of its own are not tied, whatever the configuration says
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
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


def trainable_parameters(model) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def quiet_transformers():
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before LoRA."""
    adapters = trainable_parameters(model)
    model.disable_adapters()
    for parameter in adapters:  # peft freezes them, and FSDP settles in the first forward what is trained
        parameter.requires_grad_(True)
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


# ---- 2. refusing -----------------------------------------------------------------------------------------------------


SMALL = 2**26  # parameters of a model that is run on a few tokens before a run begins


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


def _cache_layers(config) -> list:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config).layers


def _is_attention(layer) -> bool:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


# ---- 3. sharding -----------------------------------------------------------------------------------------------------


def wrap(model, dtype: str, device: torch.device, frozen: str = "float32"):
    """A transformers model as scripts know it: with final_hidden, and sharded. frozen: the dtype of frozen weights."""
    model.final_hidden = functools.partial(_final_hidden, weakref.proxy(model))  # no cycle
    model.pack_limit = _pack_limit(model.config)
    return _shard(model, device, dtype, frozen)


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
    mesh = _mesh(device.type, ranks_of_shards(model, device))
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


def ranks_of_shards(model, device: torch.device) -> int:
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
    """Inside, all parameters are whole on every rank, so that ranks may run different numbers of forward passes."""
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


# ---- 4. reading ------------------------------------------------------------------------------------------------------


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


def head_weight(model) -> torch.Tensor:
    """W of the LM head [V, H]: logits are hidden @ W.T. Take it after each forward: FSDP2 makes it whole there."""
    return model.get_output_embeddings().weight


def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [N, H] @ weight.T as fp32 [N, V]; on CUDA bfloat16 products are summed in fp32 and never rounded."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return F.linear(hidden, weight).float()


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
    weight = head_weight(model)
    flat = token_logprobs(hidden, weight, ids.clamp_max(len(weight) - 1), temperature)  # see _read
    return tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x) for x in flat)


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


def _read(model, forward, batch: dict) -> torch.Tensor:
    """forward(...) at the last token of each prompt and at each token of its completion, [B, 1 + T, ...].

    Where it spares an eighth of the work, rows with the same prompt are read as one: the prompt, then their completions
    one after another, each of which sees the prompt and itself.
    """
    (B, P), T = batch["prompt_ids"].shape, batch["completion_ids"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    # Embeddings of one tokenizer may be padded differently: what was drawn from a longer padding is the last row here.
    ids = ids.clamp_max(model.config.get_text_config().vocab_size - 1)
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


# ---- 5. vocabulary ---------------------------------------------------------------------------------------------------


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


# ---- 6. rollout ------------------------------------------------------------------------------------------------------


def stop_ids(model, tokenizer) -> list[int]:
    """All tokens that end a completion: the tokenizer's, its chat template's, and those of the generation settings."""
    extra = model.generation_config.eos_token_id
    extra = [] if extra is None else extra if isinstance(extra, list) else [extra]
    return sorted({*end_tokens(tokenizer), *extra})


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
    at_once, draws = max(1, rows_at_once // samples), min(samples, rows_at_once)
    completions, logprobs = ([[]] * (len(prompt_ids) * samples) for _ in range(2))
    most = min(at_once, len(order)) * draws
    with gathered(model), _sampling(model), cpu.fast_decoding(model, most) if cpu else contextlib.nullcontext():
        limits = max_new_tokens, temperature, stop_ids, pad_id
        decode = _decoder(model, most, max(map(len, prompt_ids), default=0) + max_new_tokens, *limits)
        pieces = [order[i : i + at_once] for i in range(0, len(order), at_once)]
        for piece, first in itertools.product(pieces, range(0, samples, draws)):
            some = range(first, min(first + draws, samples))
            rows = [p * samples + s for p in piece for s in some]
            u, prompts = None if noise is None else noise[rows], [prompt_ids[p] for p in piece]
            done = decode(prompts, len(some), u)
            for row, completion, logprob in zip(rows, *done):
                completions[row], logprobs[row] = completion, logprob
            if not math.isfinite(sum(map(sum, done[1]))):
                raise FloatingPointError("the logits of the model that answers are not finite: its weights are broken")
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
        return logits.argmax(-1), logits.amax(-1).float() * 0  # not finite where a logit is not
    probability = (logits.float() / temperature).softmax(-1)
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that a token of probability 0 is never chosen.
    target = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, target, right=True).clamp_max(logits.shape[-1] - 1)  # NaN is beyond all
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

        Returns lists of equal length: rows (with `completion_ids`, for rewards token by token), prompt ids, completion
        ids, whether each completion ended by itself, and the log-probabilities that the sampler gave its tokens.
        """
        share = len(rows) // world()
        rows = rows[rank() * share : (rank() + 1) * share]
        prompt_ids = [self.encode(row) for row in rows]
        first = rank() * share * samples
        noise = uniforms(seed, TRAIN, step, range(first, first + share * samples), self.max_new_tokens)
        completion_ids, sampled = self.complete(prompt_ids, samples, noise, return_logprobs=True)
        ends = set(stop_ids(self.policy, self.tokenizer))
        finished = [c[-1] in ends for c in completion_ids]
        rows = [row | {"completion_ids": ids} for row, ids in zip(_repeat(rows, samples), completion_ids)]
        return rows, _repeat(prompt_ids, samples), completion_ids, finished, sampled

    def evaluate(self, task, seed: int) -> tuple[dict[str, float], list[dict]]:
        """Held-out metrics, greedy and sampled (with the same noise each time), and some of this rank's samples.

        eval/greedy and eval/sampled where the task knows right from wrong, else eval/reward and eval/reward_sampled;
        eval/answered is the share of greedy completions that have an answer at all.
        """
        mine = list(range(rank(), len(task.test), world()))
        rows = [task.test[i] for i in mine]
        prompt_ids = [self.encode(row) for row in rows]
        greedy, sampled = ("eval/greedy", "eval/sampled") if task.correct else ("eval/reward", "eval/reward_sampled")
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
        "reward/spread": (by_prompt.amax(1) - by_prompt.amin(1) > 1e-5 * by_prompt.abs().amax(1)).sum() * samples,
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


def sampler_gap(policy, temperature: float, batch, sampled: list[list[float]], dtype: str, first: bool = True) -> float:
    """Mean |pi / sampler - 1| over the tokens: is the sampler the policy? Of the first 16 rows of each rank, if pi has
    not been evaluated yet.

    sampled: the log-probabilities that the sampler gave its tokens. Raises if rounding does not explain the gap. In
    bfloat16 that depends on how open the policy is, for an error e of a logit moves log p by (1 - p) e: .02 to .06 of
    mean (1 - p) is healthy, .15 to .23 comes of a sampler at temperature 0.9 instead of 1, .3 of dropout 0.05. After
    the `first` step a policy may have nearly collapsed; then single rare tokens make .3 of mean (1 - p) healthy.
    """
    known = "old_logprobs" in batch
    some = batch if known else take(batch, list(range(min(16, len(sampled)))))
    drawn = torch.zeros_like(some["mask"], dtype=torch.float32)
    drawn[some["mask"]] = torch.tensor([x for row in sampled[: len(drawn)] for x in row], device=drawn.device)
    with torch.no_grad():
        now = batch["old_logprobs"] if known else policy_logprobs(policy, some, temperature)[0]
        ratio = (now - drawn).exp()[some["mask"]]
    open_ = (1 - drawn.exp())[some["mask"]].sum()
    sums = all_sum({"n": ratio.numel(), "gap": (ratio - 1).abs().sum(), "open": open_}, drawn.device)
    gap, limit = sums["gap"] / sums["n"], ON_POLICY["float32"]
    if compute_dtype(dtype, drawn.device) == "bfloat16":
        limit = max(0.2 * sums["open"] / sums["n"] + 0.005, 0.0 if first else ON_POLICY["bfloat16"])
    _stop_if_apart(gap, limit, "the training forward")
    return gap


# ---- 7. rewards ------------------------------------------------------------------------------------------------------


def place_rewards(task_rewards: list, mask: torch.Tensor, by_token: bool) -> torch.Tensor:
    """[B, T]: a number on the last token of its completion, a list of numbers on all; by_token: all must be lists."""
    rewards = torch.zeros(mask.shape, device=mask.device)
    for b, (value, n) in enumerate(zip(task_rewards, mask.sum(1).tolist())):
        if isinstance(value, list):
            rewards[b, :n] = torch.tensor(value, device=mask.device)
        else:
            require(not by_token, "--advantage token: reward() gave a number, expected one for each token")
            rewards[b, n - 1] = value
    return rewards


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
    kind = (config.architectures or [""])[0]
    found = f"--reward_model {name} is a {kind}; expected token classification with one label, or a language model"
    require(known or not kind.endswith("ForSequenceClassification"), found)
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

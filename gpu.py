"""What makes GPUs fast: decoding in CUDA graphs, losses over the vocabulary compiled. Delete it and only speed changes.

A decoding step of a 0.5B model launches more than a thousand kernels. Launching takes the CPU 15 ms, running them takes
the GPU 3. So the step is recorded once for each number of rows and replayed: no Python and no host synchronisation per
token. Rows that have ended leave at the next halving of the batch. The distribution, the noise and the tokens are those
of `_generate` in lm.py, the readable reference; tests hold both against each other.
"""

import contextlib
import copy
import functools
from collections import OrderedDict

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

import common
import lm

# Fused passes over [n, V] for any number of tokens; a loss is compiled once per process, in some ten seconds.
fused = functools.partial(torch.compile, dynamic=True)


def prepare() -> None:
    """Attention without cuDNN, which plans anew for each shape: 60 ms, and training has a new shape in each batch."""
    torch.backends.cuda.enable_cudnn_sdp(False)


LOOK = 16  # tokens between two looks at which rows have ended, each of which waits for the GPU


class StaticLayer(DynamicLayer):
    """Keys and values [rows, heads, columns, width] that never move; a step writes the one column `column`."""

    def __init__(self, keys, values, column):
        super().__init__()
        self.keys, self.values, self.column, self.is_initialized = keys, values, column, True

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.column, keys)
        self.values.index_copy_(2, self.column, values)
        return self.keys, self.values


@contextlib.contextmanager
def without_hooks(model):
    """FSDP's hooks off: all parameters are whole here, and hooks cannot be recorded."""
    modules = [m for m in model.modules() if isinstance(m, lm.FSDPModule)]
    saved = [(m, m._forward_pre_hooks, m._forward_hooks) for m in modules]
    for m in modules:
        m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, before, after in saved:
            m._forward_pre_hooks, m._forward_hooks = before, after


@contextlib.contextmanager
def with_cudnn(on: bool):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Decoder:
    """Decodes up to `rows` rows of `length` positions at a time. For one call of `generate`, while weights stay put."""

    cudnn = True  # its attention is the fastest here, and a static cache has one shape

    def __init__(self, model, rows: int, length: int, max_new_tokens: int, temperature: float, stop_ids, pad_id: int):
        self.model, self.temperature, self.pad_id, self.T = model, temperature, pad_id, max_new_tokens
        self.device = next(model.parameters()).device
        self.columns = -(-(length + 1) // 64) * 64  # attention kernels want rows of masks aligned
        self.sizes = [max(1, rows >> i) for i in range(6) if i == 0 or rows >> i >= 8]
        self.stop = torch.tensor(stop_ids, device=self.device)
        self.layers, self.graphs, self.pool = None, {}, None
        whole = lambda *shape, **kind: torch.zeros(shape, device=self.device, **kind)  # noqa: E731
        self.token, self.position, self.rows = (whole(rows, dtype=torch.long) for _ in range(3))
        self.alive = whole(rows, dtype=torch.bool)
        self.tokens, self.lengths = whole(rows, self.T, dtype=torch.long), whole(rows, dtype=torch.long)
        self.logprobs, self.noise, self.greedy = whole(rows, self.T), whole(rows, self.T), True
        self.t, self.column = whole(1, dtype=torch.long), whole(1, dtype=torch.long)
        self.bias = whole(rows, 1, 1, self.columns, dtype=lm.head_weight(model).dtype)

    def __call__(self, prompt_ids, samples: int, noise):
        """Completions and the log-probabilities of their tokens, as lists, like `_generate`."""
        n = len(prompt_ids) * samples
        self._read(prompt_ids, samples, noise, n)
        size = min(s for s in self.sizes if s >= n)
        for t in range(1, self.T):
            if t % LOOK == 0 or t == 1:
                left = int(self.alive[:size].sum())
                if left == 0:
                    break
                smaller = min(s for s in self.sizes if s >= left)
                if smaller < size:
                    self._shrink(size, smaller)
                    size = smaller
            self._step(size)
        lengths = self.lengths[:n]
        return lm._cut(self.tokens[:n], lengths), lm._cut(self.logprobs[:n], lengths)

    def _read(self, prompt_ids, samples, noise, n) -> None:
        """The prompts, read once each, into the static cache; then the first token of each row."""
        batch = common.make_batch(prompt_ids, [[self.pad_id]] * len(prompt_ids), self.pad_id, self.device)
        mask, cache = batch["prompt_mask"], DynamicCache(config=self.model.config)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        hidden = self.model.final_hidden(batch["prompt_ids"], mask.long(), position, past_key_values=cache)
        P = mask.shape[1]
        if self.layers is None:
            rows = len(self.token)
            shape = lambda x: x.new_zeros(rows, x.shape[1], self.columns, x.shape[3])  # noqa: E731
            self.layers = [(shape(layer.keys), shape(layer.values)) for layer in cache.layers]
        for (keys, values), layer in zip(self.layers, cache.layers):
            keys[:n, :, :P] = layer.keys.repeat_interleave(samples, 0)
            values[:n, :, :P] = layer.values.repeat_interleave(samples, 0)
        self.bias.fill_(-torch.inf)
        self.bias[:n, 0, 0, :P].masked_fill_(mask.repeat_interleave(samples, 0), 0.0)
        self.bias[:, 0, 0, P] = 0.0
        for x in (self.token, self.position, self.alive, self.lengths):
            x.zero_()
        self.position[:n] = position[:, -1].repeat_interleave(samples, 0)
        self.alive[:n] = True
        torch.arange(len(self.rows), out=self.rows)
        self.greedy = noise is None
        if noise is not None:
            self.noise[:n] = noise.to(self.device)
        self.t.zero_(), self.column.fill_(P - 1)
        self._choose(lm.logits_of(hidden[:, -1], lm.head_weight(self.model)).repeat_interleave(samples, 0), n)

    def _choose(self, logits, size: int) -> None:
        """Draws a token per row, and sets the next step up."""
        rows, t, alive = self.rows[:size], self.t.expand(size), self.alive[:size]
        token, logprob = lm._pick(logits, self.temperature, None if self.greedy else self.noise[rows, t])
        self.tokens[rows, t], self.logprobs[rows, t] = token, logprob
        self.lengths[rows] += alive
        alive &= (token[:, None] != self.stop).all(1)
        self.token[:size], self.position[:size] = token, self.position[:size] + 1
        self.t += 1
        self.column += 1
        self.bias.index_fill_(3, self.column, 0.0)

    def _forward(self, size: int) -> None:
        cache = DynamicCache(config=self.model.config)
        cache.layers = [StaticLayer(keys[:size], values[:size], self.column) for keys, values in self.layers]
        hidden = self.model.base_model(
            input_ids=self.token[:size, None],
            attention_mask=self.bias[:size],
            position_ids=self.position[:size, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self._choose(lm.logits_of(hidden[:, -1], lm.head_weight(self.model)), size)

    def _step(self, size: int) -> None:
        """The first step of a size runs as it is, the second is recorded, and later ones are replayed."""
        key = size, self.greedy
        if self.device.type == "cuda" and key in self.graphs:
            if self.graphs[key] is None:
                self.graphs[key] = torch.cuda.CUDAGraph()
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                record = torch.cuda.graph(self.graphs[key], pool=self.pool, capture_error_mode="thread_local")
                with without_hooks(self.model), with_cudnn(self.cudnn), record:
                    self._forward(size)
            self.graphs[key].replay()
        else:
            with without_hooks(self.model), with_cudnn(self.cudnn):
                self._forward(size)
            self.graphs[key] = None

    def _shrink(self, size: int, smaller: int) -> None:
        """Rows that are alive, first; the rest are passengers whose tokens come after their ends and are cut off."""
        keep = self.alive[:size].int().argsort(descending=True, stable=True)[:smaller]
        for x in (self.token, self.position, self.rows, self.alive, self.bias, *[x for kv in self.layers for x in kv]):
            x[:smaller] = x[keep]


def estimate_memory(
    models: dict, *, rows: int, micro_batch: int, rollout_rows: int, max_prompt: int, max_new_tokens: int, dtype: str
) -> tuple[bool, str]:
    """The peak of a rank with `rows` completions per step, in words."""
    device = next(iter(models.values())).device
    sizes = dict(rows=rows, micro_batch=micro_batch, rollout_rows=rollout_rows, new_tokens=max_new_tokens)
    parts = memory_parts(
        models,
        **sizes,
        tokens=max_prompt + max_new_tokens,
        shards=min(lm.ranks_of_shards(m, device) for m in models.values()),
        dtype=common.compute_dtype(dtype, device),
        chunk_mib=256 if device.type == "cuda" else 64,
    )
    words = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return True, f"about {peak_memory(parts) / 2**30:.1f} GiB per rank: {words}"


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

"""What makes runs on CPUs fast: how threads wait, memory that is kept, packed weights, a cache with room.

Delete this file and only speed changes: common.py and lm.py do without it. Measurements are in docs/speed.md.
"""

import os

# Before torch is imported. Threads that spin for long while they wait ruin a step when anything else runs; threads that
# sleep at once are woken too late for the next product. Some 20 microseconds are the middle.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Large tensors in huge pages, so that the logits of a whole vocabulary cost fewer page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import contextlib
import ctypes
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F


def keep_freed_memory() -> None:
    """Memory that a step frees serves the next step. By default glibc returns it: clearing pages took a third of an
    update."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is never given back


@contextlib.contextmanager
def fast_decoding(model, rows: int):
    """For the time of a rollout: packed weights, and one thread for small products."""
    with packed(model), threads(model, rows):
        yield


@contextlib.contextmanager
def packed(model):
    """Within the context, linear layers have copies of their weights in oneDNN's order; decoding is up to 1.4 times
    faster.

    For float32 on a CPU. Small weights and many rows (a prompt) gain nothing and are left alone.
    """
    weight, layers = model.get_output_embeddings().weight, []
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        layers = [m for m in model.modules() if type(m) is torch.nn.Linear and m.weight.numel() >= 2**18]
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16)
        layer.forward = partial(_packed_linear, layer, weight)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _packed_linear(layer, weight, x):
    if x.shape[:-1].numel() > 64:
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")


@contextlib.contextmanager
def threads(model, rows: int):
    """Within the context, one thread if the products are small: a second one takes longer to wake than to multiply."""
    before, layers = torch.get_num_threads(), (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    if rows * max((layer.weight.numel() for layer in layers), default=math.inf) < 2**22:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def roomy_cache(config):
    """A DynamicCache with room for tokens to come, so that a new token does not copy all those before it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Roomy(DynamicLayer):
        room, seen = (), None

        def update(self, keys, values, *args, **kwargs):
            n = self.get_seq_length()
            if n == 0:
                return super().update(keys, values)
            end = n + keys.shape[-2]
            if self.keys is not self.seen or end > self.room[0].shape[-2]:  # other rows than last time, or it is full
                both, more = (self.keys, self.values), end + end // 4 + 32
                self.room = [x.new_empty(*x.shape[:2], more, x.shape[3]) for x in both]
                for room, x in zip(self.room, both):
                    room[:, :, :n] = x
            for room, x in zip(self.room, (keys, values)):
                room[:, :, n:end] = x
            self.keys, self.values = (room[:, :, :end] for room in self.room)
            self.seen = self.keys
            return self.keys, self.values

    cache = DynamicCache(config=config)
    cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

"""One GPU, under ten minutes: what docs/gpu.md says, measured.

    python benchmarks/gpu.py                     # every part
    python benchmarks/gpu.py decode vocabulary   # some
    DRY=1 python benchmarks/gpu.py               # tiny models on the CPU: does the script itself run? (a test)

Models have the shapes of Qwen2.5 and random weights, so nothing is downloaded; SMOL=folder gives `noise` a pretrained
model. Needs torch >= 2.11 and transformers >= 5.17, neither datasets nor math-verify; `grpo` needs trl and datasets.
Each measurement is a row of benchmarks/results/gpu.jsonl (OUT=folder: of OUT/gpu.jsonl): device, versions, part, case,
what was expected and what was seen. Every part stands alone: one that fails prints its error and the next goes on.
"""

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, before torch

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

import gpu  # noqa: E402

DRY = bool(os.environ.get("DRY"))
DEVICE = torch.device("cpu" if DRY else "cuda")
OUT = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
NAME = "DRY" if DRY else torch.cuda.get_device_name()
# hidden, intermediate, layers, heads, KV heads, vocabulary, tied
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


def row(part: str, case: str, expected: str, **seen) -> None:
    """One measurement, printed and stored."""
    seen = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in seen.items()}
    print(f"  {case}: " + ", ".join(f"{k} {v}" for k, v in seen.items()) + f"   [{expected}]", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    line = {"device": NAME, **versions, "part": part, "case": case, "expected": expected, "seen": seen}
    with (OUT / "gpu.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(function, repeats: int = 5) -> float:
    """Seconds per call, after one call to warm up."""
    function()
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    sync()
    return (time.perf_counter() - start) / repeats


def free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def used() -> float:
    return torch.cuda.memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def peak() -> float:
    """GiB at most since free()."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def config_of(name: str, layers: int | None = None):
    width, inner, depth, heads, kv, vocabulary, tied = (64, 128, 2, 4, 2, 512, True) if DRY else SHAPES[name]
    return transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )


def qwen(name: str, layers: int | None = None, dtype: str = "bfloat16", trainable: bool = True):
    """Random weights in a real shape, made on the device and sharded as load_model does."""
    with torch.device(DEVICE):
        model = transformers.Qwen2ForCausalLM(config_of(name, layers))
    model.requires_grad_(trainable)
    return common.wrap(model.train(trainable), dtype, DEVICE)


def peak_rate() -> float:
    """FLOP/s of a large bfloat16 matrix product: what shares of an update are held against."""
    n = 256 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, 10)


def start() -> None:
    """The device and its backends."""
    if DEVICE.type == "cuda":
        dist.all_reduce(torch.ones(1, device=DEVICE))
        dist.barrier()
        row("start", "NCCL with a HashStore", "ok", all_reduce="ok")
        x = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
        row("start", "memory copied", "3.0 H100, 4.3 H200", TB_per_s=2 * 2**31 / timed(lambda: x.clone()) / 1e12)
    row("start", "bfloat16 product 8192", "about 790", TFLOP_per_s=peak_rate() / 1e12)


# ---- right -----------------------------------------------------------------------------------------------------------


def noise() -> None:
    """How far two equal policies seem apart in bfloat16: packed, alone, padded, decoded. This sets the limits."""
    path = os.environ.get("SMOL", "builtin")
    tokenizer = common.load_tokenizer(path)
    questions = [
        "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell?",
        "Write two sentences about the sea.",
        "Explain photosynthesis to a child.",
        "What is 17 * 23?",
    ]
    prompts = ["12+34=", "7+8=", "1+2+3=", "9+9="] if path == "builtin" else [[dict(role="user", content=q)] for q in questions]
    prompts = [common.encode_prompt(tokenizer, p) for p in prompts]
    samples, length = 8, 16 if path == "builtin" or DRY else 128
    model = common.load_model(path, device=DEVICE, dtype="bfloat16")
    u = common.uniforms(0, 0, 0, range(len(prompts) * samples), length)
    settings = dict(samples=samples, max_new_tokens=length, noise=u, stop_ids=[-1], pad_id=0, return_logprobs=True)

    @torch.no_grad()
    def states(batch, size: int, pack: bool):
        limit, model.pack_limit = model.pack_limit, model.pack_limit if pack else 0
        hidden = common.map_rows(lambda b: {"h": common.completion_hidden(model, b)}, batch, size)["h"]
        model.pack_limit = limit
        return hidden

    @torch.no_grad()
    def logprobs(hidden, ids, temperature=1.0):
        mask = torch.ones_like(ids, dtype=torch.bool)
        flat, _ = common.token_logprobs(hidden[mask], common.head_weight(model), ids[mask], temperature)
        return flat.view_as(ids)

    def compare(case, a, b, expected):
        d = a - b
        row("noise", case, expected, ratio_gap=(d.exp() - 1).abs().mean().item(), largest=d.abs().max().item())

    for decoder in ("reference", "graphs"):
        with using(decoder):
            completions, sampled = common.generate(model, prompts, **settings)
        batch = common.make_batch([p for p in prompts for _ in range(samples)], completions, 0, DEVICE)
        ids, sampled = batch["completion_ids"], torch.tensor(sampled, device=DEVICE)
        packed = states(batch, 8, True)
        compare(f"{decoder} against training", logprobs(packed, ids), sampled, ".02-.05, sets the limit")
        for temperature in (0.9, 0.7):
            planted = logprobs(packed, ids, temperature)
            compare(f"{decoder} against training at temperature {temperature}", planted, sampled, "must stand out")
        for hot in (0.05, 0.1):
            layers = [m for n, m in model.named_modules() if n.endswith(("mlp", "self_attn"))]
            drop = lambda m, i, o, p=hot: (F.dropout(o[0], p), *o[1:]) if isinstance(o, tuple) else F.dropout(o, p)  # noqa: E731
            handles = [m.register_forward_hook(drop) for m in layers]
            compare(f"{decoder} against training with dropout {hot}", logprobs(states(batch, 8, True), ids), sampled, "must stand out")
            for handle in handles:
                handle.remove()
    other = {"packed again": (8, True), "alone": (1, False), "one padded batch": (len(completions), False)}
    for name, how in other.items():
        compare(f"packed against {name}", logprobs(packed, ids), logprobs(states(batch, *how), ids), ".01-.03; again: 0")


def sampler() -> None:
    """The sampler on CUDA against the CPU; tokens of probability zero."""
    z = torch.randn(64, 999 if DRY else 151936) * 3
    z[:, :7] += 12
    z[:, 500:600] = -torch.inf
    u = torch.rand(64)
    here, there = common._pick(z, 1.0, u)[0], common._pick(z.to(DEVICE), 1.0, u.to(DEVICE))[0].cpu()
    falls = int((z.to(DEVICE).softmax(-1).cumsum(-1).diff(dim=-1) < 0).sum())
    hits = 0
    for _ in range(200):
        token = common._pick(z.to(DEVICE), 1.0, torch.rand(64, device=DEVICE))[0]
        hits += int(((token >= 500) & (token < 600)).sum())
    seen = dict(equal_to_cpu=(here == there).float().mean().item(), falling_steps=falls, zero_probability_tokens=hits)
    row("sampler", "64 rows of 152k", ">= .98, 0, 0", **seen)


def determinism() -> None:
    """Two equal backward passes: bits."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = qwen("0.5B", layers=2)
    ids = torch.randint(9, 500, (2, 16 if DRY else 512), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for kind in ("default", "math"):
        gradients = []
        for _ in range(2):
            with sdpa_kernel(SDPBackend.MATH) if kind == "math" else contextlib.nullcontext():
                model.final_hidden(ids, mask, (mask.cumsum(1) - 1).clamp_min(0)).float().square().mean().backward()
            gradients.append([p.grad.full_tensor().clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        same = all(torch.equal(a, b) for a, b in zip(*gradients))
        row("determinism", f"attention {kind}", "math: equal", bit_equal=same)


def equality() -> None:
    """Greedy tokens of graphs, reference and transformers' generate, fp32, rows that end at different times."""
    model = common.load_model("builtin", device=DEVICE)
    tokenizer = common.load_tokenizer("builtin")
    prompts = [common.encode_prompt(tokenizer, f"{i}+{i * 7 % 50}+{i * 3 % 20}=") for i in range(64)]
    found = {}
    for decoder in ("reference", "graphs"):
        with using(decoder):
            for kind, u in (("greedy", None), ("sampled", common.uniforms(0, 0, 0, range(512), 48))):
                settings = dict(samples=8, max_new_tokens=48, noise=u, stop_ids=common.stop_ids(model, tokenizer))
                found[decoder, kind] = common.generate(model, prompts, pad_id=tokenizer.pad_token_id, **settings)
    for kind in ("greedy", "sampled"):
        a, b = found["reference", kind], found["graphs", kind]
        seen = dict(rows=len(a), equal=sum(x == y for x, y in zip(a, b)), lengths=len({len(x) for x in a}))
        row("equality", f"graphs against reference, {kind}, fp32", "all equal" if kind == "greedy" else "nearly all", **seen)


# ---- fast ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def using(decoder: str):
    """Decoding by the reference, or by graphs (their plain calls on a CPU)."""
    real = common._decoder
    if decoder == "reference":
        common._decoder = lambda model, rows, length, *limits: common.partial(common._generate, model, *limits)
    else:
        common._decoder = gpu.Decoder
    try:
        yield
    finally:
        common._decoder = real


def decode() -> None:
    """Tokens per second, all rows alive: reference, graphs, transformers' generate."""
    random.seed(0)
    for name, rows in (("0.5B", 256), ("0.5B", 64), ("1.5B", 256), ("7B", 256), ("7B", 64)):
        model = qwen(name, trainable=False)
        prompts = [[random.randrange(9, 500) for _ in range(random.randrange(100, 160))] for _ in range(rows // 8)]
        for decoder in ("reference", "graphs", "generate"):
            if decoder == "generate" and (name, rows) != ("0.5B", 256):
                continue
            few, many = (4, 8) if DRY else (64, 320) if decoder == "graphs" else (16, 48)
            u = common.uniforms(0, 0, 0, range(rows), many)

            def run(n):
                if decoder == "generate":
                    batch = common.make_batch(prompts, [[0]] * len(prompts), 0, DEVICE)
                    with common.gathered(model), torch.no_grad(), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        model.generate(
                            input_ids=batch["prompt_ids"].repeat_interleave(8, 0),
                            attention_mask=batch["prompt_mask"].long().repeat_interleave(8, 0),
                            max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0,
                        )  # fmt: skip
                else:
                    with using(decoder):
                        common.generate(model, prompts, samples=8, max_new_tokens=n, noise=u[:, :n], stop_ids=[-1], pad_id=0)

            run(few)
            free()
            seconds = []
            for n in (few, many):
                sync()
                begin = time.perf_counter()
                run(n)
                sync()
                seconds.append(time.perf_counter() - begin)
            each = (seconds[1] - seconds[0]) / (many - few)
            seen = dict(ms_per_token=each * 1e3, tokens_per_s=rows / each, first_s=seconds[0] - few * each, peak_GiB=peak())
            expected = ">= 50,000 at 0.5B and 12,000 at 7B with 256 rows" if decoder == "graphs" else "13-20 ms"
            row("decode", f"{name} {rows} rows, {decoder}", expected, **seen)
        if DEVICE.type == "cuda" and rows == 256:
            with torch.profiler.profile() as profile, using("graphs"):
                common.generate(model, prompts, samples=8, max_new_tokens=48, noise=u[:, :48], stop_ids=[-1], pad_id=0)
                sync()
            kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            total = {}
            for e in kernels:
                total[e.name[:60]] = total.get(e.name[:60], 0) + e.device_time / 48e3
            top = sorted(total.items(), key=lambda kv: -kv[1])[:12]
            print(f"    kernels per token {len(kernels) / 48:.0f}, GPU ms {sum(total.values()):.2f}")
            print("\n".join(f"      {ms:.3f} ms  {kernel}" for kernel, ms in top), flush=True)
        del model
        free()


def vocabulary() -> None:
    """LCO-KLD over 4096 tokens, V = 152k, H = 3584: chunk sizes, eager and compiled; how exact the head's gradient is."""
    import lco

    width, V, n = (64, 512, 64) if DRY else (3584, 152064, 4096)
    normal = lambda *shape: torch.randn(*shape, device=DEVICE).bfloat16()  # noqa: E731
    hidden, weight = normal(n, width).requires_grad_(), (normal(V, width) * width**-0.5).requires_grad_()
    old, old_weight, ids = normal(n, width), normal(V, width) * width**-0.5, torch.randint(V, (n,), device=DEVICE)
    advantages, args = torch.randn(n, device=DEVICE), lco.Args()

    def loss(z, z_old, ids, advantages):
        dense = lco.fill_advantages(advantages, ids, z_old, "zero")
        per_token, metrics = lco.vocabulary_loss(z, z_old, dense, args)
        return per_token.sum(), {k: v.sum() for k, v in metrics.items()}

    def step(function, mib):
        value, _ = common.over_vocabulary(function, [(hidden, weight), (old, old_weight)], [ids, advantages], 1.0, mib)
        return torch.autograd.grad(value, [hidden, weight])

    exact = step(loss, 64 if DRY else 1300)[1].double()
    for kind, function in (("eager", loss), ("compiled", torch.compile(loss, dynamic=True))):
        for mib in (64, 256, 1024):
            free()
            with contextlib.suppress(torch.OutOfMemoryError):
                before, seconds = used(), timed(lambda f=function, m=mib: step(f, m), 2)
                error = ((step(function, mib)[1].double() - exact).norm() / exact.norm()).item()
                seen = dict(ms=seconds * 1e3, head_gradient_off=error, GiB_above=peak() - before)
                row("vocabulary", f"LCO-KLD {kind} {mib} MiB", "110-150, 70-100 ms; compiled 35-50", **seen)
    for mib in (64, 256):
        step = lambda m=mib: torch.autograd.grad(  # noqa: E731
            common.token_logprobs(hidden, weight, ids, chunk_mib=m)[0].sum(), [hidden, weight]
        )
        row("vocabulary", f"token_logprobs {mib} MiB", "-", ms=timed(step, 2) * 1e3)


def attention() -> None:
    """Kernels and times of attention: no mask, padding, packed rows."""
    for B, S, mask in ((8, 1024, None), (8, 1024, "padded"), (1, 4608, "packed"), (8, 512, "padded")):
        S = S // 32 if DRY else S
        q = torch.randn(B, 28, S, 16 if DRY else 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn_like(q, requires_grad=True) for _ in range(2))
        own = torch.zeros(B, S, dtype=torch.long, device=DEVICE)
        if mask == "packed":
            own[:, S // 9 :] = torch.arange(S - S // 9, device=DEVICE) // (S // 9) + 1
        sees = ((own[:, None] == 0) | (own[:, None] == own[:, :, None])).tril()[:, None] if mask else None

        def run(q=q, k=k, v=v, sees=sees):
            F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=sees is None).sum().backward()

        kernels = ""
        if DEVICE.type == "cuda":
            with torch.profiler.profile() as profile:
                run()
                sync()
            on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            words = ("flash", "fmha", "cudnn", "attention")
            kernels = ", ".join(sorted({n.split("<")[0][-40:] for n in on_gpu if any(w in n.lower() for w in words)}))
        row("attention", f"{B} x {S}, {mask or 'no mask'}", "a mask: 2-4 x", ms=timed(run) * 1e3, kernels=kernels)


def activations() -> None:
    """Saved tensors per token and layer at 7B; whether models die."""
    for masked in (False, True):
        free()
        model, B, S = qwen("7B", layers=2), 2 if DRY else 8, 16 if DRY else 1024
        ids = torch.randint(9, 500, (B, S), device=DEVICE)
        mask = torch.ones_like(ids)
        mask[0, 0] = 1 - int(masked)
        read = lambda n, m=model, i=ids, a=mask: m.final_hidden(i[:n], a[:n], (a[:n].cumsum(1) - 1).clamp_min(0))  # noqa: E731
        read(1)
        before = used()
        hidden = read(B)
        row("activations", f"7B, mask {masked}", "226, 240", kB_per_token_and_layer=(used() - before) * 2**30 / B / S / 2e3)
        del hidden, model, read
        before = used()
        gc.collect()
        row("activations", "freed by the cycle collector alone", "0", GiB=before - used())


PARTS = [start, noise, sampler, determinism, equality, decode, vocabulary, attention, activations]


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    print(torch.__version__, transformers.__version__, NAME, flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
    backend = "gloo" if DRY else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    unknown = set(sys.argv[1:]) - {part.__name__ for part in PARTS}
    common.require(not unknown, f"unknown parts: {sorted(unknown)}")
    failed = []
    for part in PARTS:
        if part.__name__ in sys.argv[1:] or not sys.argv[1:]:
            begin = time.time()
            print(f"== {part.__name__}: {part.__doc__}", flush=True)
            try:
                part()
            except BaseException:
                failed.append(part.__name__)
                traceback.print_exc(limit=6, file=sys.stdout)
            free()
            print(f"   ({time.time() - begin:.0f} s)", flush=True)
    print("failed:", ", ".join(failed) or "none", flush=True)
    os._exit(len(failed))


if __name__ == "__main__":
    main()

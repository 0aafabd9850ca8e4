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
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, before torch
import lm

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
    return lm.wrap(model.train(trainable), dtype, DEVICE)


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
    tokenizer = lm.load_tokenizer(path)
    questions = [
        "Natalia sold clips to 48 of her friends in April, and half as many in May. How many did she sell?",
        "Write two sentences about the sea.",
        "Explain photosynthesis to a child.",
        "What is 17 * 23?",
    ]
    prompts = ["12+34=", "7+8=", "1+2+3=", "9+9="] if path == "builtin" else [[dict(role="user", content=q)] for q in questions]
    prompts = [common.encode_prompt(tokenizer, p) for p in prompts]
    samples, length = 8, 16 if path == "builtin" or DRY else 128
    model = lm.load_model(path, device=DEVICE, dtype="bfloat16")
    u = common.uniforms(0, 0, 0, range(len(prompts) * samples), length)
    settings = dict(samples=samples, max_new_tokens=length, noise=u, stop_ids=[-1], pad_id=0, return_logprobs=True)

    @torch.no_grad()
    def states(batch, size: int, pack: bool):
        limit, model.pack_limit = model.pack_limit, model.pack_limit if pack else 0
        hidden = lm.map_rows(lambda b: {"h": lm.completion_hidden(model, b)}, batch, size)["h"]
        model.pack_limit = limit
        return hidden

    @torch.no_grad()
    def logprobs(hidden, ids, temperature=1.0):
        mask = torch.ones_like(ids, dtype=torch.bool)
        flat, _ = lm.token_logprobs(hidden[mask], lm.head_weight(model), ids[mask], temperature)
        return flat.view_as(ids)

    def compare(case, a, b, expected):
        d = a - b
        row("noise", case, expected, ratio_gap=(d.exp() - 1).abs().mean().item(), largest=d.abs().max().item())

    for decoder in ("reference", "graphs"):
        with using(decoder):
            completions, sampled = lm.generate(model, prompts, **settings)
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
    here, there = lm._pick(z, 1.0, u)[0], lm._pick(z.to(DEVICE), 1.0, u.to(DEVICE))[0].cpu()
    falls = int((z.to(DEVICE).softmax(-1).cumsum(-1).diff(dim=-1) < 0).sum())
    hits = 0
    for _ in range(200):
        token = lm._pick(z.to(DEVICE), 1.0, torch.rand(64, device=DEVICE))[0]
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
    model = lm.load_model("builtin", device=DEVICE)
    tokenizer = lm.load_tokenizer("builtin")
    prompts = [common.encode_prompt(tokenizer, f"{i}+{i * 7 % 50}+{i * 3 % 20}=") for i in range(64)]
    found = {}
    for decoder in ("reference", "graphs"):
        with using(decoder):
            for kind, u in (("greedy", None), ("sampled", common.uniforms(0, 0, 0, range(512), 48))):
                settings = dict(samples=8, max_new_tokens=48, noise=u, stop_ids=lm.stop_ids(model, tokenizer))
                found[decoder, kind] = lm.generate(model, prompts, pad_id=tokenizer.pad_token_id, **settings)
    for kind in ("greedy", "sampled"):
        a, b = found["reference", kind], found["graphs", kind]
        seen = dict(rows=len(a), equal=sum(x == y for x, y in zip(a, b)), lengths=len({len(x) for x in a}))
        row("equality", f"graphs against reference, {kind}, fp32", "all equal" if kind == "greedy" else "nearly all", **seen)


# ---- fast ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def using(decoder: str):
    """Decoding by the reference, or by graphs (their plain calls on a CPU)."""
    real = lm._decoder
    if decoder == "reference":
        lm._decoder = lambda model, rows, length, *limits: lm.partial(lm._generate, model, *limits)
    else:
        lm._decoder = gpu.Decoder
    try:
        yield
    finally:
        lm._decoder = real


def decode() -> None:
    """Tokens per second, all rows alive: reference, graphs, transformers' generate."""
    random.seed(0)
    chosen = os.environ.get("CASES", "")
    cases = [("0.5B", 256), ("0.5B", 64), ("1.5B", 256), ("7B", 256), ("7B", 64)]
    for name, rows in [case for case in cases if chosen in f"{case[0]} {case[1]}"]:
        model = qwen(name, trainable=False)
        prompts = [[random.randrange(9, 500) for _ in range(random.randrange(100, 160))] for _ in range(rows // 8)]
        for decoder in ("reference", "reference, cuDNN", "graphs", "graphs, no cuDNN", "generate"):
            if decoder in ("generate", "reference, cuDNN") and (name, rows) != ("0.5B", 256):
                continue
            torch.backends.cuda.enable_cudnn_sdp("cuDNN" in decoder or decoder == "generate")
            gpu.Decoder.cudnn = "no cuDNN" not in decoder
            few, many = (4, 8) if DRY else (64, 320) if "graphs" in decoder else (16, 48)
            u = common.uniforms(0, 0, 0, range(rows), many)

            def run(n, model=model, decoder=decoder, prompts=prompts, rows=rows, u=u):
                if decoder == "generate":
                    batch = common.make_batch(prompts, [[0]] * len(prompts), 0, DEVICE)
                    with lm.gathered(model), torch.no_grad(), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        model.generate(
                            input_ids=batch["prompt_ids"].repeat_interleave(8, 0),
                            attention_mask=batch["prompt_mask"].long().repeat_interleave(8, 0),
                            max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0,
                        )  # fmt: skip
                else:
                    with using(decoder.split(",")[0]):
                        lm.generate(model, prompts, samples=8, max_new_tokens=n, noise=u[:, :n], stop_ids=[-1], pad_id=0)

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
            expected = ">= 50,000 at 0.5B and 12,000 at 7B with 256 rows" if "graphs" in decoder else "13-20 ms"
            row("decode", f"{name} {rows} rows, {decoder}", expected, **seen)
        if DEVICE.type == "cuda" and rows == 256:
            with torch.profiler.profile() as profile, using("graphs"):
                lm.generate(model, prompts, samples=8, max_new_tokens=48, noise=u[:, :48], stop_ids=[-1], pad_id=0)
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
        A = torch.zeros_like(z_old).scatter(-1, ids[:, None], advantages[:, None])
        beta = lco.scaled_beta(A, args.beta, args.negative_beta_scale)
        target, logp = lco.target_logprobs(z_old, A, beta, args.target), z.log_softmax(-1)
        return lco.kld_loss(logp, target).sum(), lco.step_sizes(logp.detach(), z_old.log_softmax(-1), target)

    def step(function, mib):
        value, _ = lm.over_vocabulary(function, [(hidden, weight), (old, old_weight)], [ids, advantages], 1.0, mib)
        return torch.autograd.grad(value, [hidden, weight])

    exact = step(loss, 64 if DRY else 1300)[1].double()
    real, lm._fused = lm._fused, lambda fn, weight: fn  # compiled here or not at all
    for kind, function in (("eager", loss), ("compiled", torch.compile(loss, dynamic=True, backend="eager" if DRY else "inductor"))):
        for mib in (64, 256, 1024):
            free()
            with contextlib.suppress(torch.OutOfMemoryError):
                before, seconds = used(), timed(lambda f=function, m=mib: step(f, m), 2)
                error = ((step(function, mib)[1].double() - exact).norm() / exact.norm()).item()
                seen = dict(ms=seconds * 1e3, head_gradient_off=error, GiB_above=peak() - before)
                row("vocabulary", f"LCO-KLD {kind} {mib} MiB", "110-150, 70-100 ms; compiled 35-50", **seen)
    for kind in ("eager", "compiled"):
        lm._fused = real if kind == "compiled" else lambda fn, weight: fn
        free()
        step = lambda: torch.autograd.grad(lm.token_logprobs(hidden, weight, ids)[0].sum(), [hidden, weight])  # noqa: E731
        row("vocabulary", f"token_logprobs {kind}, default chunks", "48 eager", ms=timed(step, 2) * 1e3, GiB=peak())
    total, a, b = torch.zeros(64, 32, device=DEVICE), normal(64, 128), normal(128, 32)
    with contextlib.suppress(TypeError, RuntimeError):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        error = (total - a.float() @ b.float()).abs().max().item()
        row("vocabulary", "addmm of bfloat16 into fp32, in place", "below 1e-4", error=error)


def attention() -> None:
    """Kernels and times of attention: no mask, padding, packed rows."""
    cases = ((8, 1024, None), (8, 1024, "padded"), (1, 4608, "packed"))
    for B, S, mask, cudnn in [(*case, cudnn) for case in cases for cudnn in (True, False)]:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
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
        case = f"{B} x {S}, {mask or 'no mask'}, cuDNN {'on' if cudnn else 'off'}"
        row("attention", case, "a mask: 2-4 x", ms=timed(run) * 1e3, kernels=kernels)


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


# ---- whole runs --------------------------------------------------------------------------------------------------

# Runs a script in its own process, and says at the end how much memory it took. CUDNN=1: with cuDNN's attention in
# training too; STEPS_ALONE=1: nothing is evaluated or saved.
WORKER = """
import os, runpy, sys
sys.argv = sys.argv[1:]
import torch
if os.environ.get("CUDNN") == "1":
    torch.backends.cuda.enable_cudnn_sdp = lambda on: None
if os.environ.get("STEPS_ALONE"):
    import common, lm
    common.save_checkpoint = common.export_model = lambda *given, **more: None
    lm.Sampling.evaluate = lambda *given, **more: ({}, [])
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.cuda.is_available():
    print("PEAK", torch.cuda.max_memory_allocated() / 2**30)
"""


def shell(words: list[str], limit: int = 240, **env) -> tuple[int, str, float]:
    """(exit status, output, seconds) of a script in a process of its own."""
    begin = time.time()
    words = [sys.executable, "-c", WORKER, *map(str, words)] if words[0].endswith(".py") else words
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=os.environ | {"PYTHONPATH": path} | env
        )
        return done.returncode, done.stdout + done.stderr, time.time() - begin
    except subprocess.TimeoutExpired as stop:
        return 124, str(stop.stdout), limit


def together(jobs: dict[str, list[str]], **settings) -> dict[str, tuple]:
    """Runs several scripts at the same time: they check, nothing is timed."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(lambda words: shell(words, **settings), jobs.values())))


def last_error(said: str) -> str:
    return " | ".join([line for line in said.splitlines() if "rror" in line or line.startswith("FAIL")][-2:])[:300]


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scripts() -> None:
    """Every script on this device, in bfloat16: recomputed activations, LoRA, critic and KL, teachers, a reviser."""
    home = Path(tempfile.mkdtemp())
    small = ["--steps", 3, "--prompts_per_step", 8, "--test_rows", 64, "--eval_every", 3, "--dtype", "bfloat16"]
    bare = ["--steps", 3, "--prompts_per_step", 8, "--test_rows", 16, "--dtype", "bfloat16"]
    jobs = {
        "lco": ["lco.py", *small, "--loss", "kld"],
        "lco lch, recomputed": ["lco.py", *small, "--loss", "lch", "--activation_checkpointing", True],
        "lco lch": ["lco.py", *small, "--loss", "lch"],
        "lco, LoRA": ["lco.py", *small, "--lora_rank", 8],
        "lco fp32": ["lco.py", *small[:-1], "float32"],
        "ppo, critic and KL": ["ppo_baseline.py", *small, "--kl_coef", 0.05],
        "qrm": ["qrm.py", "--epochs", 1, "--test_rows", 16, "--dtype", "bfloat16"],
        "dpo": ["dpo.py", *bare],
        "dckd": ["dckd.py", *bare],
        "adpa": ["adpa.py", *bare],
        "adpa, opd": ["adpa.py", *bare, "--objective", "opd", "--refresh_every", 1],
        "seft, reviser": ["seft.py", "--warmup_reviser_steps", 4, "--reviser_steps", 4, *bare[2:]],
        "seft, evolve": ["seft.py", "--stage", "evolve", "--reviser", "builtin", "--rounds", 1, "--unannotated", 32, *bare],
        "evaluate": ["evaluate.py", "--model", "builtin", "--test_rows", 64, "--samples_per_prompt", 4, *bare[6:]],
    }  # fmt: skip
    jobs = {k: [*map(str, v), "--out", str(home / k.replace(" ", "-").replace(",", ""))] for k, v in jobs.items()}
    if DRY and not os.environ.get("EVERY"):
        jobs = {k: jobs[k] for k in ("lco", "evaluate")}
    found = {}
    for name, (code, said, seconds) in together(jobs).items():
        folder = Path(jobs[name][-1])
        found[name] = [] if code or name == "evaluate" else metrics_of(folder)
        seen = {"exit": code, "error": last_error(said) if code else ""}
        seen |= {k: v for line in found[name] for k, v in line.items() if k in ("eval/sampled", "policy/sampler_gap")}
        row("scripts", name, "exit 0, no error", seconds=seconds, **seen)
    if not DRY and found["lco lch"] and found["lco lch, recomputed"]:
        pairs = zip(found["lco lch"], found["lco lch, recomputed"])
        gap = max(abs(a[k] - b[k]) for a, b in pairs for k in a if k[:5] != "time/" and a[k] is not None)
        row("scripts", "recomputed activations", "largest difference near 0", difference=gap)


def checks() -> None:
    """The pre-flight, in fp32 and bfloat16; two ranks on one GPU; learning as on the CPU."""
    home = Path(tempfile.mkdtemp())
    jobs = {
        f"{name} {dtype}": ["check.py", f"{name}.py", "--dtype", dtype]
        for name in ("lco", "ppo_baseline")
        for dtype in ("float32", "bfloat16")
    }
    if DRY:
        jobs = dict(list(jobs.items())[:1])
    else:
        bare = ["--out", str(home / "bare")]
        jobs |= {"bare lco": ["lco.py", *bare], "bare lco fp32": ["lco.py", "--dtype", "float32", "--out", str(home / "fp32")]}
        jobs |= {"bare ppo": ["ppo_baseline.py", "--out", str(home / "ppo")]}
    for name, (code, said, seconds) in together(jobs).items():
        if name.startswith("bare"):
            folder = Path(jobs[name][-1])
            last = {} if code else {k: v for k, v in metrics_of(folder)[-1].items() if k.startswith("eval/")}
            row("checks", name, "greedy .98, sampled .76 (LCO) or .86 (PPO)", exit=code, seconds=seconds, error=last_error(said) if code else "", **last)
        else:
            passed = sum(line.startswith("pass") for line in said.splitlines())
            row("checks", name, "all pass", exit=code, passed=passed, error=last_error(said))


TWO = """
import runpy, sys
import torch.distributed as dist
real = dist.init_process_group
dist.init_process_group = lambda backend, **more: real("gloo", **more)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ranks() -> None:
    """Two ranks share the device through gloo (NCCL refuses that): FSDP2's streams and DTensors, fp32."""
    home = Path(tempfile.mkdtemp())
    words = ["lco.py", "--steps", 3, "--prompts_per_step", 8, "--test_rows", 16, "--eval_every", 3, "--minibatches", 1]
    words = [*map(str, words), "--epochs", "2", "--dtype", "float32", "--device", DEVICE.type, "--out"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    with ThreadPoolExecutor(3) as pool:
        one = pool.submit(shell, [*words, str(home / "1")])
        start = [sys.executable, "-c", TWO, *words, str(home / "2")]
        two = [pool.submit(shell, start, 240, **address, RANK=str(rank)) for rank in (0, 1)]
        codes, said = [f.result()[0] for f in (one, *two)], two[0].result()[1]
    seen = {"exits": codes, "error": last_error(said)}
    if not any(codes):
        pairs = zip(metrics_of(home / "1"), metrics_of(home / "2"))
        gaps = [abs(a[k] - b[k]) / (abs(a[k]) + 1e-2) for a, b in pairs for k in a if k[:5] != "time/" and a[k] is not None]
        seen["largest_relative_difference"] = max(gaps)
    row("ranks", "two ranks on one device", "within 1e-4 of one", **seen)


def random_model(name: str, layers: int | None, home: Path) -> str:
    """A folder with random weights in a real shape, bfloat16, and the tokenizer of the built-in model."""
    folder = home / f"{name}-{layers}"
    with torch.device(DEVICE):
        model = transformers.Qwen2ForCausalLM(config_of(name, layers)).bfloat16()
    tokenizer = lm.load_tokenizer("builtin")
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    free()
    return str(folder)


def work(name: str, layers: int | None, tokens: float, answers: float, lora: bool = False) -> float:
    """FLOP of an update: 6 per weight of the body and token (4 with adapters), 6 per weight of the head and answer."""
    config = config_of(name, layers)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.model.parameters()) - head
    return (4 if lora else 6) * body * tokens + (4 if lora else 6) * head * answers


def update() -> None:
    """Steps of lco.py with random weights: seconds, share of the matmul rate, peak memory against the estimate."""
    home, rate = Path(tempfile.mkdtemp()), peak_rate()
    cases = [  # shape, layers, prompts a step, micro-batch, more arguments
        ("0.5B", None, 64, 64, ["--loss", "kld"]),
        ("1.5B", None, 16, 32, ["--loss", "kld"]),
        ("7B", 8, 8, 16, ["--loss", "kld"]),
    ]
    chosen = os.environ.get("CASES", "")
    for name, layers, prompts, micro, more in cases[:1] if DRY else [c for c in cases if chosen in c[0]]:
        length, prompts = (8, 2) if DRY else (256, prompts)
        model = random_model(name, layers, home)
        out = home / f"run-{name}-{len(list(home.iterdir()))}"
        words = ["lco.py", "--model", model, "--task", "chains", "--steps", 2, "--prompts_per_step", prompts, "--samples_per_prompt", 8]
        words += ["--minibatches", 1, "--micro_batch", micro, "--max_prompt", 32, "--max_new_tokens", length, "--test_rows", 8]
        words += ["--eval_every", 9, "--rollout_rows", 512, "--reward_file", write_reward(home), "--dtype", "bfloat16", "--out", out, *more]
        code, said, seconds = shell(words, STEPS_ALONE="1")
        if code:
            row("update", f"{name} {more[-1]}", "exit 0", exit=code, error=last_error(said))
            continue
        line = metrics_of(out)[-1]
        answers = prompts * 8 * line["length/mean"]
        flop = work(name, layers, answers + prompts * 8 * 8, answers)
        peak_gib = float(said.split("PEAK")[-1].split()[0]) if "PEAK" in said else 0.0
        seen = dict(rollout_s=line["time/rollout"], update_s=line["time/update"], step_s=line["time/step"])
        seen |= dict(share_of_matmul=flop / line["time/update"] / rate, peak_GiB=peak_gib, sampler_gap=line["policy/sampler_gap"])
        case = f"{name}{f', {layers} layers' if layers else ''}, {prompts * 8} x {length} tokens, {more[-1]}"
        row("update", case, "35 % of matmul at 1.5B, 45 % at 7B", **seen)


def write_reward(home: Path) -> Path:
    """A reward that differs within each group, whatever random weights say."""
    file = home / "reward.py"
    file.write_text("def reward(prompts, completions, rows):\n    return [float(len(c) % 2 + i % 2) for i, c in enumerate(completions)]\n")
    return file


GRPO = """
import sys, time
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
model, prompts, length, micro, cpu = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "cpu"
class Clock(TrainerCallback):
    def on_step_begin(self, *given, **more):
        self.begin = time.perf_counter()
    def on_step_end(self, *given, **more):
        print("STEP", time.perf_counter() - self.begin, flush=True)
config = GRPOConfig(output_dir=sys.argv[6], use_cpu=cpu, bf16=not cpu, per_device_train_batch_size=micro,
    gradient_accumulation_steps=prompts * 8 // micro, num_generations=8, max_completion_length=length, max_steps=2,
    beta=0.0, learning_rate=1e-6, report_to="none", save_strategy="no", logging_strategy="no", gradient_checkpointing=False)
rows = Dataset.from_list([{"prompt": f"{i % 90 + 10}+{i % 7}="} for i in range(prompts * 8)])
GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [float(i % 2) for i, _ in enumerate(completions)],
    args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Clock()]).train()
"""


def grpo() -> None:
    """A step of TRL's GRPO with its rollout by transformers, on the same weights and lengths as `update`."""
    home = Path(tempfile.mkdtemp())
    model = random_model("0.5B", None, home)
    prompts, length, micro = (2, 8, 8) if DRY else (64, 256, 64)
    words = [sys.executable, "-c", GRPO, model, prompts, length, micro, DEVICE.type, home / "trl"]
    code, said, seconds = shell([str(w) for w in words], limit=150)
    steps = [float(line.split()[1]) for line in said.splitlines() if line.startswith("STEP")]
    row("grpo", f"TRL GRPO, 0.5B, {prompts * 8} x {length} tokens", ">= 3 x our step", exit=code, steps_s=[round(s, 2) for s in steps],
        error=last_error(said) if code else "")  # fmt: skip


def batch_api() -> None:
    """transformers' continuous batching, a manager sized for the case and warmed up, on the work of `decode`."""
    model, rows, length = qwen("0.5B", trainable=False, dtype="float32").bfloat16().eval(), 256, 8 if DRY else 128
    rows = 4 if DRY else rows
    prompts = [[random.randrange(9, 500) for _ in range(128)] for _ in range(rows)]
    config = transformers.GenerationConfig(do_sample=True, eos_token_id=-1, pad_token_id=0, max_new_tokens=length)
    size = transformers.ContinuousBatchingConfig(num_blocks=2 * rows + 1, max_batch_tokens=max(512, rows * 16))
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=size)
    manager.warmup()
    manager.start()
    deadline, found = time.perf_counter() + 60, []
    for _ in range(2):
        begin, tokens, left = time.perf_counter(), 0, rows
        for prompt in prompts:
            manager.add_request(prompt, max_new_tokens=length)
        while left and time.perf_counter() < deadline:
            result = manager.get_result(timeout=1)
            if result and result.is_finished():
                tokens, left = tokens + len(result.generated_tokens), left - 1
        found.append(tokens / (time.perf_counter() - begin))
    manager.stop(block=False)
    row("batch_api", f"0.5B, {rows} rows, continuous batching", "-", unfinished=left, tokens_per_s=found[-1])


PARTS = [start, sampler, equality, scripts, checks, ranks, noise, determinism, decode, update, grpo, vocabulary, attention]
PARTS += [activations, batch_api]


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

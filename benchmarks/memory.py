"""Peak memory and time of losses over the vocabulary: in chunks, as the scripts run them, against all logits at once.

    python benchmarks/memory.py [--json memory.json]        # a few minutes, 10 GiB of memory
    python benchmarks/memory.py --fits                      # what fits on GPUs of 80 GB: the table of docs/gpu.md

Each case is a process of its own: forward and backward, once, in fp32. `lco-kld` is lco.kld_objective() itself on a
policy whose final hidden states and LM head [V, H] are its parameters; `dckd` and `adpa` are the objectives of these
scripts, with teachers of width 1024, half of the tokens on each side; `logprobs` is lm.token_logprobs(). The peak is the
highest resident memory less that before the call, so it includes the gradients; s are CPU seconds, which other work on
the machine still stretches. "once" is the same code with one chunk.
Leaves with 1 when a chunked peak is more than a quarter of the dense one or a gradient differs by more than 1e-5.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("lco-kld", "logprobs", "dckd", "adpa")
CHUNKS = {"chunks": None, "once": 2**20}  # None: the scripts' own chunk size; in MiB
TEACHER_WIDTH = 1024


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far), in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(loss: str, chunk_mib: int | None, tokens: int, vocabulary: int, width: int, out: Path) -> None:
    """One case in this process; peak, seconds, value and gradients go to `out`."""
    sys.path.insert(0, str(ROOT))
    import common  # before torch: it sets how OpenMP threads wait
    import lm
    import adpa
    import dckd
    import lco

    import torch

    class FixedStates(torch.nn.Module):
        """A model that has read its answers already; with `rows`, it is evaluated on some of them alone."""

        pack_limit = 0  # rows are read one by one

        def __init__(self, hidden, weight, rows=slice(None), trained=False):
            super().__init__()
            self.hidden, self.weight = (torch.nn.Parameter(x, requires_grad=trained) for x in (hidden, weight))
            self.rows = rows

        def final_hidden(self, input_ids, attention_mask, position_ids):
            return self.hidden[self.rows]

        def get_output_embeddings(self):
            return self

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    B = 8
    T = tokens // B
    old_hidden, weight = torch.randn(B, T + 1, width), torch.randn(vocabulary, width) * 2 / width**0.5
    moved = old_hidden + 0.1 * torch.randn(B, T + 1, width), weight + 0.01 * torch.randn(vocabulary, width)
    policy = FixedStates(*moved, trained=True)
    micro = common.make_batch([[0]] * B, torch.randint(vocabulary, (B, T)).tolist(), 0, "cpu")
    micro |= {"old_hidden": old_hidden[:, :T], "advantages": torch.randn(B, T)}
    models = torch.nn.ModuleDict({"policy": policy})
    script, second = {"dckd": (dckd, "rejected"), "adpa": (adpa, "states")}.get(loss, (None, None))
    if script:
        chosen = torch.arange(B) % 2 == 0
        micro |= {"chosen": chosen, second: ~chosen}
        rows = slice(1, None, 2) if loss == "adpa" else slice(None)
        models["ref"] = FixedStates(old_hidden, weight, rows)
        for name in ("teacher", "ref_teacher")[: 2 if loss == "adpa" else 1]:
            head = torch.randn(vocabulary, TEACHER_WIDTH) * 2 / TEACHER_WIDTH**0.5
            models[name] = FixedStates(torch.randn(B, T + 1, TEACHER_WIDTH), head, rows)
    if chunk_mib:
        for name in ("over_vocabulary", "token_logprobs"):
            setattr(lm, name, partial(getattr(lm, name), chunk_mib=chunk_mib))

    before, start = resident("VmRSS"), time.process_time()
    if loss == "lco-kld":
        micro["beta"] = lco.scaled_beta(micro["advantages"], 1.0, 100.0)
        value, _ = lco.kld_objective(policy, {"old": weight}, micro, lco.Args())
    elif script:
        args = script.Args()
        value, _ = script.objective(models, micro, {"chosen": 1.0, second: 1.0}, args)
    else:
        chosen = lm.completion_hidden(policy, micro)[micro["mask"]]
        logprobs, _ = lm.token_logprobs(chosen, policy.weight, micro["completion_ids"][micro["mask"]])
        value = -(logprobs * micro["advantages"][micro["mask"]]).sum()
    (value / tokens).backward()
    seconds, peak = time.process_time() - start, resident("VmHWM") - before
    gradients = {"hidden": policy.hidden.grad, "W": policy.weight.grad}
    torch.save({"peak": peak, "seconds": seconds, "loss": value.item() / tokens, "gradients": gradients}, out)


def compare(tokens: int, vocabulary: int, width: int, only: str = "") -> list[dict]:
    """One row a loss, each measured with and without chunks."""
    import torch

    rows = []
    for loss in (x for x in LOSSES if only in x):
        with tempfile.TemporaryDirectory() as folder:
            cases = {}
            for name in CHUNKS:
                out = Path(folder) / name
                sizes = [f"--tokens={tokens}", f"--vocabulary={vocabulary}", f"--width={width}"]
                command = [sys.executable, __file__, *sizes, "--case", loss, name, str(out)]
                subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
                cases[name] = torch.load(out, weights_only=True)
        row = {"loss": loss, "N": tokens, "V": vocabulary, "H": width}
        for name, case in cases.items():
            row |= {f"{name}_mib": round(case["peak"] / 2**20), f"{name}_s": round(case["seconds"], 1)}
        for key in ("hidden", "W"):
            a, b = (cases[name]["gradients"][key] for name in ("chunks", "once"))
            row[f"error_{key}"] = ((a - b).norm() / b.norm()).item()
        row["error_loss"] = abs(cases["chunks"]["loss"] / cases["once"]["loss"] - 1)
        row["ratio"] = round(row["chunks_mib"] / row["once_mib"], 3)
        rows.append(row)
    return rows


# Shapes of Qwen2.5: width, inner width, layers, heads, heads of keys and values, tied embeddings.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
    "72B": (8192, 29568, 80, 64, 8, False),
}
GPUS, LIMIT = (1, 2, 4, 8), 80e9 * 0.95  # the rest is CUDA's own and NCCL's


def fits() -> list[str]:
    """Lines of a table: the peak of a GPU in GB for each model and number of GPUs, bfloat16, the scripts' defaults."""
    sys.path.insert(0, str(ROOT))
    import gpu
    import lco

    import torch
    from peft import LoraConfig
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

    args = lco.Args()
    rows = args.prompts_per_step * args.samples_per_prompt
    sizes = dict(micro_batch=args.micro_batch, rollout_rows=args.rollout_rows, new_tokens=args.max_new_tokens)
    sizes |= dict(tokens=args.max_prompt + args.max_new_tokens, dtype="bfloat16", chunk_mib=256)

    def build(cls, shape, kind: str):
        width, inner, layers, heads, kv, tied = shape
        config = Qwen2Config(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_labels=1)
        config.num_attention_heads, config.num_key_value_heads = heads, kv
        config.vocab_size, config.tie_word_embeddings = 152064 if width > 2048 else 151936, tied
        with torch.device("meta"):
            model = cls(config)
            if kind == "LoRA":
                model.requires_grad_(False)
                names = [n for n, m in model.model.named_modules(prefix="model") if type(m) is torch.nn.Linear]
                model.add_adapter(LoraConfig(r=16, target_modules=names))
        if kind != "full":  # LoRA of a large model is used with recomputation too
            model.gradient_checkpointing_enable()
        return model

    header = [f"{n} GPU{'s' * (n > 1)}" for n in GPUS]
    lines = ["| model | what is trained | " + " | ".join(header) + " |", "|---|---|" + "---|" * len(GPUS)]
    for name, shape in SHAPES.items():
        for kind in ("full", "full, recomputed", "full + critic, recomputed", "LoRA"):
            models = {"policy": build(Qwen2ForCausalLM, shape, kind)}
            if "critic" in kind:
                models["critic"] = build(Qwen2ForTokenClassification, shape, kind)
            cells = []
            for n in GPUS:
                peak = gpu.peak_memory(gpu.memory_parts(models, shards=n, rows=rows // n, **sizes))
                cells.append(f"{peak / 1e9:.0f}" if peak < LIMIT else f"({peak / 1e9:.0f})")
            kind = kind.replace("LoRA", "LoRA of rank 16, recomputed")
            lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="N, a multiple of 8")
    parser.add_argument("--vocabulary", type=int, default=49152, help="V")
    parser.add_argument("--width", type=int, default=576, help="H")
    parser.add_argument("--only", default="", help="only losses whose name contains this")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--case", nargs=3, metavar=("LOSS", "CHUNKS", "OUT"), help="measure one case in this process")
    parser.add_argument("--fits", action="store_true", help="print what fits on GPUs of 80 GB, as computed")
    args = parser.parse_args()
    if args.fits:
        print(*fits(), sep="\n")
        return
    if args.case:
        loss, chunks, out = args.case
        measure(loss, CHUNKS[chunks], args.tokens, args.vocabulary, args.width, Path(out))
        return
    rows = compare(args.tokens, args.vocabulary, args.width, args.only)
    print(f"N={args.tokens} V={args.vocabulary} H={args.width} fp32; peak above the inputs, gradients included; CPU s")
    print("| loss | chunks: MiB / s | once: MiB / s | ratio | gradient error in hidden, W | in the loss |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        peaks = f"{r['chunks_mib']} / {r['chunks_s']} | {r['once_mib']} / {r['once_s']} | {r['ratio']}"
        print(f"| {r['loss']} | {peaks} | {r['error_hidden']:.1e}, {r['error_W']:.1e} | {r['error_loss']:.1e} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    bad = [r["loss"] for r in rows if r["ratio"] > 0.25 or max(r["error_hidden"], r["error_W"]) > 1e-5]
    if bad:
        sys.exit(f"more than a quarter of the memory, or another gradient: {', '.join(bad)}")


if __name__ == "__main__":
    main()

"""One side of a comparison: a process that does one step each time benchmarks/speed.py sends it a line.

Its first line is a JSON object that says what to set up; each later line starts a step, and each step is answered by
one line with its seconds, CPU seconds, tokens and memory. So two sides can stay loaded and take turns, in environments
of their own. Ours are the scripts themselves, stopped between two steps where they log; TRL's trainers are stopped by a
callback at the same place. Lengths of completions are imposed on both sides in the same way: EOS is banned before the
planned end of a row, and forced there.
"""

import contextlib
import ctypes
import json
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FOREVER = 10**6  # steps; the driver says when it is over
END = 2.0  # where the noise of a token would be: this token ends the row


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest since the last step began), in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def in_use() -> int:
    """VmRSS less what the C heap holds and nobody uses: some of it goes back to the system, some waits for a step."""

    class Mallinfo2(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return resident("VmRSS") - mallinfo2().fordblks


class Gate:
    """Where a worker waits between two steps. Called at the end of each with what is known of it."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed goes to the log
        self.laps, self.tokens, self.started = {}, {}, None

    def read(self) -> dict:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        return json.loads(line)

    def __call__(self, **more) -> dict:
        """Answer, wait for the next line, start the clocks; returns that line."""
        now, cpu = time.perf_counter(), time.process_time()
        if self.started:
            said = {"seconds": now - self.started[0], "cpu": cpu - self.started[1], "laps": self.laps}
            said |= {"peak": resident("VmHWM"), "held": self.held, "tokens": self.tokens} | more
        else:
            packages = ("torch", "transformers", "trl", "numpy")
            versions = {name: metadata.version(name) for name in packages if has(name)}
            said = {"ready": versions | {"python": platform.python_version()}}
        print(json.dumps(said), file=self.answers, flush=True)
        order = self.read()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        self.laps, self.tokens, self.held = {}, {}, in_use()
        self.started = time.perf_counter(), time.process_time()
        return order

    @contextlib.contextmanager
    def lap(self, name: str):
        start = time.perf_counter()
        yield
        self.laps[name] = self.laps.get(name, 0.0) + time.perf_counter() - start

    def count(self, **tokens) -> None:
        for name, n in tokens.items():
            self.tokens[name] = self.tokens.get(name, 0) + int(n)


def has(package: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(package))
    return False


# ---- this project ----------------------------------------------------------------------------------------------------


class Lengths:
    """Row i of a rollout ends after plan[i] tokens. The plan travels in the noise, which follows a row everywhere."""

    def __init__(self, plan: list[int]):
        import lm

        self.plan, self.greedy, self.stops = plan, False, []
        self.uniforms, self.pick, self.stop_ids = lm.uniforms, lm._pick, lm.stop_ids
        lm.uniforms, lm._pick, lm.stop_ids = self.planned, self.forced, self.remembered

    def planned(self, seed, stream, step, rows, columns):
        noise = self.uniforms(seed, stream, step, rows, columns)
        for i, row in enumerate(rows):
            noise[i, self.plan[row % len(self.plan)] - 1] = END
        return noise

    def forced(self, logits, temperature, u):
        if u is None:
            return self.pick(logits, temperature, None)
        logits[:, self.stops] = -float("inf")
        token, logprob = self.pick(logits, temperature, None if self.greedy else u % END)
        return token.masked_fill(u == END, self.stops[0]), logprob

    def remembered(self, model, tokenizer):
        self.stops = self.stop_ids(model, tokenizer)
        return self.stops


def script(spec: dict, gate: Gate) -> None:
    """A script of this project in its own main loop; it waits where it would log a step."""
    sys.path.insert(0, str(ROOT))
    import importlib

    import common  # before torch: it sets how OpenMP threads wait
    import lm

    module = importlib.import_module(spec["script"])
    folder = Path(tempfile.mkdtemp())
    if "prompts" in spec:
        rows = [{"prompt": prompt} for prompt in [*spec["prompts"], spec["held_out"]]]
        (folder / "reward.py").write_text(
            "def reward(prompts, completions, rows):\n    return [float(len(set(c))) for c in completions]\n"
        )
        files = {"reward_file": str(folder / "reward.py"), "task": "prompts"}
    else:
        rows, files = spec["pairs"], {}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {spec.get("data_argument", "dataset"): str(folder / "rows.jsonl")}
    args = module.Args(**(files | data | spec["arguments"]), out=str(folder / "run"))
    Lengths(spec.get("lengths") or [args.max_new_tokens])

    evaluating = "score" if hasattr(module, "score") else "evaluate_models"
    generate, score, update = lm.generate, getattr(module, evaluating, None), getattr(module, "update", None)

    def timed_generate(model, prompt_ids, *, samples=1, **settings):
        with gate.lap("rollout"):
            done = generate(model, prompt_ids, samples=samples, **settings)
        new = sum(map(len, done))
        gate.count(new=new, all=new + samples * sum(map(len, prompt_ids)))
        return done

    def timed_score(*given):
        with gate.lap("score"):
            return score(*given)

    def timed_update(*given, **options):
        with gate.lap("update"):
            return update(*given, **options)

    def counted(make):
        def made(*given):
            batch = make(*given)
            gate.count(new=batch["mask"].sum(), all=batch["mask"].sum() + batch["prompt_mask"].sum())
            return batch

        return made

    lm.generate = timed_generate
    if spec["script"] == "qrm":
        module.make_batch = counted(module.make_batch)
    else:
        setattr(module, evaluating, timed_score)
        module.update = timed_update
        if "prompts" not in spec:
            module.make_batch = counted(module.make_batch)
        if spec["script"] == "adpa":  # off-policy: all sides read the answers of the data
            of_data = lambda row: row.update(states_ids=row["rejected_ids"])  # noqa: E731
            module.answer_prompts = lambda sampling, pairs, *_: list(map(of_data, pairs))
    common.RunFolder.log = lambda self, step, metrics: gate()
    common.launch(lambda: getattr(module, spec.get("function", "train"))(args), "cpu")


def rollout(spec: dict, gate: Gate) -> None:
    """lm.generate() alone, one case a line."""
    sys.path.insert(0, str(ROOT))
    import common
    import lm

    def run():
        model = lm.load_model(spec["model"], device=common.local_device("cpu"), trainable=False)
        tokenizer = lm.load_tokenizer(spec["model"])
        lengths, order = Lengths([1]), gate()
        while True:
            lengths.plan, lengths.greedy = order["lengths"], order["greedy"]
            prompts = [common.encode_prompt(tokenizer, prompt) for prompt in order["prompts"]]
            done = lm.generate(
                model,
                prompts,
                max_new_tokens=max(lengths.plan),
                noise=lm.uniforms(0, common.TRAIN, 0, range(len(prompts)), max(lengths.plan)),
                stop_ids=lm.stop_ids(model, tokenizer),
                pad_id=tokenizer.pad_token_id,
            )
            gate.count(new=sum(map(len, done)), all=sum(map(len, done)) + sum(map(len, prompts)))
            order = gate(completions=[row[:-1] for row in done] if order["greedy"] else None)

    common.launch(run, "cpu")


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def load(spec: dict, name: str = "AutoModelForCausalLM", **options):
    import torch
    import transformers

    cls = getattr(transformers, name)
    return cls.from_pretrained(spec["model"], dtype=torch.float32, **options)


def load_tokenizer(spec: dict):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # some trainers tell padding by its id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def stop_ids(model, tokenizer) -> list[int]:
    extra = model.generation_config.eos_token_id
    extra = [] if extra is None else extra if isinstance(extra, list) else [extra]
    return sorted({tokenizer.eos_token_id, *extra})


def ends_at(lengths: list[int], prompt: int, stops: list[int]):
    """A logits processor: EOS is banned before the planned end of a row, and forced there."""
    import torch
    from transformers import LogitsProcessorList

    plan = torch.tensor(lengths)

    def force(ids, scores):
        scores[:, stops] = -torch.inf
        last = plan[: len(ids)] == ids.shape[1] - prompt + 1
        if last.any():
            scores[last] = -torch.inf
            scores[last, stops[0]] = 0.0
        return scores

    return LogitsProcessorList([force])


def time_generation(model, tokenizer, lengths: list[int], gate: Gate) -> None:
    """model.generate() with planned lengths, timed and counted."""
    generate, stops = model.generate, stop_ids(model, tokenizer)

    def timed(input_ids, attention_mask, **options):
        plan = [lengths[i % len(lengths)] for i in range(len(input_ids))]
        with gate.lap("rollout"):
            out = generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=ends_at(plan, input_ids.shape[1], stops),
                **options,
            )
        gate.count(new=sum(plan), all=sum(plan) + attention_mask.sum())
        return out

    model.generate = timed


def hugging_face(spec: dict, gate: Gate) -> None:
    """model.generate() with a dynamic or a static cache, or continuous batching; one case a line."""
    import torch
    from transformers import GenerationConfig

    model, tokenizer = load(spec).eval(), load_tokenizer(spec)
    tokenizer.padding_side = "left"
    stops, order, managers = stop_ids(model, tokenizer), gate(), {}
    while True:
        plan, longest, method = order["lengths"], max(order["lengths"]), order["method"]
        prompts = tokenizer(order["prompts"])["input_ids"]
        shared = dict(max_new_tokens=longest, do_sample=not order["greedy"], pad_token_id=tokenizer.pad_token_id)
        if not order["greedy"]:
            shared |= dict(temperature=1.0, top_k=0, top_p=1.0)
        with torch.no_grad():
            if method == "generate_batch":
                manager = manager_of(managers, model, prompts, plan, GenerationConfig(**shared), stops)
                done = in_requests(manager, prompts, plan)
            else:
                config = GenerationConfig(**shared, eos_token_id=stops, disable_compile=True)
                config.cache_implementation = "static" if method == "static" else None
                inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
                width = inputs["input_ids"].shape[1]
                force = ends_at(plan, width, stops)
                out = model.generate(**inputs, generation_config=config, logits_processor=force)
                done = [row[width : width + n].tolist() for row, n in zip(out, plan)]
        gate.count(new=sum(map(len, done)), all=sum(map(len, done)) + sum(map(len, prompts)))
        order = gate(completions=[row[:-1] for row in done] if order["greedy"] else None)


def manager_of(managers: dict, model, prompts, plan, config, stops):
    """What generate_batch() starts anew for each call (17 s on a CPU): here it is sized for a case and kept for it."""
    from transformers import ContinuousBatchingConfig

    key = len(prompts), tuple(plan), config.do_sample
    if key not in managers:
        for old in managers.values():
            old.stop(block=True)
            old.destroy()
        managers.clear()
        config.eos_token_id = -1  # each request has a limit instead, and the stop tokens are banned
        config.sequence_bias = {(stop,): -1e9 for stop in stops}
        pages = sum(-(-(len(prompt) + n) // 256) for prompt, n in zip(prompts, plan))
        size = ContinuousBatchingConfig(num_blocks=pages + 1, max_batch_tokens=max(64, sum(map(len, prompts))))
        managers[key] = model.init_continuous_batching(generation_config=config, continuous_batching_config=size)
        managers[key].warmup()
        managers[key].start()
    return managers[key]


def in_requests(manager, prompts, plan) -> list[list[int]]:
    names = {manager.add_request(prompt, max_new_tokens=n): i for i, (prompt, n) in enumerate(zip(prompts, plan))}
    done = {}
    while len(done) < len(names):
        result = manager.get_result(timeout=1)
        if result and result.is_finished():
            done[names[result.request_id]] = list(result.generated_tokens)
        elif not result and not manager.is_running():
            raise RuntimeError("continuous batching ended early")
    return [done[i] for i in range(len(prompts))]


# ---- TRL -------------------------------------------------------------------------------------------------------------


def training(spec: dict, rows: int, micro: int) -> dict:
    """What all trainers are given: fp32 on the CPU, one optimizer step of `rows` in pieces of `micro`, no extras."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        max_steps=FOREVER,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def step_callback(gate: Gate):
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, *given, **more):
            gate()

        def on_step_end(self, *given, **more):
            gate()

    return Steps()


def many(rows: list[dict], times: int = 50):
    """A dataset in which the same step comes again and again, so that no epoch ends during a measurement."""
    from datasets import Dataset

    return Dataset.from_list(rows * times)


def in_order(cls):
    """A trainer whose rows come as they are, already as token ids."""
    from torch.utils.data import SequentialSampler

    class InOrder(cls):
        def _prepare_dataset(self, dataset, *given, **more):
            return dataset

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    return InOrder


def count_inputs(trainer, gate: Gate) -> None:
    compute_loss = trainer.compute_loss

    def counted(model, inputs, *given, **more):
        gate.count(all=inputs["attention_mask"].sum())
        return compute_loss(model, inputs, *given, **more)

    trainer.compute_loss = counted


def encode_pairs(spec: dict, tokenizer) -> list[dict]:
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]  # noqa: E731
    return [
        {
            "prompt_ids": tokenizer(row["prompt"])["input_ids"],
            "chosen_ids": encode(row["chosen"]),
            "rejected_ids": encode(row["rejected"]),
        }
        for row in spec["pairs"][: spec["count"]]
    ]


def grpo(spec: dict, gate: Gate) -> None:
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(spec), load_tokenizer(spec)
    time_generation(model, tokenizer, spec["lengths"], gate)
    rows = len(spec["prompts"]) * spec["samples"]
    config = GRPOConfig(
        **training(spec, rows, spec["micro_batch"]),
        num_generations=spec["samples"],
        max_completion_length=max(spec["lengths"]),
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,
    )
    GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=config,
        train_dataset=many([{"prompt": prompt} for prompt in spec["prompts"]]),
        processing_class=tokenizer,
        callbacks=[step_callback(gate)],
    ).train()


def ppo(spec: dict, gate: Gate) -> None:
    """The last release with a PPO trainer. Its reward model is one that costs nothing, for ours is a function."""
    from types import SimpleNamespace

    import torch
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class NoBody(torch.nn.Module):
        def forward(self, input_ids, **_):
            return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])

    class NoReward(torch.nn.Module):
        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.score = NoBody(), torch.nn.Linear(1, 1)

    model, tokenizer = load(spec), load_tokenizer(spec)
    tokenizer.padding_side = "left"
    time_generation(model, tokenizer, spec["lengths"], gate)
    rows = len(spec["prompts"]) * spec["samples"]
    arguments = training(spec, rows, spec["micro_batch"])
    del arguments["max_steps"]
    config = PPOConfig(
        **arguments,
        total_episodes=rows * FOREVER,
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        local_rollout_forward_batch_size=rows,
        response_length=max(spec["lengths"]),
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        lam=0.95,
    )
    ids = [{"input_ids": ids} for ids in tokenizer(spec["prompts"])["input_ids"] for _ in range(spec["samples"])]
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=model,
        ref_model=load(spec),
        reward_model=NoReward(),
        value_model=load(spec, "AutoModelForSequenceClassification", num_labels=1),
        train_dataset=many(ids),
        callbacks=[step_callback(gate)],
    ).train()


def gkd(spec: dict, gate: Gate) -> None:
    """Off-policy (lmbda 0) with the forward KL (beta 0), on both answers of each pair."""
    import torch
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = load_tokenizer(spec)
    pairs = encode_pairs(spec, tokenizer)
    rows = [{"prompt_ids": p["prompt_ids"], "answer_ids": p[k]} for p in pairs for k in ("chosen_ids", "rejected_ids")]

    def collate(examples):
        ids = [e["prompt_ids"] + e["answer_ids"] for e in examples]
        width = max(map(len, ids))
        fill = lambda row, value: row + [value] * (width - len(row))  # noqa: E731
        columns = {
            "input_ids": [fill(row, tokenizer.pad_token_id) for row in ids],
            "attention_mask": [fill([1] * len(row), 0) for row in ids],
            "labels": [fill([-100] * len(e["prompt_ids"]) + e["answer_ids"], -100) for e in examples],
        }
        return {name: torch.tensor(column) for name, column in columns.items()}

    arguments = training(spec, len(rows), spec["micro_batch"])
    arguments["gradient_checkpointing"] = spec.get("checkpointing", False)
    trainer = in_order(GKDTrainer)(
        model=load(spec),
        teacher_model=load(spec | {"model": spec["teacher"]}),
        args=GKDConfig(**arguments, lmbda=0.0, beta=0.0, temperature=1.0),
        data_collator=collate,
        train_dataset=many(rows),
        processing_class=tokenizer,
        callbacks=[step_callback(gate)],
    )
    count_inputs(trainer, gate)
    trainer.train()


def dpo(spec: dict, gate: Gate) -> None:
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(spec)
    rows = encode_pairs(spec, tokenizer)
    trainer = in_order(DPOTrainer)(
        model=load(spec),
        ref_model=load(spec),
        args=DPOConfig(**training(spec, len(rows), spec["micro_batch"] // 2), beta=0.1, max_length=None),
        train_dataset=many(rows),
        processing_class=tokenizer,
        callbacks=[step_callback(gate)],
    )
    count_inputs(trainer, gate)
    trainer.train()


def reward(spec: dict, gate: Gate) -> None:
    from trl import RewardConfig, RewardTrainer

    tokenizer = load_tokenizer(spec)
    rows = [
        {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
        for row in encode_pairs(spec, tokenizer)
    ]
    trainer = in_order(RewardTrainer)(
        model=load(spec, "AutoModelForSequenceClassification", num_labels=1, pad_token_id=tokenizer.pad_token_id),
        args=RewardConfig(**training(spec, len(rows), spec["micro_batch"] // 2), max_length=None),
        train_dataset=many(rows),
        processing_class=tokenizer,
        callbacks=[step_callback(gate)],
    )
    count_inputs(trainer, gate)
    trainer.train()


# ---- this machine's limits -------------------------------------------------------------------------------------------


def checkpointed(fn, heads, columns, rows: int):
    """The sum of fn over chunks of tokens, whose logits are computed again in the backward pass."""
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    def piece(*tensors):
        return fn(*(F.linear(h, w) for h, (_, w) in zip(tensors, heads)), *tensors[len(heads) :])[0]

    tensors = [h for h, _ in heads] + columns
    cuts = ([x[i : i + rows] for x in tensors] for i in range(0, len(tensors[0]), rows))
    return sum(checkpoint(piece, *cut, use_reentrant=False) for cut in cuts)


def vocabulary(spec: dict, gate: Gate) -> None:
    """Forward and backward of a loss over [N, V] logits, in one of several ways."""
    sys.path.insert(0, str(ROOT))
    import lm

    import torch
    import torch.nn.functional as F

    N, V, H, mode = spec["N"], spec["V"], spec["H"], spec["mode"]
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) * 2 / H**0.5).requires_grad_()
    ids, factor = torch.randint(V, (N,)), torch.randn(N)

    def logprobs(logits, ids, factor):
        logp = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum()  # which every script logs
        return -(logp.gather(-1, ids[:, None])[:, 0] * factor).sum(), entropy

    def distance(logits, teacher_logits):
        said = teacher_logits.log_softmax(-1)
        return (said.exp() * (said - logits.log_softmax(-1))).sum(), {}

    heads, fn, columns = [(hidden, weight)], logprobs, [ids, factor]
    if spec["loss"] == "KL":
        heads, fn, columns = [*heads, (torch.randn(N, H), torch.randn(V, H) * 2 / H**0.5)], distance, []
    gate()
    while True:
        hidden.grad = weight.grad = None
        if mode == "dense":
            loss, _ = fn(*(F.linear(h, w) for h, w in heads), *columns)
        elif mode == "checkpointed":
            loss = checkpointed(fn, heads, columns, rows=max(1, 64 * 2**20 // (4 * V)))
        elif mode == "over_vocabulary":
            loss, _ = lm.over_vocabulary(fn, heads, columns)
        else:
            loss = -(lm.token_logprobs(hidden, weight, ids)[0] * factor).sum()
        loss.backward()
        gate.count(all=N)
        sums = [x.double().norm().item() for x in (hidden.grad, weight.grad)]
        gate(values=[loss.item(), *sums])


def bare_policy(lm, config=None, name=None):
    """A policy alone: a model of the project, or one with random weights of this shape."""
    import functools

    import torch

    if name:
        return lm.load_model(name, device=torch.device("cpu"))
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    heads = config["H"] // 32
    shape = dict(hidden_size=config["H"], intermediate_size=2 * config["H"], num_hidden_layers=config["layers"])
    shape |= dict(num_attention_heads=heads, num_key_value_heads=heads, vocab_size=config["V"])
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, max_position_embeddings=4096))
    model.final_hidden = functools.partial(lm._final_hidden, model)
    return model


def random_batch(common, model, rows: int, prompt: int, new: int):
    import torch

    ids = torch.randint(3, model.config.vocab_size, (rows, prompt + new)).tolist()
    batch = common.make_batch([x[:prompt] for x in ids], [x[prompt:] for x in ids], 0, "cpu")
    zeros = torch.zeros(rows, new)
    return batch | {"old_logprobs": zeros, "advantages": torch.randn(rows, new), "ref_logprobs": zeros}


def probe(spec: dict, gate: Gate) -> None:
    """What an order asks for: `mm` and `read` of the machine, `update` and `decode` of a model of some size."""
    sys.path.insert(0, str(ROOT))
    import common
    import lm
    import cpu
    import ppo_baseline

    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DynamicCache

    if not spec.get("keep", True):
        cpu.keep_freed_memory = lambda: None
    args = ppo_baseline.Args(advantage="group", micro_batch=spec.get("micro_batch", 8))
    built = {}

    def model_of(order):
        key = json.dumps(order.get("config") or spec["model"], sort_keys=True)
        if key not in built:
            built.clear()
            policy = bare_policy(lm, order.get("config"), spec.get("model"))
            models = torch.nn.ModuleDict({"policy": policy})
            built[key] = models, torch.optim.Adam(models.parameters(), lr=1e-9)
        return built[key]

    def mm(order):
        m, k, n = order["shape"]
        a, b = torch.randn(m, k), torch.randn(k, n)
        with gate.lap("mm"):
            for _ in range(order["times"]):
                a @ b
        return {"flops": 2.0 * m * k * n * order["times"]}

    def read(order):
        x = torch.ones(order["rows"], 1024)
        with gate.lap("read"):
            for _ in range(order["times"]):
                x.sum()
        return {"bytes": 4.0 * x.numel() * order["times"]}

    def update(order):
        models, optimizer = model_of(order)
        batch = random_batch(common, models["policy"], order["rows"], order["prompt"], order["new"])
        step = lambda: ppo_baseline.update(  # noqa: E731
            models, optimizer, batch, list(range(order["rows"])), args, train_policy=True
        )
        more = {}
        if order.get("count"):
            with FlopCounterMode(display=False) as counter:
                step()
            more["flops"] = float(counter.get_total_flops())
        with gate.lap("update"):
            step()
        gate.count(all=order["rows"] * (order["prompt"] + order["new"]))
        return more

    def decode(order):
        policy = model_of(order)[0]["policy"]
        prompts = random_batch(common, policy, order["rows"], order["prompt"], 1)["prompt_ids"].tolist()
        limits = dict(max_new_tokens=order["new"], stop_ids=[policy.config.vocab_size], pad_id=0, rows_at_once=FOREVER)
        forward, without = policy.forward, order.get("without")

        def timed(*given, **more):
            with gate.lap("model"):
                return forward(*given, **more)

        nothing = lambda *_: contextlib.nullcontext()  # noqa: E731
        plain = {"roomy_cache": lambda config: DynamicCache(config=config)}.get(without, nothing)
        with mock.patch.object(cpu, without, plain) if without else nothing():
            with gate.lap("pack"), cpu.packed(policy):
                pass
            with gate.lap("prefill"):
                lm.generate(policy, prompts, **limits | {"max_new_tokens": 1})
            noise = common.uniforms(0, common.TRAIN, 0, range(order["rows"]), order["new"])
            with gate.lap("decode"):
                lm.generate(policy, prompts, noise=noise, **limits)
            policy.forward = timed  # a second time: what is not spent in the model is our own
            with gate.lap("decode and model"):
                lm.generate(policy, prompts, noise=noise, **limits)
        policy.forward = forward
        gate.count(new=order["rows"] * order["new"])
        return {"parameters": sum(p.numel() for p in policy.parameters())}

    def adam(order):
        parameters = list(model_of(order)[0].parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-9, fused=order["fused"])
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes its state
        with gate.lap("adam"):
            optimizer.step()
        for p in parameters:
            p.grad = None
        return {}

    def run():
        order = gate()
        while True:
            done = {}
            for name in order["do"]:
                done |= {"mm": mm, "read": read, "update": update, "decode": decode, "adam": adam}[name](order)
            order = gate(**done)

    common.launch(run, "cpu")


def main() -> None:
    gate = Gate()
    spec = gate.read()
    sides = (script, rollout, hugging_face, grpo, ppo, gkd, dpo, reward, vocabulary, probe)
    {side.__name__: side for side in sides}[spec["side"]](spec, gate)


if __name__ == "__main__":
    main()

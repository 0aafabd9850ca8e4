"""Is a script right with this model and these data? To be run before a long training; nothing is kept.

    python check.py lco.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    torchrun --nproc_per_node=8 check.py ppo_baseline.py --model ...

The arguments are those of the script. It runs for two steps on a few rows, with all of its own code: what its update()
is given is examined before the first step, what it logs and saves afterwards. The first check that fails ends the
program with 1.
"""

import contextlib
import importlib
import inspect
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import common  # before torch: it sets how threads wait
import lm
import gpu

import torch
import torch.nn.functional as F

# Less to do. Two epochs: with a single update per rollout pi_old would not be evaluated, and nothing compared with it.
LESS = dict(
    steps=2, warmup_reviser_steps=2, reviser_steps=2, epochs=2, minibatches=1, rounds=2, micro_batch=8,
    test_rows=4, test_pairs=2, builtin_pairs=64, warmup_steps=0, external_rounds=0, pair_share=0.0, keep_threshold="0",
    wandb=False, resume=False,
)  # fmt: skip


class Checks:
    """Runs a script with spies in the place of some functions: they call the real ones and look at what goes by."""

    def __init__(self, module, args):
        self.module, self.args = module, args
        self.tight = 0.1 if args.dtype == "bfloat16" else 1e-4
        self.looking, self.answers, self.sampled, self.rollout, self.told = False, {}, set(), None, set()
        self.gap = None
        self.screen, self.complete, self.sampler_gap = sys.stdout, lm.Sampling.complete, lm.sampler_gap
        names = ("train", "update", "judge", "revise")
        self.real = {name: getattr(module, name) for name in names if hasattr(module, name)}
        self.token_scores = lm.token_scores

    def run(self) -> None:
        """The whole script, in a folder that is thrown away."""
        world, home = common.world(), Path(common.from_rank_0(tempfile.mkdtemp() if common.rank() == 0 else None))
        less = LESS | dict(prompts_per_step=4 * world, pairs_per_step=4 * world, unannotated=16 * world)
        less |= dict(samples_per_prompt=4, max_new_tokens=min(self.args.max_new_tokens, 32), out=str(home / "run"))
        if "train" not in self.real:  # evaluate.py
            less = {name: less[name] for name in ("micro_batch", "out")}
        small = replace(self.args, **{name: value for name, value in less.items() if hasattr(self.args, name)})
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, home, ignore_errors=True)
            stack.callback(common.dist.barrier)
            for name in self.real:
                stack.enter_context(mock.patch.object(self.module, name, getattr(self, name)))
            stack.enter_context(mock.patch.object(common, "make_batch", self.make_batch(common.make_batch)))
            complete = lambda *given, **more: self.spied_complete(*given, **more)  # noqa: E731
            stack.enter_context(mock.patch.object(lm.Sampling, "complete", complete))
            stack.enter_context(mock.patch.object(lm, "sampler_gap", self.spied_gap))
            if "train" not in self.real:
                stack.enter_context(mock.patch.object(lm, "token_scores", self.spied_scores))
            stack.enter_context(mock.patch.object(common.RunFolder, "report"))
            stack.enter_context(contextlib.redirect_stdout(None))  # the script's own lines are not shown
            getattr(self.module, "train" if "train" in self.real else "evaluate")(small)
        self.say("all checks passed")

    def say(self, text: str) -> None:
        if common.rank() == 0:
            print(text, file=self.screen, flush=True)

    def report(self, name: str, check, *given) -> None:
        """One line of the table; check(...) -> (passed, detail)."""
        started = time.perf_counter()
        passed, detail = check(*given)
        passed = not common.all_max(float(not passed), torch.device("cpu"))
        self.say(f"{'pass' if passed else 'FAIL'}  {name:<44} {detail}  ({time.perf_counter() - started:.1f} s)")
        if not passed:
            raise SystemExit(1)

    def once(self, name: str, passed: bool, detail: str) -> None:
        """report() of what happens often: the first time, and whenever it fails."""
        if name not in self.told or common.all_max(float(not passed), torch.device("cpu")):
            self.report(name, lambda: (passed, detail))
        self.told.add(name)

    # ---- spies -------------------------------------------------------------------------------------------------------

    def make_batch(self, real):
        def spy(prompt_ids, completion_ids, pad_id, device):
            batch = real(prompt_ids, completion_ids, pad_id, device)
            self.answers[id(batch["mask"])] = completion_ids, batch["mask"]  # held, so that its id stays its own
            return batch

        return spy

    def spied_complete(self, sampling, prompt_ids, samples, noise, return_logprobs=False):
        out = self.complete(sampling, prompt_ids, samples, noise, return_logprobs)
        done = out[0] if return_logprobs else out
        self.sampled.update(map(tuple, done))
        if noise is not None and prompt_ids and not self.rollout:
            self.rollout = sampling, [p for p in prompt_ids for _ in range(samples)][:16], noise[:16]
            if "train" not in self.real:
                device = next(sampling.policy.parameters()).device
                batch = common.make_batch(self.rollout[1], done[:16], 0, device)
                self.look_at_models({"policy": sampling.policy}, batch)
        return out

    def spied_gap(self, per_token, batch, sampled, dtype, **more):
        """lm.sampler_gap(): the training forward gives tokens the log-probabilities with which they were drawn."""
        try:
            gap = self.sampler_gap(per_token, batch, sampled, dtype, **more)
            self.gap = True, f"mean |ratio - 1| {gap:.1e}"
        except RuntimeError as error:  # told later, after what may be the cause
            gap, self.gap = 0.0, (False, str(error))
        return gap

    def train(self, args) -> None:
        """The script's train(), and whether it can be resumed."""
        words = [f"--{name} {getattr(args, name)}" for name in ("stage", "objective", "loss") if hasattr(args, name)]
        self.say(f"---- {self.module.__name__} {' '.join(words)}")
        twin = {name: args.model for name in ("teacher", "ref_teacher") if hasattr(args, name)}
        if twin:
            self.report("a model is at distance 0 from itself", self.at_distance_0, replace(args, **twin))
        self.looking, self.rollout, self.gap, self.told = True, None, None, set()
        self.real["train"](args)
        self.report("resuming changes nothing", self.resumes, args)

    def update(self, *given, **more):
        """The script's update(); before the first one of a run, what can be seen of a step."""
        if self.looking:
            self.looking = False
            bound = inspect.signature(self.real["update"]).bind(*given, **more).arguments
            self.look_at_models(bound["models"], bound["batch"])
            if "advantages" in bound["batch"]:  # a few rewards may be all equal; here is something to learn
                mask = bound["batch"]["mask"]
                signal = torch.sin(torch.arange(len(mask), device=mask.device))[:, None] * mask
                bound["batch"] = bound["batch"] | {"advantages": signal}
            self.look_at_gradients(bound)
        return self.real["update"](*given, **more)

    def spied_scores(self, model, batch, ref=None):
        """lm.token_scores() of the reward model that evaluate.py rates."""
        if "scores" not in self.told:
            self.told.add("scores")
            self.look_at_models({"reward": model}, batch)
        return self.token_scores(model, batch, ref)

    def judge(self, reviser, answers, data, args):
        """seft.py's judge(): three probabilities that sum to 1, the same whatever else is scored beside them."""
        self.real["judge"](reviser, answers, data, args)
        alone = [replace(a) for a in answers[:4]]
        for twin in alone:
            self.real["judge"](reviser, [twin], data, args)
        gap = max((abs(p - q) for a, b in zip(answers, alone) for p, q in zip(a.chances, b.chances)), default=0.0)
        total = max((abs(sum(a.chances) - 1) for a in answers), default=0.0)
        detail = f"largest difference {gap:.1e}, sum {total:.1e} off"
        self.once("labels are scored as a distribution", max(gap, total) < self.tight, detail)

    def revise(self, *given):
        """seft.py's revise(): an answer with the label No is kept as it is."""
        self.real["revise"](*given)
        answers = given[1]
        kept = [a for a in answers if a.label == self.module.NO]
        same = all(a.target is a.ids for a in kept)
        self.once("No keeps an answer as it is", same, f"{len(kept)} of {len(answers)} answers were kept")

    # ---- checks ------------------------------------------------------------------------------------------------------

    def look_at_models(self, models, batch) -> None:
        args, first, tokenizer = self.args, next(iter(models.values())), self.tokenizer()
        stops = {*lm.stop_ids(first, tokenizer)} if first.can_generate() else {tokenizer.eos_token_id}
        self.report("tokenizer and vocabularies agree", self.vocabularies, models)
        self.report("dropout is off", dropout_is_off, models)
        if id(batch["mask"]) in self.answers:
            self.report("EOS is inside the loss", self.end_of_sequence, batch, stops)
        for name, model in models.items():
            self.report(f"{name}: padding and batch size do not matter", self.padding, model, batch)
        if self.rollout:
            if not self.gap:
                self.look_at_sampler()
            self.report("the sampler is the policy", lambda: self.gap)
        rows, small = len(batch["mask"]) / (4 * common.world()), getattr(args, "samples_per_prompt", 4) / 4
        rows = int(rows * small * getattr(args, "prompts_per_step", getattr(args, "pairs_per_step", 4)))
        sizes = {name: getattr(args, name) for name in ("micro_batch", "max_prompt", "max_new_tokens", "dtype")}
        at_once = getattr(args, "rollout_rows", 0)
        self.report("peak memory", lambda: gpu.estimate_memory(models, rows=rows, rollout_rows=at_once, **sizes))

    def look_at_gradients(self, bound) -> None:
        gradient, metrics = self.gradient(bound, 8)
        known = ("ratio_gap", "kl_old") + (() if self.args.dtype == "bfloat16" else ("logit_gap",))
        gaps = {k: abs(v) for k, v in metrics.items() if k.endswith(known)}  # noise of raw logits grows with their size
        if gaps:
            self.report("ratio = 1 and KL = 0 at the start", lambda: (max(gaps.values()) < self.tight, told(gaps)))
        self.report("gradient ignores micro-batches", self.micro_batches, bound, gradient)

    def tokenizer(self):
        return lm.load_tokenizer(self.args.model)

    def vocabularies(self, models) -> tuple[bool, str]:
        """Every id of the tokenizer has a row in each model's embeddings."""
        rows = {name: m.config.get_text_config().vocab_size for name, m in models.items()}
        top = max(self.tokenizer().get_vocab().values())
        return all(top < n for n in rows.values()), f"largest id {top}, rows {rows}"

    def end_of_sequence(self, batch, stops) -> tuple[bool, str]:
        """A completion has one stop token, at its end and inside the mask; none if it was sampled and cut."""
        answers, _ = self.answers[id(batch["mask"])]
        ok = batch["mask"].sum(1).tolist() == [len(ids) for ids in answers]
        ended = [ids[-1] in stops for ids in answers]
        ok &= all(sum(i in stops for i in ids) == end for ids, end in zip(answers, ended))
        ok &= all(end or tuple(ids) in self.sampled for ids, end in zip(answers, ended))
        return ok, f"{sum(ended)} of {len(ended)} completions ended by themselves, their EOS is in the loss"

    @torch.no_grad()
    def padding(self, model, batch) -> tuple[bool, str]:
        """Log-probabilities (or scalars) are the same for rows alone, and with more padding on both sides."""
        scalar = lm.has_scalar_head(model.config)
        if scalar:  # a head that starts at 0 would pass any test
            head, before = lm.scalar_head(model), [p.clone() for p in lm.scalar_head(model).parameters()]
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, std=0.1)

        def per_token(micro):
            return lm.completion_scalars(model, micro) if scalar else lm.policy_logprobs(model, micro)[0]

        names = ("prompt_ids", "prompt_mask", "completion_ids", "mask")
        error = padding_error(per_token, {name: batch[name] for name in names})
        if scalar:
            for parameter, old in zip(head.parameters(), before):
                parameter.copy_(old)
        return error < self.tight * (10 if scalar else 1), f"mean difference {error:.1e}"

    def look_at_sampler(self) -> None:
        """For scripts whose loop does not compare: the log-probabilities of fresh samples."""
        sampling, prompt_ids, noise = self.rollout
        completion_ids, sampled = self.complete(sampling, prompt_ids, 1, noise, return_logprobs=True)
        batch = common.make_batch(prompt_ids, completion_ids, 0, next(sampling.policy.parameters()).device)
        per_token = lambda micro: lm.policy_logprobs(sampling.policy, micro, sampling.temperature)[0]  # noqa: E731
        self.spied_gap(per_token, batch, sampled, self.args.dtype)

    def gradient(self, bound, size: int):
        """(gradient, metrics) of an update() in micro-batches of `size` that changes no weight."""
        models, found = bound["models"], []

        class NoOptimizer:
            param_groups = bound["optimizer"].param_groups

            def step(self):
                parts = [p.grad for p in lm.trainable_parameters(models) if p.grad is not None]
                found.append(torch.cat([getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in parts]))

            def zero_grad(self, **_):
                models.zero_grad(set_to_none=True)

        args = replace(bound["args"], micro_batch=size, max_grad_norm=1e9)
        metrics = self.real["update"](**bound | {"optimizer": NoOptimizer(), "args": args})
        if isinstance(metrics, tuple):  # sums over tokens, and their number
            metrics = {name: total / metrics[1] for name, total in metrics[0].items()}
        return found[0], metrics

    def micro_batches(self, bound, gradient) -> tuple[bool, str]:
        norm = gradient.norm()
        error = max(((self.gradient(bound, size)[0] - gradient).norm() / norm).item() for size in (6, 2))
        passed = norm > 0 and error < (0.6 if self.args.dtype == "bfloat16" else self.tight)
        return passed, f"gradient norm {norm:.3g}, relative difference {error:.1e} for [8, 6, 2]"

    def at_distance_0(self, args) -> tuple[bool, str]:
        """With the student in the place of its teachers, every KL and the advantage vanish; hidden states are equal."""
        gaps = {}

        def first_update(*given, **more):
            bound = inspect.signature(self.real["update"]).bind(*given, **more).arguments
            _, metrics = self.gradient(bound, 8)
            gaps.update({k: abs(v) for k, v in metrics.items() if k.startswith("kl/") or k.endswith("margin")})
            batch, policy = bound["batch"], bound["models"]["policy"]
            with torch.no_grad():
                own = lm.map_rows(lambda m: {"x": lm.completion_hidden(policy, m)}, batch, 8)["x"]
            for name in [k for k in batch if k.endswith("_hidden")]:
                evaluated = (batch[name].abs().amax((1, 2)) > 0)[:, None] & batch["mask"]
                gaps[name] = (batch[name] - own)[evaluated].abs().mean().item()
            raise StopIteration

        with mock.patch.object(self.module, "update", first_update), contextlib.suppress(StopIteration):
            self.real["train"](replace(args, out=f"{args.out}-twin"))
        limit = self.tight * (1 if self.args.dtype == "bfloat16" else 10)
        return bool(gaps) and max(gaps.values()) < limit, told(gaps)

    def resumes(self, args) -> tuple[bool, str]:
        """Two steps at once = one step, and another from its checkpoint, to the last bit."""
        parts = f"{args.out}-parts"
        with mock.patch.object(common.Run, "stop_after", 1):
            self.real["train"](replace(args, out=parts))
        self.real["train"](replace(args, out=parts, resume=True))
        runs = []
        for folder in (Path(args.out), Path(parts)):
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
            runs.append((metrics, [file.read_bytes() for file in sorted((folder / "model").glob("*.safetensors"))]))
        count = sum(len(line) for line in runs[0][0])
        return runs[0] == runs[1], f"{count} logged numbers and all weights are compared bit by bit"


def dropout_is_off(models) -> tuple[bool, str]:
    modules = [m for model in models.values() for m in model.modules()]
    parts = [c for model in models.values() for c in lm.configs(model.config)]
    left = [(key, value) for part in [*modules, *parts] for key, value in vars(part).items() if "drop" in key]
    left += [("Dropout.p", m.p) for m in modules if isinstance(m, torch.nn.Dropout)]
    left = [key for key, value in left if isinstance(value, float) and value > 0]
    return not left, f"{len(models)} model(s)" if not left else f"still on: {left}"


def padding_error(per_token, batch) -> float:
    """How far per_token(batch) [B, T] is from the same for rows alone, and with more padding on both sides.

    The mean counts: in bfloat16 single tokens differ by half a nat between healthy kernels.
    """
    whole = per_token(batch)
    alone = lm.map_rows(lambda micro: {"x": per_token(micro)}, batch, 1)["x"]
    wide = {k: F.pad(v, (5, 0) if k.startswith("prompt") else (0, 5)) for k, v in batch.items()}
    padded = per_token(wide)[:, : batch["mask"].shape[1]]
    return max((x - whole)[batch["mask"]].abs().mean().item() for x in (alone, padded))


def told(gaps: dict[str, float]) -> str:
    return ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit(__doc__)
    script = importlib.import_module(Path(sys.argv[1]).stem)
    sys.argv = sys.argv[1:]
    args = common.parse_args(script.Args, script.BUILTIN)
    common.launch(Checks(script, args).run, args.device)

"""Is a script right with this model and these data? To be run before a long training; nothing is kept.

    python check.py lco.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k
    torchrun --nproc_per_node=8 check.py ppo_baseline.py --model ...

The arguments are those of the script. It runs for two steps on a few rows, with all of its own code: what its update()
is given is examined before the first step, what it logs and saves afterwards. The first check that fails ends the
program with 1.
"""

import contextlib
import importlib.util
import inspect
import json
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import common  # before torch: it sets how threads wait
import lm

import torch
import torch.nn.functional as F

# Less to do. Two epochs: with a single update per rollout pi_old would not be evaluated, and nothing compared with it.
LESS = dict(
    steps=2, warmup_reviser_steps=2, reviser_steps=2, epochs=2, minibatches=1, rounds=2, micro_batch=8,
    test_rows=4, test_pairs=2, builtin_pairs=64, warmup_steps=0, external_rounds=0, external_model="", pair_share=0.0,
    keep_threshold="0", critic_warmup=0, keep="last", track="none", push_to_hub="", resume=False,
)  # fmt: skip


class Checks:
    """Runs a script with spies in the place of some functions: they call the real ones and look at what goes by."""

    def __init__(self, module, args):
        self.module, self.args, self.screen = module, args, sys.stdout
        self.tight = 0.1 if args.dtype == "bfloat16" else 1e-4
        self.looking, self.answers, self.sampled, self.rollout, self.gap = True, {}, set(), None, None
        self.spied = {"make_batch": common, "sampler_gap": lm, "token_scores": lm, "complete": lm.Sampling}
        self.spied |= {name: module for name in ("train", "update", "revise") if hasattr(module, name)}
        self.real = {name: getattr(place, name) for name, place in self.spied.items()}
        self.trains = "train" in self.real  # all scripts but evaluate.py

    def run(self) -> None:
        """The whole script, in a folder that is thrown away."""
        world, home = common.world(), Path(common.from_rank_0(tempfile.mkdtemp() if common.rank() == 0 else None))
        less = LESS | dict(prompts_per_step=4 * world, pairs_per_step=4 * world, unannotated=16 * world)
        most = 32 if hasattr(self.args, "samples_per_prompt") else 10**9  # else answers of pairs have to fit
        less |= dict(samples_per_prompt=4, max_new_tokens=min(self.args.max_new_tokens, most), out=str(home / "run"))
        names = [f.name for f in fields(self.args) if f.name in (less if self.trains else ("micro_batch", "out"))]
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, home, ignore_errors=True)
            stack.callback(common.dist.barrier)
            for name, place in self.spied.items():
                spy = lambda *given, _spy=getattr(self, name), **more: _spy(*given, **more)  # noqa: E731
                stack.enter_context(mock.patch.object(place, name, spy))
            stack.enter_context(mock.patch.object(common.RunFolder, "report"))
            stack.enter_context(contextlib.redirect_stdout(None))  # the script's own lines are not shown
            if self.trains:
                self.module.prepare(self.args)  # may refuse sizes that are smaller below
            start = self.module.train if self.trains else self.module.evaluate
            start(replace(self.args, **{name: less[name] for name in names}))
        self.say("all checks passed")

    def say(self, text: str) -> None:
        if common.rank() == 0:
            print(text, file=self.screen, flush=True)

    def report(self, name: str, passed: bool, detail: str) -> None:
        """One line of the table; a check that fails on one rank ends all."""
        passed = not common.all_max(float(not passed), torch.device("cpu"))
        self.say(f"{'pass' if passed else 'FAIL'}  {name:<44} {detail}")
        if not passed:
            raise SystemExit(1)

    # ---- spies -------------------------------------------------------------------------------------------------------

    def make_batch(self, prompt_ids, completion_ids, pad_id, device):
        batch = self.real["make_batch"](prompt_ids, completion_ids, pad_id, device)
        self.answers[id(batch["mask"])] = completion_ids, batch["mask"]  # held, so that its id stays its own
        return batch

    def complete(self, sampling, prompt_ids, samples, noise, return_logprobs=False):
        out = self.real["complete"](sampling, prompt_ids, samples, noise, return_logprobs)
        done = out[0] if return_logprobs else out
        self.sampled.update(map(tuple, done))
        if noise is not None and prompt_ids and not self.rollout:
            self.rollout = sampling, [p for p in prompt_ids for _ in range(samples)][:16], noise[:16]
            if not self.trains:
                batch = self.make_batch(self.rollout[1], done[:16], 0, sampling.policy.device)
                self.look_at_models({"policy": sampling.policy}, batch)
        return out

    def sampler_gap(self, *given, **first):
        try:
            gap = self.real["sampler_gap"](*given, **first)
            self.gap = True, f"mean |ratio - 1| {gap:.1e}"
        except RuntimeError as error:  # told later, after what may be the cause
            gap, self.gap = 0.0, (False, str(error))
        return gap

    def token_scores(self, model, batch, ref=None):
        if not self.trains and self.looking:
            self.looking = False
            self.look_at_models({"reward": model}, batch)
        return self.real["token_scores"](model, batch, ref)

    def train(self, args) -> None:
        """The script's train(), and whether it can be resumed."""
        words = [f"--{name} {getattr(args, name)}" for name in ("stage", "objective", "loss") if hasattr(args, name)]
        self.say(f"---- {self.module.__name__} {' '.join(words)}")
        twin = {name: args.model for name in ("teacher", "ref_teacher") if hasattr(args, name)}
        if twin:
            self.report("a model is at distance 0 from itself", *self.at_distance_0(replace(args, **twin)))
        self.looking, self.rollout, self.gap = True, None, None
        self.real["train"](args)
        self.report("resuming changes nothing", *self.resumes(args))

    def update(self, *given, **more):
        """Before the first update() of a run: what can be seen of a step."""
        if self.looking:
            self.looking = False
            bound = inspect.signature(self.real["update"]).bind(*given, **more).arguments
            self.look_at_models(bound["models"], bound["batch"])
            self.look_at_gradients(bound)
        return self.real["update"](*given, **more)

    def revise(self, reviser, answers, data, args):
        """seft.py's revise(): labels are scored as a distribution, alone as in a batch; No keeps an answer as it is."""
        self.real["revise"](reviser, answers, data, args)
        if args.revise == "never":
            return
        alone = [replace(a) for a in answers[:4]]
        for twin in alone:
            self.module.judge(reviser, [twin], data, args)
        gaps = [abs(p - q) for a, b in zip(answers, alone) for p, q in zip(a.chances, b.chances)]
        gaps += [abs(sum(a.chances) - 1) for a in alone]
        kept = [a for a in answers if a.label == self.module.NO]
        most = max(gaps, default=0.0)
        self.report("labels are scored as a distribution", most < self.tight, f"largest difference {most:.1e}")
        self.report("No keeps an answer as it is", all(a.target is a.ids for a in kept), f"{len(kept)} answers")

    # ---- checks ------------------------------------------------------------------------------------------------------

    def look_at_models(self, models, batch) -> None:
        args, tokenizer = self.args, lm.load_tokenizer(self.args.model)
        self.report("tokenizer and vocabularies agree", *vocabularies(models, tokenizer))
        self.report("dropout is off", *dropout_is_off(models))
        if id(batch["mask"]) in self.answers:
            first = next(iter(models.values()))
            stops = {*lm.stop_ids(first, tokenizer)} if first.can_generate() else {*common.end_tokens(tokenizer)}
            self.report("EOS is inside the loss", *self.end_of_sequence(batch, stops))
        for name, model in models.items():
            self.report(f"{name}: padding and batch size do not matter", *self.padding(model, batch))
        if self.rollout and not self.gap:  # a script whose loop does not compare: fresh samples
            sampling, prompt_ids, noise = self.rollout
            ids, sampled = self.real["complete"](sampling, prompt_ids, 1, noise, return_logprobs=True)
            fresh = self.real["make_batch"](prompt_ids, ids, 0, batch["mask"].device)
            self.sampler_gap(sampling.policy, sampling.temperature, fresh, sampled, args.dtype)
        if self.gap:
            self.report("the sampler is the policy", *self.gap)
        rows, small = len(batch["mask"]) / (4 * common.world()), getattr(args, "samples_per_prompt", 4) / 4
        rows = int(rows * small * getattr(args, "prompts_per_step", getattr(args, "pairs_per_step", 4)))
        names = ("micro_batch", "max_prompt", "max_new_tokens", "dtype", "rollout_rows")
        sizes = {name: getattr(args, name, 0) for name in names}  # not all scripts sample
        if importlib.util.find_spec("gpu"):
            estimate = importlib.import_module("gpu").estimate_memory
            self.report("peak memory", *estimate(models, rows=rows, **sizes))

    def look_at_gradients(self, bound) -> None:
        if "advantages" in bound["batch"]:  # a few rewards may be all equal; here is something to learn
            mask = bound["batch"]["mask"]
            signal = torch.sin(torch.arange(len(mask), device=mask.device))[:, None] * mask
            bound["batch"] = bound["batch"] | {"advantages": signal}
        gradient, metrics = self.gradient(bound, 8)
        known = ("ratio_gap", "kl_old") + (() if self.args.dtype == "bfloat16" else ("logit_gap",))
        gaps = {k: abs(v) for k, v in metrics.items() if k.endswith(known)}  # noise of raw logits grows with their size
        if gaps:
            most = max(gaps.values())
            self.report("ratio = 1 and KL = 0 at the start", most < self.tight, f"{most:.1e} in {', '.join(gaps)}")
        norm = gradient.norm()
        error = max(((self.gradient(bound, size)[0] - gradient).norm() / norm).item() for size in (6, 2))
        passed = norm > 0 and error < (0.6 if self.args.dtype == "bfloat16" else self.tight)
        self.report("gradient ignores micro-batches", passed, f"norm {norm:.3g}, relative difference {error:.1e}")

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
        """Log-probabilities, or final states where a scalar head may be 0, depend on neither padding nor batch size."""

        def per_token(micro):
            if not lm.has_scalar_head(model.config):
                return lm.policy_logprobs(model, micro)[0]
            hidden = lm.completion_hidden(model, micro).float()
            return F.layer_norm(hidden, hidden.shape[-1:])

        error = padding_error(per_token, batch)
        return error < self.tight, f"mean difference {error:.1e}"

    def gradient(self, bound, size: int):
        """(gradient, metrics) of an update() in micro-batches of `size` that changes no weight."""
        models, optimizer = bound["models"], bound["optimizer"]
        args = replace(bound["args"], micro_batch=size, max_grad_norm=1e9)
        with mock.patch.object(optimizer, "step"), mock.patch.object(optimizer, "zero_grad"):
            metrics = self.real["update"](**bound | {"args": args})
        parts = [p.grad for p in lm.trainable_parameters(models) if p.grad is not None]
        gradient = torch.cat([getattr(g, "full_tensor", lambda g=g: g)().flatten() for g in parts])
        models.zero_grad(set_to_none=True)
        if isinstance(metrics, tuple):  # sums over tokens, and their number
            metrics = {name: total / metrics[1] for name, total in metrics[0].items()}
        return gradient, metrics

    def at_distance_0(self, args) -> tuple[bool, str]:
        """With the student in the place of its teachers, every KL and the advantage vanish."""
        gaps = {}

        def first_update(*given, **more):
            bound = inspect.signature(self.real["update"]).bind(*given, **more).arguments
            _, metrics = self.gradient(bound, 8)
            gaps.update({k: abs(v) for k, v in metrics.items() if k.startswith("kl/") or k.endswith("margin")})
            raise StopIteration

        with mock.patch.object(self.module, "update", first_update), contextlib.suppress(StopIteration):
            self.real["train"](replace(args, out=f"{args.out}-twin"))
        most = max(gaps.values(), default=1.0)
        return most < self.tight, f"at most {most:.1e} in {', '.join(gaps)}"

    def resumes(self, args) -> tuple[bool, str]:
        """Two steps at once = one step, and another from its checkpoint, to the last bit."""
        parts = f"{args.out}-parts"
        with mock.patch.object(common.Run, "stop_after", 1), contextlib.suppress(SystemExit):
            self.real["train"](replace(args, out=parts))
        self.real["train"](replace(args, out=parts, resume=True))
        runs = []
        for folder in (Path(args.out), Path(parts)):
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
            runs.append((metrics, [file.read_bytes() for file in sorted((folder / "model").glob("*.safetensors"))]))
        return runs[0] == runs[1], f"{sum(map(len, runs[0][0]))} logged numbers and all weights are compared bit by bit"


def vocabularies(models, tokenizer) -> tuple[bool, str]:
    """Every id of the tokenizer has a row in each model's embeddings."""
    rows = {name: m.config.get_text_config().vocab_size for name, m in models.items()}
    top = max(tokenizer.get_vocab().values())
    return all(top < n for n in rows.values()), f"largest id {top}, rows {rows}"


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
    batch = {name: batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "mask")}
    whole = per_token(batch)
    alone = lm.map_rows(lambda micro: {"x": per_token(micro)}, batch, 1)["x"]
    wide = {k: F.pad(v, (5, 0) if k.startswith("prompt") else (0, 5)) for k, v in batch.items()}
    padded = per_token(wide)[:, : batch["mask"].shape[1]]
    return max((x - whole)[batch["mask"]].abs().mean().item() for x in (alone, padded))


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit(__doc__)
    script = importlib.import_module(Path(sys.argv[1]).stem)
    sys.argv = sys.argv[1:]
    args = common.parse_args(script.Args, script.BUILTIN)
    common.launch(Checks(script, args).run, args.device)

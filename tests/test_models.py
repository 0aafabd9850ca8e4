"""Models load as promised: GPT-2, Llama and Qwen3, both heads, adapters on all linear layers, no dropout, FSDP2."""

import json
import re
import shutil

import check
import common
import lm
import report
import pytest
from conftest import ids_of, save_model

import torch
import transformers
from torch.distributed.fsdp import FSDPModule

CPU = torch.device("cpu")
FOLDERS = ("tiny_model", "gpt2_model", "qwen_model")


@pytest.fixture(params=FOLDERS)
def folder(request) -> str:
    return request.getfixturevalue(request.param)


def make_batch(pad_id: int = 0) -> dict:
    """Four rows whose prompts and completions have unequal lengths."""
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10], [4], [9, 9]]
    completions = [[5, 6, 7, 2], [8], [9, 10, 11], [4, 3]]
    return common.make_batch(prompts, completions, pad_id, CPU)


def logprobs(model, batch) -> torch.Tensor:
    """[N], of the completion tokens."""
    hidden = lm.completion_hidden(model, batch)[batch["mask"]]
    return lm.token_logprobs(hidden, lm.head_weight(model), batch["completion_ids"][batch["mask"]])[0]


def changed(folder: str, path, **values) -> str:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    return str(path)


def test_lm_head(folder):
    """Logits are hidden @ W.T, all weights are fp32 and train, and the same folder gives the same model."""
    model = lm.load_model(folder, device=CPU)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        hidden = model.final_hidden(ids, torch.ones_like(ids), torch.arange(8)[None])
        torch.testing.assert_close(hidden @ lm.head_weight(model).T, model(ids).logits)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    again = lm.load_model(folder, device=CPU, trainable=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not lm.trainable_parameters(again)


def test_scalar_head_starts_at_zero(folder):
    """The same body, with a linear head to one number that is 0 everywhere at first, and learns."""
    model = lm.load_model(folder, head="scalar", device=CPU)
    values = lm.completion_scalars(model, make_batch())
    assert values.shape == (4, 4) and values.dtype == torch.float32 and not values.any()
    head = lm.scalar_head(model)
    assert head.weight.shape[0] == 1 and not head.weight.any()
    values.sum().backward()
    assert head.weight.grad.abs().sum() > 0
    body = lm.load_model(folder, device=CPU).base_model.state_dict()
    assert all(torch.equal(body[k], v) for k, v in model.base_model.state_dict().items())


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_lora(folder, head):
    """Adapters on every linear layer of the body, none on the LM head; they change nothing at first."""
    model = lm.load_model(folder, head=head, device=CPU, lora_rank=4)
    adapted = {n.removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith(".lora_A")}
    linear = {
        n.removesuffix(".base_layer")
        for n, m in model.base_model.named_modules(prefix=model.base_model_prefix)
        if type(m).__name__ in ("Linear", "Conv1D") and ".lora_" not in n
    }
    assert adapted == linear and len(adapted) >= 8
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in trained if "lora_" not in n}
    assert len(trained - heads) == 2 * len(adapted)
    assert all(n.startswith(("score.", "classifier.")) for n in heads) and bool(heads) == (head == "scalar")
    if head == "lm":
        with torch.no_grad():
            plain = logprobs(lm.load_model(folder, device=CPU), make_batch())
            torch.testing.assert_close(logprobs(model, make_batch()), plain)
            with lm.adapters_off(model):
                torch.testing.assert_close(logprobs(model, make_batch()), plain)


def test_what_a_file_was_is_forgotten_in_training(tiny_model, tmp_path):
    """A policy trained from a Q-RM is none, and would be taken for one."""
    was = dict(aligned_from="builtin", reward_score="mean", reward_objective="qrm")
    folder = changed(tiny_model, tmp_path / "judge", **was)
    for trainable in (True, False):
        config = vars(lm.load_model(folder, device=CPU, trainable=trainable).config)
        assert {key: config[key] for key in was if key in config} == ({} if trainable else was)


def test_tokens_from_a_longer_padding(tiny_model):
    """A policy whose embeddings have more rows than those of its teacher or reward model may draw any of them."""
    model, found = lm.load_model(tiny_model, device=CPU, trainable=False), []
    last = model.config.vocab_size - 1
    for drawn in (last, last + 5):
        batch = common.make_batch([[3, 4]], [[5, drawn, 6]], 0, CPU)
        found.append(torch.stack(lm.policy_logprobs(model, batch)))
    assert torch.equal(*found)


def test_new_weights_depend_on_the_seed_alone(tiny_model):
    def adapters(seed):
        model = lm.load_model(tiny_model, device=CPU, lora_rank=4, seed=seed)
        return torch.cat([p.detach().flatten() for p in lm.trainable_parameters(model)])

    torch.manual_seed(123)
    assert torch.equal(adapters(0), adapters(0)) and not torch.equal(adapters(0), adapters(1))


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_dropout_is_off(head, gpt2_model, tiny_model, tmp_path):
    """Whatever a config says, a forward in training mode is the same twice."""
    for name in (gpt2_model, changed(tiny_model, tmp_path / "drops", attention_dropout=0.5, hidden_dropout=0.5)):
        model = lm.load_model(name, head=head, device=CPU, lora_rank=2)
        assert model.training
        assert check.dropout_is_off({"model": model})[0]
        batch = make_batch()
        assert torch.equal(lm.completion_hidden(model, batch), lm.completion_hidden(model, batch))


def test_padding_and_batch_size_change_nothing(folder):
    """Rotary or absolute positions: log-probabilities of a row do not depend on its neighbours or its padding."""
    model = lm.load_model(folder, device=CPU)

    @torch.no_grad()
    def per_token(batch):
        mask = batch["mask"]
        return torch.zeros(mask.shape).masked_scatter(mask, logprobs(model, batch))

    assert check.padding_error(per_token, make_batch()) < 1e-5


SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("kind", ["lm", "scalar", "after", "lora", "recomputed"])
def test_shared_prompts_are_packed(kind, folder):
    check_packing(kind, folder, packed=True)


@pytest.mark.parametrize(
    "kind, packed, options",
    [
        ("Mistral", True, {"sliding_window": 12}),
        ("Mistral", False, {"sliding_window": 11}),  # the longest packed row has twelve tokens
        ("Mistral", False, {"sliding_window": 3}),
        ("Falcon", False, {"alibi": True, "parallel_attn": False}),
    ],
)
def test_packing_in_other_layers(kind, packed, options, letter_tokenizer, tmp_path):
    """Layers that look at neighbouring columns never see a packed row."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **options, **ids_of(letter_tokenizer))
    check_packing("lm", save_model(tmp_path / "model", config, letter_tokenizer), packed)


def check_packing(kind, folder, packed):
    """Two prompts of six rows: numbers and gradients of six rows on their own, from fewer tokens where packed."""
    options = dict(head="scalar" if kind in ("scalar", "after") else "lm", lora_rank=2 * (kind == "lora"))
    model = lm.load_model(folder, device=CPU, activation_checkpointing=kind == "recomputed", **options)
    for parameter in model.parameters():  # where heads and adapters start, no gradient reaches the body
        if parameter.requires_grad and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    a, b = [3, 4, 5, 6, 7], [8, 9, 10]
    prompts = [a, b, b, a, b, a]
    completions = [[5, 6, 2], [8], [9, 10, 11, 3], [4], [3, 2], [7, 7, 7]]
    batch = common.make_batch(prompts, completions, 0, CPU)
    read = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))

    def values_and_gradients(size):
        def per_token(micro):
            if kind in ("scalar", "after"):
                return lm.completion_scalars(model, micro, after=kind == "after")
            return lm.completion_hidden(model, micro).cos().sum(-1)

        read.clear()
        model.zero_grad()
        for i in range(0, 6, size):
            micro = common.take(batch, list(range(i, i + size)))
            (per_token(micro) * micro["mask"]).sum().backward()
        tokens = sum(read)
        with torch.no_grad():
            values = lm.map_rows(lambda micro: {"x": per_token(micro)}, batch, size)["x"] * batch["mask"]
        return tokens, [values, *(p.grad for p in lm.trainable_parameters(model) if p.grad is not None)]

    tokens, together = values_and_gradients(6)
    more, alone = values_and_gradients(1)
    assert more == sum(map(len, prompts + completions))
    assert tokens == (2 * (5 + 3 + 1 + 3) if packed else 6 * (5 + 4))
    assert len(together) == len(alone) > 4 and any(g.any() for g in alone[1:])
    for a, b in zip(together, alone):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_refused_dtype(tiny_model):
    with pytest.raises(common.BadInput, match="--dtype must be one of auto, float32, bfloat16; found .float16.*"):
        lm.load_model(tiny_model, device=CPU, dtype="float16")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_activation_checkpointing_gives_equal_gradients(folder, lora_rank):
    gradients = []
    for on in (False, True):
        model = lm.load_model(folder, device=CPU, activation_checkpointing=on, lora_rank=lora_rank)
        assert getattr(model, "is_gradient_checkpointing", on) == on
        logprobs(model, make_batch()).sum().backward()
        gradients.append([p.grad for p in lm.trainable_parameters(model)])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_bfloat16_keeps_fp32_masters(folder):
    """FSDP2 on one process: computes in bfloat16, keeps fp32 weights and gradients, takes a step, still generates."""
    model = lm.load_model(folder, device=CPU, dtype="bfloat16")
    assert isinstance(model, FSDPModule)
    assert sum(isinstance(m, FSDPModule) for m in model.modules()) == 3  # two blocks and the rest
    parameters = lm.trainable_parameters(model)
    assert all(p.dtype == torch.float32 for p in parameters)
    batch = make_batch()
    before = logprobs(model, batch)
    (-before.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters)
    plain = lm.load_model(folder, device=CPU)
    torch.testing.assert_close(before, logprobs(plain, batch), rtol=0.05, atol=0.05)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    assert torch.nn.utils.clip_grad_norm_(parameters, 1.0).full_tensor() > 0
    optimizer.step()
    settings = dict(max_new_tokens=4, stop_ids=[2], pad_id=0)
    completions = lm.generate(model, [[3, 4, 5], [6]], samples=2, noise=torch.rand(4, 4), **settings)
    assert len(completions) == 4 and all(1 <= len(c) <= 4 for c in completions)
    with torch.no_grad():
        assert logprobs(model, batch).sum() > before.sum()


def test_tokenizer_without_padding_token(gpt2_model):
    """Padding gets the id of EOS, which is harmless because masks come from lengths."""
    tokenizer = lm.load_tokenizer(gpt2_model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    batch = common.make_batch([[3], [4, 5]], [[6, 0], [7, 8, 0]], tokenizer.pad_token_id, CPU)
    assert batch["mask"].sum(1).tolist() == [2, 3] and batch["prompt_mask"].sum(1).tolist() == [1, 2]


# ---- a head that a checkpoint brings ---------------------------------------------------------------------------------


@pytest.fixture
def judge(folder, tmp_path):
    """The folder of a model with a scalar head that is not 0."""
    model = lm.load_model(folder, head="scalar", device=CPU)
    torch.manual_seed(0)
    torch.nn.init.normal_(lm.scalar_head(model).weight)
    common.export_model(tmp_path / "judge", model, lm.load_tokenizer(folder))
    return str(tmp_path / "judge"), model


def test_saved_head(folder, judge):
    """head="saved" and head="scalar" keep the head of a token classifier; a language model has none to keep."""
    name, model = judge
    assert lm.has_scalar_head(lm.load_config(name)) and not lm.has_scalar_head(lm.load_config(folder))
    with torch.no_grad():
        expected = lm.completion_scalars(model, make_batch())
        for head in ("saved", "scalar"):
            found = lm.load_model(name, head=head, device=CPU)
            torch.testing.assert_close(lm.completion_scalars(found, make_batch()), expected, atol=1e-6, rtol=1e-5)
            assert lm.has_scalar_head(found.config) and found.config.num_labels == 1
        language = lm.load_model(folder, head="saved", device=CPU)
        assert not lm.has_scalar_head(language.config)
        plain = logprobs(lm.load_model(folder, device=CPU), make_batch())
        assert torch.equal(logprobs(language, make_batch()), plain)


def test_scalars_at_the_token_and_before_it(folder, judge):
    """after=True is the score that has seen token t; without it, the one that has not."""
    batch = make_batch()
    with torch.no_grad():
        before, after = (lm.completion_scalars(judge[1], batch, after=x) for x in (False, True))
        other = batch | {"completion_ids": batch["completion_ids"].index_fill(1, torch.tensor([2]), 12)}
        moved = [lm.completion_scalars(judge[1], other, after=x)[0] for x in (False, True)]
    torch.testing.assert_close(after[:, :-1][batch["mask"][:, 1:]], before[:, 1:][batch["mask"][:, 1:]])
    changed = [((x - y[0]).abs() > 1e-6).tolist() for x, y in zip(moved, (before, after))]
    assert changed == [[False, False, False, True], [False, False, True, True]]


# ---- answers as tokens -----------------------------------------------------------------------------------------------


def test_answers_end_with_one_eos(folder):
    """No BOS before an answer, and the end of the sequence behind it."""
    tokenizer = lm.load_tokenizer(folder)
    prompt, answer = common.encode_prompt(tokenizer, "7+15="), common.encode_completion(tokenizer, "22")
    assert answer == [*tokenizer("7+15=22")["input_ids"][len(prompt) :], tokenizer.eos_token_id] and len(answer) == 3
    assert common.encode_completion(tokenizer, "") == [tokenizer.eos_token_id]


def test_pairs_as_tokens(folder):
    """Ids are added, columns stay; what is too long or says nothing is left out and counted."""
    tokenizer = lm.load_tokenizer(folder)
    start = len(common.encode_prompt(tokenizer, ""))
    good = {"prompt": "1+1=", "chosen": "2", "rejected": "33", "id": 7}
    same, long_answer = good | {"chosen": "33"}, good | {"rejected": "333"}
    long_prompt = good | {"prompt": "1+1+1="}
    rows, note = common.encode_pairs(tokenizer, [good, same, long_answer, long_prompt], start + 4, 3)
    assert note == "1 pairs; 2 too long, left out; 1 with two equal answers, left out"
    ids = {
        "chosen_ids": common.encode_completion(tokenizer, "2"),
        "rejected_ids": common.encode_completion(tokenizer, "33"),
    }
    assert rows == [good | ids | {"prompt_ids": common.encode_prompt(tokenizer, "1+1=")}]
    with pytest.raises(common.BadInput, match="no pair is left: 1 of 1 are too long, 0 have two equal answers"):
        common.encode_pairs(tokenizer, [long_answer], 9, 3)
    single = {"prompt": "1+1=", "answer": "2"}
    rows, note = common.encode_pairs(tokenizer, [single, single], 9, 9, sides=["answer"])
    assert note == "2 pairs" and rows[0]["answer_ids"] == ids["chosen_ids"]


def test_token_page(tmp_path):
    """One span a token of each colouring: blue above the mean of that colouring, red below it; all text is escaped."""
    answers = [
        {
            "prompt": "a<b",
            "kind": "chosen",
            "tokens": ["<s>", "&", "\n"],
            "scores": {"z": [1.0, 2.0, 3.0], "y": [5.0] * 3},
        },
        {"prompt": [{"role": "user", "content": "<i>"}], "kind": "rejected", "tokens": ["x"], "scores": {"z": [2.0]}},
    ]
    report.token_page(tmp_path / "page.html", "A & B", answers, note="<note>")
    page = (tmp_path / "page.html").read_text()
    assert (
        "<title>A &amp; B</title>" in page and "a&lt;b" in page and "user: &lt;i&gt;" in page and "&lt;note&gt;" in page
    )
    span = r'<span style="background:rgba\((\d+),\d+,(\d+),([\d.]+)\)" title="(\w): ([\d.]+)">([^<]*)</span>'
    spans = re.findall(span, page)
    assert [span[3:] for span in spans] == [
        *(("z", x, t) for x, t in (("1.000", "&lt;s&gt;"), ("2.000", "&amp;"), ("3.000", "↵\n"))),
        *(("y", "5.000", t) for t in ("&lt;s&gt;", "&amp;", "↵\n")),
        ("z", "2.000", "x"),
    ]
    colours = [tuple(map(float, span[:3])) for span in spans]  # red, blue and how much of it there is on white
    assert colours[0][0] == 255 > colours[0][1] and colours[2][1] == 255 > colours[2][0]
    assert colours[0][2] == colours[2][2] > 0.5 and all(colour[2] == 0 for colour in (colours[1], *colours[3:]))
    assert page.count('class="chosen"') == page.count('class="rejected"') == 1

"""The sampler against Hugging Face's, against the softmax, and against itself in any arrangement of the batch."""

import functools

import pytest
import torch
import transformers

import check
import common
import lm
import cpu

V = 32
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, head_dim=8)
SHAPE |= dict(pad_token_id=0, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "gpt2": lambda: transformers.GPT2Config(**SHAPE, n_positions=64),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=6, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
STOPS = [3, 7, 11, 19]  # several, so that random models stop at different times
LIMIT = 16


def build(config):
    """A random model with strong preferences, its head untied (a tied one repeats its input); dropout is off."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.final_hidden = functools.partial(lm._final_hidden, model)
    model.pack_limit = lm._pack_limit(model.config)
    return model


@pytest.fixture(scope="module")
def models():
    return {name: build(config()) for name, config in CONFIGS.items()}


def prompts(count, seed=0):
    """Prompts of 1 to 9 tokens, also of stop tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (1 + 5 * i % 9,), generator=generator).tolist() for i in range(count)]


def generate(model, prompt_ids, noise=None, **settings):
    settings = dict(max_new_tokens=LIMIT, stop_ids=STOPS, pad_id=0) | settings
    return lm.generate(model, prompt_ids, noise=noise, **settings)


def noise_for(count, seed=0):
    return common.uniforms(seed, common.TRAIN, 0, range(count), LIMIT)


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_hugging_face(models, name):
    """Token for token, prompts of unequal length, rows that end at different times (so that the cache is compacted)."""
    model, prompt_ids = models[name], prompts(12)
    expected = []
    for prompt in prompt_ids:  # alone, so without any padding
        ids = torch.tensor([prompt])
        settings = dict(do_sample=False, max_new_tokens=LIMIT, eos_token_id=STOPS, pad_token_id=0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        expected.append(out[0, len(prompt) :].tolist())
    found = generate(model, prompt_ids)
    assert found == expected
    lengths = [len(c) for c in found]
    assert min(lengths) < 6 and max(lengths) > 12 and len(set(lengths)) >= 3  # 12: beyond the window of the Gemmas


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_packed_weights_change_nothing(monkeypatch, rows):
    """Large layers are packed for the time of a rollout: the same tokens, the weights of today, no trace afterwards."""
    shape = SHAPE | dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, head_dim=128)
    model = build(transformers.LlamaConfig(**shape))
    rows, used, found = prompts(rows), [], []
    real = torch.ops.mkldnn._linear_pointwise
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: used.append(x) or real(x, *rest))
            packed = generate(model, rows)
        assert not any("forward" in vars(module) for module in model.modules())
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
            assert generate(model, rows) == packed
        found.append(packed)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.neg_()
    assert found[0] != found[1]
    assert used and max(x.shape[:-1].numel() for x in used) <= 64


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cache_with_room_is_a_dynamic_cache(name):
    """The same keys and values, to the last bit, while rows are repeated and dropped; a token copies none before it."""
    ours, theirs = cpu.roomy_cache(CONFIGS[name]()), transformers.DynamicCache(config=CONFIGS[name]())
    full = len(ours.layers) - 1  # Gemma's first layer has a window, and is left as it is
    changes = {3: lambda cache: cache.batch_repeat_interleave(3), 50: lambda cache: cache.batch_select_indices(kept)}
    rows, copies, kept = 2, 0, torch.tensor([0, 2, 5])
    for t in range(100):
        if t in changes:
            changes[t](ours), changes[t](theirs)
            rows = {3: 6, 50: 3}[t]
        new = torch.randn(2, rows, 2, 4 if t == 0 else 1, 8)  # keys and values; a prompt of four tokens, then one each
        before = ours.layers[full].keys.data_ptr() if t else 0
        for layer in range(len(ours.layers)):
            for a, b in zip(ours.update(*new, layer), theirs.update(*new, layer)):
                assert torch.equal(a, b)
        copies += ours.layers[full].keys.data_ptr() != before
        assert ours.get_seq_length() == theirs.get_seq_length() == t + 4
    assert copies <= 6  # the prompt, the first token, either change, twice more room


@pytest.mark.parametrize("rows, threads", [(2, 1), (2048, 2)])
def test_small_products_take_one_thread(models, rows, threads):
    """While a rollout lasts: the largest matrix has 2048 numbers, and 2048 rows are enough for two threads."""
    seen, model, before = [], models["llama"], torch.get_num_threads()
    handle = model.base_model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        generate(model, prompts(1), samples=rows, max_new_tokens=2, rows_at_once=rows)
        assert torch.get_num_threads() == 2
    finally:
        handle.remove()
        torch.set_num_threads(before)
    assert seen == [threads] * 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_without_cpu_py(models, monkeypatch, name):
    """Delete cpu.py and only speed changes: the same tokens."""
    prompt_ids, noise = prompts(10), noise_for(10)
    with_it = generate(models[name], prompt_ids, noise)
    monkeypatch.setattr(lm, "cpu", None)
    assert generate(models[name], prompt_ids, noise) == with_it


def test_stop_tokens(models):
    """A completion ends with its first stop token, or at the limit; any of the stop tokens counts, none is banned."""
    prompt_ids = prompts(40)
    completions = generate(models["llama"], prompt_ids, noise_for(40))
    for c in completions:
        assert not set(c[:-1]) & set(STOPS)
        assert c[-1] in STOPS or len(c) == LIMIT
    assert {c[-1] for c in completions} >= set(STOPS)
    free = generate(models["llama"], prompt_ids, noise_for(40), stop_ids=[V])
    assert all(len(c) == LIMIT for c in free)
    assert all(f[: len(c)] == c for c, f in zip(completions, free))


# ---- any arrangement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_tokens_are_independent_of_the_batch(models, name):
    """The same noise gives a prompt the same tokens: alone, in pieces, in any order, with and without compaction."""
    model, prompt_ids, noise = models[name], prompts(10), noise_for(10)
    whole = generate(model, prompt_ids, noise)
    assert len({tuple(c) for c in whole}) > 5 and len({len(c) for c in whole}) > 3
    for rows_at_once in (1, 3):
        assert generate(model, prompt_ids, noise, rows_at_once=rows_at_once) == whole
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    mixed = generate(model, [prompt_ids[i] for i in order], noise[order])
    assert mixed == [whole[i] for i in order]
    other = generate(model, prompt_ids, noise_for(10, seed=1))
    assert other != whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_samples_share_the_prompt(models, name):
    """Four samples of a prompt are four rows with the same noise, and the prompt is read once."""
    model, prompt_ids, noise = models[name], prompts(5), noise_for(20)
    reads = []
    handle = model.base_model.register_forward_pre_hook(
        lambda m, a, k: reads.append(k["input_ids"].shape), with_kwargs=True
    )
    shared = generate(model, prompt_ids, noise, samples=4)
    handle.remove()
    assert reads[0] == (5, max(map(len, prompt_ids))) and all(shape[1] == 1 for shape in reads[1:])
    assert reads[1][0] > 5 and reads[-1][0] < reads[1][0]  # finished rows leave the batch
    separate = generate(model, [p for p in prompt_ids for _ in range(4)], noise)
    assert shared == separate
    assert generate(model, prompt_ids, noise, samples=4, rows_at_once=8) == shared
    reads.clear()
    rows = lambda m, a, k: reads.append(len(k["input_ids"]))  # noqa: E731
    handle = model.base_model.register_forward_pre_hook(rows, with_kwargs=True)
    assert generate(model, prompt_ids, noise, samples=4, rows_at_once=3) == shared and max(reads) == 3
    handle.remove()
    assert len({tuple(c) for c in shared[:4]}) > 1


def test_noise_is_a_function_of_the_row():
    """common.uniforms: each row its own stream, whatever rows it is asked with; in [0, 1); columns only lengthen it."""
    all_rows = common.uniforms(5, common.TRAIN, 2, range(50), 40)
    assert torch.equal(common.uniforms(5, common.TRAIN, 2, [7, 30], 40), all_rows[[7, 30]])
    assert torch.equal(common.uniforms(5, common.TRAIN, 2, range(50), 10), all_rows[:, :10])
    assert all_rows.min() >= 0 and all_rows.max() < 1 and all_rows.unique().numel() > 1990
    assert all_rows.mean().item() == pytest.approx(0.5, abs=0.03) and all_rows.dtype == torch.float32
    for seed, stream, step in ((6, common.TRAIN, 2), (5, common.EVAL, 2), (5, common.TRAIN, 3)):
        assert not (common.uniforms(seed, stream, step, range(50), 40) == all_rows).any(1).all()


# ---- the decoder of GPUs, whose graphs are plain calls here --------------------------------------------------------


def static_decoder(model, rows, length, *limits):
    import gpu

    return gpu.Decoder(model, rows, length, *limits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("samples, rows_at_once", [(1, 256), (4, 256), (4, 16), (1, 3), (4, 3)])
def test_static_decoder_equals_the_reference(monkeypatch, models, name, samples, rows_at_once):
    """Greedy and sampled tokens and their log-probabilities, in pieces and in shrinking batches."""
    model, prompt_ids, limit = models[name], prompts(13), 40
    noise = common.uniforms(0, common.TRAIN, 0, range(13 * samples), limit)
    settings = dict(samples=samples, rows_at_once=rows_at_once, max_new_tokens=limit, stop_ids=[3, 7])
    settings |= dict(return_logprobs=True)
    for u in (None, noise):
        tokens, logprobs = generate(model, prompt_ids, u, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(lm, "_decoder", static_decoder)
            found, found_logprobs = generate(model, prompt_ids, u, **settings)
        assert found == tokens
        for a, b in zip(found_logprobs, logprobs):
            assert a == pytest.approx(b, abs=1e-4)
    assert max(map(len, tokens)) > 17  # long enough for a second look


# ---- frequencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_softmax(models, temperature):
    """With evenly spread noise each token comes as often as its probability says, to one draw: nothing is truncated."""
    model, prompt, n = models["llama"], prompts(4)[3], 4000
    with torch.no_grad():
        exact = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    noise = ((torch.arange(n) + 0.5) / n)[:, None]
    drawn = generate(model, [prompt], noise, samples=n, max_new_tokens=1, temperature=temperature, rows_at_once=n)
    counts = torch.tensor(drawn)[:, 0].bincount(minlength=V)
    assert (counts - n * exact).abs().max() < 1.1
    assert exact.max() < 0.9 and (counts > 0).sum() > 5
    at_other = (exact.log() * temperature / (1.7 - temperature)).softmax(-1)
    assert (counts - n * at_other).abs().max() > 20  # the tolerance tells temperatures apart


def test_tokens_of_probability_zero_are_never_chosen():
    """At the edges of the noise, next to gaps, and over a vocabulary so large that the cumulative sum is inexact."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, -torch.inf, 2.0, -200.0, 0.5, -torch.inf])
    p = logits.softmax(-1)
    edges = p.cumsum(0)
    last = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    below = torch.nextafter(edges, torch.tensor(0.0))
    u = torch.cat([torch.tensor([0.0, 1e-45, 1e-30, last]), edges, below, edges + 1e-7])
    u = u[u < 1]
    chosen, _ = lm._pick(logits.expand(len(u), -1), 1.0, u)
    assert set(chosen.tolist()) == {1, 4, 6}
    assert chosen[0] == 1 and chosen[3] == 6

    V = 150_000
    wide = torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    wide[:, :1000], wide[:, -1000:] = -torch.inf, -torch.inf
    for value in (0.0, last.item()):
        chosen, _ = lm._pick(wide, 1.0, torch.full((8,), value))
        assert (wide.gather(1, chosen[:, None]) > -torch.inf).all()


def test_pick_is_the_inverse_of_the_cumulative_distribution():
    """Token a for u in [F(a - 1), F(a)); the largest logit without noise."""
    p = torch.tensor([0.25, 0.5, 0.25])
    u = torch.tensor([0.0, 0.24, 0.26, 0.5, 0.74, 0.76, 0.99])
    assert lm._pick(p.log().expand(7, 3), 1.0, u)[0].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert lm._pick(p.log()[None], 1.0, None)[0].tolist() == [1]


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def logprobs(model, batch, temperature=1.0):
    """[B, T], as the scripts take them."""
    mask = batch["mask"]
    with torch.no_grad():
        hidden = lm.completion_hidden(model, batch)[mask]
        flat, _ = lm.token_logprobs(hidden, lm.head_weight(model), batch["completion_ids"][mask], temperature)
    return torch.zeros(mask.shape).masked_scatter(mask, flat)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_logprobs_ignore_padding(models, name):
    """The log-probability of each token, its EOS included, is that of the unpadded sequence read alone."""
    model, prompt_ids = models[name], prompts(6)
    completion_ids = generate(model, prompt_ids, noise_for(6))
    batch = common.make_batch(prompt_ids, completion_ids, 0, "cpu")
    found = logprobs(model, batch, 0.7)
    for b, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        exact = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(found[b, : len(completion)], exact, atol=1e-4, rtol=1e-4)
        assert (found[b, len(completion) :] == 0).all()
    assert check.padding_error(lambda micro: logprobs(model, micro), batch) < 1e-4
    assert len({len(p) for p in prompt_ids}) > 3 and len({len(c) for c in completion_ids}) > 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pad_may_be_eos(models, name):
    """pad == eos changes no token, no mask and no log-probability, and EOS stays inside the loss."""
    model, prompt_ids, runs = models[name], prompts(8), []
    eos = generate(model, prompt_ids, noise_for(8), stop_ids=[V])[0][3]  # a token that comes
    for pad in (0, eos):
        completion_ids = generate(model, prompt_ids, noise_for(8), stop_ids=[eos], pad_id=pad)
        batch = common.make_batch(prompt_ids, completion_ids, pad, "cpu")
        runs.append((completion_ids, batch["mask"], batch["prompt_mask"], logprobs(model, batch)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1]) and torch.equal(runs[0][2], runs[1][2])
    torch.testing.assert_close(runs[0][3], runs[1][3], atol=1e-5, rtol=1e-5)
    ended = [b for b, c in enumerate(runs[1][0]) if c[-1] == eos and len(c) < LIMIT]
    assert ended
    for b in ended:
        n = len(runs[1][0][b])
        assert runs[1][1][b].tolist() == [True] * n + [False] * (runs[1][1].shape[1] - n)
        assert runs[1][3][b, n - 1] < 0


def test_sampler_and_training_see_the_same_policy(models):
    """A token is drawn where its noise falls in the distribution that the training forward gives it."""
    model, prompt_ids, noise = models["llama"], prompts(8), noise_for(8)
    completion_ids = generate(model, prompt_ids, noise, temperature=0.7)
    batch = common.make_batch(prompt_ids, completion_ids, 0, "cpu")
    with torch.no_grad():
        hidden = lm.completion_hidden(model, batch)
        cumulative = (hidden @ lm.head_weight(model).T / 0.7).softmax(-1).cumsum(-1)
    for b, completion in enumerate(completion_ids):
        for t, token in enumerate(completion):
            low = cumulative[b, t, token - 1] if token else 0
            assert low - 1e-5 <= noise[b, t] <= cumulative[b, t, token] + 1e-5

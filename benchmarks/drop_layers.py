"""A smaller student with the tokenizer of its teacher: the model without some of its layers, to be healed by SFT.

    python benchmarks/drop_layers.py runs/smollm2 runs/smollm2-21 3 4 5 7 12 14 25 26 27
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def drop(model: str, folder: Path, layers: set[int]) -> None:
    """Writes the model without these layers; embeddings, norms and head stay."""
    import torch
    from transformers import AutoModelForCausalLM

    import lm

    whole = AutoModelForCausalLM.from_pretrained(lm.model_path(model), dtype=torch.float32)
    kept = [i for i in range(whole.config.num_hidden_layers) if i not in layers]
    whole.model.layers = whole.model.layers[:0].extend(whole.model.layers[i] for i in kept)
    whole.config.num_hidden_layers = len(kept)
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[i] for i in kept]
    whole.save_pretrained(folder)
    lm.load_tokenizer(model).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    drop(sys.argv[1], Path(sys.argv[2]), set(map(int, sys.argv[3:])))

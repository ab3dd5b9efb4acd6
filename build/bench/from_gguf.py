"""`python -m build.bench.from_gguf FILE FOLDER`: convert a GGUF file to a Hugging Face folder with transformers.

It serves engines that read nothing else.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from build.bench.rival_transformers import load_model


def main(file: str, folder: str) -> None:
    """Write the weights as float32, the config and the tokenizer."""
    gguf = Path(file)
    loaded = load_model(gguf, torch.float32)
    # It says that the weights are still those of the file, in which case they would not be saved.
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

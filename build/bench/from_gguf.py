"""`python -m build.bench.from_gguf FILE FOLDER`: a GGUF file as a Hugging Face folder, for engines that read nothing else; by transformers."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from build.bench.rival_transformers import load_model


def main(file: str, folder: str) -> None:
    """Write weights as float32, the config and the tokenizer."""
    gguf = Path(file)
    loaded = load_model(gguf, torch.float32)
    del (
        loaded.config.quantization_config
    )  # it says that the weights are still those of the file, and then they are not saved
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

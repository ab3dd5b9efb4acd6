"""A random Mistral small enough to compile in seconds.

`python -m tests.helpers.tiny OUT_FOLDER` writes it as a Hugging Face folder.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM

from runtime.errors import UserError, run_command

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")  # ids 0 to 4; the 256 bytes follow
DEFAULTS: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # ten times the usual value, so that the logits of random weights differ from each other
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "chat_template": CHAT_TEMPLATE,
    "model_max_length": 512,
}


def write_tiny_mistral(folder: Path, *, seed: int = 0, **config_changes: Any) -> None:
    """Save a random MistralForCausalLM and a byte tokenizer into `folder`.

    The folder must be absent or empty; it appears all at once. `config_changes` are arguments of `MistralConfig`;
    `dtype` (a torch dtype) is the dtype of the stored weights.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, expected a new folder; name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = config_changes.pop("dtype", torch.float32)
    config = MistralConfig(**(DEFAULTS | config_changes))
    with (
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix=".tiny-", dir=folder.parent) as temporary,
    ):
        torch.manual_seed(seed)
        model = MistralForCausalLM(config).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):  # ones by default, which would hide the loss of a norm's weight
                    parameter.uniform_(0.5, 1.5)
        written = Path(temporary) / "model"
        model.save_pretrained(written)
        byte_tokenizer(config.vocab_size).save(str(written / "tokenizer.json"))
        (written / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1))
        os.replace(written, folder)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE without merges: one token per byte, after `SPECIAL_TOKENS`.

    Ids beyond them decode to their own name.
    """
    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<extra_{i}>" for i in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names[:vocab_size])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def main() -> int:
    """Run the command; a folder that already exists stays as it is."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.tiny", description="Write a tiny random Mistral checkpoint."
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not (folder / "config.json").is_file():
        write_tiny_mistral(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    run_command(main)

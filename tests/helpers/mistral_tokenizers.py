"""Mistral's own tokenizer files of every version, opened by us and by mistral-common.

mistral-common ships tekken.json of version v3 only, so those of later versions are made from one.
"""

import atexit
import importlib.resources
import json
import shutil
import tempfile
from functools import cache, lru_cache
from pathlib import Path

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from export.checkpoints.mistral.tokenizer import mistral_tokenizer
from runtime.artifact.manifest import TokenizerSpec
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.tokenizer import open_tokenizer

DATA = Path(str(importlib.resources.files("mistral_common") / "data"))
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v3-tekken-240718": "tekken_240718.json",
    "v3-tekken-240911": "tekken_240911.json",
    "v7-tekken": "tekken_240911.json",
    "v11-tekken": "tekken_240911.json",
    "v13-tekken": "tekken_240911.json",
    "v15-tekken": "tekken_240911.json",
}
VERSIONS = {
    "v1": "v1",
    "v2": "v2",
    "v3": "v3",
    "v7": "v7",
    "v11": "v11-tekken",
    "v13": "v13-tekken",
    "v15": "v15-tekken",
}
# The names by rank in the published files of v11 and later; `None` is one that no version names.
SPECIALS = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", *[None] * 4, "[AUDIO]", "[BEGIN_AUDIO]", *[None] * 6,
    "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]",
]  # fmt: skip
WORDS = 20_000
UNLISTED_VERSIONS = ("v3", "v7")  # whose tekken.json lists no special tokens
EFFORT = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}


def version_of(name):
    return name.partition("-")[0]


@cache
def tekken_file(name, *, thinks=True):
    """The bytes of the tekken.json `name` of `FILES`; without `thinks`, it has no tokens for reasoning."""
    file = json.loads((DATA / FILES[name]).read_bytes())
    file["config"]["version"] = version_of(name)
    if version_of(name) != "v3":  # fewer words, so that it opens in a fifth of the time; those of v3 are whole
        file["config"]["default_vocab_size"] = file["config"]["default_num_special_tokens"] + WORDS
        file["vocab"] = file["vocab"][:WORDS]
    if version_of(name) not in UNLISTED_VERSIONS:
        names = [name for name in SPECIALS if thinks or name not in ("[THINK]", "[/THINK]")]
        file["special_tokens"] = [
            {"rank": i, "token_str": name or f"<SPECIAL_{i}>", "is_control": True} for i, name in enumerate(names)
        ]
    if version_of(name) == "v15":
        file["model_settings_builder"] = {"reasoning_effort": EFFORT, "json_schema": None}
    return json.dumps(file).encode()


def write(name, folder, *, thinks=True):
    """The file under the name that it has in a checkpoint, so that both read its version from it."""
    source = DATA / FILES[name]
    tekken = source.suffix == ".json"
    target = folder / ("tekken.json" if tekken else f"tokenizer.model{source.suffix}")
    target.write_bytes(tekken_file(name, thinks=thinks) if tekken else source.read_bytes())
    return target


def open_ours(folder, artifact):
    """The tokenizer in `folder` as a compile stores it in `artifact` and a box opens it, with its encoder."""
    source = mistral_tokenizer(folder, instruct=True)
    file = {"tokenizer.json": "tokenizer.json", "sentencepiece": "tokenizer.model"}[source.kind]
    (artifact / file).write_bytes(source.data)
    spec = TokenizerSpec(
        kind=source.kind,
        file=file,
        bos_id=source.bos_id,
        add_bos=source.add_bos,
        eos_ids=source.eos_ids,
        instruct=source.instruct,
        model_settings=source.model_settings,
    )
    tokenizer = open_tokenizer(spec, artifact)
    return tokenizer, open_conversation_encoder(spec, artifact, tokenizer)


@lru_cache(maxsize=4)  # a whole tekken.json takes seconds to open, and some hundred megabytes
def open_both(name, *, thinks=True):
    """Our tokenizer and encoder, and mistral-common's tokenizer, of the file `name` of `FILES`."""
    raw, artifact = (Path(tempfile.mkdtemp()) for _ in range(2))
    for folder in (raw, artifact):
        atexit.register(shutil.rmtree, folder)
    theirs = MistralTokenizer.from_file(write(name, raw, thinks=thinks))
    assert theirs.version == version_of(name)
    return *open_ours(raw, artifact), theirs

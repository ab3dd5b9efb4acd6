"""Rotary settings of every format: frequencies and factors are those of transformers, bit for bit, or are refused."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from export.checkpoints.gguf.rope import gguf_rotary
from export.checkpoints.huggingface.folder import describe
from export.checkpoints.hyperparameters import model_config
from export.checkpoints.rope_settings import mistral_rotary
from export.static_model.rope import inverse_frequencies, query_factors, rotation
from export.static_model.rope_scaling import attention_factor
from runtime.artifact.rotary import QueryScaling
from runtime.errors import UserError

CONFIG = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
EQUAL_MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SETTINGS = {
    "nothing": {},
    "empty rope_scaling": {"rope_scaling": {}, "rope_theta": 5e5},
    "empty rope_parameters": {"rope_parameters": {}, "rope_theta": 5e5},
    "empty both": {"rope_scaling": {}, "rope_parameters": {}},
    "null everything": {"rope_scaling": None, "rope_parameters": None, "rope_theta": 5e5, "rope_local": None},
    "empty rope_scaling before rope_parameters": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7e5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    "linear of old": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 1e5},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "llama3, all wavelengths": {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 1e3}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 1e6}},
    "yarn, two spellings": {"rope_parameters": {**YARN, "type": "yarn", "rope_theta": 1e6}},
    "yarn of old": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "yarn, finetuned": {"rope_scaling": {**YARN, "finetuned": True}},
    "yarn, attention_factor": {"rope_parameters": {**YARN, "attention_factor": 0.75}},
    "yarn, mscale": {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}},
    "yarn, equal mscale": {"rope_parameters": {**YARN, **EQUAL_MSCALE}},
    "yarn, mscale alone": {"rope_parameters": {**YARN, "mscale": 0.707}},
    "yarn, betas": {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "rope_theta": 1e5}},
    "yarn, not truncated": {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 8, "rope_theta": 1e5}},
    "yarn, factor null": {"rope_parameters": {**YARN, "factor": None}},
    "yarn, original left out": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, small factor": {"rope_parameters": {**YARN, "factor": 1.0}},
    "original beside the object": {"rope_parameters": {**YARN}, "original_max_position_embeddings": 32},
    "equal for both layer types": {
        "model_type": "ministral",
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "mixtral": {"model_type": "mixtral", "rope_parameters": {**YARN, "rope_theta": 1e6}},
    "llama": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
    "ministral 3, nothing said": {"model_type": "ministral3", "max_position_embeddings": 262144},
    "ministral 3": {
        "model_type": "ministral3",
        "rope_parameters": {**YARN, **EQUAL_MSCALE, "llama_4_scaling_beta": 0.1, "rope_theta": 1e6},
    },
}  # fmt: skip


def described(config, where="config.json"):
    """The model that a config.json describes."""
    found = describe(config, where)
    return model_config(found.family, found.values, {}, where, found.rotary), found.rotary


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_and_factors_are_those_of_transformers(tmp_path, name):
    config = CONFIG | SETTINGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    parameters = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    theirs.rope_parameters = parameters  # each layer type has the same here
    embedding = MistralRotaryEmbedding(theirs)
    model, rotary = described(config)
    assert model.rope_theta == parameters["rope_theta"]
    ours = inverse_frequencies(model.head_dim, model.rope_theta, rotary.scaling)
    assert np.array_equal(ours, embedding.inv_freq.numpy())
    assert attention_factor(rotary.scaling) == embedding.attention_scaling
    beta = parameters.get("llama_4_scaling_beta")
    assert rotary.queries == (
        QueryScaling(beta=beta, original_context=parameters["original_max_position_embeddings"]) if beta else None
    )


REFUSALS = {
    "has rope_type: 'dynamic', which is not supported; expected one of default, linear, llama3, yarn": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0}
    },
    "has rope_type: 'longrope'": {"rope_parameters": {"rope_type": "longrope", "short_factor": None}},
    "has the rotary setting short_factor: [1.0], which is not supported; expected some of rope_type": {
        "rope_parameters": {"rope_type": "yarn", "short_factor": [1.0]}
    },
    "has rope_type: 'su', which is not supported": {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
    "has a rotary factor of 4.0 and no rope_type": {"rope_scaling": {"factor": 4.0}},
    "has rope_interleaved: True, which is not supported; expected no key that begins with rope but": {
        "rope_interleaved": True
    },
    "has rope_local_base_freq: 10000.0": {"rope_local_base_freq": 1e4},
    "differ by layer type": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "has rotary settings that differ by layer type: {'full_attention': {'rope_theta': 1000000.0}, 'rope_theta'": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "rope_theta": 1e4}
    },
    "expected an object": {"rope_parameters": {"full_attention": None, "sliding_attention": None}},
    "do not fit together: Object missing required field `factor`": {"rope_scaling": {"type": "linear"}},
    "do not fit together: Object missing required field `low_freq_factor`": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}
    },
    "do not fit together: Expected `float` > 0.0 - at `$.factor`": {
        "rope_scaling": {"type": "linear", "factor": math.nan}
    },
    "has partial_rotary_factor: 0.5, which is not supported": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "has partial_rotary_factor: 0.25": {"partial_rotary_factor": 0.25},
    "has llama_4_scaling_beta: 0.1, which is not supported; expected none": {
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}
    },
    "gives a rope_theta of 1.0 with YaRN": {"rope_parameters": {**YARN, "rope_theta": 1.0}},
    "original_max_position_embeddings is malformed: Expected `int` >= 1": {
        "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 0}
    },
    "max_position_embeddings is malformed": {
        "rope_parameters": {**YARN, "factor": None},
        "max_position_embeddings": 10**400,
    },
    "do not fit together: Expected `float` > 0.0 - at `$.attention_factor`": {
        "rope_parameters": {**YARN, "factor": math.e, "mscale": 1.0, "mscale_all_dim": -10.0}
    },
    "which contradict each other; expected attention_factor: 1.0": {
        "rope_parameters": {**YARN, "apply_yarn_scaling": False}
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_the_layers_would_not_follow_is_refused(message):
    with pytest.raises(UserError) as caught:
        described(CONFIG | REFUSALS[message])
    assert message.lower() in str(caught.value).lower()


def test_queries_are_scaled_as_in_transformers():
    """At the edges of the original context, and at the last position of a long one."""
    scaling = QueryScaling(beta=0.1, original_context=16384)
    positions = torch.tensor([[0, 1, 16383, 16384, 32767, 32768, 262143, 2**24 - 1]])
    expected = get_llama_4_attn_scale(positions, scaling.beta, scaling.original_context)
    assert torch.equal(query_factors(positions, scaling), expected)
    assert torch.equal(query_factors(torch.tensor([[-7, -1]]), scaling), torch.ones(1, 1, 2, 1))


def test_cosines_and_sines_carry_the_attention_factor():
    frequencies = torch.from_numpy(inverse_frequencies(16, 1e4))
    plain, scaled = rotation(torch.arange(5)[None], frequencies), rotation(torch.arange(5)[None], frequencies, 1.25)
    assert all(torch.equal(one * 1.25, other) for one, other in zip(plain, scaled, strict=True))


def test_params_json_means_what_config_json_of_the_same_model_means():
    """Ministral 3 is published in both forms; `apply_scale: false` is an attention factor of 1."""
    params = {
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 128, "beta": 32, "alpha": 1, "apply_scale": False},
        "llama_4_scaling": {"original_max_position_embeddings": 128, "beta": 0.1},
    }
    _, expected = described(CONFIG | SETTINGS["ministral 3"])
    assert mistral_rotary(params, "params.json") == expected
    params["yarn"]["apply_scale"] = True
    _, plain = described(CONFIG | SETTINGS["yarn"])
    assert mistral_rotary(params, "params.json").scaling == plain.scaling
    assert mistral_rotary({"yarn": None, "llama_4_scaling": None}, "params.json") == described(CONFIG)[1]


HEADER = {"context_length": 512, "embedding_length": 64, "attention.head_count": 4, "rope.freq_base": 1e6}
GGUF_SETTINGS = {  # keys of a header -> the settings of transformers that mean the same to llama.cpp
    "nothing": ({}, {}),
    "dimensions": ({"rope.dimension_count": 16}, {}),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "no type": ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "old name": ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "factor 0": ({"rope.scaling.factor": 0.0}, {}),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
        YARN,
    ),
    "yarn without an original context": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "ministral 3": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "attention.temperature_scale": 0.1,
        },
        {**SETTINGS["ministral 3"]["rope_parameters"]},
    ),
}


@pytest.mark.parametrize("name", GGUF_SETTINGS)
def test_a_gguf_header_means_what_it_means_to_llama_cpp(name):
    keys, parameters = GGUF_SETTINGS[name]
    _, expected = described(CONFIG | {"model_type": "ministral3", "rope_parameters": {"rope_theta": 1e6, **parameters}})
    assert gguf_rotary(HEADER | keys, None, "x.gguf") == expected


def test_divisors_of_a_gguf_are_those_of_llama_3():
    """llama.cpp writes Llama 3's formula as a number for each pair of dimensions, and no other key."""
    plain = inverse_frequencies(16, 5e5)
    _, llama3 = described(CONFIG | SETTINGS["llama3"])
    expected = inverse_frequencies(16, 5e5, llama3.scaling)
    scaling = gguf_rotary(HEADER, (plain / expected).tolist(), "x.gguf").scaling
    assert np.allclose(inverse_frequencies(16, 5e5, scaling), expected, rtol=2**-22)  # two divisions, each rounded
    halved = gguf_rotary(HEADER | {"rope.scaling.factor": 2.0}, (plain / expected).tolist(), "x.gguf").scaling
    assert np.array_equal(inverse_frequencies(16, 5e5, halved), inverse_frequencies(16, 5e5, scaling) / 2)


GGUF_REFUSALS = {
    "has rope.scaling.type: 'longrope', which is not supported; expected one of none, linear, yarn": {
        "rope.scaling.type": "longrope"
    },
    "has rope.scaling.alpha: 4.0, which is not supported; expected no key that begins with rope. but": {
        "rope.scaling.alpha": 4.0
    },
    "has rope.dimension_count: 8, expected all 16 dimensions": {"rope.dimension_count": 8},
    "has rope.scaling.attn_factor: 2.0 without YaRN": {"rope.scaling.attn_factor": 2.0},
    "missing required field `original_context`": {"attention.temperature_scale": 0.1},
    "Expected `float` < 1000000000.0": {"rope.scaling.factor": math.inf},
    "Expected `float` > 0.0 - at `$.attention_factor`": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": math.e,
        "rope.scaling.yarn_log_multiplier": -10.0,
    },
}


@pytest.mark.parametrize("message", GGUF_REFUSALS)
def test_a_gguf_header_that_would_not_be_followed_is_refused(message):
    with pytest.raises(UserError) as caught:
        gguf_rotary(HEADER | GGUF_REFUSALS[message], None, "x.gguf")
    assert message in str(caught.value)
    with pytest.raises(UserError, match="has 7 divisors of rotary frequencies, expected 8"):
        gguf_rotary(HEADER, [1.0] * 7, "x.gguf")

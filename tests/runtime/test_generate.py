import json
import os
import re
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from runtime.decoding.options import GREEDY, SamplingOptions
from runtime.errors import UserError, run_command
from runtime.generate import main
from runtime.scheduling.completions import completions
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, ScriptedEngine, install

PROMPT = [3, 14, 15, 92, 6]


class TorchModel:
    """A transformers model with the interface of an engine of one slot."""

    same_bits_in_any_call = False
    slots, step_rows, chunks = 1, (1,), (64,)

    def __init__(self, model):
        self.model = model
        self.cache = DynamicCache()
        self.held = []

    def prefill(self, _slot, ids):
        self.held += ids
        with torch.no_grad():
            return self.model(torch.tensor([ids]), past_key_values=self.cache).logits[0, -1].numpy()

    def step(self, rows):
        return self.prefill(0, [row.token_id for row in rows])[None]

    def tokens(self, _slot):
        return self.held

    def least_rewind(self, _slot):
        return 0

    def room(self, _slot):
        return None


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        initializer_range=0.3,  # the default of 0.02 repeats one token forever
        eos_token_id=None,
        bos_token_id=None,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_greedy_ids_equal_those_of_transformers(model, penalty):
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = [
        step
        for _, step in completions(
            TorchModel(model),
            [PROMPT],
            SamplingOptions(repetition_penalty=penalty),
            max_tokens=24,
            eos_ids=(),
            logprobs=5,
        )
    ]
    assert [step.token_id for step in steps] == expected.sequences[0, len(PROMPT) :].tolist()
    assert [step.finish_reason for step in steps] == [None] * 23 + ["length"]
    for step, logits in zip(steps, expected.logits, strict=True):
        theirs = logits[0].double().log_softmax(-1).topk(5)
        assert [token_id for token_id, _ in step.logprobs] == theirs.indices.tolist()
        # fp32 logits of magnitude < 64 from two orders of summation: 1e-4 is 13 units in the last place (2**-17)
        np.testing.assert_allclose([logprob for _, logprob in step.logprobs], theirs.values.numpy(), atol=1e-4)


def greedy(engine, max_tokens=100, prompt=PROMPT):
    return [step for _, step in completions(engine, [prompt], GREEDY, max_tokens=max_tokens, eos_ids=(0, EOS))]


@pytest.mark.parametrize("eos", [0, EOS])
def test_any_end_of_sequence_is_the_last_step_and_is_not_fed(eos):
    engine = ScriptedEngine([[50, 51, eos, 52]])
    steps = greedy(engine)
    assert [(step.token_id, step.finish_reason) for step in steps] == [(50, None), (51, None), (eos, "stop")]
    assert engine.fed == [*PROMPT, 50, 51]


@pytest.mark.parametrize(("cache_len", "count"), [(len(PROMPT), 1), (len(PROMPT) + 2, 3)])
def test_full_caches_end_with_length(cache_len, count):
    engine = ScriptedEngine([[50] * 9], cache_len=cache_len)
    steps = greedy(engine)
    assert [step.finish_reason for step in steps] == [None] * (count - 1) + ["length"]
    assert engine.room(0) == 0


def test_what_cannot_run_is_refused():
    with pytest.raises(UserError, match="5 tokens, expected at most 4"):
        greedy(ScriptedEngine([[50]], cache_len=4))
    with pytest.raises(UserError, match="no tokens"):
        greedy(ScriptedEngine([[50]]), prompt=[])
    with pytest.raises(UserError, match="max_tokens is 0"):
        greedy(ScriptedEngine([[50]]), max_tokens=0)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run the command on a scripted engine; return status, stdout and stderr."""

    def run(engine, *flags, spec=SPEC):
        install(monkeypatch, tmp_path, engine, spec)
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda: main([str(tmp_path), *flags]))
        return exit_info.value.code, *capsys.readouterr()

    return run


def test_command_streams_the_continuation_and_one_line_of_timings(command):
    engine = ScriptedEngine([[*PIECES.encode("Paris, 東京 🎉."), EOS]])
    status, out, err = command(engine, "--prompt", "The capital is", "--threads", "3")
    assert (status, out) == (0, " Paris, 東京 🎉.\n")
    assert re.fullmatch(
        r"load .* s \| TTFT \d+ ms \| prompt 4 tokens at .* tok/s \| \d+ tokens at .* tok/s \| stop\n", err
    )
    assert engine.prefills == [[1, *PIECES.encode("The capital is")]]
    assert engine.threads == 3


def test_command_prints_one_json_object(command):
    reply = [*PIECES.encode("Paris"), EOS]
    status, out, err = command(ScriptedEngine([reply]), "--prompt", "The capital is", "--json", "--logprobs", "2")
    result = json.loads(out)
    timings = result.pop("timings")
    logprobs = result.pop("logprobs")
    assert (status, err) == (0, "")
    assert result == {"text": " Paris", "token_ids": reply, "prompt_tokens": 4, "finish_reason": "stop"}
    assert set(timings) == {"load_s", "ttft_s", "prefill_tok_s", "decode_tok_s"}
    assert all(seconds > 0 for seconds in timings.values())
    assert [len(step) for step in logprobs] == [2] * len(reply)
    assert [step[0][0] for step in logprobs] == reply


def test_command_stops_before_a_stop_string_and_at_a_limit(command):
    reply = PIECES.encode("one two three four")
    status, out, err = command(ScriptedEngine([reply]), "--prompt", "x", "--stop", "nothing", "--stop", " three")
    assert (status, out) == (0, " one two\n")
    assert err.endswith("| stop\n")
    status, out, err = command(ScriptedEngine([reply]), "--prompt", "x", "--max-tokens", "2")
    assert (status, out) == (0, " one two\n")
    assert err.endswith("| length\n")


def test_command_stops_at_a_control_token_that_a_stop_string_names(command):
    reply = [*PIECES.encode("one"), PIECES.piece_to_id("[INST]"), *PIECES.encode("two")]
    _, out, _ = command(ScriptedEngine([reply]), "--prompt", "x", "--stop", "[INST]", "--json")
    found = json.loads(out)
    assert (found["text"], found["finish_reason"], found["token_ids"]) == (" one", "stop", reply[:2])


def test_command_takes_ids_with_and_without_a_tokenizer(command):
    reply = [*PIECES.encode("Paris"), EOS]
    engine = ScriptedEngine([reply])
    _, out, _ = command(engine, "--prompt-ids", "7,8, 9")
    assert engine.prefills == [[7, 8, 9]]
    assert out.strip() == "Paris"
    _, out, _ = command(ScriptedEngine([reply]), "--prompt-ids", "7", "--max-tokens", "1", spec=None)
    assert out.split() == [str(reply[0])]
    _, out, _ = command(ScriptedEngine([reply]), "--prompt-ids", "7", "--max-tokens", "1", "--json", spec=None)
    assert json.loads(out)["text"] is None


def test_command_wraps_a_chat_in_the_template(command, tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}][INST] {{ m.content }}[/INST]{% endfor %}"
    )
    spec = msgspec.structs.replace(SPEC, chat_template="chat.jinja")
    engine = ScriptedEngine([[*PIECES.encode("Hello"), EOS]])
    status, out, _ = command(engine, "--chat", "--system", "Be brief.", "--prompt", "Hi", spec=spec)
    assert (status, out) == (0, "Hello\n")  # a reply begins a text: no leading space
    roles = [PIECES.encode("[system]"), PIECES.encode("[user]")]
    assert engine.prefills == [[1, *roles[0], 3, *PIECES.encode("Be brief."), 4, *roles[1], 3, *PIECES.encode("Hi"), 4]]


REPLIES = ([*PIECES.encode("Paris"), EOS], [*PIECES.encode("Rome"), EOS], PIECES.encode("one two three four"))


def test_several_prompts_run_one_after_the_other_under_headings(command):
    engine = ScriptedEngine(REPLIES)
    status, out, err = command(
        engine, "--prompt", "France", "--prompt", "It\naly", "--prompt", "x", "--max-tokens", "3"
    )
    assert (status, out) == (0, "> France\n Paris\n\n> It aly\n Rome\n\n> x\n one two three\n")
    # the token that begins a text is still in the slot
    assert engine.prefills == [[1, *PIECES.encode("France")], PIECES.encode("It\naly"), PIECES.encode("x")]
    assert engine.fed == [1, *engine.prefills[-1], *REPLIES[2][:2]]
    assert [line[:10] for line in err.splitlines()] == ["prompt 1: ", "prompt 2: ", "prompt 3: "]
    assert [line.rpartition("| ")[2] for line in err.splitlines()] == ["stop", "stop", "length"]


def test_several_prompts_give_a_json_list_of_what_each_gives_alone(command, tmp_path):
    prompts = ["France", "Italy", "x"]

    def objects(*flags, replies=REPLIES):
        status, out, _ = command(ScriptedEngine(replies), *flags, "--json", "--max-tokens", "3", "--logprobs", "2")
        assert status == 0
        result = json.loads(out)
        for each in result if isinstance(result, list) else [result]:
            assert all(seconds > 0 for seconds in each.pop("timings").values())
        return result

    alone = [objects("--prompt", text, replies=[reply]) for text, reply in zip(prompts, REPLIES, strict=True)]
    assert all(isinstance(each, dict) for each in alone)
    assert objects("--prompt", "France", "--prompt", "Italy", "--prompt", "x") == alone
    path = tmp_path / "prompts.txt"
    for mark in (b"", b"\xef\xbb\xbf"):  # as Windows writes it
        path.write_bytes(mark + b"France\r\n\nItaly\nx\n")
        assert objects("--prompts-file", str(path)) == alone
    path.write_text("France")
    assert objects("--prompts-file", str(path)) == alone[:1]  # a list, whatever the file holds


def test_each_prompt_draws_with_a_seed_of_its_own(command):
    class Undecided(ScriptedEngine):
        def _logits(self, _slot):
            return np.zeros(32768, np.float32)

        def step(self, rows):
            return self._logits(rows[0].slot)[None]

    def drawn(*flags):
        _, out, _ = command(Undecided([[0]] * 9), *flags, "--temperature", "1", "--max-tokens", "4", "--json")
        return json.loads(out)

    first, second = drawn("--prompt", "x", "--prompt", "x", "--seed", "7")
    assert first["token_ids"] != second["token_ids"]
    assert drawn("--prompt", "x", "--seed", "7")["token_ids"] == first["token_ids"]
    assert drawn("--prompt", "x", "--seed", "8")["token_ids"] == second["token_ids"]


def test_ctrl_c_keeps_what_the_prompts_before_gave(command):
    def interrupt(count):
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    flags = ("--prompt", "France", "--prompt", "x", "--prompt", "Italy")
    replies = [REPLIES[0], REPLIES[2], REPLIES[1]]
    status, out, err = command(ScriptedEngine(replies, on_step=interrupt), *flags)
    assert (status, out) == (130, "> France\n Paris\n\n> x\n one two three\n\n> Italy\n\n")
    assert [line.rpartition("| ")[2] for line in err.splitlines()] == ["stop", "interrupted", "interrupted"]
    status, out, _ = command(ScriptedEngine(replies, on_step=interrupt), *flags, "--json")
    assert status == 130
    assert [(each["text"], each["finish_reason"]) for each in json.loads(out)] == [
        (" Paris", "stop"),
        (" one two three", "interrupted"),
        ("", "interrupted"),
    ]


def test_no_prompt_runs_when_one_of_them_cannot(command):
    engine = ScriptedEngine([[50]], cache_len=20)
    status, out, err = command(engine, "--prompt", "x", "--prompt", "a" * 200)
    assert (status, out) == (2, "")
    assert "prompt 2 has " in err
    assert engine.prefills == []


def test_a_file_of_prompts_that_cannot_be_read_is_one_sentence(command, tmp_path):
    contents = {"absent": None, "empty": b" \n\n", "latin": "é\n".encode("latin-1")}
    messages = {
        "absent": "cannot be read as text: ",
        "empty": "holds no prompt, expected one per line",
        "latin": "name a UTF-8 file",
    }
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        status, out, err = command(ScriptedEngine([[50]]), "--prompts-file", str(tmp_path / name))
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path / name) in err
        assert messages[name] in err


@pytest.mark.parametrize("in_prefill", [True, False])
def test_ctrl_c_keeps_what_was_generated(command, in_prefill):
    def interrupt(_count=None):
        if _count in (None, 2):
            os.kill(os.getpid(), signal.SIGINT)

    reply = PIECES.encode("one two three four")
    hook = {"on_prefill": interrupt} if in_prefill else {"on_step": interrupt}
    status, out, err = command(ScriptedEngine([reply], **hook), "--prompt", "x")
    assert (status, out) == (130, "\n" if in_prefill else " one two\n")
    assert err.endswith("| interrupted\n")
    status, out, err = command(ScriptedEngine([reply], **hook), "--prompt", "x", "--json")
    assert (status, err) == (130, "")
    assert json.loads(out)["finish_reason"] == "interrupted"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt-ids", "1,x"], "--prompt-ids is '1,x', expected whole numbers"),
        (["--prompt", "x", "--top-k", "0"], "top_k is 0, expected at least 1"),
        (["--prompt", "x", "--chat"], "has no chat template"),
        (["--prompt-ids", "1", "--chat"], "pass --prompt, or leave --chat out"),
        (["--prompt", "x", "--system", "y"], "pass --chat with it"),
        (["--prompt", "x", "--logprobs", "3"], "pass both"),
        (["--prompt", "x", "--json", "--logprobs", "0"], "--logprobs is 0, expected at least 1"),
        (["--prompt", "x", "--stop", ""], "a stop string is empty"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0, expected at least 1"),
        (["--prompt", "x", "--speculate"], "has only steps of one: compile with shape.step_rows"),
        (["--prompt", "a" * 200], "expected at most 20"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(command, flags, message):
    status, out, err = command(ScriptedEngine([[50]], cache_len=20), *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_artifact_without_a_tokenizer_takes_ids_alone(command):
    for flags in (["--prompt", "x"], ["--prompt-ids", "1", "--stop", "x"]):
        status, _, err = command(ScriptedEngine([]), *flags, spec=None)
        assert status == 2
        assert "needs a tokenizer" in err


def test_import_stays_light():
    heavy = [
        "torch",
        "onnx",
        "transformers",
        "tvm",
        "tvm_ffi",
        "tokenizers",
        "sentencepiece",
        "jinja2",
        "runtime.engines.engine",
    ]
    code = f"import sys, runtime.generate; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

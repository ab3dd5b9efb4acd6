"""The demo on a scripted engine, and on a compiled artifact of three rows, compared with one prompt at a time."""

import json
import os
import signal

import pytest

from runtime import generate
from runtime.demo import DEFAULT_MAX_TOKENS, PROMPTS, main
from runtime.engines.engine import Engine
from runtime.errors import run_command
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, ScriptedEngine, install

REPLIES = ([*PIECES.encode("of patience"), EOS], [*PIECES.encode("for the win"), EOS], PIECES.encode("so " * 40))


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run the demo on a scripted engine with typed lines, Ctrl-C where a line is None.

    It returns status, stdout and stderr.
    """

    def run(engine, *flags, lines=(), spec=SPEC):
        install(monkeypatch, tmp_path, engine, spec)
        typed = iter(lines)

        def read(_prompt):
            for line in typed:
                if line is None:
                    raise KeyboardInterrupt
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read)
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda: main([str(tmp_path), *flags]))
        return exit_info.value.code, *capsys.readouterr()

    return run


def test_three_prompts_each_with_its_continuation(command):
    engine = ScriptedEngine(REPLIES)
    status, out, err = command(engine, "--threads", "3")
    assert (status, err) == (0, "")
    continuations = (
        " of patience",
        " for the win",
        PIECES.decode([*PIECES.encode("x"), *REPLIES[2][:DEFAULT_MAX_TOKENS]])[1:],
    )
    assert out == "".join(f"{prompt}{text}\n=====\n" for prompt, text in zip(PROMPTS, continuations, strict=True))
    assert engine.prompts == [[1, *PIECES.encode(prompt)] for prompt in PROMPTS]
    assert engine.threads == 3


def test_max_tokens(command):
    _, out, _ = command(ScriptedEngine(REPLIES), "--max-tokens", "1")
    assert out.split("\n")[::2][:2] == [f"{PROMPTS[0]} of", f"{PROMPTS[1]} for"]


def test_typed_prompts_are_continued_each_on_its_own_until_the_input_ends(command):
    engine = ScriptedEngine(REPLIES)
    status, out, _ = command(engine, "--interactive", lines=["This is a test", "  ", "A test"])
    assert status == 0
    assert out.partition("\n")[2] == "This is a test of patience\n=====\nA test for the win\n=====\n\n"
    assert engine.prompts == [[1, *PIECES.encode("This is a test")], [1, *PIECES.encode("A test")]]


def test_ctrl_c_ends_a_continuation_and_not_the_demo(command):
    def interrupt(count):
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    engine = ScriptedEngine([REPLIES[2], REPLIES[0]], on_step=interrupt)
    status, out, _ = command(engine, "--interactive", lines=["x", None, "y"], spec=SPEC)
    assert status == 0
    assert (
        out.partition("\n")[2] == "x so so so\n[interrupted]\n=====\n\n[interrupted]\n=====\ny of patience\n=====\n\n"
    )


def test_a_typed_prompt_that_does_not_fit_says_so_and_the_next_one_runs(command):
    status, out, _ = command(ScriptedEngine(REPLIES, cache_len=20), "--interactive", lines=["a" * 200, "x"])
    assert status == 0
    assert "expected at most 20" in out
    assert out.endswith("x of patience\n=====\n\n")


@pytest.mark.parametrize(
    ("flags", "spec", "message"),
    [([], None, "the demo needs a tokenizer"), (["--max-tokens", "0"], SPEC, "--max-tokens is 0, expected at least 1")],
)
def test_wrong_use_is_one_sentence(command, flags, spec, message):
    status, out, err = command(ScriptedEngine(REPLIES), *flags, spec=spec)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_an_artifact_of_three_slots_continues_all_three_side_by_side(compile_case, capsys, monkeypatch):
    """The ids are those that `runtime.generate` gives for each prompt alone."""
    artifact = str(compile_case("batched").artifact)
    texts = []
    for prompt in PROMPTS:
        assert generate.main([artifact, "--prompt", prompt, "--max-tokens", str(DEFAULT_MAX_TOKENS), "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    step, slots = Engine.step, []
    monkeypatch.setattr(Engine, "step", lambda self, rows: slots.append({row.slot for row in rows}) or step(self, rows))
    assert main([artifact]) == 0
    assert capsys.readouterr().out == "".join(
        f"{prompt}{text}\n=====\n" for prompt, text in zip(PROMPTS, texts, strict=True)
    )
    assert max(map(len, slots)) == 3

import io
import os
import signal

import msgspec
import pytest
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from runtime.chat import converse, main
from runtime.decoding.options import SamplingOptions
from runtime.scheduling.conversation import SEPARATOR, Conversation
from runtime.text.chat_template import ChatTemplate, TemplateEncoder
from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, ScriptedEngine, install, write_tokenizer

# the v3 template of Mistral's checkpoints, with a system message in the first turn
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[PREFIX] {{ m.content }}{% else %} {{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    write_tokenizer(folder)
    return open_tokenizer(SPEC, folder)


def conversation(engine, tokenizer, *, max_tokens=100, system=None):
    encoder = TemplateEncoder(ChatTemplate(TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}), tokenizer)
    return Conversation(engine, tokenizer, encoder, SamplingOptions(), max_tokens=max_tokens, system=system)


def chat(conversation, *lines):
    """Type the lines and return what was written."""
    lines, written = iter(lines), []

    def read():
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    converse(conversation, read, written.append)
    return "".join(written)


@pytest.fixture
def ids(tokenizer):
    return tokenizer.encode_rendered


def reply_of(ids, text):
    return [*ids(text), EOS]


def interrupt_at(step):
    return lambda n: os.kill(os.getpid(), signal.SIGINT) if n == step else None


def test_each_turn_feeds_only_what_is_new(tokenizer, ids):
    engine = ScriptedEngine([reply_of(ids, "Hello there!"), reply_of(ids, "I am fine 🎉."), reply_of(ids, "Bye")])
    talk = conversation(engine, tokenizer)
    assert chat(talk, "Hi", "How are you?", "", "See you") == "Hello there!\nI am fine 🎉.\nBye\n\n"
    first, second, third = engine.prefills
    assert first == ids("<s>[INST] Hi[/INST]")
    assert second == ids("</s>[INST] How are you?[/INST]")
    assert third == ids("</s>[INST] See you[/INST]")
    whole = "<s>[INST] Hi[/INST] Hello there!</s>[INST] How are you?[/INST] I am fine 🎉.</s>[INST] See you[/INST] Bye"
    assert engine.fed == ids(whole)


def test_penalties_count_the_whole_conversation(tokenizer, ids):
    """The reply would be the very word of the turn before, had that not been made less likely."""
    hello, fine = ids("x Hello")[-1], ids("x Fine")[-1]
    engine = ScriptedEngine([[hello, EOS], [hello, EOS]])
    plain = engine._logits

    def with_a_second_best(slot):
        logits = plain(slot)
        logits[fine] = 80
        return logits

    engine._logits = with_a_second_best
    encoder = TemplateEncoder(ChatTemplate(TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}), tokenizer)
    options = SamplingOptions(repetition_penalty=1.5)
    talk = Conversation(engine, tokenizer, encoder, options, max_tokens=1)
    assert [step.token_id for text in ("Hi", "Again") for step in talk.say(text)] == [hello, fine]


def test_a_reply_that_reads_back_as_other_ids_is_fed_anew(tokenizer, ids):
    # letter by letter, as no tokenizer would split it
    spelled = [*ids("H"), *(ids(f"x{letter}")[-1] for letter in "ello"), EOS]
    assert spelled != reply_of(ids, "Hello")
    engine = ScriptedEngine([spelled, reply_of(ids, "Fine")])
    assert chat(conversation(engine, tokenizer), "Hi", "How?").startswith("Hello\n")
    # what is the same up to there is not fed again
    same = len(ids("<s>[INST] Hi[/INST] H")) - 1
    assert engine.prefills[1] == ids("<s>[INST] Hi[/INST] Hello</s>[INST] How?[/INST]")[same:]


def test_reset_starts_anew_with_the_system_message(tokenizer, ids):
    engine = ScriptedEngine([reply_of(ids, "Hello"), reply_of(ids, "Hello")])
    written = chat(conversation(engine, tokenizer, system="Be brief."), "Hi", "/reset", "Hi", "/exit", "never read")
    assert written == "Hello\n[the conversation starts over]\nHello\n"
    prompt = ids("<s>[PREFIX] Be brief.[INST] Hi[/INST]")
    assert engine.prefills == [prompt, prompt[-1:]]  # all but its last token is still there
    assert engine.fed == ids("<s>[PREFIX] Be brief.[INST] Hi[/INST] Hello")


def test_a_limit_is_told_and_the_cut_reply_stays_in_the_cache(tokenizer, ids):
    engine = ScriptedEngine([reply_of(ids, "one two three"), reply_of(ids, "four")])
    written = chat(conversation(engine, tokenizer, max_tokens=2), "Count", "Go on")
    assert written.startswith("one two\n[the reply has reached 2 tokens, the limit that --max-tokens sets]\n")
    assert engine.prefills[1] == ids("one two</s>[INST] Go on[/INST]")[1:]  # "two" was generated but never fed


def test_no_room_is_told_in_one_sentence_and_reset_helps(tokenizer, ids):
    first = ids("<s>[INST] Hi[/INST]")
    engine = ScriptedEngine([reply_of(ids, "Hello"), reply_of(ids, "Hello")], cache_len=len(first) + 4)
    written = chat(conversation(engine, tokenizer), "Hi", "one two three four", "/reset", "Hi")
    tokens = len(ids("<s>[INST] Hi[/INST] Hello</s>[INST] one two three four[/INST]"))
    sentence = f"[the conversation has {tokens} tokens, and a slot holds {len(first) + 4}: type /reset to start over"
    assert written.split("\n")[2].startswith(sentence)
    assert written.endswith("[the conversation starts over]\nHello\n\n")
    assert engine.prefills == [first, first[-1:]]


def test_a_message_that_did_not_fit_is_not_part_of_the_conversation(tokenizer, ids):
    engine = ScriptedEngine([reply_of(ids, "Hello"), reply_of(ids, "Hello")], cache_len=20)
    chat(conversation(engine, tokenizer), "Hi", "word " * 30, "And?")
    assert engine.prefills[1] == ids("</s>[INST] And?[/INST]")


def test_a_cache_that_fills_up_ends_the_reply(tokenizer, ids):
    first = ids("<s>[INST] Count[/INST]")
    engine = ScriptedEngine([reply_of(ids, "one two three four")], cache_len=len(first) + 1)
    written = chat(conversation(engine, tokenizer), "Count")
    assert written.startswith("one two\n[the slot is full: type /reset to start over")


def test_ctrl_c_ends_the_reply_after_the_step_and_keeps_the_caches(tokenizer, ids):
    engine = ScriptedEngine([reply_of(ids, "one two three four"), reply_of(ids, "Fine")], on_step=interrupt_at(2))
    before = signal.getsignal(signal.SIGINT)
    written = chat(conversation(engine, tokenizer), "Count", "Why?")
    assert written.startswith("one two three\n[interrupted]\n")
    assert engine.prefills[1] == ids("one two three</s>[INST] Why?[/INST]")[2:]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_prefill_drops_the_message(tokenizer, ids):
    interrupts = iter([True, False])

    def on_prefill():
        if next(interrupts):
            os.kill(os.getpid(), signal.SIGINT)

    engine = ScriptedEngine([reply_of(ids, "Fine")], on_prefill=on_prefill)
    written = chat(conversation(engine, tokenizer), "A long text", "Hi")
    assert written.startswith("\n[interrupted before the reply began: the message is dropped]\nFine\n")
    assert engine.fed == ids("<s>[INST] Hi[/INST] Fine")


def test_an_interrupt_within_a_step_keeps_what_was_fed_before(tokenizer, ids):
    def fail(n):
        if n == 2:
            raise KeyboardInterrupt  # as a second Ctrl-C, or one inside the model, would

    engine = ScriptedEngine([reply_of(ids, "one two three four"), reply_of(ids, "F")], on_step=fail)
    written = chat(conversation(engine, tokenizer), "Count", "Why?")
    assert written.startswith("one two\n[interrupted]\n")
    assert (
        engine.prefills[1] == ids("<s>[INST] Count[/INST] one two</s>[INST] Why?[/INST]")[len(engine.prefills[0]) + 1 :]
    )


def test_ctrl_c_at_the_prompt_asks_again(tokenizer):
    answers = iter([KeyboardInterrupt, "/exit"])

    def read():
        answer = next(answers)
        if answer is KeyboardInterrupt:
            raise KeyboardInterrupt
        return answer

    written = []
    converse(conversation(ScriptedEngine([]), tokenizer), read, written.append)
    assert written == ["\n"]


def test_command_talks_through_stdin_and_stdout(monkeypatch, tmp_path, capsys, ids):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    engine = ScriptedEngine([reply_of(ids, "Hello")])
    install(monkeypatch, tmp_path, engine, msgspec.structs.replace(SPEC, chat_template="chat.jinja"))
    lines = iter(["Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    assert main([str(tmp_path), "--system", "Be brief.", "--seed", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.split("\n")[1:] == ["Hello", ""]
    assert engine.prefills == [ids("<s>[PREFIX] Be brief.[INST] Hi[/INST]")]


def test_a_line_that_is_not_utf8_is_refused_and_the_chat_goes_on(monkeypatch, tmp_path, capsys, ids):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    engine = ScriptedEngine([reply_of(ids, "Hello")])
    install(monkeypatch, tmp_path, engine, msgspec.structs.replace(SPEC, chat_template="chat.jinja"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\nHi\n"), encoding="utf-8"))
    assert main([str(tmp_path), "--temperature", "0"]) == 0
    written = capsys.readouterr().out
    assert "[the text is not valid Unicode at character" in written
    assert "Hello" in written


STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) or not m.content %}"
    "{{ raise_exception('roles must alternate, and no message may be empty') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)


def strict_encoder(tokenizer):
    return TemplateEncoder(ChatTemplate(STRICT, {"bos_token": "<s>", "eos_token": "</s>"}), tokenizer)


def v3_encoder(tokenizer):
    return InstructEncoder("v3", tokenizer)


@pytest.mark.parametrize("encoder", [strict_encoder, v3_encoder])
@pytest.mark.parametrize("empty", [[EOS], [3, 4, EOS], [0]], ids=["nothing", "control tokens", "another end"])
def test_an_empty_reply_is_left_out_and_every_later_turn_is_answered(tokenizer, ids, encoder, empty):
    engine = ScriptedEngine([empty, empty, reply_of(ids, "Hello"), empty, reply_of(ids, "Fine")])
    talk = Conversation(engine, tokenizer, encoder(tokenizer), SamplingOptions(), max_tokens=9)
    written = chat(talk, "One", "Two", "Three", "Four", "Five")
    assert written == "\n\nHello\n\nFine\n\n"
    messages = [
        {"role": "user", "content": "One\n\nTwo\n\nThree"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Four\n\nFive"},
    ]
    assert engine.fed == [*encoder(tokenizer).encode(messages), *ids("Fine")]


def test_mistral_common_joins_messages_in_a_row_in_the_same_way(tokenizer):
    request = ChatCompletionRequest(messages=[UserMessage(content="One"), UserMessage(content="Two")])
    theirs = MistralTokenizer.v3().encode_chat_completion(request).tokens
    assert v3_encoder(tokenizer).encode([{"role": "user", "content": "One" + SEPARATOR + "Two"}]) == theirs


def test_a_reply_that_was_interrupted_before_its_text_is_left_out(tokenizer, ids):
    start = PIECES.encode("\U0001fae0")[1:3]  # bytes of a character that is not whole
    engine = ScriptedEngine([[*start, EOS], reply_of(ids, "Fine")], on_step=interrupt_at(1))
    written = chat(conversation(engine, tokenizer), "One", "Two")
    assert written.startswith("\n[interrupted]\nFine\n")
    assert engine.prompts[1] == ids("<s>[INST] One\n\nTwo[/INST]")


def test_reset_forgets_what_was_not_answered(tokenizer, ids):
    engine = ScriptedEngine([[EOS], reply_of(ids, "Fine")])
    chat(conversation(engine, tokenizer), "One", "/reset", "Two")
    assert engine.prompts[1] == ids("<s>[INST] Two[/INST]")


def test_a_file_with_a_byte_order_mark_is_read_as_without(tokenizer, ids):
    engine = ScriptedEngine([reply_of(ids, "Hello")])
    chat(conversation(engine, tokenizer), "\ufeffHi")
    assert engine.prefills == [ids("<s>[INST] Hi[/INST]")]

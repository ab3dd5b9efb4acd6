"""A server under load: what the client notes, what is compared with what, and the goals."""

import asyncio
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from build.bench import served_process
from build.bench.served_process import Served, llama_command, reason_without_llama
from build.bench.serving_load import CoTenant, LevelSpeed, LoadWorkload, measure_level, steady_speed
from build.bench.serving_report import Rounds, draw_load, engine_ratios, goals_table, levels_table
from build.bench.streaming_client import Stream, completion_body, stream
from runtime.benchmarks.spread import Spread
from runtime.errors import UserError
from runtime.server.running.served_model import open_served_model
from runtime.text.instruct import InstructEncoder
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.scripted_engine import EOS, PIECES, SPEC, VOCAB, ScriptedEngine, write_tokenizer
from tests.helpers.serving import NAME, running, served


def level(clients, decode, first_byte=0.01):
    return LevelSpeed(clients, decode - 1, decode, (first_byte,), (0.1, 0.2), (0.01, 0.03))


def test_the_client_notes_each_token_and_a_refusal_is_an_error(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = open_tokenizer(SPEC, tmp_path)
    model = ScriptedEngine(itertools.repeat([*PIECES.encode("Bonjour, tout le monde"), EOS]))
    model.manifest = SimpleNamespace(model=SimpleNamespace(generates=True, head="causal_lm", vocab_size=VOCAB))
    with running(lambda: served(model, tokenizer, InstructEncoder("v3", tokenizer))) as server:
        found = asyncio.run(stream(Served(server.port, NAME, 0), completion_body(NAME, [5, 6], 4), 4))
        assert found.count == 4
        assert len(found.tokens) == 4
        assert found.sent < found.first_byte <= found.tokens[0]
        with pytest.raises(UserError, match="404"):
            asyncio.run(stream(Served(server.port, NAME, 0), completion_body("other", [5, 6], 4), 4))


def test_every_client_gets_its_answers_from_a_real_server(compile_case):
    workload = LoadWorkload((1, 3), prompt=6, tokens=5, requests=2, vocab_size=300, longest_prompt=30)
    with running(lambda: open_served_model(compile_case("int8").artifact, 1, 0)) as server:
        found = asyncio.run(measure_level(Served(server.port, NAME, 0), 3, workload, workload.prompts()))
    assert len(found.ttft_s) == len(found.first_byte_s) == 6
    assert 0 < len(found.gaps_s) <= 6 * 4
    assert found.tok_s > 0


def test_the_steady_speed_leaves_out_prompts_and_ends():
    early = Stream(0.0, tokens=[1.0, 2.0, 3.0, 4.0], count=4)
    late = Stream(0.0, tokens=[2.0, 3.0, 4.0, 5.0], count=4)
    assert steady_speed([early, late]) == 2.0  # two tokens of each between 2 and 4
    assert math.isnan(steady_speed([Stream(0.0, tokens=[1.0, 2.0], count=2), Stream(0.0, tokens=[3.0, 4.0], count=2)]))


def test_ratios_are_of_figures_of_the_same_round_and_goals_are_named():
    rounds = Rounds(0.1, engine={4: [100.0, 50.0]}, co_tenants=[CoTenant(0.02, 0.119, 4096), CoTenant(0.02, 0.2, 4096)])
    for decode in (98.0, 40.0):
        rounds.add("ours", level(4, decode))
        rounds.add("ours", level(8, decode, first_byte=0.06))
    assert engine_ratios(rounds, "ours") == {4: Spread.of([0.98, 0.8])}
    cells = [list(column.cells) for column in goals_table(rounds, "ours").columns]
    assert cells[1] == ["0.89 (0.85-0.94)", "10.0", "60.0", "119", "200"]
    assert cells[3] == ["missed", "reached", "missed", "reached", "missed"]
    assert [next(iter(column.cells)) for column in levels_table(rounds).columns][:2] == ["ours", "4"]


def test_the_plot_shows_every_server(tmp_path):
    rounds = Rounds(0.1, engine={1: [30.0], 4: [60.0]})
    for server, clients in itertools.product(("ours", "llama-server"), (1, 4)):
        rounds.add(server, level(clients, 50.0))
    draw_load(rounds, tmp_path / "load.svg")
    assert "llama-server" in (tmp_path / "load.svg").read_text()


def test_llama_server_gets_room_for_each_sequence_and_is_left_out_where_it_cannot_run(monkeypatch):
    command = llama_command(Path("a.gguf"), 8080, 4, 2048, 2)
    assert command[command.index("--ctx-size") + 1] == "8192"
    assert command[command.index("--parallel") + 1] == "4"
    assert reason_without_llama(None) == reason_without_llama(Path("folder")) == "the weights are no GGUF file"
    monkeypatch.setattr(served_process.shutil, "which", lambda _name: None)
    assert "not installed" in reason_without_llama(Path("a.gguf"))

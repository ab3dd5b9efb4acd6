"""Parts of the bench: `--only` selects them, and their tables and figures follow from what the box reports."""

import json

import msgspec
import pytest

from build.bench import __main__ as module
from build.bench import parts
from build.bench.parts import PARTS, PartOptions, PartResult
from runtime.benchmarks.second_turn import SecondTurn, SecondTurnReport
from runtime.benchmarks.speculation import SpeculationReport, TaskSpeed
from runtime.benchmarks.spread import Spread
from runtime.errors import UserError

HALF = Spread(0.4, 0.5, 0.6)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("name: x\nfrontend: {checkpoint: none.gguf}\nbackend: {target: llvm}\n")
    return tmp_path / "x.yaml"


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ([], ["speeds", *PARTS]),
        (["--only", "sequences"], ["sequences"]),
        (["--only", "speculation,second-turn"], ["second-turn", "speculation"]),
        (["--only", "int8,sequences"], ["speeds", "sequences"]),
    ],
)
def test_only_selects_parts(config, monkeypatch, capsys, only, expected):
    ran = []

    def part(name):
        def run(job, options):
            ran.append(name)
            assert (job.path, options) == (config, PartOptions(rounds=2, steps=4, threads=1))
            return PartResult([f"table of {name}"], {"name": name})

        return run

    monkeypatch.setattr(module, "PARTS", {name: part(name) for name in PARTS})
    monkeypatch.setattr(module, "_compare_speeds", lambda job, args, path, paper: ran.append("speeds"))
    assert module.main([str(config), *only, "--rounds", "2", "--tokens", "4", "--threads", "1"]) == 0
    assert ran == expected
    printed = capsys.readouterr().out
    for name in set(expected) & set(PARTS):
        assert f"table of {name}\n" in printed
        assert json.loads(config.parent.joinpath(f"out/bench/x-{name}.json").read_text()) == {"name": name}


def test_what_is_neither_a_part_nor_a_contender_is_refused(config):
    with pytest.raises(UserError, match=r"--only names 'sequence', expected some of .*second-turn"):
        module.main([str(config), "--only", "sequence"])


@pytest.fixture
def box(monkeypatch):
    """Commands that the box was given, whose replies are `box.reports` in order."""
    commands = []

    def json_of(command, what):
        commands.append(command)
        return msgspec.json.encode(reports.pop(0))

    reports = []
    monkeypatch.setattr(parts, "json_of", json_of)
    monkeypatch.setattr(parts, "_compiled", lambda job, changes: "+".join(["artifact", *changes]))
    return commands, reports


OPTIONS = PartOptions(rounds=3, steps=32, threads=2)


def test_second_turns_are_measured_as_configured_and_in_a_window(box):
    commands, reports = box
    reports += [SecondTurnReport(512, wrapped, (SecondTurn(4, HALF, HALF, HALF),)) for wrapped in (False, True)]
    result = parts.second_turn(None, OPTIONS)
    assert [command[3] for command in commands] == ["artifact", "artifact+frontend.overrides={sliding_window: 256}"]
    assert commands[0][-2:] == ["--second-turn", "1,4,16,64,256"]
    assert [table.splitlines()[0] for table in result.tables] == [
        "second turn, as configured, behind a conversation of 512 tokens",
        "second turn, with a window of 256, behind a conversation of 512 tokens, in rings that have wrapped",
    ]


def test_speculation_is_that_of_the_config(box):
    commands, reports = box
    reports.append(SpeculationReport((TaskSpeed("copied", 96, HALF, HALF, HALF, 2.5, 1.0),)))
    result = parts.speculation(None, OPTIONS)
    assert commands[0][3] == "artifact"
    assert commands[0][-1] == "--speculation"
    assert "0.50 (0.40-0.60)" in result.tables[0]
    assert result.figures.tasks[0].tokens_per_step == 2.5

"""The command's refusals, its tables and plots, and its budget."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from build.tools.quality.__main__ import OVER_BUDGET, OWN, check_budget, write_report
from build.tools.quality.figures import Estimate, Quality
from build.tools.quality.report import by_text, draw_errors, draw_quality, tables
from build.tools.variants import VARIANTS
from export.stage import ROOT
from runtime.artifact.schemes import SCHEMES

WIDTH = 120  # columns that a table may take


def quality(text, variant, perplexity, divergence=0.0, size=4_000_000):
    return Quality(
        text=text,
        variant=variant,
        tokens=8192,
        perplexity=Estimate(perplexity, 0.25),
        log_ratio=Estimate(0.00499 if divergence else 0.0, 0.0008),
        divergence=Estimate(divergence, 0.00012),
        divergence_percentiles={"50": 0.002, "90": 0.009, "99": 0.04, "99.9": 0.2},
        divergence_maximum=0.5,
        delta_p=Estimate(-0.018, 0.021),
        delta_p_rms=Estimate(1.54, 0.08),
        same_top=Estimate(95.4, 0.23),
        bits_per_byte=0.9876,
        weight_bytes=size,
    )


RESULTS = [
    quality("prose", "fp32 of Q4_1, Q8_0", 20.0),
    quality("prose", f"int8_dynamic ({OWN})", 20.1, 0.01, 1_000_000),
    quality("code", "fp32 of Q4_1, Q8_0", 5.0),
    quality("code", f"int8_dynamic ({OWN})", 5.05, 0.02, 1_000_000),
]


@pytest.mark.parametrize(
    ("budget", "status", "said"),
    [
        (None, 0, []),
        (1.1, 0, ["+0.500 % of perplexity on prose, within", "+1.000 % of perplexity on code, within the 1.1 %"]),
        (0.6, OVER_BUDGET, ["+0.500 % of perplexity on prose, within", "on code, more than the 0.6 %"]),
        (0.4, OVER_BUDGET, ["on prose, more than", "on code, more than"]),
    ],
)
def test_budget_is_of_the_configs_own_scheme_on_every_text(budget, status, said, capsys):
    assert check_budget(RESULTS, budget) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_tables_have_every_figure():
    predicted, differs = tables(by_text(RESULTS)["prose"])
    cells = {column.header: list(column.cells) for column in predicted.columns}
    assert cells == {
        "weights": ["fp32 of Q4_1, Q8_0", "int8_dynamic (this config)"],
        "PPL": ["20.000 ± 0.25", "20.100 ± 0.25"],
        "ln(PPL/base)": ["", "+0.00499 ± 0.00080"],
        "bits/byte": ["0.9876", "0.9876"],
        "mean Δp, %": ["", "-0.02 ± 0.02"],
        "RMS Δp, %": ["", "1.54 ± 0.08"],
        "size": ["4.0 MB", "1.0 MB"],
    }
    cells = {column.header: list(column.cells) for column in differs.columns}
    assert cells == {
        "weights": ["int8_dynamic (this config)"],
        "mean": ["0.01000 ± 0.00012"],
        "50 %": ["0.00200"],
        "90 %": ["0.00900"],
        "99 %": ["0.04000"],
        "99.9 %": ["0.20000"],
        "maximum": ["0.50000"],
        "same top-1, %": ["95.40 ± 0.23"],
    }
    assert "fp32 of Q4_1, Q8_0" in str(differs.title)


def test_tables_fit_the_page():
    console = Console(width=1000)
    assert all(console.measure(table).maximum <= WIDTH for table in tables(RESULTS[:2]))


def test_the_report_is_written_for_every_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_report("demo", RESULTS, ["Q4_1", "Q8_0"], {"int4": {"wqkv": [0.1, 0.2], "output": [0.05]}})
    written = json.loads((tmp_path / "out/quality/demo.json").read_text())
    assert written["stored"] == ["Q4_1", "Q8_0"]
    assert [(row["text"], row["perplexity"]["value"]) for row in written["quality"]] == [
        ("prose", 20.0),
        ("prose", 20.1),
        ("code", 5.0),
        ("code", 5.05),
    ]
    assert written["quality"][1]["divergence_percentiles"]["99.9"] == 0.2
    assert written["layer_errors"]["int4"]["output"] == [0.05]
    out = capsys.readouterr().out
    assert "prose, 8,192 tokens scored" in out
    assert "code, 8,192 tokens scored" in out
    assert "figures and plots in out/quality: demo.json, demo.svg, demo-layers.svg" in out


def test_plots_are_drawn(tmp_path):
    draw_quality(RESULTS, tmp_path / "a.svg")
    draw_errors({"int4": {"wqkv": [0.1, 0.2], "output": [0.05]}}, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert all(name in drawn for name in ("this config", "prose", "code"))
    assert "wqkv" in (tmp_path / "b.svg").read_text()


def test_every_scheme_is_a_variant():
    named = {
        setting.removeprefix("quantize.scheme=")
        for sets in VARIANTS.values()
        for setting in sets
        if setting.startswith("quantize.scheme=")
    }
    assert named == set(SCHEMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--set", "backend.target=cuda"],
            "backend.target is cuda, expected a target that runs here; add --set backend.target=llvm",
        ),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read: No such file or directory"),
        (["--context", "2"], "--context is 2, expected at least 4 tokens"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message):
    command = [sys.executable, "-m", "build.tools.quality", "yaml/tiny.yaml", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr

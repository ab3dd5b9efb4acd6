"""The findings of `runtime.gpucheck` as tables in Markdown, as docs/cuda.md has them."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from runtime.benchmarks import sequences
from runtime.gpu_check.findings import Findings
from runtime.gpu_check.report import HEADING, check_rows, kernel_cells, speed_rows
from runtime.gpu_check.torch_process import TransformersTimes

Row = Sequence[str]


def markdown(findings: Findings) -> str:
    """All of the findings."""
    kernels = [
        _section(f"Kernels of {folder}", HEADING, [kernel_cells(row, findings.limits) for row in model.kernels])
        for folder, model in findings.models.items()
    ]
    return "\n\n".join(filter(None, [summary(findings), *kernels])) + "\n"


def summary(findings: Findings) -> str:
    """All of the findings but the kernels one by one."""
    models = findings.models.items()
    speeds = [
        (folder, *row)
        for folder, model in models
        for row in (speed_rows(model, findings.limits, findings.rivals(folder)) if findings.gpu else ())
    ]
    together = [(folder, *row) for folder, model in models if model.sequences for row in model.sequences.rows()]
    checks = [(folder, *row) for folder, model in models for row in check_rows(model.checks)]
    tools = [(r.tool, r.folder, str(r.kernels), r.summary, "yes" if r.ok else "WRONG") for r in findings.sanitizer]
    sections = (
        _section("Whole models", ("model", "", "tok/s", "time", "beside others"), speeds),
        _section("Several sequences", ("model", *sequences.HEADING), together),
        _section("transformers and torch", ("model", "", "theirs"), list(_rivals(findings))),
        _section("Checks of whole models", ("model", "check", "found", "expected", "ok"), checks),
        _section("compute-sanitizer", ("tool", "model", "kernels", "found", "ok"), tools),
        _section("Not measured", ("of", "what", "why"), list(_unmeasured(findings))),
    )
    return "\n\n".join(filter(None, (_machine(findings), *sections)))


def _machine(findings: Findings) -> str:
    if findings.gpu is None:
        return f"No GPU has answered, on {findings.date}."
    gpu, peak = findings.gpu, findings.limits.peak_tflop_s
    products = "" if peak is None else f", torch's fp16 products {peak:,.0f} TFLOP/s"
    copy = f"A copy reached {gpu.copy_gb_s:,.0f} GB/s{products}."
    return f"{gpu.name} with driver {gpu.driver}, on {findings.date}. {copy}"


def _rivals(findings: Findings) -> Iterator[Row]:
    if findings.torch:
        for graph, seconds in findings.torch.seconds.items():
            yield graph, "torch's products alone", f"{seconds * 1e3:,.2f} ms"
    seen: list[TransformersTimes] = []  # several folders hold the same model
    for folder, times in findings.transformers.items():
        if times in seen:
            continue
        seen.append(times)
        kind = "a step of transformers' CUDA graph" if times.graph else "a step of transformers without a graph"
        for context, seconds in times.decode.items():
            yield folder, f"{kind}, context {context}", f"{seconds * 1e3:,.2f} ms"
        for tokens, seconds in times.ttft.items():
            yield folder, f"transformers' first token after {tokens}", f"{seconds * 1e3:,.2f} ms"


def _unmeasured(findings: Findings) -> Iterator[Row]:
    """Rows of parts of one folder or tool that share their reason, and of lengths that a model's caches do not hold."""
    for (of, reason), group in groupby(findings.unmeasured.items(), key=lambda item: (item[0].of, item[1])):
        yield of, ", ".join(part.what for part, _ in group), f"{reason.text}{' WRONG' if reason.wrong else ''}"
    for folder, model in findings.models.items():
        skipped = (
            *(model.speeds.skipped if model.speeds else ()),
            *(model.sequences.skipped if model.sequences else ()),
        )
        yield from ((folder, "speed", text) for text in skipped)


def _section(title: str, heading: Row, rows: Sequence[Row]) -> str:
    """A table under a title; nothing without rows."""
    if not rows:
        return ""
    lines = [heading, ["---"] * len(heading), *rows]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines]
    return "\n".join([f"### {title}", "", *table])

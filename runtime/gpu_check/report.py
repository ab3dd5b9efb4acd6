"""The results of `runtime.gpucheck` for one folder: rows of tables, and JSON.

Kernels are compared with this GPU's limits, whole models with torch and transformers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite, prod

from runtime.artifact.manifest import KernelCall
from runtime.bench import Speeds
from runtime.benchmarks.sequences import SequencesReport
from runtime.gpu_check.torch_process import TorchTimes, TransformersTimes
from runtime.verify import Check

FUSED = {"norm_eps": "norm", "swiglu": "SwiGLU", "residual": "residual"}  # added to a product by `label_of`
HEADING = ("error/bound", "us", "GB/s", "TFLOP/s", "share", "kernel", "computes", "functions")
WIDTHS = (12, 10, 8, 9, 12, 20, 44, 0)


@dataclass(frozen=True)
class KernelRow:
    """One kernel: its largest error as a share of the bound, and its speed.

    `cold` says that its weights and caches came from memory, not from a cache.
    """

    kernel: str
    label: str
    graphs: str
    error: float
    seconds: float
    bytes: int
    flops: int
    cold: bool

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= 1

    @property
    def gb_s(self) -> float:
        """GB/s of the minimum memory traffic."""
        return self.bytes / self.seconds / 1e9

    @property
    def tflop_s(self) -> float:
        """TFLOP/s."""
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class Gpu:
    """The GPU and its driver, and GB/s of a copy on it, counting bytes read and written."""

    name: str
    driver: str
    copy_gb_s: float


@dataclass(frozen=True)
class GpuLimits:
    """The speeds that this GPU reaches.

    GB/s of a copy, counting bytes read and written, and TFLOP/s of a large product, if torch has measured it.
    """

    copy_gb_s: float
    peak_tflop_s: float | None

    def share(self, row: KernelRow) -> str:
        """A kernel's speed as a share of the limit that costs it more time; none if its data came from a cache."""
        times = {"copy": row.bytes / self.copy_gb_s / 1e9}
        if self.peak_tflop_s is not None:
            times["peak"] = row.flops / self.peak_tflop_s / 1e12
        limit = max(times, key=lambda name: times[name])
        return f"{times[limit] / row.seconds:.0%} of {limit}" if row.cold or limit == "peak" else "in cache"


@dataclass(frozen=True)
class ModelReport:
    """Everything that the check of one folder reports; speeds are those of a whole model that agrees with itself.

    `sequences` are several at once, for an artifact with several slots.
    """

    name: str
    kernels: tuple[KernelRow, ...] = ()
    checks: tuple[Check, ...] = ()
    speeds: Speeds | None = None
    sequences: SequencesReport | None = None

    @property
    def ok(self) -> bool:
        """Whether every kernel is within its bound and the whole model agrees with itself."""
        return all(row.ok for row in self.kernels) and all(check.ok for check in self.checks)


def line(cells: Sequence[str]) -> str:
    """A line of the table of kernels, whose column widths are fixed before the first row is known."""
    return "".join(
        cell.rjust(width) + "  " if i < 4 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )


def kernel_cells(row: KernelRow, limits: GpuLimits) -> tuple[str, ...]:
    """One kernel's row of the table under `HEADING`."""
    error = f"{row.error:.2g}{'' if row.ok else ' WRONG'}"
    numbers = (error, f"{row.seconds * 1e6:,.1f}", f"{row.gb_s:,.0f}", f"{row.tflop_s:,.2f}")
    return (*numbers, limits.share(row), row.kernel, row.label, row.graphs)


def label_of(call: KernelCall) -> str:
    """The kernel's computation, in a few words."""
    first = call.arguments[0]
    if call.op in ("linear", "embedding"):
        fused = [name for key, name in FUSED.items() if first.get(key)]
        return ", ".join([f"{prod(first['lead'])} x {first['k']} -> {first['n']} {first['weight']['dtype']}", *fused])
    if call.op == "rolling_attention":
        size = f"{first['rows']} rows" if first["tokens"] == 1 else f"{first['tokens']} tokens"
        heads = f"{first['n_heads']}/{first['n_kv_heads']} heads of {first['head_dim']}"
        return f"{size}, {heads}, {first['window']} columns"
    if call.op == "mixture":
        return (
            f"{prod(first['lead'])} x {first['dim']}, "
            f"{first['experts_per_token']} of {first['n_experts']} {first['weight']['dtype']}"
        )
    if call.op == "sample":
        return f"the next id from {first} logits"
    return " x ".join(map(str, (prod(first), *call.arguments[1:2])))


@dataclass(frozen=True)
class Rivals:
    """The times of others for the same work on this GPU, in fp16; None if they are not installed."""

    torch: TorchTimes | None = None  # the matrix products alone
    transformers: TransformersTimes | None = None  # the whole model

    def beside_decode(self, name: str, context: int, seconds: float) -> str:
        """A decode step compared with theirs."""
        return _joined(
            _beside(
                seconds, self.torch.seconds.get(f"{name} decode") if self.torch else None, "torch's products alone"
            ),
            _beside(
                seconds, self.transformers.decode.get(context) if self.transformers else None, self._transformers_step
            ),
        )

    def beside_prefill(self, name: str, tokens: int, seconds: float, *, longest: bool) -> str:
        """A prefill compared with theirs; torch's products are those of the longest prompt."""
        return _joined(
            _beside(
                seconds,
                self.torch.seconds.get(f"{name} prefill") if self.torch and longest else None,
                "torch's products alone",
            ),
            _beside(seconds, self.transformers.ttft.get(tokens) if self.transformers else None, "transformers"),
        )

    @property
    def _transformers_step(self) -> str:
        return (
            "transformers' graph" if self.transformers and self.transformers.graph else "transformers without a graph"
        )


def check_rows(checks: Sequence[Check]) -> Sequence[tuple[str, ...]]:
    """What the checks of a whole model found and expected, and whether that is right."""
    return [(check.check, check.found, check.expected, "yes" if check.ok else "WRONG") for check in checks]


def speed_rows(report: ModelReport, limits: GpuLimits, rivals: Rivals) -> Sequence[tuple[str, ...]]:
    """tok/s and time of each step and prefill, beside the copy, torch's products and transformers; none if unknown."""
    if report.speeds is None:
        return []
    rows = []
    for d in report.speeds.decode:
        share = _joined(
            f"{d.gb_s / limits.copy_gb_s:.0%} of copy", rivals.beside_decode(report.name, d.context, d.step_s)
        )
        rows.append((f"decode, context {d.context}", f"{d.tok_s:,.1f} tok/s", f"{d.step_s * 1e3:,.2f} ms", share))
    longest = max((p.prompt_tokens for p in report.speeds.prefill), default=0)
    for p in report.speeds.prefill:
        beside = rivals.beside_prefill(report.name, p.prompt_tokens, p.ttft_s, longest=p.prompt_tokens == longest)
        rows.append((f"TTFT, {p.prompt_tokens} tokens", f"{p.tok_s:,.1f} tok/s", f"{p.ttft_s * 1e3:,.2f} ms", beside))
    return rows


def _beside(seconds: float, theirs: float | None, whose: str) -> str:
    return "" if theirs is None else f"{seconds / theirs:.2f} of the time of {whose}"


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def as_builtins(report: ModelReport) -> dict[str, object]:
    """The report as JSON has it; an error that is not finite becomes null, and its row is not ok."""
    kernels = [
        {
            **asdict(row),
            "error": row.error if isfinite(row.error) else None,
            "ok": row.ok,
            "gb_s": row.gb_s,
            "tflop_s": row.tflop_s,
        }
        for row in report.kernels
    ]
    return {**asdict(report), "ok": report.ok, "kernels": kernels}

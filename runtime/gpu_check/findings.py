"""Everything that a run of `runtime.gpucheck` has found so far, and what it has not measured, and why."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from runtime.gpu_check.report import Gpu, GpuLimits, ModelReport, Rivals, as_builtins
from runtime.gpu_check.sanitizer import SanitizerResult
from runtime.gpu_check.torch_process import TorchTimes, TransformersTimes


class Part(NamedTuple):
    """Something to measure of a folder or a tool, such as a kernel."""

    of: str
    what: str


@dataclass(frozen=True)
class Reason:
    """Why a part has not been measured, and whether that is a fault of ours."""

    text: str
    wrong: bool = False


NOT_YET, TIME_WAS_UP = Reason("not yet"), Reason("time was up")


@dataclass
class Findings:
    """What was found, by folder; `unmeasured` holds every planned part until it has been measured."""

    date: str
    models: dict[str, ModelReport]
    gpu: Gpu | None = None
    torch: TorchTimes | None = None
    transformers: dict[str, TransformersTimes] = field(default_factory=dict)
    sanitizer: list[SanitizerResult] = field(default_factory=list)
    unmeasured: dict[Part, Reason] = field(default_factory=dict)

    def plan(self, of: str, names: Iterable[str]) -> None:
        """Add parts that are to be measured."""
        self.unmeasured.update({Part(of, name): NOT_YET for name in names})

    def measured(self, part: Part) -> None:
        """Take a part off the list."""
        del self.unmeasured[part]

    def pending(self, of: str | None = None) -> list[Part]:
        """What is still to be measured, of everything or of one folder or tool."""
        return [part for part, reason in self.unmeasured.items() if reason is NOT_YET and of in (None, part.of)]

    def close(self, reason: Reason, of: str | None = None) -> None:
        """Give the reason for what is still to be measured."""
        self.unmeasured.update(dict.fromkeys(self.pending(of), reason))

    @property
    def limits(self) -> GpuLimits:
        """What this GPU reaches; without a GPU there is nothing to compare with it."""
        assert self.gpu is not None, "the GPU is measured first"
        return GpuLimits(self.gpu.copy_gb_s, self.torch.peak_tflop_s if self.torch else None)

    def rivals(self, folder: str) -> Rivals:
        """Others beside the model of a folder."""
        return Rivals(self.torch, self.transformers.get(folder))

    @property
    def wrong(self) -> list[str]:
        """Folders and tools with something wrong, each once."""
        found = [folder for folder, model in self.models.items() if not model.ok]
        found += [part.of for part, reason in self.unmeasured.items() if reason.wrong]
        found += [result.tool for result in self.sanitizer if not result.ok]
        return list(dict.fromkeys(found))

    def model_as_json(self, folder: str) -> str:
        """A folder's report beside the GPU's limits as one line of JSON."""
        return json.dumps({**as_builtins(self.models[folder]), **asdict(self.limits)}, allow_nan=False)

    def as_json(self) -> str:
        """All of it as JSON."""
        found: Mapping[str, object] = {
            "date": self.date,
            "gpu": self.gpu and asdict(self.gpu),
            "ok": not self.wrong,
            "models": {folder: as_builtins(model) for folder, model in self.models.items()},
            "torch": self.torch and asdict(self.torch),
            "transformers": {folder: asdict(times) for folder, times in self.transformers.items()},
            "sanitizer": [asdict(result) for result in self.sanitizer],
            "not_measured": [{**part._asdict(), "why": reason.text} for part, reason in self.unmeasured.items()],
        }
        return json.dumps(found, indent=1, allow_nan=False)

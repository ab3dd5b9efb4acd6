"""The steps of `runtime.gpucheck` in their order, each in processes of its own, until the time is up."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from runtime.artifact.manifest import Manifest
from runtime.columns import in_columns
from runtime.errors import UserError
from runtime.gpu_check.findings import TIME_WAS_UP, Findings, Part, Reason
from runtime.gpu_check.measurement import SEQUENCES, WORKLOAD, finding_of
from runtime.gpu_check.process_group import OutOfTimeError, UnfinishedError, run_group
from runtime.gpu_check.report import HEADING, ModelReport, Rivals, check_rows, kernel_cells, label_of, line, speed_rows
from runtime.gpu_check.sanitizer import TOOLS, find_sanitizer, sanitize
from runtime.gpu_check.torch_process import ask_torch, ask_transformers, is_comparable, products_of

MEASUREMENT = (sys.executable, "-m", "runtime.gpu_check.measurement")
# Seconds in which a process says something: it starts and checks a kernel, or does a part of a whole model.
KERNEL_SECONDS, MODEL_SECONDS = 90, 200
KERNELS_GIVEN_UP = 3  # so many in a row that fail, and the other kernels of a folder are not tried
TORCH, TRANSFORMERS, SANITIZER = "torch", "transformers", "compute-sanitizer"
PRODUCTS = "matrix products"


class CheckRun:
    """One run over folders with their manifests, whose smallest model comes first.

    `save` keeps the findings after each step; `say` shows a person what is measured.
    """

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        findings: Findings,
        save: Callable[[], None],
        say: Callable[[str], None],
        seconds: float,
    ) -> None:
        self._manifests, self._findings, self._save, self._say = manifests, findings, save, say
        self._end = time.monotonic() + seconds
        self._smallest = next(iter(manifests))

    def plan(self, *, kernels: bool, models: bool) -> None:
        """List everything that is to be measured."""
        plan = self._findings.plan
        for folder, manifest in self._manifests.items():
            plan(folder, [call.kernel for call in manifest.calls] if kernels else [])
        for folder, manifest in self._manifests.items():
            if models and manifest.model.generates:
                several = min(SEQUENCES.counts[1:]) <= manifest.shape.slots
                plan(folder, ["checks", "speeds", *(["sequences"] if several else [])])
        plan(TORCH, [PRODUCTS])
        comparable = [folder for folder, manifest in self._manifests.items() if is_comparable(manifest.model)]
        plan(TRANSFORMERS, comparable if models else [])
        plan(SANITIZER, TOOLS if kernels else [])

    def measure(self) -> None:
        """Measure what is planned.

        What time does not allow stays pending. Raises `UserError` without a GPU that runs all folders.
        """
        try:
            self._gpu()
            for folder in self._manifests:
                self._kernels(folder)
            for folder in self._manifests:
                self._model(folder)
            self._torch()
            self._transformers()
            self._sanitizer()
        except OutOfTimeError:
            self._findings.close(TIME_WAS_UP)

    def _gpu(self) -> None:
        def told(_name: str, gpu: Any) -> None:  # noqa: ANN401 (of the type that the table of findings says)
            self._findings.gpu = gpu
            self._say(f"{gpu.name}: copy {gpu.copy_gb_s:,.0f} GB/s")

        try:
            self._measurement(["gpu", *self._manifests], told, MODEL_SECONDS)
        except UnfinishedError as error:
            self._findings.close(Reason(str(error)))
            raise UserError(f"the GPU cannot be measured: {error}") from error

    def _kernels(self, folder: str) -> None:
        """Check the kernels of a folder; behind one that takes its process along, with another process."""
        calls = self._manifests[folder].calls
        if Part(folder, calls[0].kernel) not in self._findings.unmeasured:
            return
        first = failed = 0
        self._say(f"\n{folder}\n{line(HEADING)}")

        def told(_name: str, row: Any) -> None:  # noqa: ANN401
            nonlocal first, failed
            self._update(folder, row.kernel, kernels=(*self._findings.models[folder].kernels, row))
            self._say(line(kernel_cells(row, self._findings.limits)))
            first, failed = first + 1, 0

        while first < len(calls):
            why = "it ended without a result"
            try:
                self._measurement(["kernels", folder, "--first", str(first)], told, KERNEL_SECONDS)
            except UnfinishedError as error:
                why = str(error)
            if first < len(calls):  # otherwise all are measured, whatever happened afterwards
                call = calls[first]
                self._fail(Part(folder, call.kernel), f"{label_of(call)}: {why}")
                first, failed = first + 1, failed + 1
            if failed == KERNELS_GIVEN_UP:
                for call in calls[first:]:
                    self._fail(Part(folder, call.kernel), f"not tried after {failed} kernels that failed")
                return

    def _model(self, folder: str) -> None:
        """Run a whole model."""
        if Part(folder, "checks") not in self._findings.unmeasured:
            return

        shown: Mapping[str, Callable[[ModelReport], list[str]]] = {
            "checks": lambda report: in_columns(check_rows(report.checks)),
            "speeds": lambda report: in_columns(speed_rows(report, self._findings.limits, Rivals())),
            "sequences": lambda report: [report.sequences.table()] if report.sequences else [],
        }

        def told(name: str, found: Any) -> None:  # noqa: ANN401
            self._update(folder, name, **{name: found})
            self._say("\n".join(shown[name](self._findings.models[folder])))

        self._say(f"\n{folder}")
        try:
            self._measurement(["model", folder], told, MODEL_SECONDS)
        except UnfinishedError as error:  # for example too little memory; other folders may still fit
            for part in self._findings.pending(folder):
                self._fail(part, str(error))
        self._findings.close(Reason("the checks found something wrong"), folder)

    def _torch(self) -> None:
        products = [p for m in self._manifests.values() for p in products_of(m, max(WORKLOAD.prompt_tokens))]
        try:
            self._findings.torch = ask_torch(products, self._left)
        except UnfinishedError as error:
            self._findings.close(Reason(str(error)), TORCH)
        else:
            self._findings.measured(Part(TORCH, PRODUCTS))
        self._save()

    def _transformers(self) -> None:
        """Measure each model once for all folders that hold it, the largest first, since it matters most."""
        for folder in reversed(list(self._manifests)):
            if Part(TRANSFORMERS, folder) not in self._findings.pending(TRANSFORMERS):
                continue
            model = self._manifests[folder].model
            same = [Part(TRANSFORMERS, name) for name, manifest in self._manifests.items() if manifest.model == model]
            try:
                times = ask_transformers(model, WORKLOAD.prompt_tokens, WORKLOAD.contexts, self._left)
            except UnfinishedError as error:
                self._findings.unmeasured.update(dict.fromkeys(same, Reason(str(error))))
            else:
                for part in same:
                    self._findings.transformers[part.what] = times
                    self._findings.measured(part)
            self._save()

    def _sanitizer(self) -> None:
        """Watch the kernels of the smallest model with each tool."""
        sanitizer = find_sanitizer()
        if sanitizer is None:
            self._findings.close(Reason("it is not installed"), SANITIZER)
            return
        for part in self._findings.pending(SANITIZER):
            try:
                command = [*MEASUREMENT, "launches", self._smallest]
                result = sanitize(sanitizer, part.what, self._smallest, command, self._left)
            except UnfinishedError as error:
                self._findings.unmeasured[part] = Reason(str(error))
            else:
                self._findings.sanitizer.append(result)
                self._findings.measured(part)
                self._say(f"{part.what}: {result.summary}")
            self._save()

    @property
    def _left(self) -> float:
        """Seconds until the time is up."""
        return self._end - time.monotonic()

    def _measurement(self, arguments: Sequence[str], told: Callable[[str, Any], None], silence: float) -> None:
        """Run a part of `runtime.gpu_check.measurement`; `told` gets each finding with its name."""

        def heard(text: str) -> None:
            finding = finding_of(text)
            if finding is not None:
                told(*finding)
                self._save()

        run_group([*MEASUREMENT, *arguments], heard, seconds=self._left, silence=silence)

    def _update(self, folder: str, what: str, **found: Any) -> None:  # noqa: ANN401 (fields of a report)
        """Add what was found to the report of a folder."""
        self._findings.models[folder] = replace(self._findings.models[folder], **found)
        self._findings.measured(Part(folder, what))

    def _fail(self, part: Part, why: str) -> None:
        """Take a part that failed for a fault of ours."""
        self._findings.unmeasured[part] = Reason(why, wrong=True)
        self._say(f"{part.of}, {part.what}: {why}  WRONG")
        self._save()

"""`python -m build.tools.lm_eval ARTIFACT --tasks NAMES`: run tasks of lm-evaluation-harness on an artifact.

Needs the package `lm_eval`, which `make setup EVAL=1` installs. Its own tasks download their data; tasks of your own
need no network if they name their files by `dataset_path: json`. Chat templates are not applied.
"""

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from build.tools.lm_eval.scoring import Scorer
from export.console import output
from runtime.cli import open_engine
from runtime.errors import UserError, run_command
from runtime.text.tokenizer import open_tokenizer

Metrics = Mapping[str, Mapping[str, object]]  # by task, and by metric
STDERR = "_stderr"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks, print a table of the metrics and write them as JSON; returns the exit status."""
    arguments = parser().parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the package lm_eval is not installed; install it with `make setup EVAL=1`")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit is {arguments.limit}, expected at least 1")
    if arguments.tasks_folder is not None and not arguments.tasks_folder.is_dir():
        raise UserError(f"--tasks-folder is {arguments.tasks_folder}, expected a folder with YAML files of tasks")
    engine = open_engine(arguments.artifact, arguments.threads)
    if engine.manifest.tokenizer is None:
        raise UserError(f"{engine.folder} has no tokenizer, which tasks need; use a checkpoint with a tokenizer")
    scorer = Scorer(engine, open_tokenizer(engine.manifest.tokenizer, engine.folder))
    metrics = evaluated(scorer, arguments)
    output.print(metrics_table(metrics))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(metrics, indent=1, default=str) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = argparse.ArgumentParser(
        prog="python -m build.tools.lm_eval", description="Run tasks of lm-evaluation-harness on an artifact."
    )
    result.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    result.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks, groups or tags")
    result.add_argument("--tasks-folder", type=Path, metavar="PATH", help="a folder with YAML files of more tasks")
    result.add_argument("--shots", type=int, metavar="N", help="examples before each question (default: the task's)")
    result.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions of each task")
    result.add_argument(
        "--gen-kwargs", metavar="KEY=VALUE,...", help="how texts are written, in place of what the task says"
    )
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    result.add_argument("--json", type=Path, metavar="PATH", help="write the results there too")
    return result


def evaluated(scorer: Scorer, arguments: argparse.Namespace) -> Metrics:
    """The harness's metrics of each task; raises `UserError` for a task that it does not know."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from build.tools.lm_eval.harness import ArtifactModel

    folder = arguments.tasks_folder
    manager = TaskManager(include_path=None if folder is None else str(folder))
    names = arguments.tasks.split(",")
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks names {unknown[0]}, which lm_eval does not know; `lm-eval ls tasks` lists its tasks, and "
            "--tasks-folder names a folder with others"
        )
    results = lm_eval.simple_evaluate(
        model=ArtifactModel(scorer),
        tasks=names,
        task_manager=manager,
        num_fewshot=arguments.shots,
        limit=arguments.limit,
        gen_kwargs=arguments.gen_kwargs,
    )
    metrics: Metrics = results["results"]
    return metrics


def metrics_table(metrics: Metrics) -> Table:
    """A row for each metric of each task; the harness keys them by "METRIC,FILTER" and "METRIC_stderr,FILTER"."""
    result = Table()
    for name in ("task", "metric", "filter"):
        result.add_column(name)
    for name in ("value", "standard error"):
        result.add_column(name, justify="right")
    for task, found in metrics.items():
        for key, value in found.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith(STDERR):
                continue
            result.add_row(task, metric, chosen, shown(value), shown(found.get(f"{metric}{STDERR},{chosen}")))
    return result


def shown(value: object) -> str:
    """A metric with four decimals; whatever is no number as it is, and nothing for none."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value in (None, "N/A") else str(value)


if __name__ == "__main__":
    run_command(main)

"""The adapter that lm-evaluation-harness calls; needs the package `lm_eval`, which `make setup EVAL=1` installs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from build.tools.lm_eval.scoring import Scorer
from export.console import step_bar


class ArtifactModel(LM):
    """A `Scorer` in the interface of the harness."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = scorer

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, and whether greedy decoding gives it."""
        return self._answers("loglikelihood", requests, lambda scorer, arguments: scorer.loglikelihood(arguments))

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """The log-likelihood of each whole text."""
        return self._answers(
            "loglikelihood_rolling",
            requests,
            lambda scorer, arguments: scorer.loglikelihood_rolling([text for (text,) in arguments]),
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The continuation of each (context, generation_kwargs)."""
        return self._answers("generate_until", requests, lambda scorer, arguments: scorer.generate_until(arguments))

    def _answers(
        self, kind: str, requests: Sequence[Instance], answer: Callable[[Scorer, list[Any]], list[Any]]
    ) -> list[Any]:
        """The answers to requests of one kind, with a progress bar, offered to the harness's cache."""
        arguments = [request.args for request in requests]
        with step_bar(kind, len(arguments)) as bar:
            answers = answer(replace(self._scorer, advance=bar.advance), arguments)
        for asked, answered in zip(arguments, answers, strict=True):
            self.cache_hook.add_partial(kind, asked, answered)
        return answers

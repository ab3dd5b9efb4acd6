"""Limits that a process sets itself before it opens a tokenizer that somebody else wrote."""

import resource


def limit_process(seconds: int, memory: int) -> None:
    """Limit this process to `seconds` of CPU time and `memory` bytes of address space, or to what it is limited to."""
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_AS, memory)


def _limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    least = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (least, least))

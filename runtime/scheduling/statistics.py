"""Counts of what a scheduler has done."""

from dataclasses import dataclass


@dataclass
class Statistics:
    """Each number only grows, but for the last two."""

    chunks: int = 0  # prefill calls
    steps: int = 0
    rows: int = 0  # of all steps, without those that held nothing
    prompt_tokens: int = 0  # computed
    generated_tokens: int = 0
    prefix_queries: int = 0  # tokens of all prompts that were given a slot
    prefix_hits: int = 0  # those of them that needed no computing
    drafts_proposed: int = 0  # that were checked
    drafts_accepted: int = 0
    waiting: int = 0  # choices without a slot, now
    running: int = 0  # choices with a slot, now

"""Drafts from a sequence's own tokens."""

import numpy as np
import pytest

from runtime.scheduling.prompt_lookup import LONGEST_MATCH, SHORTEST_MATCH, PromptLookup, Proposal


def proposal(tokens, most=7):
    lookup = PromptLookup()
    lookup.extend(tokens)
    return lookup.propose(most)


def searched(tokens, most):
    """The same by searching the whole sequence for each proposal."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if len(tokens) > length and tokens[start : start + length] == tokens[-length:]:
                grown = list(tokens)
                while len(grown) < start + length + most:
                    grown.append(grown[len(grown) - (len(tokens) - start - length)])
                return grown[start + length : start + length + most]
    return []


def test_it_proposes_what_followed_the_last_time():
    assert proposal([1, 2, 3, 4, 5, 9, 1, 2, 3], 2) == Proposal([4, 5], 3)


def test_the_longest_match_wins_and_then_the_latest():
    assert proposal([1, 2, 3, 7, 5, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], 1) == Proposal([7], 3)
    assert proposal([5, 2, 3, 8, 6, 2, 3, 9, 1, 2, 3], 1) == Proposal([9], 2)


def test_a_repetition_goes_on():
    assert proposal([4, 1, 2, 1, 2, 1, 2], 5).drafts == [1, 2, 1, 2, 1]
    assert proposal([6, 6, 6], 4).drafts == [6, 6, 6, 6]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_nothing_is_proposed_where_nothing_repeats(tokens):
    assert proposal(tokens).drafts == []


@pytest.mark.parametrize("seed", range(20))
def test_it_finds_what_a_search_finds(seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(4, size=60).tolist()
    lookup, known = PromptLookup(), 0
    while known < len(tokens):
        count = int(random.integers(1, 6))
        lookup.extend(tokens[known : known + count])
        known = min(known + count, len(tokens))
        assert lookup.propose(5).drafts == searched(tokens[:known], 5)

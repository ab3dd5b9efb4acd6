from collections import Counter

import numpy as np

from runtime.decoding.token_counts import TokenCounts


def counted(counts):
    return dict(zip(counts.ids.tolist(), counts.generated.tolist(), strict=True))


def expected(prompt, generated):
    return {**dict.fromkeys(prompt, 0), **Counter(generated)}


def test_counts_equal_those_of_the_whole_text():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 50, 30).tolist()
    for given in ([], prompt):
        counts, generated = TokenCounts(given), []
        assert counted(counts) == expected(given, [])
        for token_id in rng.integers(0, 400, 1000).tolist():
            counts.add(token_id)
            generated.append(token_id)
            assert len(counted(counts)) == len(set(given) | set(generated))
        assert counted(counts) == expected(given, generated)


def test_drafts_count_within_their_block_only():
    prompt, generated = [3, 3, 7], [7, 9, 9]
    counts = TokenCounts(prompt)
    for token_id in generated:
        counts.add(token_id)
    for drafts in ([], [3], [9, 7, 3], [100, 100, 9, 101, 100]):
        with counts.assuming(drafts):
            assert counted(counts) == expected(prompt, generated + drafts)
        assert counted(counts) == expected(prompt, generated)
    counts.add(101)
    assert counted(counts) == expected(prompt, [*generated, 101])

import numpy as np
import pytest
import torch

from runtime.decoding.logprobs import row_logprobs

VOCAB = 1000
LOGITS = np.random.default_rng(0).normal(0, 4, (5, VOCAB)).astype(np.float32)


def top_logprobs(logits, k):
    (found,) = row_logprobs(logits[None], [0], [k])
    return list(found.top)


@pytest.mark.parametrize("k", [1, 5, VOCAB, VOCAB + 10])
def test_top_logprobs_equal_torch(k):
    expected = torch.from_numpy(LOGITS[0].astype(np.float64)).log_softmax(-1).topk(min(k, VOCAB))
    ours = top_logprobs(LOGITS[0], k)
    assert [token_id for token_id, _ in ours] == expected.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in ours], expected.values.numpy(), rtol=1e-12)


def test_each_row_has_its_own_count_and_its_chosen_token():
    chosen = [0, 17, 999, int(LOGITS[3].argmax()), int(LOGITS[4].argmin())]
    counts = [0, 1, 20, 3, 2]
    expected = torch.from_numpy(LOGITS.astype(np.float64)).log_softmax(-1).numpy()
    found = row_logprobs(LOGITS, chosen, counts)
    # float64: a few units in the last place of numbers below 64
    np.testing.assert_allclose([each.chosen for each in found], expected[range(5), chosen], rtol=0, atol=2.0**-44)
    for row, (each, count) in enumerate(zip(found, counts, strict=True)):
        assert list(each.top) == top_logprobs(LOGITS[row], count)
        assert len(each.top) == count


def test_of_equal_logits_the_first_ids_are_told():
    assert [token_id for token_id, _ in top_logprobs(np.zeros(100, np.float32), 3)] == [0, 1, 2]

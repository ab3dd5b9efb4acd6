"""The key of a prompt's beginning, and the replicas that it prefers."""

from collections import Counter

import pytest

from cluster.serving.affinity import CHUNK, affinity_key, preferred

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [SYSTEM, {"role": "user", "content": "Hello"}]
LATER = [*FIRST, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And then?"}]


def test_all_turns_of_a_conversation_have_one_key():
    assert affinity_key({"messages": FIRST}) == affinity_key({"messages": LATER}) != ""


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [SYSTEM, {"role": "user", "content": "Goodbye"}]},
        {"messages": [{"role": "system", "content": "Be long."}, *FIRST[1:]]},
        {"messages": FIRST, "model": "another"},
        {"messages": FIRST, "system": "Anthropic's place for it"},
    ],
)
def test_another_beginning_has_another_key(other):
    assert affinity_key(other) != affinity_key({"messages": FIRST})


def test_a_plain_prompt_counts_up_to_its_first_chunk():
    beginning = "x" * CHUNK
    assert affinity_key({"prompt": beginning + "a"}) == affinity_key({"prompt": beginning + "b"})
    assert affinity_key({"prompt": "a" + beginning}) != affinity_key({"prompt": "b" + beginning})
    assert affinity_key({"prompt": [1] * CHUNK + [2]}) == affinity_key({"prompt": [1] * CHUNK + [3]})


def test_turns_of_the_responses_api_have_one_key():
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert affinity_key({"instructions": "Be brief.", "input": turns}) == affinity_key(
        {"instructions": "Be brief.", "input": [*turns, {"role": "user", "content": "More"}]}
    )


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": "text"}, {"messages": None, "prompt": ""}])
def test_no_prompt_has_no_key(body):
    assert affinity_key(body) == ""


@pytest.mark.parametrize("messages", [[1, None, "x"], [{"role": 3}], [{"content": {"deep": [1]}}]])
def test_what_is_no_conversation_is_taken_as_it_is(messages):
    """The replica says what is wrong."""
    assert affinity_key({"messages": messages})


def test_keys_spread_evenly_and_stay_when_a_replica_goes():
    names, keys = [f"replica{n}" for n in range(4)], [f"key{n}" for n in range(4000)]
    before = {key: preferred(key, names)[0] for key in keys}
    counts = Counter(before.values())
    # of a binomial distribution with p = 1/4, six standard deviations: 6 * sqrt(4000 * 1/4 * 3/4) = 164
    assert all(abs(count - 1000) < 165 for count in counts.values())
    after = {key: preferred(key, names[:-1])[0] for key in keys}
    assert all(after[key] == name for key, name in before.items() if name != names[-1])
    moved = Counter(after[key] for key, name in before.items() if name == names[-1])
    assert len(moved) == 3
    assert preferred("key", reversed(names)) == preferred("key", names)

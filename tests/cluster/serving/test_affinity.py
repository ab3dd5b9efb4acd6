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


PART = {"type": "text", "text": "Hello"}


@pytest.mark.parametrize(
    "content", [[PART], [{**PART, "cache_control": {"type": "ephemeral"}}], [{"type": "input_text", "text": "Hello"}]]
)
def test_a_content_has_one_key_however_it_is_written(content):
    said = {"role": "user", "content": content}
    assert affinity_key({"messages": [SYSTEM, said]}) == affinity_key({"messages": FIRST})
    assert affinity_key({"messages": [said], "system": [PART]}) == affinity_key(
        {"messages": [FIRST[1]], "system": "Hello"}
    )
    assert affinity_key({"input": [said, {"role": "assistant", "content": "Hi"}]}) == affinity_key({"input": "Hello"})


def test_what_is_nested_too_deeply_has_no_key():
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert affinity_key({"prompt": deep}) == affinity_key({"messages": deep}) == ""


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

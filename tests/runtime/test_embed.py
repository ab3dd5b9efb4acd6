"""Which pooling a vector gets: that of the command, or else that of the artifact."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import embed

STATES = np.array([[3, 0], [0, 4]], np.float32)


@pytest.mark.parametrize(
    ("pool", "normalize", "flags", "expected"),
    [
        ("last", False, [], [0, 4]),
        ("mean", False, [], [1.5, 2]),
        ("mean", True, [], [0.6, 0.8]),
        ("mean", True, ["--pool", "last"], [0, 1]),
        ("mean", True, ["--no-normalize"], [1.5, 2]),
        ("last", False, ["--pool", "mean", "--normalize"], [0.6, 0.8]),
    ],
)
def test_pooling_is_that_of_the_artifact_unless_it_is_given(monkeypatch, capsys, pool, normalize, flags, expected):
    opened = SimpleNamespace(
        engine=SimpleNamespace(head_outputs=lambda _ids: STATES),
        model=SimpleNamespace(pool=pool, normalize=normalize),
        ids=lambda _text: [1, 2],
    )
    monkeypatch.setattr(embed, "open_head", lambda *_args: opened)
    assert embed.main(["artifact", "--text", "x", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)[0]["embedding"] == pytest.approx(expected)

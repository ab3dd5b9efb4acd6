"""The settings of a server: a file, flags, and what is refused."""

import re
import tomllib

import msgspec
import pytest

from export.stage import ROOT
from runtime.errors import UserError
from runtime.server.settings import Keys, ServerSettings, read_settings


def written(tmp_path, text, name="serving.toml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_flags_come_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = written(tmp_path, 'port = 9000\nmax_queued = 5\nreuse = "exact"\n')
    settings = read_settings(path, {"port": 7000})
    assert settings == ServerSettings(port=7000, max_queued=5, reuse="exact")
    assert settings.scheduler().reuse == "exact"
    assert read_settings(None, {}) == ServerSettings()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prot = 1", "unknown field `prot`"),
        ("port = 70000", "at `\\$.port`"),
        ('port = "x"', "Expected `int`, got `str` - at `\\$.port`"),
        ("port = ", "is not TOML"),
        (b"port = \xff", "is not TOML"),
        ("max_queued = 0", "at `\\$.max_queued`"),
        ("request_seconds = inf", "at `\\$.request_seconds`"),
        ("drain_seconds = nan", "drain_seconds"),
        ("unready_seconds = -1", "unready_seconds"),
        ("unready_seconds = nan", "unready_seconds"),
        ("stall_budget = -1", "stall_budget is -1"),
        ('reuse = "some"', "at `\\$.reuse`"),
        ('tls_key = "x.pem"', "tls_certificate is missing"),
        ('host = "0.0.0.0"', "host is 0.0.0.0, which other machines reach, and there are no API keys"),
        ("x" * 2**21, "more than 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, reason):
    with pytest.raises(UserError, match=reason):
        read_settings(written(tmp_path, text), {})


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"serving\.toml cannot be read: No such file"):
        read_settings(tmp_path / "serving.toml", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_keys(host):
    assert read_settings(None, {"host": host}).only_this_machine


@pytest.mark.parametrize("given", [{"keys_file": "keys"}, {"allow_no_keys": True}])
def test_other_machines_need_keys_or_a_word(given):
    assert not read_settings(None, {"host": "0.0.0.0", **given}).only_this_machine


def test_keys_are_one_a_line(tmp_path):
    assert Keys.read(written(tmp_path, "# ours\nfirst\n\n  second  \n")).keys == (b"first", b"second")
    for text, reason in (("# none\n", "holds no API key"), ("a b\n", "key 1 has a character"), ("ä\n", "key 1 has")):
        with pytest.raises(UserError, match=reason):
            Keys.read(written(tmp_path, text))


def test_the_documentation_lists_every_setting_with_its_default():
    rows = [line.split(" | ") for line in (ROOT / "docs/serving.md").read_text().splitlines() if line.startswith("| `")]
    listed = {name: row[1] for row in rows for name in re.findall(r"`([a-z_]+)`", row[0])}
    for field in msgspec.structs.fields(ServerSettings):
        shown = listed[field.name]
        if shown.startswith("`"):
            (value,) = tomllib.loads(f"x = {shown.strip('`')}").values()
            assert value == (list(field.default) if isinstance(field.default, tuple) else field.default), field.name
        else:
            assert field.default is None, field.name

"""The page as a file: it needs nothing from elsewhere, cannot make HTML out of text, and can be read by all."""

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser
from typing import get_args

import msgspec
import pytest

from runtime.server.answers.sampling import DEFAULT_TEMPERATURE
from runtime.server.api.status import SlotsResponse, State
from runtime.server.http.page import PAGE_FILE, content_security_policy, load_page
from tests.helpers.scripted_server import IDLE

TEXT = PAGE_FILE.read_text(encoding="utf-8")
MOST_BYTES = 100_000
# What makes HTML, code or a request to elsewhere out of a string.
DANGEROUS = (
    "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment", "DOMParser", "srcdoc",
    "setHTMLUnsafe", "parseHTMLUnsafe", "eval(", "Function(", "javascript:", "import(", "@import", "url(",
)  # fmt: skip
# WCAG 2.2, 1.4.3 (text) and 1.4.11 (edges of fields, focus, curves)
TEXT_CONTRAST, EDGE_CONTRAST = 4.5, 3.0
TEXT_PAIRS = [
    *itertools.product(("ink", "muted"), ("ground", "surface", "raised")),
    ("ink", "current"),
    ("ink", "accent-ground"),
    ("on-accent", "accent"),
    ("accent", "ground"),
    ("accent", "raised"),
    ("good", "ground"),
    ("danger", "ground"),
    ("danger", "danger-ground"),
    ("muted", "danger-ground"),
    ("ground", "ink"),
]
EDGE_PAIRS = [
    ("field-line", "ground"),
    ("field-line", "raised"),
    ("field-line", "surface"),
    ("accent", "ground"),
    ("accent", "surface"),
    ("accent", "raised"),
    ("accent", "accent-ground"),
    ("danger", "danger-ground"),
]


class Elements(HTMLParser):
    """All elements of the page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(TEXT)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements().found
COLOURS = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", TEXT)}


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_known_colours():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)  # WebAIM's least grey on white


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back", "least"),
    [(*pair, TEXT_CONTRAST) for pair in TEXT_PAIRS] + [(*pair, EDGE_CONTRAST) for pair in EDGE_PAIRS],
)
def test_colours_can_be_told_apart(theme, front, back, least):
    assert contrast(COLOURS[front][theme], COLOURS[back][theme]) >= least


def test_no_colour_is_written_elsewhere():
    style = "".join(re.findall("<style>(.*?)</style>", TEXT, re.DOTALL))
    outside = re.sub(r"--[\w-]+: light-dark\(.*?\);", "", style)
    assert re.findall(r"#[0-9a-f]{3,8}\b(?=[;, )])", outside) == []


def test_the_page_needs_no_other_file():
    for tag, attributes in ELEMENTS:
        assert tag not in {"img", "iframe", "object", "embed", "base"}, tag
        assert attributes.get("src") is None, tag
        if href := attributes.get("href"):
            assert href.startswith(("#", "data:image/svg+xml,")), href


def test_addresses_are_names_or_comments():
    """Those of the SVG namespace, which nothing fetches, and of specifications."""
    outside_comments = re.sub(r"<!--.*?-->|/\*.*?\*/|//[^\n]*\(https://[^\n]*", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?:https?:|wss?:)?//\w[\w./-]*", outside_comments)) <= {"http://www.w3.org/2000/svg"}


def test_requests_go_to_known_paths():
    """All requests pass `ask`, whose paths are relative and therefore the server's own."""
    assert len(re.findall(r"\bfetch\(", TEXT)) == 1
    assert not re.search(r"XMLHttpRequest|WebSocket|EventSource|sendBeacon|\.src\s*=|window\.open", TEXT)
    assert set(re.findall(r'\bask\("([^"]*)"', TEXT)) == {"v1/models", "v1/chat/completions", "slots"}
    assert len(re.findall(r"\bask\(", TEXT)) == 3 + 1  # and its definition


@pytest.mark.parametrize("name", DANGEROUS)
def test_strings_never_become_html_or_code(name):
    assert name not in TEXT


def test_no_attribute_holds_a_script_or_style():
    """The policy refuses them, so such an attribute would silently do nothing."""
    for tag, attributes in ELEMENTS:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
    assert all(not attributes for tag, attributes in ELEMENTS if tag in {"script", "style"})


def test_ids_are_unique_and_used_ones_exist():
    ids = [attributes["id"] for _, attributes in ELEMENTS if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'byId\("([^"]+)"\)', TEXT)) <= set(ids)
    for _, attributes in ELEMENTS:
        for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            assert attributes.get(name) in {None, *ids}
    icons = {name.removeprefix("i-") for name in ids if name.startswith("i-")}
    assert set(re.findall(r'\bicon(?:Button)?\("(\w+)"', TEXT)) <= icons


def test_every_control_has_a_name():
    labels = {attributes.get("for") for tag, attributes in ELEMENTS if tag == "label"}
    for tag, attributes in ELEMENTS:
        if tag in {"input", "textarea"}:
            assert attributes.get("id") in labels or attributes.get("name"), attributes  # the latter lie in their label
    buttons = re.findall(r"<button([^>]*)>(.*?)</button>", TEXT, re.DOTALL)
    assert buttons
    for attributes, content in buttons:
        assert "aria-label=" in attributes or re.sub("<.*?>", "", content).strip()


def test_the_page_knows_what_the_server_answers():
    """What the page reads of /slots are fields of that answer, and it has a word for each state of the server."""
    assert msgspec.to_builtins(msgspec.convert(IDLE, SlotsResponse)) == IDLE
    for first, second in re.findall(r"\blive\.(\w+)(?:\.(\w+))?", TEXT):
        assert first in IDLE
        assert not second or second in IDLE[first] or second == "length"
    words = re.search(r"const HEALTH = \{(.*?)\};", TEXT, re.DOTALL)
    assert words is not None
    assert set(re.findall(r"^  (\w+):", words[1], re.MULTILINE)) == set(get_args(State))


def test_the_default_that_the_page_shows_is_the_servers():
    shown = re.search(r'name: "temperature", label: "\w+", placeholder: "(\d+)"', TEXT)
    assert shown is not None
    assert float(shown[1]) == DEFAULT_TEMPERATURE


def test_lines_are_as_short_as_those_of_other_code():
    drawings = ("  <symbol", '<link rel="icon"')
    assert [line for line in TEXT.splitlines() if len(line) > 120 and not line.startswith(drawings)] == []


def test_the_page_is_small():
    assert len(load_page().body) < MOST_BYTES


def test_the_page_goes_with_its_policy():
    page = load_page()
    assert page.body.decode() == TEXT
    assert page.headers["Content-Security-Policy"] == content_security_policy(TEXT)
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"


def test_the_policy_names_each_inline_element_by_its_hash():
    digest = base64.b64encode(hashlib.sha256(b"f()").digest()).decode()
    policy = content_security_policy("<style>a {}</style><script>f()</script><script>\ng()\n</script>")
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"].split()[0] == f"'sha256-{digest}'"
    assert len(directives["script-src"].split()) == 2
    assert len(directives["style-src"].split()) == 1
    assert "unsafe" not in policy

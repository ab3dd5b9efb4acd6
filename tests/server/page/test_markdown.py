"""Markdown on the page: as markdown-it-py reads it, where both know a construct, and harmless for any text."""

import random
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

CASES = {
    "paragraphs": "One\n\nTwo\nlines\n\n\n\nThree",
    "emphasis": "*a* **b** ***c*** _d_ __e__ ~~f~~ **a*b*c** *a**b**c* **a * b** * a * snake_case_name 2*3*4 a**b**c",
    "emphasis of punctuation": '**"quoted"** text**(x)**text *(**y**)* **Note:** text **Gomphocarpus (*G. p*, syn.)**',
    "emphasis without an end": "**bold and *more\n\n*a\n\n**a*\n\n***a**\n\n_a__\n\n* *a",
    "rule of three": "*foo**bar**baz* foo***bar***baz foo******bar*********baz *foo**bar* **foo*bar**",
    "code": "`a` ``b ` c`` `` ` `` `*no*` `unclosed ``\n\n` a ` `  ` `a\nb`",
    "escapes": "\\*no\\* \\`no\\` \\\\ \\a 5\\. \\# \\~ \\_x\\_ `\\*`",
    "headings": "# One\n## Two **bold**\n###### Six\n####### Seven\n#none\n# Closed ##\n#\n## \ntext\n# Below",
    "rules": "---\n\n***\n\n_ _ _\n\n--\n\ntext\n***\nmore",
    "fences": "```py\na = 1\n\n  b\n```\n\n~~~\n```\n~~~\n\n````\n```\n````\ntext\n```\nin\n```\nafter\n\n``` a`b",
    "fence without an end": "```c\nint main() {\n\n}",
    "indented fence": "  ```\n  a\n    b\n c\n  ```",
    "bullets": "- a\n- b\n  more\n- c\nlazy\n\n* other\n+ third\n+ fourth",
    "numbers": "1. a\n2. b\n10. c\n\ntext\n\n7) x\n8) y",
    "number in a paragraph": "In the year\n1986. What a year\n\ntext\n1. list",
    "nested": "1. a\n   - b\n     - c\n   - d\n2. e\n\n- x\n  1. y\n     z",
    "loose": "- a\n\n- b\n- c\n\ntext\n\n1. a\n\n   b\n2. c",
    "loose inside": "- a\n  - b\n\n  - c\n- d\n\n-\n- e",
    "code in a list": "1. First:\n   ```sh\n   ls\n\n   cd\n   ```\n2. Second",
    "quotes": "> a\n> b\n>\n> - c\n> - d\n\n> > e\n\ntext\n> f",
    "table": "| a | b |\n|---|:-:|\n| 1 | **2** |\n| `3` | 4\\|5 | 6 |\n| 7\n\nx | y\n--|--\nz | w",
    "no table": "no | table\n\n| a |\n|---|---|",
    "entities stay": "a < b > c \" d ' e",
    "tabs": "a\tb\n\n-\ta\n-\tb\n\t- c\n\n1.\td\n\n\te\n\n```make\nall:\n\tcc\n```",
    "line ends": "a\r\nb\r\n\r\n- c\r\n- d",
    "other scripts": "**太字**と*斜体*、`コード` **weiß** __ü__",
}


class Outline(HTMLParser):
    """Elements and text of HTML as a list, as `OUTLINE` gives them of a drawn element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        start = dict(attrs).get("start")
        self.parts.append(f"<{tag} {start}>" if start else f"<{tag}>")

    def handle_endtag(self, tag):
        if tag not in {"br", "hr"}:
            self.parts.append(f"</{tag}>")

    def handle_data(self, data):
        if self.parts and not self.parts[-1].startswith("<"):
            data = self.parts.pop() + data
        self.parts.append(data)


OUTLINE = """
const target = document.createElement("div");
drawMarkdown(target, arguments[0]);
for (const block of target.querySelectorAll(".code")) block.replaceWith(block.querySelector("pre"));
for (const block of target.querySelectorAll(".table")) block.replaceWith(block.querySelector("table"));
target.normalize();
const parts = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return [node.data];
    const tag = node.tagName.toLowerCase();
    const start = node.getAttribute("start");
    const inside = [...node.childNodes].flatMap(parts);
    return [start ? `<${tag} ${start}>` : `<${tag}>`, ...inside, ...(["br", "hr"].includes(tag) ? [] : [`</${tag}>`])];
};
return [...target.childNodes].flatMap(parts);
"""


def expected(text: str) -> list[str]:
    """markdown-it-py's elements; its headings of six levels are our three, it writes line ends between elements."""
    parser = MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    parser.disable(["code", "lheading", "link", "image", "autolink", "reference", "entity", "html_inline"])
    html = parser.render(text)
    html = re.sub(r"<(/?)h(\d)>", lambda found: f"<{found[1]}h{min(int(found[2]) + 2, 5)}>", html)
    parts, in_code = [], False
    for part in Outline(html).parts:
        in_code = part == "<pre>" or (in_code and part != "</pre>")
        text = part.removesuffix("\n") if in_code else part.strip("\n")
        if text and text != "<p></p>":
            parts.append(text)
    return parts


def shown(page, text):
    return [part for part in page.script(OUTLINE, text) if part]


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_it_reads_as_markdown_it_does(page, text):
    assert shown(page, text) == expected(text)


PIECES = [
    "*", "**", "_", "__", "~~", "`", "``", "```", "~~~", "\n", "\n\n", "\n  ", "\n    ", "- ", "1. ", "2) ", "> ", "# ",
    "|", "\n|---|---|\n", "---", "\\", " ", "a", "word ", "<b>", "<script>x()</script>", "<img src=x onerror=x()>",
    "&lt;", "</code></pre>", "[link](javascript:x())", "![i](http://example.com/i.png)", "<!--", "]]>",
    "😀", "é", "\u202e", "\x00",
]  # fmt: skip
FUZZ = """
const [texts, tags, attributes] = arguments;
const wrong = [];
for (const text of texts) {
    const target = document.createElement("div");
    for (const end of [text.length >> 1, text.length]) drawMarkdown(target, text.slice(0, end));
    const whole = document.createElement("div");
    drawMarkdown(whole, text);
    if (target.outerHTML !== whole.outerHTML) wrong.push(["pieces differ", text]);
    for (const found of whole.querySelectorAll("*")) {
        const names = found.getAttributeNames().filter((name) => !attributes.includes(name));
        if (!tags.includes(found.tagName.toLowerCase()) || names.length) wrong.push([found.outerHTML, text]);
    }
    const letters = (value) => value.replace(/[^a-z😀é]/gu, "");
    const lines = text.split("\\n").filter((line) => !/```|~~~|\\|/.test(line)).length === text.split("\\n").length;
    if (lines && letters(whole.textContent) !== letters(text)) wrong.push(["text lost", text]);
}
return wrong;
"""
TAGS = [
    "p", "h3", "h4", "h5", "ul", "ol", "li", "blockquote", "hr", "br", "div", "span", "button", "svg", "use", "pre",
    "code", "em", "strong", "s", "table", "thead", "tbody", "tr", "th", "td",
]  # fmt: skip
ATTRIBUTES = ["class", "type", "start", "tabindex", "aria-hidden", "href"]


def test_any_text_gives_only_known_elements_and_loses_nothing(page):
    source = random.Random(18)
    texts = ["".join(source.choices(PIECES, k=source.randint(1, 40))) for _ in range(4000)]
    assert page.script(FUZZ, texts, TAGS, ATTRIBUTES) == []


@pytest.mark.parametrize(
    "text",
    [
        "> " * 20000,
        "- " * 20000,
        "*a" * 9999,
        "*" * 20000,
        "**a*" * 5000,
        "`" * 19999,
        "`a``" * 5000,
        "|a" * 10000,
        "~~a" * 6000,
        "# " + "a #" * 6000,
        "a\n" * 10000,
        "- a\n" * 3000,
        "1." + " " * 20000 + "x",
        "---" + " -" * 9000 + "x",
        "_a " * 6000,
    ],
    ids=lambda text: text[:8],
)
def test_no_text_is_slow(page, text):
    """A hostile answer must not freeze the page: it is drawn again at each frame while it comes."""
    took = page.script(
        """
        const started = performance.now();
        drawMarkdown(document.createElement("div"), arguments[0]);
        return performance.now() - started;
        """,
        text,
    )
    assert took < 1000


def test_what_is_drawn_stays_while_more_comes(page):
    """Otherwise text that a reader has selected would be unselected with every token."""
    kept = page.script(
        """
        const target = document.createElement("div");
        drawMarkdown(target, "First\\n\\n```\\ncode");
        const [first, code] = target.children;
        drawMarkdown(target, "First\\n\\n```\\ncode\\nmore\\n```\\n\\nLast");
        return [target.children[0] === first, target.children[1] === code, target.children.length];
        """
    )
    assert kept == [True, False, 3]

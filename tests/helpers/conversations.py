"""Random conversations: many scripts, runs of white space, texts that look like control tokens, tools."""

import json
import string

LOOK_ALIKES = [
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CONTENT]",
    "[IMG]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "[MODEL_SETTINGS]",
    "<SPECIAL_20>",
    "[control_8]",
    "<0x0A>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "[INST",
    "[/",
    "</",
    "s>",
]
SCRIPTS = (  # first and last code point
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x5F4), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE5B), (0x10A0, 0x10FF), (0x1200, 0x137F), (0x1E00, 0x1EFF), (0x2000, 0x206F),
    (0x2150, 0x218B), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFE00, 0xFE0F),
    (0xFF00, 0xFFEF), (0x10300, 0x1032F), (0x1D400, 0x1D7FF), (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF),
    (0x20000, 0x2A6DF), (0xE0001, 0xE007F), (0xF0000, 0xF00FF),
)  # fmt: skip
SPACES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2028",
    "\x00",
    "\x0b\x0c",
)
WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "def",
    "return",
    "import",
    "3.14159",
    "2024-05-13",
    "I'll",
    "don't",
    "naïve",
    "CamelCase",
    "snake_case",
    "https://mistral.ai/news?x=1&y=2",
    "{'a':",
    "[1,",
    "2]}",
    "<b>bold</b>",
    "#include",
    "##",
    "```",
    "$x^2$",
    "👩\u200d👩\u200d👧\u200d👦",
    "🇫🇷",
    "👍🏽",
    "é東京です",
    "مرحبا",
    "नमस्ते",
    "Привет",
    "☺",
    "▁",
    "▁▁",
]
EDGES = ("", "", "", "", " ", "   ", "\n", "\t ")


def text(draw, parts=8):
    """A text of up to `parts` parts, occasionally empty."""
    made = []
    for _ in range(draw.randint(0 if draw.random() < 0.05 else 1, parts)):
        kind = draw.random()
        if kind < 0.5:
            made.append(draw.choice(WORDS) + " ")
        elif kind < 0.65:
            made.append(draw.choice(LOOK_ALIKES))
        elif kind < 0.8:
            made.append(draw.choice(SPACES))
        else:
            first, last = draw.choice(SCRIPTS)
            made.append("".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 5))))
    return draw.choice(EDGES) + "".join(made) + draw.choice(EDGES)


def said(draw):
    """A non-empty text."""
    return text(draw) or "."


def value(draw, depth=2):
    """A JSON value."""
    kind = draw.randrange(7 if depth else 5)
    if kind == 5:
        return [value(draw, depth - 1) for _ in range(draw.randrange(3))]
    if kind == 6:
        return {text(draw, 1): value(draw, depth - 1) for _ in range(draw.randrange(3))}
    return (text(draw, 3), draw.randrange(-(10**6), 10**12), draw.uniform(-1e3, 1e-3), None, draw.random() < 0.5)[kind]


def json_text(draw):
    """JSON in any layout, or text that is not JSON."""
    kind = draw.random()
    if kind < 0.15:
        return text(draw, 3)
    indent, ascii_only = draw.choice((None, None, 2)), draw.random() < 0.5
    return json.dumps(value(draw) if kind < 0.5 else {"x": value(draw)}, indent=indent, ensure_ascii=ascii_only)


def name(draw):
    return "".join(draw.choices(string.ascii_letters + string.digits + "_-", k=draw.randint(1, 12)))


def call_id(draw):
    return "".join(draw.choices(string.ascii_letters + string.digits, k=9))


def tool(draw):
    kinds = [
        {"type": "string", "description": text(draw, 4)},
        {"type": "number"},
        {"enum": [text(draw, 1) for _ in range(2)]},
    ]
    properties = {name(draw): draw.choice(kinds) for _ in range(draw.randrange(3))}
    function = {
        "name": name(draw),
        "description": text(draw, 5),
        "parameters": {"type": "object", "properties": properties},
    }
    return {"type": "function", "function": function}


def parts(draw):
    """A message's content as a list: texts and thoughts in any order, at least one of them not an empty text."""
    made = []
    for i in range(draw.randint(1, 3)):
        if draw.random() < 0.5:
            made.append({"type": "text", "text": text(draw) if i else said(draw)})
        else:
            made.append({"type": "thinking", "thinking": text(draw), "closed": draw.random() < 0.8})
    return made


def content(draw, role, thinkers):
    """The content of a message, which is a list now and then if its role may think."""
    return parts(draw) if role in thinkers and draw.random() < 0.5 else said(draw)


def tool_round(draw, *, several, beside_text, shuffled=False, thinkers=()):
    """An assistant's tool calls and their results, in the order of the calls unless `shuffled`."""
    calls = [
        {"id": call_id(draw), "type": "function", "function": {"name": name(draw), "arguments": json_text(draw)}}
        for _ in range(draw.randint(1, 3 if several else 1))
    ]
    beside = content(draw, "assistant", thinkers) if beside_text and draw.random() < 0.5 else ""
    results = [
        {"role": "tool", "content": json_text(draw), "tool_call_id": call["id"], "name": call["function"]["name"]}
        for call in calls
    ]
    if shuffled:
        draw.shuffle(results)
    return [{"role": "assistant", "content": beside, "tool_calls": calls}, *results]


def conversation(draw, *, tools, several, beside_text, shuffled=False, thinkers=()):
    """(messages, tools) that Mistral's encoder accepts.

    With `tools`, some conversations have tools; `several` allows more than one call per turn, `beside_text` allows
    calls beside text, and `shuffled` results in any order. The messages of `thinkers`, which are roles, may think.
    """
    with_tools = tools and draw.random() < 0.5
    messages = []
    for turn in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        if draw.random() < (0.4 if turn == 0 else 0.1) and (turn == 0 or messages[-1]["role"] == "user"):
            messages += [
                {"role": "system", "content": parts(draw) if "system" in thinkers else text(draw)}
                for _ in range(draw.randint(1, 2))
            ]
        if (turn and messages[-1]["role"] == "user") or (draw.random() < 0.04 and not messages):
            messages.append({"role": "assistant", "content": content(draw, "assistant", thinkers)})
        messages += [{"role": "user", "content": text(draw)} for _ in range(2 if draw.random() < 0.1 else 1)]
        if with_tools and draw.random() < 0.5:
            messages += tool_round(draw, several=several, beside_text=beside_text, shuffled=shuffled, thinkers=thinkers)
            if draw.random() < 0.7:
                messages.append({"role": "assistant", "content": content(draw, "assistant", thinkers)})
        elif draw.random() < 0.7:
            messages += [
                {"role": "assistant", "content": content(draw, "assistant", thinkers)}
                for _ in range(2 if draw.random() < 0.1 else 1)
            ]
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": text(draw)})
    return messages, [tool(draw) for _ in range(draw.randint(1, 2))] if with_tools else []

"""A chat template on the box; a text that it renders must be the one that transformers renders, and of bounded size."""

from functools import partial
from pathlib import Path
from random import Random

from transformers.utils.chat_template_utils import render_jinja_template

from runtime.artifact.manifest import TokenizerSpec
from runtime.text.chat_template import open_chat_template
from runtime.text.tokenizer import open_tokenizer
from tests.fuzz.limits import apart, start_clock
from tests.fuzz.mutations import spoil_bytes
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.tiny_files import CHATML, json_tokenizer

LONGEST = 2**24  # characters of what is rendered
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye\n"},
]
INSTRUCT = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in rest %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}{%- if message['role'] == 'user' %}"
    "{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}{%- else %}{{- ' ' + message['content'] + eos_token }}"
    "{%- endif %}{%- endfor %}"
)
TOOLS = (
    "{% macro shown(tool) %}{{ tool | tojson(indent=2) }}{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for message in messages %}{% set ns.n = ns.n + 1 %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{% for tool in tools or [] %}{{ shown(tool) }}"
    "{% endfor %}{{ messages | map(attribute='role') | join(', ') }}{{ messages | length }}"
)
# What a template may be asked for, but must not get: time, memory, or something outside itself.
HOSTILE = (
    "9**(9**9)", "9**9**9**9", "(9**99999)|string|length", "2**(2**40)", "1 << 99", "'a' * 10**10", "[0] * 10**10",
    "('a' * 10**6) * 10**6", "(messages * 10**9)|length", "'%2000000000d' % 1", "'%.2000000000f' % 1",
    "'{:2000000000}'.format(1)", "'{:.2000000000f}'.format(1)", "'a'.center(2000000000)", "'a'.ljust(2000000000)",
    "'a'.zfill(2000000000)", "'a'.rjust(10**11)", "'\t'.expandtabs(2000000000)", "'a'|center(2000000000)",
    "'a'|indent(2000000000)", "'x y'|wordwrap(1, wrapstring='a' * 10**9)", "('a' * 10**8)|urlize", "range(10**9)|list",
    "range(99999)|list|length", "range(10**5)|map('string')|list|length", "lipsum(10**6)", "lipsum(n=999, min=999)",
    "messages|slice(10**9)|list", "messages|batch(10**9, 0)|list", "messages|batch(10**9, 0)|first|length",
    "cycler(*range(99999))", "'a'.replace('', 'b' * 10**9)", "('a' * 10**6).replace('a', 'b' * 10**6)",
    "('a,' * 10**8).split(',')", "messages|tojson(indent=10**9)", "messages|pprint", "dict(a=1)|xmlattr",
    "strftime_now('%Y' * 10**8)", "strftime_now('%2000000000d')", "namespace().__init__.__globals__",
    "''.__class__.__mro__", "self._TemplateReference__context", "cycler.__init__.__globals__.os", "lipsum.__globals__",
    "messages.append(1)", "messages[0].update(a=1)", "messages|attr('__class__')", "messages[10**30]",
    "'a'.encode('utf-8').decode('utf-16')", "'\ud800'", "1 // 0", "1e999", "-1 ** 0.5", "undefined.a.b", "loop.index",
    "'%s' % messages", "messages|sum", "messages|sort|list", "messages|groupby('role')|list", "messages|random",
    "joiner()()", "caller()", "'a'|format(1, 2)", "'%c' % 1114112", "'%*d' % (2000000000, 1)", "self.x()",
    "''.join(range(10**8))", "range(0, 10**18, 10**13)|list|length", "int('9' * 99999)", "('9' * 99999)|int + 1",
    "('9' * 10**6)|float", "999999|filesizeformat", "'a'|truncate(10**10, true, 'b' * 10**9)", "('<' * 10**7)|escape",
)  # fmt: skip
STATEMENTS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s|length }}",
    "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}{{ n.s > 1 }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s|length }}",
    "{% set n = namespace(s=[]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=1) %}{% for i in range(9999) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}",
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% block a %}{% endblock %}",
    "{% filter upper %}{{ 'a' * 10**10 }}{% endfilter %}", "{% call(x) messages %}{% endcall %}", "{% break %}",
    "{% set x %}{{ 'a' * 10**9 }}{% endset %}", "{% raw %}{{", "{% generation %}", "{% for %}", "{#", "{{", "%}", "{%",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{% do 1 %}", "{% trans %}a{% endtrans %}", "{% debug %}",
    "{% with a = 1 %}{{ a }}{% endwith %}", "{% set messages = [] %}", "{% set ns.x = 1 %}", "{{ bos_token = 1 }}",
)  # fmt: skip
NESTED = (
    ("(", ")"), ("[", "]"), ("-", ""), ("not ", ""), ("{'a':", "}"), ("1 if ", " else 1"), ("1 + (", ")"), ("1 ~ ", ""),
)  # fmt: skip
NESTED_STATEMENTS = (("{% if 1 %}", "{% endif %}"), ("{% for a in [1] %}", "{% endfor %}"), ("{% filter trim %}", ""))
DEPTHS = (10, 90, 300, 1000, 3000, 30_000, 300_000)
SPEC = TokenizerSpec(
    kind="tokenizer.json", file="tokenizer.json", bos_id=1, add_bos=True, eos_ids=(2,), chat_template="template.jinja"
)


def open_reader(folder: Path) -> Reader:
    json_tokenizer().save(str(folder / "tokenizer.json"))
    known = {f"expression {i}": f"{{{{ {text} }}}}".encode(errors="surrogatepass") for i, text in enumerate(HOSTILE)}
    known |= {f"statement {i}": text.encode() for i, text in enumerate(STATEMENTS)}
    for i, (before, after) in enumerate(NESTED):
        known[f"nested expression {i}"] = f"{{{{ {before * 3000}1{after * 3000} }}}}".encode()
    for i, (before, after) in enumerate(NESTED_STATEMENTS):
        known[f"nested statement {i}"] = f"{before * 3000}{after * 3000}".encode()
    known |= {"latin-1": "é".encode("latin-1"), "empty": b"", "a zero byte": b"a\0b", "endless": b"a" * 2**25}
    seeds = [text.encode() for text in (CHATML, INSTRUCT, TOOLS)]
    return Reader(seeds, spoil, partial(check, folder), known)


def spoil(draw: Random, data: bytes) -> bytes:
    """Put hostile expressions and statements into a template, or change any bytes."""
    text = data.decode()
    kind = draw.random()
    if kind < 0.2:
        return spoil_bytes(draw, data)
    if kind < 0.5:  # in place of a name or a constant
        old = draw.choice(("messages", "message['content']", "'user'", "message.content", "add_generation_prompt", "0"))
        text = text.replace(old, f"({_expression(draw)})", draw.choice((1, -1)))
    else:
        at = draw.choice([0, len(text), *(i + 2 for i in range(len(text)) if text[i : i + 2] == "%}")])
        part = draw.choice(STATEMENTS) if draw.random() < 0.4 else f"{{{{ {_expression(draw)} }}}}"
        if draw.random() < 0.2:
            before, after = draw.choice(NESTED_STATEMENTS)
            depth = draw.choice(DEPTHS)
            part = before * depth + part + after * depth
        text = text[:at] + part + text[at:]
    return text.encode(errors="surrogatepass")


def _expression(draw: Random) -> str:
    expression = draw.choice(HOSTILE)
    if draw.random() < 0.3:
        before, after = draw.choice(NESTED)
        depth = draw.choice(DEPTHS)
        expression = before * depth + expression + after * depth
    if draw.random() < 0.3:
        expression = f"({expression}) {draw.choice(('+', '*', '~', '**', '%', 'in', 'and'))} ({draw.choice(HOSTILE)})"
    if draw.random() < 0.2:
        expression = f"({expression})|{draw.choice(('length', 'string', 'tojson', 'list', 'upper', 'safe', 'int'))}"
    return expression


def check(folder: Path, data: bytes) -> None:
    place(folder / "template.jinja", data)
    template = open_chat_template(SPEC, folder, open_tokenizer(SPEC, folder))
    text = template.render(MESSAGES)
    demand(len(text) <= LONGEST, "it renders a text without end")
    source = data.decode()
    if "strftime_now" in source or "random" in source or "lipsum" in source or "0x" in text.lower():
        return  # another text each time, or addresses in memory
    start_clock()
    theirs = apart(partial(_rendered_by_transformers, source))  # which may fail where we do not
    demand(theirs is None or text == theirs, "another text than that of transformers")


def _rendered_by_transformers(source: str) -> str:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, **tokens)
    return rendered[0]

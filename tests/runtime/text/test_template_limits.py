"""A template that would take minutes or gigabytes is refused within a second or so, and real ones are not."""

import resource
import time

import pytest

from runtime.errors import UserError
from runtime.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}]
BOMBS = {
    "power": "{{ 9**(9**9) }}",
    "power of a power": "{% set x = 9**9 %}{{ x**x }}",
    "negative digits": "{{ 5 | round(-10**9) }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a loop's length": "{% for a in range(99999) %}{% for b in range(99999) %}{{ loop.length }}{% endfor %}"
    "{% endfor %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "width": "{{ '%2000000000d' % 1 }}",
    "width of an argument": "{{ '%*d' % (2000000000, 1) }}",
    "precision": "{{ '%.2000000000f' % 1 }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "format of an argument": "{{ '{:>{}}'.format(1, 2000000000) }}",
    "format filter": "{{ '%2000000000d' | format(1) }}",
    "format_map": "{{ '{a:>2000000000}'.format_map({'a': 1}) }}",
    "center": "{{ 'x' | center(2000000000) }}",
    "center by name": "{{ 'x' | center(width=2000000000) }}",
    "center method": "{{ 'x'.center(2000000000) }}",
    "ljust": "{{ 'x'.ljust(2000000000) }}",
    "zfill": "{{ 'x'.zfill(2000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(2000000000) }}",
    "bytes": "{{ (1).to_bytes(2000000000, 'big') }}",
    "indent": "{{ 'a\\nb' | indent(2000000000) }}",
    "tojson": "{{ [1] | tojson(indent=2000000000) }}",
    "product": "{{ 'x' * 2000000000 }}",
    "product from the left": "{{ 2000000000 * [1] }}",
    "product of a product": "{{ ('x' * 60000) * 60000 }}",
    "doubling": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joining twice": "{% set n = namespace(x='xxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "join": "{{ (['x' * 99999] * 99999) | join }}",
    "join with a separator": "{{ range(99999) | list | join('x' * 99999) }}",
    "join method": "{{ ('x' * 99999).join(['y'] * 99999) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'x' * 99999) }}",
    "replace method": "{{ ('x' * 99999).replace('x', 'x' * 99999) }}",
    "replace nothing": "{{ ('x' * 99999).replace('', 'x' * 99999) }}",
    "much output": "{% for a in range(99999) %}{% for b in range(9) %}" + "x" * 9999 + "{% endfor %}{% endfor %}",
    "much output of a macro": "{% macro m() %}{% for a in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "macros that call themselves": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(99) }}",
    "a loop in a loop's own list": "{% for a in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "while a template compiles": "{% autoescape 'x' | center(2000000000) %}x{% endautoescape %}",
    "a power while a template compiles": "{% if 9**(9**9) %}x{% endif %}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep conditions": "{% if x %}" * 5000 + "{% endif %}" * 5000,
    "deep loops": "{% for a in [1] %}" * 200 + "{% endfor %}" * 200,
    "many digits": "{{ " + "9" * 5000 + " }}",
    "break outside a loop": "{% break %}",
    "a long source": "x" * 2**21,
    "many expressions": "{{ a }}" * 200_000,
    "indent many lines": "{% set x = 'a\\n' * 1000000 %}{{ x | indent(100000) }}",
    "tojson of many items": "{{ ([1] * 200000) | tojson(indent=100000) }}",
    "tojson with separators": "{{ ([1] * 200000) | tojson(separators=('x' * 100000, ':')) }}",
    "wordwrap": "{{ ('a ' * 400000) | wordwrap(1, wrapstring='x' * 1000000) }}",
    "tabs": "{{ ('\\t' * 30000).expandtabs(100000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 10000}) }}",
    "join a generator": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "join a generator by a method": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "join a range": "{{ range(99999) | join('x' * 99999) }}",
    "replace by name": "{{ ('a' * 99999) | replace(old='a', new='x' * 99999) }}",
    "width of a width": "{{ '{:{}}'.format('a', '1000000000') }}",
    "width in a list": "{{ '{0:{1[0]}}'.format('a', [1000000000]) }}",
    "namespaces": "{% set n0 = namespace(a=1, b=1) %}"
    + "".join(f"{{% set n{i + 1} = namespace(a=n{i}, b=n{i}) %}}" for i in range(44))
    + "{{ n44 | string | length }}",
    "namespaces filled later": "".join(f"{{% set n{i} = namespace() %}}" for i in range(45))
    + "".join(f"{{% set n{i + 1}.a = n{i} %}}{{% set n{i + 1}.b = n{i} %}}" for i in range(44))
    + "{{ n44 }}",
    "many long texts": "{% set x = 'x' * 4000000 %}{% set l = namespace(l=[]) %}"
    + "".join(f"{{% set v{i} = x + 'b' %}}" for i in range(200)),
    "views of mappings": "{% set d = {'a': 1} %}"
    + "{% set d = {'a': d.items(), 'b': d.items()} %}" * 45
    + "{{ d | string }}",
    "slices": "{% set x = 'a' * 8000000 %}" + "{{ x" + "[1:]" * 100 + " | length }}",
    "a method in a loop": "{% for a in [1] %}{{ 'x'.rjust(10**11) }}{% endfor %}",
    "a join in a loop": "{% for a in [1] %}{{ ('x' * 99999).join(range(99999) | map('string')) }}{% endfor %}",
    "a format in a block": "{% block a %}{{ '{:>2000000000}'.format(1) }}{% endblock %}",
    "a filter in a loop": "{% for a in [1] %}{{ 'x' | center(2000000000) }}{% endfor %}",
    "bytes of a text": "{{ ('x' * 9).encode() }}",
    "a date": "{{ strftime_now('%99999999Y') }}",
    "a long date": "{{ strftime_now('a' * 4000000) }}",
    "a sum of lists": "{{ ([[1] * 9999] * 999) | sum(start=[]) | length }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError) as told:
        ChatTemplate(BOMBS[name], {}, where="x.jinja").render(MESSAGES)
    assert time.process_time() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 512 * 1024  # kB
    assert str(told.value).startswith("x.jinja ")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 2**10 }}{{ 'ab' * 3 }}{{ 7 % 4 }}{{ '%5d' % 7 }}{{ 'a' ~ 1 ~ none }}", "1024ababab3    7a1None"),
        ("{{ 'x' | center(5) }}|{{ 'a' | default(1700000000) }}|{{ y | default(1700000000) }}", "  x  |a|1700000000"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}", "1/1True"),
        ("{% for a in range(3) %}{{ a }}{% if not loop.last %},{% endif %}{% else %}none{% endfor %}", "0,1,2"),
        ("{% for a in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': 1}.items() if v %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ messages | map(attribute='role') | join(', ') }}{{ [1, 2] | tojson(indent=1) }}", "user[\n 1,\n 2\n]"),
        ("{{ '{} and {b}'.format(1, b='x') }}{{ 'aXa'.replace('X', '-') }}{{ '-'.join(['a', 'b']) }}", "1 and xa-aa-b"),
        ("{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m(1700000000) }}{{ [3, 1] | sort | join }}", "[1700000000]13"),
        ("{{ namespace(budget=131072).budget }}{{ messages[0].get('x', 200000) }}", "131072200000"),
        ("{{ '* %s' | format('x') }}{{ 'limit 200000 for %s' | format('x') }}", "* xlimit 200000 for x"),
        ("{{ '%d' | format(1234567) }}{{ '{} 999999'.format(1) }}{{ [1, 2] | sum }}", "12345671 9999993"),
        ("{{ ['a', 'b'] | join('-') }}{{ [{'x': 'a'}, {'x': 'b'}] | join(', ', attribute='x') }}", "a-ba, b"),
        (
            "{{ ['a', 'b'] | join(d='-') }}{{ {'a': 1}.values() | join }}{{ '-'.join(['a', 'b'] | map('upper')) }}",
            "a-b1A-B",
        ),
        ("{{ 'a\nb' | indent(2) }}{{ 'a\tb'.expandtabs(4) }}{{ 3.14159 | round(2) }}", "a\n  ba   b3.14"),
        ("{% for a in [1, 2] %}{{ 'x'.rjust(3) }}{{ '{}'.format(a) }}{% endfor %}", "  x1  x2"),
        ("{% set n = namespace(x=0) %}{% for i in range(4) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", "6"),
    ],
)
def test_what_templates_do_every_day(source, expected):
    assert ChatTemplate(source, {}).render(MESSAGES) == expected

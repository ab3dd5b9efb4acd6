"""What an answer may have to keep to, as the package llguidance takes it: JSON schemas, regular expressions, grammars.

JSON is written without whitespace, but for at most one space or line break behind a comma or colon: a model that may
write any whitespace sometimes writes nothing else. (The package's own `whitespace_pattern` bounds nothing, since it
repeats the pattern.)
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from runtime.errors import UserError

LONGEST = 2**16  # bytes of a source; JSON schemas of that size compile in some tenths of a second
DEEPEST = 64  # objects and lists of a schema within each other; the package refuses some more than 100
MOST_ITEMS = 10_000  # of all lists and objects; the package has rules for each item, which could take all memory
COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
SEPARATORS = {"whitespace_flexible": False, "item_separator": ",[ \\n]?", "key_separator": ":[ \\n]?"}
Part = Mapping[str, object]  # a grammar as the package has it in a list of grammars, without its name


@dataclass(frozen=True)
class JsonSchema:
    """JSON text that is valid under a schema.

    What the package does not know in a schema is refused, or ignored unless `strict`; `oneOf` is then `anyOf`.
    """

    schema: Mapping[str, object]
    strict: bool = True
    what: str = "the JSON schema"
    definitions: Mapping[str, object] = field(default_factory=dict)  # of a schema around it
    writes_json = True

    def part(self) -> Part:
        """The grammar for the package; raises `UserError` for a schema that is too large."""
        check_extent([self])
        _check_size(json.dumps(self.schema), self.what)
        options = {**SEPARATORS, "lenient": not self.strict, "coerce_one_of": not self.strict}
        unnamed = {key: value for key, value in self.schema.items() if key not in ("$id", "x-guidance")}
        return {"json_schema": {**self.definitions, **unnamed, "x-guidance": options}}

    def smaller(self) -> Iterator[tuple[str, "JsonSchema"]]:
        """The schemas right inside this one, each with its place; they share its definitions."""
        own = {key: self.schema[key] for key in DEFINITIONS if key in self.schema}
        for place, inner in _inner_schemas(self.schema):
            yield place, JsonSchema(inner, self.strict, self.what, {**self.definitions, **own})


@dataclass(frozen=True)
class Regex:
    """Text that matches a regular expression as a whole, in the syntax of Rust's package regex."""

    pattern: str
    what: str = "the regular expression"
    writes_json = False

    def part(self) -> Part:
        """The grammar for the package; raises `UserError` for one that is too long."""
        import llguidance

        _check_size(self.pattern, self.what)
        return {"lark_grammar": f"start: /{llguidance.regex_to_lark(self.pattern, '')}/"}


@dataclass(frozen=True)
class LarkGrammar:
    """Text of a context-free grammar, in llguidance's variant of Lark's syntax, from its rule `start` on."""

    text: str
    what: str = "the grammar"
    writes_json = False

    def part(self) -> Part:
        """The grammar for the package; raises `UserError` for one that is too long."""
        _check_size(self.text, self.what)
        if "%json" in self.text:  # the limits of schemas would not hold for it
            raise UserError(f"{self.what} has a JSON schema within it; send a schema as such, or write rules instead")
        return {"lark_grammar": self.text}


GrammarSource = JsonSchema | Regex | LarkGrammar
JSON_OBJECT = JsonSchema({"type": "object"}, what="the JSON object")

# Where schemas hold schemas: by name, in a list, or one alone.
DEFINITIONS = ("$defs", "definitions")
_NAMED = ("properties", "patternProperties")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_ALONE = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")


def _inner_schemas(schema: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    found: list[tuple[str, object]] = []
    for key in (*DEFINITIONS, *_NAMED):
        named = schema.get(key)
        found += [(f"{key}/{name}", inner) for name, inner in named.items()] if isinstance(named, dict) else []
    for key in _LISTED:
        listed = schema.get(key)
        found += [(f"{key}/{i}", inner) for i, inner in enumerate(listed)] if isinstance(listed, list) else []
    found += [(key, schema[key]) for key in _ALONE if key in schema]
    return ((place, inner) for place, inner in found if isinstance(inner, dict))


def _check_size(text: str, what: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > LONGEST:
        raise UserError(f"{what} has {size} bytes, expected at most {LONGEST}; shorten it")


def check_extent(sources: Collection[GrammarSource]) -> None:
    """Raise `UserError` for schemas that are nested too deeply, or whose counts of items are too high in all."""
    items = 0.0
    for source in sources:
        if isinstance(source, JsonSchema):
            items += sum(map(_items, _levels(source)))
            if items > MOST_ITEMS:
                counts = f"{', '.join(COUNTS[:-1])} and {COUNTS[-1]}"
                raise UserError(
                    f"{source.what} brings {counts} to {items:g} in all, expected at most {MOST_ITEMS}; lower them"
                )


def _levels(source: JsonSchema) -> list[object]:
    """The objects and lists of a schema, level by level, since recursion itself would fail if they are too deep."""
    found: list[object] = []
    level: list[object] = [source.schema]
    for _ in range(DEEPEST):
        found += level
        level = [inner for value in level for inner in _children(value)]
        if not level:
            return found
    raise UserError(f"{source.what} is nested more than {DEEPEST} levels deep; flatten it, for example with $defs")


def _items(value: object) -> float:
    counts = [value.get(key) for key in COUNTS] if isinstance(value, dict) else []
    return sum(count for count in counts if isinstance(count, (int, float)) and count > 0)


def _children(value: object) -> list[object]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [one for one in inner if isinstance(one, (dict, list))]

"""The chat templates of a folder or a GGUF, which may be several with names, as the one that an artifact holds."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from export.checkpoints.json_files import convert, read_json, read_text
from export.checkpoints.tokenizers.special_tokens import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder: each file is named as its template
OF_PROCESSORS = ("chat_template.json", "processor_config.json")  # of models that also see images
DEFAULT, WITH_TOOLS = "default", "tool_use"  # the names that transformers and llama.cpp choose by


class _Named(msgspec.Struct, frozen=True):
    name: str
    template: str


class _Config(msgspec.Struct, frozen=True):
    """The part of a file that holds templates: one, a list of named ones, or an object of them."""

    chat_template: str | tuple[_Named, ...] | dict[str, str] | None = None


def folder_template(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """The chat template of a folder, or None, with a note if it has some of which none applies by itself.

    As in transformers, chat_template.jinja comes before `chat_template` of tokenizer_config.json; then come the files
    of processors. Raises `UserError` if a file is malformed.
    """
    more = {path.stem: read_text(path) for path in more_template_files(folder)}
    named = {**_first(folder), **more}
    template = one_template(named)
    if template is not None or not named:
        return template, ()
    return None, (
        f"{folder} has chat templates of the names {', '.join(named)}, and none of the name {DEFAULT}, "
        "so none is used; set frontend.chat_template to a file with the one that you want",
    )


def more_template_files(folder: Path) -> list[Path]:
    """The files of named templates that are in a folder of their own."""
    return sorted(path for path in (folder / MORE_TEMPLATES).glob("*.jinja") if path.is_file())


def one_template(named: Mapping[str, str]) -> str | None:
    """The template that does what several do by name; None without one of the name default.

    That for tools applies if there are any.
    """
    default, with_tools = named.get(DEFAULT), named.get(WITH_TOOLS)
    if default is None or with_tools is None:
        return default
    # A plus sign keeps the white space beside a tag. The last line break is none of a template's text.
    return (
        "{% if tools +%}" + with_tools.removesuffix("\n") + "{%+ else +%}" + default.removesuffix("\n") + "{%+ endif %}"
    )


def _first(folder: Path) -> Mapping[str, str]:
    """The templates of the first file that has any, by name."""
    if (folder / TEMPLATE_FILE).is_file():
        return {DEFAULT: read_text(folder / TEMPLATE_FILE)}
    paths = (folder / name for name in (CONFIG_FILE, *OF_PROCESSORS))
    found = (_by_name(convert(read_json(path), _Config, path)) for path in paths if path.is_file())
    return next((templates for templates in found if templates), {})


def _by_name(config: _Config) -> Mapping[str, str]:
    given = config.chat_template
    if isinstance(given, tuple):
        return {named.name: named.template for named in given}
    return {DEFAULT: given} if isinstance(given, str) else given or {}

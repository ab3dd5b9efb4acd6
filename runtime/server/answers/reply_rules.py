"""What a chat request asks of the form of its answer."""

from runtime.decoding.reply_grammar import NamedTool, ReplyRules, ToolChoice
from runtime.server.answers.conversations import tools_of
from runtime.server.api import chat
from runtime.server.http.failures import refused
from runtime.text.grammar_source import JSON_OBJECT, GrammarSource, JsonSchema, LarkGrammar, Regex


def rules_of(asked: chat.ChatRequest) -> ReplyRules:
    """The rules of a request; raises `RequestFailure` for fields that do not fit together."""
    if asked.tool_choice not in (None, "none") and not asked.tools:
        raise refused("tool_choice needs tools", param="tool_choice")
    if asked.parallel_tool_calls is not None and not asked.tools:
        raise refused("parallel_tool_calls needs tools", param="parallel_tool_calls")
    return ReplyRules(
        tools_of(asked.tools or []), _choice(asked), asked.parallel_tool_calls is not False, _answer(asked)
    )


def _choice(asked: chat.ChatRequest) -> ToolChoice:
    if isinstance(asked.tool_choice, chat.NamedTool):
        return NamedTool(asked.tool_choice.function.name)
    return asked.tool_choice or ("auto" if asked.tools else "none")


def _answer(asked: chat.ChatRequest) -> GrammarSource | None:
    wanted = asked.response_format
    if isinstance(wanted, chat.JsonObjectFormat):
        return JSON_OBJECT
    if isinstance(wanted, chat.JsonSchemaFormat):
        return JsonSchema(wanted.json_schema.schema, strict=wanted.json_schema.strict is True)
    if isinstance(wanted, chat.RegexFormat):
        return Regex(wanted.pattern)
    if isinstance(wanted, chat.GrammarFormat):
        return LarkGrammar(wanted.grammar)
    return None

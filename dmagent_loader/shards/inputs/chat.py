"""Renders conversations by the chat template of a tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmagent_loader._validation import shown
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.shards.inputs.options import TOOLS_KEY

_SPECIAL = re.compile(r"\b(?:bos|eos|unk|sep|pad|cls|mask)_token\b")
_SET = re.compile(r"{%-?\s*set\s+(\w+)")
_CONFIG_NAME = "tokenizer_config.json"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        render: Function from the messages of a conversation and its tools, None if it has none, to its text.
        sha256: Hex sha256 of the template and the special tokens that it writes.
    """

    render: Callable[[list[dict[str, Any]], list[Any] | None], str]
    sha256: str


@functools.lru_cache(maxsize=4)
def load_template(path: str) -> ChatTemplate:
    """Loads a chat template.

    Args:
        path: Folder or Hub name of a tokenizer with a chat template, or a ``.jinja`` file. A file takes the special
            tokens that it names from a ``tokenizer_config.json`` beside it.

    Raises:
        ConfigurationError: There is no template, or it names special tokens that are not known.
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf")
    if path.endswith(".jinja"):
        return _of_file(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigurationError(
            f"no tokenizer could be loaded from {path!r} ({error}): name a .jinja file or a tokenizer's folder"
        ) from error
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"tokenizer {path!r} has no chat template: name one that has, or a .jinja file (--chat-template)"
        )
    return ChatTemplate(
        lambda messages, tools: str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)),
        _digest(tokenizer.chat_template, tokenizer.special_tokens_map),
    )


def _of_file(path: str) -> ChatTemplate:
    if not os.path.isfile(path):
        raise ConfigurationError(f"there is no chat template {path!r}: name a .jinja file or a tokenizer's folder")
    template = Path(path).read_text(encoding="utf-8")
    named = sorted({*_SPECIAL.findall(template)} - {*_SET.findall(template)})
    known = _special_tokens(Path(path).with_name(_CONFIG_NAME)) if named else {}
    missing = [name for name in named if name not in known]
    if missing:
        raise ConfigurationError(
            f"chat template {path!r} writes {', '.join(missing)}, which would be empty: name the tokenizer's folder "
            f"instead, or put its {_CONFIG_NAME} beside the template"
        )
    tokens = {name: known[name] for name in named}
    library = require_extra("transformers.utils.chat_template_utils", "hf")
    return ChatTemplate(
        lambda messages, tools: str(
            library.render_jinja_template([messages], tools=tools, chat_template=template, **tokens)[0][0]
        ),
        _digest(template, tokens),
    )


def _special_tokens(path: Path) -> dict[str, str]:
    """The special tokens of a ``tokenizer_config.json``, by name; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tokens = {name: value for name, value in config.items() if _SPECIAL.fullmatch(name)}
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read ({error}): fetch or write it again") from error
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tools_of(value: Any) -> list[Any] | None:
    """The tools of a conversation, from its column `TOOLS_KEY`; None if it has none.

    Columns of tables have nulls for the keys that only other tools have; they are left out.

    Raises:
        ValueError: The column holds something else.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        tools = json.loads(text or "null", object_hook=lambda found: {k: v for k, v in found.items() if v is not None})
    except (ValueError, TypeError):
        tools = value
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"its column {TOOLS_KEY!r} is neither a list of tools nor the JSON of one: {shown(value)}")
    return tools or None


def fault_of_text(text: str, messages: list[dict[str, Any]]) -> str:
    """The fault of a rendered conversation; ``""`` if there is none.

    Content may be a list of parts, which templates without a loop over them write as Python does. Templates that know
    no tools leave calls of them out.
    """
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if content and not isinstance(content, str) and str(content) in text:
            return (
                f"has {shown(content)} as 'content' of message {number}, which the chat template writes as Python "
                "code, because it expects text"
            )
        for call in message.get("tool_calls") or []:
            name = (call.get("function") or call).get("name")
            if isinstance(name, str) and name not in text:
                return f"has a call of {shown(name)} in message {number}, which the chat template leaves out"
    return ""


def fault_of_messages(messages: Any) -> str:
    """The fault of a value that is not a conversation; ``""`` if it is one."""
    if not isinstance(messages, list) or not messages:
        return "is not a list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"has no 'role' in message {number}: each is an object with 'role' and 'content'"
        if not message.get("content") and not message.get("tool_calls"):
            return f"has no 'content' in message {number}"
    return ""

"""Renders conversations by the chat template of a tokenizer."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmagent_loader.errors import ConfigurationError, require_extra

Render = Callable[[list[dict[str, Any]]], str]


@functools.lru_cache(maxsize=4)
def load_template(path: str) -> Render:
    """A function from the messages of a conversation to its text.

    Args:
        path: Folder or Hub name of a tokenizer with a chat template, or a ``.jinja`` file.

    Raises:
        ConfigurationError: There is no template.
        MissingExtraError: transformers is not installed.
    """
    transformers = require_extra("transformers", "hf")
    if path.endswith(".jinja"):
        if not os.path.isfile(path):
            raise ConfigurationError(f"there is no chat template {path!r}: name a .jinja file or a tokenizer's folder")
        template = Path(path).read_text(encoding="utf-8")
        library = require_extra("transformers.utils.chat_template_utils", "hf")
        return lambda messages: str(library.render_jinja_template([messages], chat_template=template)[0][0])
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
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


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

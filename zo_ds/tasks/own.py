"""A user's own texts to be learned: documents, prompts with their completions, conversations."""

from __future__ import annotations

from typing import Any

from zo_ds.data.examples import Example
from zo_ds.data.rows import Row
from zo_ds.errors import DataError
from zo_ds.tasks.task import Metric, Objective, Task

ROLES = ("system", "user", "assistant", "tool")


def _text(row: Row) -> list[Example]:
    return [Example(row.text("text"), where=row.where)]


def _completion(row: Row) -> list[Example]:
    prompt, completion = row.text("prompt", empty=True), row.text("completion")
    return [Example(prompt, 0, options=(completion,), answers=(completion.strip(),), where=row.where)]


def _chat(row: Row) -> list[Example]:
    messages = row.value("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError("'messages' is not a list of messages", where=row.where, why=f"found {messages!r}")
    turns = tuple(_turn(message, number, row.where) for number, message in enumerate(messages))
    if not any(role == "assistant" for role, _ in turns):
        raise DataError(
            "a conversation without an assistant's message has nothing to learn",
            where=row.where,
            why=f"roles: {', '.join(role for role, _ in turns)}",
        )
    return [Example("", messages=turns, where=row.where)]


def _turn(message: Any, number: int, where: str) -> tuple[str, str]:
    known = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
    if not known:
        raise DataError(
            f"message {number + 1} is not a role and a content",
            where=where,
            why=f"found {message!r}",
            remedy=f'write {{"role": "user", "content": "..."}}; roles are {", ".join(ROLES)}',
        )
    return message["role"], message["content"]


OWN: dict[str, Task] = {
    "text": Task("text", _text, objective=Objective.ANSWER, metric=Metric.LOSS, template="{text}"),
    "completion": Task(
        "completion", _completion, objective=Objective.ANSWER, metric=Metric.LOSS, template="{prompt} -> {completion}"
    ),
    "chat": Task("chat", _chat, objective=Objective.ANSWER, metric=Metric.LOSS, template="{messages}"),
}
"""Every token of a text; the completion; the assistant's messages, by the tokenizer's own chat template."""

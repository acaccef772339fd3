"""What a row is: one of four kinds, told by its fields."""

from typing import Any, NamedTuple

from shared_lib.errors import InputError
from shared_lib.records import Record, short, text_field

#: The fields of each kind.
KINDS = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "question": ("question", "answer"),
    "messages": ("messages",),
}
ROLES = ("system", "user", "assistant", "tool")
INSTEAD = "instead"


class TextRow(NamedTuple):
    """A row whose fields have been checked.

    kind: a key of KINDS. prompt: what comes before; nothing for a text. turns: the messages before the last. answer:
    what is forgotten or kept. instead: what DPO is to prefer to it, where the row says so.
    """

    where: str
    kind: str
    answer: str
    prompt: str = ""
    turns: tuple[dict[str, str], ...] = ()
    instead: str | None = None


def parse_row(record: Record, option: str) -> TextRow:
    """Return the row that a JSON object describes.

    Raises:
        InputError: it is of no kind or of several, or a field is not as it should be; names option, place and field.
    """
    where, fields = f"{option}: {record[0]}", record[1]
    if not isinstance(fields, dict):
        raise InputError(f"{where}: the line must be one JSON object, got {short(fields)}.")
    kind = _kind(fields, where)
    instead = text_field(fields, INSTEAD, where) if fields.get(INSTEAD) is not None else None
    if kind == "messages":
        *turns, last = _messages(fields["messages"], where)
        return TextRow(where, kind, last["content"], turns=tuple(turns), instead=instead)
    if kind == "text":
        return TextRow(where, kind, text_field(fields, "text", where), instead=instead)
    prompt, answer = (text_field(fields, name, where) for name in KINDS[kind])
    return TextRow(where, kind, answer, prompt, instead=instead)


def _kind(fields: dict[str, Any], where: str) -> str:
    present = {name for name, value in fields.items() if value is not None}  # The hub fills what is missing with None.
    whole = [kind for kind, names in KINDS.items() if present.issuperset(names)]
    if len(whole) > 1:
        raise InputError(
            f"{where}: the row must be of one kind, got the fields of {len(whole)}: {_kinds(whole)}. Leave one out."
        )
    begun = whole or [kind for kind, names in KINDS.items() if present.intersection(names)]
    if not begun:
        raise InputError(f"{where}: the row must have the field {_kinds(list(KINDS))}, got {short(list(fields))}.")
    return begun[0]


def _kinds(kinds: list[str]) -> str:
    return ", or ".join(" and ".join(f'"{name}"' for name in KINDS[kind]) for kind in kinds)


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f'{where}: field "messages" must be a list of two messages or more, got {short(messages)}.')
    turns = [_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages)]
    if turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last message must be the assistant's, which is forgotten or kept, got the role "
            f'"{turns[-1]["role"]}".'
        )
    return turns


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InputError(f'{where} must be an object with "role" and "content", got {short(message)}.')
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f'{where}: field "role" must be one of {", ".join(ROLES)}, got {short(role)}.')
    return {"role": role, "content": text_field(message, "content", where)}

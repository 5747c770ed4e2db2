"""Chat templates: a list of messages as the one text that a model was trained to answer.

A template is a Jinja program that came with somebody's weights. It runs in Jinja's sandbox, with a bound on its time
and on every text that it makes.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llm_jax.errors import InputError

MAX_TEMPLATE = 2**18  # characters; the longest published ones have some 20,000
MAX_LENGTH = 2**24  # characters of a text or items of a list; and the largest number that a function is given
MAX_REASON = 500  # characters of what a template says against messages
MAX_SECONDS = 5.0  # of this thread's CPU time; a published template takes milliseconds


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of `messages` by a template as `transformers` renders it; no tools, no documents.

    A template sees `messages`, `add_generation_prompt`, `bos_token` and `eos_token` (undefined where None), `tools`
    and `documents` (none), `raise_exception`, `strftime_now`, the filter `tojson`, and the tags `break`, `continue`
    and `generation`. What a message says is text to it, never template code.

    Bounded: the length of the template and of each text and list that it builds by output, `~`, `+`, `*` or `set`;
    numbers that a function or filter is given; the time, which is looked at in every turn of a loop and at the
    beginning of every macro and block. `**` and the formatting of texts by `%` and `format` are refused. Not
    bounded: what one call of a method or filter takes of time or memory when its texts are large (`replace`,
    `join`), nor the sum of all texts.

    Args:
        messages: at least one, each with "role" and "content"; other keys are given to the template as they are.
        add_generation_prompt: whether the text ends where the assistant's answer begins.

    Raises:
        InputError: messages of another form; a template that is wrong, does what is not allowed, or refuses these
            messages (by `raise_exception`).
    """
    values = {"messages": _checked(messages), "tools": None, "documents": None}
    values |= {"add_generation_prompt": add_generation_prompt}
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    values |= {name: token for name, token in tokens.items() if token is not None}
    if len(template) > MAX_TEMPLATE:
        raise InputError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE} are read")
    try:
        environment = _Sandbox()
        program = environment.from_string(_Bounds().visit(environment.parse(template)))
        return environment.concat(program.generate(values))
    except _Refusal as error:
        raise InputError(f"the chat template refuses these messages: {_one_line(error)}") from None
    except Exception as error:  # foreign code: a template can raise whatever Python's operators do
        reason = _one_line(error) or type(error).__name__
        raise InputError(f"the chat template can't be rendered ({reason}); give a working one") from None


def read_template(file: Path) -> str:
    """The text of a chat_template.jinja."""
    try:
        if (size := file.stat().st_size) > 4 * MAX_TEMPLATE:  # a character has at most 4 bytes
            raise InputError(f"chat template {file} has {size} bytes; at most {4 * MAX_TEMPLATE} are read")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"chat template {file} can't be read ({error.strerror}); repair or remove it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"chat template {file} is not UTF-8 ({error}); repair or remove it") from None


def _checked(messages: Any) -> list[dict[str, str]]:
    """The messages as plain dicts of plain text: a subclass could have methods that a template then calls."""
    form = "[{'role': 'user', 'content': '...'}]"
    if not isinstance(messages, list | tuple) or not messages:
        given = "an empty one" if isinstance(messages, list | tuple) else type(messages).__name__
        raise InputError(f"a chat is a list of messages, got {given}; give it as {form}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i} is {type(message).__name__}; give the messages as {form}")
        for name in ("role", "content"):
            if name not in message:
                raise InputError(f"message {i} has no {name!r}; give the messages as {form}")
        for name, value in message.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InputError(f"message {i}: {name!r} is {type(value).__name__}; names and values must be texts")
    return [{str.__str__(name): str.__str__(value) for name, value in message.items()} for message in messages]


class _Refusal(Exception):
    """A template called raise_exception."""


class _Bounds(NodeTransformer):
    """Lets a program ask `_Sandbox.in_time` wherever it may come again, and join texts by `_Sandbox.joined`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("joined", node.nodes, lineno=node.lineno)

    def _watched(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("in_time", lineno=node.lineno), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_Block = _watched


def _call(method: str, arguments: Sequence[nodes.Expr] = (), *, lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), [*arguments], [], None, None, lineno=lineno)


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words for training; for the text it is a scope and no more."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """For one rendering: its time begins when it is made."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self._deadline = time.thread_time() + MAX_SECONDS
        self.filters = {name: _of_small_numbers(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _of_small_numbers(_tojson)
        del self.filters["format"], self.globals["lipsum"]  # their results have any length
        self.globals |= {
            "dict": lambda *args, **values: dict(*args, **values),  # the class has methods that change messages
            "namespace": _SafeNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }

    def in_time(self) -> bool:
        if time.thread_time() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")
        return True

    def joined(self, *parts: Any) -> str:
        return self.concat(map(str, parts))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What Jinja calls for the text of a macro or of a `set` block."""
        return "".join(_bounded(parts))

    def call(self, context: Any, function: Any, /, *args: Any, **values: Any) -> Any:
        _check_numbers(*args, *values.values())
        return super().call(context, function, *args, **values)

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("'format' is not allowed; join texts by ~")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"{operator!r} of {type(left).__name__} is not allowed")
        sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "+":
            _check_size(sum(sizes))
        elif operator == "*":
            _check_numbers(left, right)
            if sizes:
                _check_size(sizes[0] * max(value for value in (left, right, 0) if isinstance(value, int)))
        return super().call_binop(context, operator, left, right)


class _SafeNamespace(Namespace):
    """Without names of Python's own, which code that is handed the object might believe."""

    def __init__(*args: Any, **values: Any) -> None:  # "self" may be among the values
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **values).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: Any) -> None:
    raise _Refusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own writes <, > and & as escapes, for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _of_small_numbers(function: Callable) -> Callable:
    @functools.wraps(function)
    def checked(*args: Any, **values: Any) -> Any:
        _check_numbers(*args, *values.values())
        return function(*args, **values)

    return checked


def _check_numbers(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_LENGTH:
            raise SecurityError(f"it works with a number beyond {MAX_LENGTH}")


def _check_size(size: int) -> None:
    if size > MAX_LENGTH:
        raise SecurityError(f"it makes a text of more than {MAX_LENGTH} characters or a list of as many items")


def _bounded(parts: Iterable[str]) -> Iterator[str]:
    length = 0
    for part in parts:
        length += len(part)
        _check_size(length)
        yield part


def _one_line(error: Exception) -> str:
    return " ".join(str(error)[:MAX_REASON].split())

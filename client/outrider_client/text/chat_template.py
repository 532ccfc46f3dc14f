"""The target's chat template, which turns messages into the model's own text form of a conversation."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from outrider.common import extras
from outrider_client.arguments import check_text, shown, taken
from outrider_client.errors import InvalidRequestError, ServiceFailedError

MOST_MESSAGES = 1 << 20  # of an iterable; more are taken for endless
LONGEST_S = 5.0  # for one text; milliseconds are usual
_LONGEST_START_S = 60.0  # of a process on a busy machine
_REASONING = ("reasoning_content", "thinking", "reasoning")
_BOOTSTRAP = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from outrider_client.text.chat_worker import main
print("{}", flush=True)
main(int(sys.argv[2]))
"""


class ChatTemplate:
    """Renders one template, in a process that starts at first use and ends with this object. Thread-safe."""

    def __init__(self, source: str, longest_s: float = LONGEST_S):
        self._source, self._longest_s = source, longest_s
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        special_tokens: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        `settings` are further variables of the template, such as `enable_thinking`, or others than the usual ones.

        Raises:
            InvalidRequestError: the messages are malformed, or the template refuses them.
            ServiceFailedError: the template fails, takes too long, or writes too much.
        """
        variables = {
            **special_tokens,
            "messages": checked_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **(settings or {}),
        }
        try:
            request = json.dumps({"template": self._source, "variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"messages holds what JSON cannot: {error}: give texts, numbers, lists, dicts"
            ) from error
        answer = self._answer_to(request)
        if "refused" in answer:
            raise InvalidRequestError(f"the target's chat template refuses the messages: {answer['refused']}")
        if "text" not in answer:
            raise ServiceFailedError(
                f"the target's chat template failed: {answer.get('failed', 'it ended its process')}"
            )
        return _checked_text(answer["text"], variables["messages"])

    def _answer_to(self, request: str) -> dict[str, str]:
        with self._lock:
            worker = self._worker or _Worker(self._longest_s)
            self._worker = worker
            answer = worker.ask(request, self._longest_s)
            if answer is None:
                self._worker = None
                worker.close()
                return {"failed": f"it takes longer than {self._longest_s:g} s, or more memory than it may"}
            return answer


class _Worker:
    """A process that renders, and a thread that reads what it writes."""

    def __init__(self, longest_s: float):
        if find_spec("jinja2") is None:
            raise InvalidRequestError(extras.missing("jinja2", "chat", "chat"))
        arguments = [json.dumps([*map(str, sys.path)]), str(int(longest_s) + 2)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for the text, not for the template
            )
        except (OSError, ValueError, TypeError) as error:
            raise InvalidRequestError(
                f"chat needs a process of its own for the template, which fails: {error}"
            ) from error
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(
            target=_read, args=(self._process, self._answers), name="outrider-chat-template", daemon=True
        ).start()
        self.close = weakref.finalize(self, _end, self._process)
        if self._next(_LONGEST_START_S) is None:
            self.close()
            raise InvalidRequestError("chat needs a process of its own for the template, and it does not start")

    def ask(self, request: str, longest_s: float) -> dict[str, str] | None:
        """Return the answer; None if the process took too long or has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._next(longest_s)

    def _next(self, longest_s: float) -> dict[str, str] | None:
        try:
            line = self._answers.get(timeout=longest_s)
            return json.loads(line) if line else None
        except (queue.Empty, ValueError):
            return None


def _checked_text(text: str, messages: list[dict[str, Any]]) -> str:
    """Return the text of `messages`; a lone surrogate in it is from them, or from the template."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        check_text("messages", json.dumps(messages, ensure_ascii=False))
        raise ServiceFailedError("the target's chat template failed: its text has a lone surrogate") from error
    return text


def _read(process: subprocess.Popen, answers: queue.SimpleQueue[bytes]) -> None:
    """Queue each line; an empty one marks the end."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            answers.put(line)
    answers.put(b"")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with suppress(OSError):  # the process had not read everything
        process.stdin.close()


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as templates see them: dicts without None, with reasoning under each of its usual names.

    Raises:
        InvalidRequestError: they are malformed.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequestError(f"messages is {shown(messages)}: give a list of dicts with role and content")
    given = taken("messages", messages, MOST_MESSAGES, "a list of dicts with role and content")
    if len(given) > MOST_MESSAGES:
        raise InvalidRequestError(f"messages has more than {MOST_MESSAGES}: give fewer, no context holds so many")
    found = [_checked_message(f"messages[{index}]", message) for index, message in enumerate(given)]
    if not found:
        raise InvalidRequestError("messages is empty: give at least one")
    return found


def _checked_message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        raise InvalidRequestError(f"{name} is {shown(message)}: give a dict with role and content")
    its = {key: value for key, value in message.items() if value is not None}
    role, content = its.get("role"), its.get("content")
    if not isinstance(role, str):
        raise InvalidRequestError(f"{name}.role is {shown(role)}: give a string, such as 'user'")
    is_parts = isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)
    if not isinstance(content, str) and not is_parts and not (content is None and "tool_calls" in its):
        raise InvalidRequestError(f"{name}.content is {shown(content)}: give a string, or a list of dicts")
    reasoning = next((its[key] for key in _REASONING if key in its), None)
    return its if reasoning is None else {"thinking": reasoning, **its, "reasoning_content": reasoning}

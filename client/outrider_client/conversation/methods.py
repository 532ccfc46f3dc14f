"""Which conversation writes a text."""

from __future__ import annotations

from typing import Any

from outrider_client.conversation.ahead import Ahead
from outrider_client.conversation.committed import Task
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.draft_only import DraftOnly
from outrider_client.conversation.rounds import Rounds


def conversation_of(task: Task, *given: Any) -> Conversation:
    """Return the conversation for a task; all take the same arguments."""
    if task.speculation.method == "draft":
        return DraftOnly(task, *given)
    return Ahead(task, *given) if task.runs_ahead else Rounds(task, *given)

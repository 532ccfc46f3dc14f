"""Prompts for a benchmark, from a file or from the set that comes with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from outrider_client.errors import InvalidRequestError


def read_prompts(path: Path | None, limit: int) -> list[str]:
    """Return at most `limit` prompts; 0 takes all.

    A `.jsonl` file has one object per line, with `prompt` or alpaca's `instruction` and `input`; any other file has
    one prompt per line. Without a path: the beginnings of stories that come with the package.

    Raises:
        InvalidRequestError: a line is not such an object, or there is no prompt.
    """
    text = (
        files("outrider_client.bench").joinpath("prompts.txt").read_text(encoding="utf-8")
        if path is None
        else path.read_text(encoding="utf-8")
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path is not None and path.suffix == ".jsonl":
        lines = [_prompt_of(line, number) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise InvalidRequestError(f"{path} holds no prompt: give one per line")
    return lines[: limit or None]


def _prompt_of(line: str, number: int) -> str:
    try:
        record: Any = json.loads(line)
        if "prompt" in record:
            return record["prompt"]
        return "\n\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(
            f"line {number}: give a JSON object with `prompt`, or `instruction` and `input`"
        ) from error

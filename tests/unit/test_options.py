"""Option types of the command line."""

from __future__ import annotations

import click
import pytest
from outrider_client.cli.options import Length


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0), ("12", 12)])
def test_a_length_is_auto_or_a_whole_number(text, value):
    assert Length().convert(text, None, None) == value
    assert Length().convert(value, None, None) == value


@pytest.mark.parametrize("text", ["nine", "-1", "1.5", "", "Auto"])
def test_any_other_length_is_refused_with_what_to_give(text):
    with pytest.raises(click.BadParameter, match="`auto` nor a whole number from 0 on"):
        Length().convert(text, None, None)

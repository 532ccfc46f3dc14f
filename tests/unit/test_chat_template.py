"""Chat templates say what transformers makes of them, and whatever they do ends soon and without harm."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from itertools import repeat

import numpy as np
import pytest

from outrider_client.errors import InvalidRequestError, ServiceFailedError
from outrider_client.text import chat_template as chat_template_module
from outrider_client.text.chat_template import ChatTemplate
from outrider_client.text.text import TargetTokenizer
from tests.chat_templates import CONVERSATIONS, TALK, TEMPLATES, THOUGHT, USER
from tests.tiny_models import byte_tokenizer


def as_transformers_does(template: str, messages: list) -> str:
    return byte_tokenizer().apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )


def as_here(template: ChatTemplate, messages: list) -> str:
    return template.render(messages, byte_tokenizer().special_tokens_map)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_what_transformers_makes_of_it(name):
    """Errors too: a refusal by the template is the caller's, and every other one the service's."""
    template = ChatTemplate(TEMPLATES[name])
    for messages in CONVERSATIONS.values():
        expected = outcome(lambda messages=messages: as_transformers_does(TEMPLATES[name], messages))
        actual = outcome(lambda messages=messages: as_here(template, messages))
        if isinstance(expected, str):
            assert actual == expected
        else:
            is_refusal = "raise_exception" in TEMPLATES[name] and "role" in str(expected).lower()
            assert type(actual) is (InvalidRequestError if is_refusal else ServiceFailedError)
            assert str(expected) in str(actual)


def outcome(render: Callable[[], str]) -> str | Exception:
    try:
        return render()
    except Exception as error:
        return error


def test_the_date_is_todays():
    assert as_here(ChatTemplate("{{ strftime_now('%Y') }}"), USER) == str(datetime.now().year)


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one operation": "{{ (messages | length * 10) ** (10 ** 9) }}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "when it is compiled": "{{ 10 ** (10 ** 9) }}",
    "lists of lists": "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
}  # fmt: skip
BROKEN = {
    "syntax": "{% for",
    "unknown tag": "{% oops %}",
    "undefined": "{{ messages[0].no.such }}",
    "no loader": "{% include 'x' %}",
    "type": "{{ 1 + 'a' }}",
    "range": "{{ range(10 ** 9) | list }}",
    "memory": "{{ 'a' * (10 ** 11) }}",
    "doubled": "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "padded": "{{ 'a'.center(10 ** 11) }}",
    "size": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__class__.__name__.x }}",
    "names": "{{ namespace(__class__=1) }}",
    "changes": "{{ messages.append(1) }}",
    "surrogates": "{{ 'a' | format }}{{ '%d' | format('x') }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_is_ended(source):
    with pytest.raises(ServiceFailedError, match=r"^the target's chat template failed: it takes longer than 0.2 s"):
        as_here(ChatTemplate(source, longest_s=0.2), USER)


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_template_that_fails_is_the_services_fault(source):
    with pytest.raises(ServiceFailedError, match=r"^the target's chat template failed: "):
        as_here(ChatTemplate(source), USER)


@pytest.mark.parametrize("source", ["{{ '\\ud800' }}", "{{ '%c' | format(55296) }}"])
def test_half_a_character_is_whose_it_is(source):
    with pytest.raises(ServiceFailedError, match="its text has a lone surrogate"):
        as_here(ChatTemplate(source), USER)
    with pytest.raises(InvalidRequestError, match=r"^messages has a lone surrogate"):
        as_here(ChatTemplate("{{ messages[0].content }}"), [{"role": "user", "content": "\udfff"}])


@pytest.mark.parametrize("source", ["{{ raise_exception('a' * 10 ** 7) }}", "{{ ('a' * 10 ** 7) | int + messages }}"])
def test_a_long_reason_is_cut(source):
    with pytest.raises((InvalidRequestError, ServiceFailedError)) as caught:
        as_here(ChatTemplate(source), USER)
    assert len(str(caught.value)) < 1000


def test_what_a_template_refuses_is_the_callers_mistake():
    with pytest.raises(InvalidRequestError, match=r"refuses the messages: no user, 2$"):
        as_here(ChatTemplate("{{ raise_exception('no ' ~ messages[0].role ~ ', ' ~ (1 + 1)) }}"), USER)


@pytest.mark.parametrize(
    "messages",
    [
        None, "hello", b"hello", 5, [], {}, {"role": "user", "content": "x"}, ["hello"], [None], [["user", "x"]], [{}],
        [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
        [{"role": 5, "content": "x"}], [{"role": None, "content": "x"}], [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": b"x"}], [{"role": "user", "content": "x", 5: 6}],
        [{"role": "user", "content": "x", "name": object()}], [{"role": "user", "content": "x", "name": {1, 2}}],
        [{"role": "user", "content": "\ud800"}], [*USER, "x"], np.array("x"), repeat(USER[0]),
    ],
    ids=lambda messages: repr(messages).split(" object at ")[0],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages):
    tokenizer = TargetTokenizer(byte_tokenizer().backend_tokenizer, TEMPLATES["chatml"], {})
    with pytest.raises(InvalidRequestError, match=r"^messages"):
        tokenizer.render_chat(messages)


class TestRendering:
    TOKENIZER = TargetTokenizer(byte_tokenizer().backend_tokenizer, TEMPLATES["chatml"], {})

    def test_gives_the_ids_of_the_text_and_no_more(self):
        text = as_transformers_does(TEMPLATES["chatml"], USER)
        assert self.TOKENIZER.render_chat(USER) == byte_tokenizer()(text, add_special_tokens=False)["input_ids"]

    def test_takes_any_iterable_and_leaves_the_messages_alone(self):
        messages = [dict(message) for message in THOUGHT]
        assert self.TOKENIZER.render_chat(iter(messages)) == self.TOKENIZER.render_chat(tuple(messages))
        assert messages == THOUGHT

    def test_works_in_threads_and_in_a_loop(self):
        found = []
        threads = [threading.Thread(target=lambda: found.append(self.TOKENIZER.render_chat(TALK))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        async def render() -> list[int]:
            return self.TOKENIZER.render_chat(TALK)

        assert found == 4 * [asyncio.run(render())]

    def test_compiles_a_template_once(self):
        """Its process, where it lives, is the same one."""
        self.TOKENIZER.render_chat(USER)
        worker = self.TOKENIZER._template._worker
        self.TOKENIZER.render_chat(TALK)
        assert self.TOKENIZER._template._worker is worker

    def test_goes_on_after_its_process_was_killed(self):
        template = ChatTemplate(TEMPLATES["chatml"])
        expected = as_here(template, USER)
        template._worker._process.kill()
        template._worker._process.wait()
        with pytest.raises(ServiceFailedError):
            as_here(template, USER)
        assert as_here(template, USER) == expected

    def test_works_with_whatever_stands_in_the_path(self, monkeypatch, tmp_path):
        monkeypatch.setattr("sys.path", [*sys.path, tmp_path])
        assert as_here(ChatTemplate("{{ messages | length }}"), TALK) == "4"

    def test_leaves_no_process_behind(self):
        template = ChatTemplate(TEMPLATES["chatml"])
        as_here(template, USER)
        process = template._worker._process
        del template
        assert process.returncode is not None

    def test_needs_a_template(self):
        with pytest.raises(InvalidRequestError, match="no chat template"):
            TargetTokenizer(byte_tokenizer().backend_tokenizer, "", {}).render_chat(USER)

    def test_needs_jinja2(self, monkeypatch):
        monkeypatch.setattr(chat_template_module, "find_spec", lambda name: None)
        with pytest.raises(InvalidRequestError, match=r"\.\[chat\]"):
            as_here(ChatTemplate("x"), USER)

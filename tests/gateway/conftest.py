"""Gateways in front of real services on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outrider import SpeculativeClient
from tests import tiny_models
from tests.e2e.conftest import NEVER_WITHOUT_DRAFT, services  # noqa: F401 - a fixture
from tests.gateways import GatewayProcess, gateway_process
from tests.servers import DRAFT, TARGET, RunningServer, Services

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if shout is defined %}{{ shout }}{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def paths(tmp_path_factory) -> dict[str, str]:
    """A draft and a target with one tokenizer and a chat template, saved."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    models = {
        name: tiny_models.make_model("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=512)
        for name, seed in (("draft", 1), ("target", 2))
    }
    return {name: tiny_models.save(model, folder / name, tokenizer) for name, model in models.items()}


@pytest.fixture(scope="session")
def draft(services: Services, paths) -> Iterator[RunningServer]:  # noqa: F811
    server = services.start(DRAFT, paths["draft"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def target(services: Services, paths) -> Iterator[RunningServer]:  # noqa: F811
    server = services.start(TARGET, paths["target"])
    yield server
    server.stop()


@pytest.fixture(scope="session")
def gateway(target: RunningServer, draft: RunningServer) -> Iterator[GatewayProcess]:
    """A gateway with two pairs: `tiny`, and `single` without a draft."""
    pairs = f"tiny={target.address},{draft.address}", f"single={target.address}"
    with gateway_process(*pairs) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def client(target: RunningServer, draft: RunningServer) -> Iterator[SpeculativeClient]:
    with SpeculativeClient(target.address, draft.address, patience=NEVER_WITHOUT_DRAFT) as client:
        yield client

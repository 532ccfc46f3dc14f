"""The whole stack on loopback: both services in this process, and clients that reach them through sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outrider import Patience
from tests import tiny_models
from tests.servers import DRAFT, PATIENCE_S, TARGET, Services, shared_services

FAMILY = (
    "gpt2"  # float64 throughout; the others keep norms or rotary angles in float32 whatever the type of the weights
)

# Rounds without proposals follow the same distribution, but draw other texts from one seed. So where a test compares
# texts, no machine may be so busy that a round goes without.
NEVER_WITHOUT_DRAFT = Patience(draft_wait_s=PATIENCE_S, describe_draft_s=PATIENCE_S, retry_s=PATIENCE_S)


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    services = shared_services()
    yield services
    services.close()


@pytest.fixture(scope="session")
def paths(tmp_path_factory) -> dict[str, str]:
    """A draft and a target with one tokenizer, saved."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    models = {
        name: tiny_models.make_model("llama", seed, vocab_size=len(tokenizer))
        for name, seed in (("draft", 1), ("target", 2))
    }
    return {name: tiny_models.save(model, folder / name, tokenizer) for name, model in models.items()}


@pytest.fixture(scope="module")
def addresses(services, paths) -> Iterator[list[str]]:
    """The options by which a command finds services of these models."""
    servers = services.start(DRAFT, paths["draft"]), services.start(TARGET, paths["target"])
    yield [f"--draft={servers[0].address}", f"--target={servers[1].address}"]
    for server in servers:
        server.stop()

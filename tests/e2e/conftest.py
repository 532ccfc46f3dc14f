"""The whole stack on loopback: both services in this process, and clients that reach them through sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from client import Patience
from tests.servers import PATIENCE_S, Services, shared_services

FAMILY = (
    "gpt2"  # float64 throughout; the others keep norms or rotary angles in float32 whatever the type of the weights
)

# Rounds without proposals follow the same law, but draw other texts from one seed. So where a test compares texts, no
# machine may be so busy that a round goes without.
NEVER_WITHOUT_DRAFT = Patience(draft_wait_s=PATIENCE_S, describe_draft_s=PATIENCE_S, retry_s=PATIENCE_S)


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    services = shared_services()
    yield services
    services.close()

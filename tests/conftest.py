"""Settings that hold for every test."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref
from collections.abc import Iterator

# Kernels for GPUs run in Triton's interpreter, on arrays; it is chosen when they are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings

from outrider.engine.backends.paged.cache import BlockPool, PagedCache

# A shell that runs the tests in the background has them ignore SIGINT, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

# The same examples in every run, so that a test passes always or never; no deadline, since machines are shared.
settings.register_profile("outrider", derandomize=True, deadline=None, database=None)
settings.load_profile("outrider")


SETTLING_S = 10.0  # until sessions that a test has left are ended on their own threads

_caches_by_pool: weakref.WeakKeyDictionary[BlockPool, list] = weakref.WeakKeyDictionary()
_make_cache = PagedCache.__init__


def _make_known_cache(cache: PagedCache, pool: BlockPool, max_length: int) -> None:
    _make_cache(cache, pool, max_length)
    _caches_by_pool.setdefault(pool, []).append(weakref.ref(cache))


PagedCache.__init__ = _make_known_cache  # type: ignore[method-assign]


def lost_blocks(pool: BlockPool) -> str:
    """Return what is wrong with a pool's blocks: each is free, or held by one cache that is there, and by it alone."""
    caches = [cache for reference in _caches_by_pool.get(pool, []) if (cache := reference())]
    held = [block for cache in caches for block in cache.block_ids]
    all_blocks = sorted([*pool._free, *held])
    if any(len(cache.block_ids) != pool.num_blocks_for(cache.length) for cache in caches):
        return "a cache holds other blocks than its length needs"
    return "" if all_blocks == list(range(1, pool.num_blocks + 1)) else f"{pool.num_blocks} blocks, but {all_blocks}"


@pytest.fixture(autouse=True)
def all_blocks_are_accounted_for() -> Iterator[None]:
    """Fail a test that loses a block of any pool, or has two sequences hold one."""
    yield
    until = time.monotonic() + SETTLING_S
    while problem := next(filter(None, map(lost_blocks, list(_caches_by_pool))), ""):
        assert time.monotonic() < until, problem
        gc.collect()  # of pools that nobody has any more
        time.sleep(0.01)

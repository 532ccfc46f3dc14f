"""A link with a delay: a TCP proxy in front of a service, for measurements of what distance costs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 256 * 1024
_Arrivals = asyncio.Queue[tuple[float, bytes]]


@contextmanager
def delayed(address: str, one_way_s: float) -> Iterator[str]:
    """Yield an address that leads to `address`, HOST:PORT; each byte takes so long, in both directions."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="delayed-link", daemon=True)
    thread.start()
    link = _Link(address, one_way_s)
    try:
        yield asyncio.run_coroutine_threadsafe(link.start(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(link.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Link:
    """The proxy's server and its connections. Belongs to one event loop."""

    def __init__(self, address: str, one_way_s: float):
        host, _, port = address.rpartition(":")
        self._host, self._port, self._one_way_s = host.strip("[]"), int(port), one_way_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            its_reader, its_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, its_writer), (its_reader, writer)):
            arrivals: _Arrivals = asyncio.Queue()
            for work in (self._read(source, arrivals), self._write(arrivals, sink)):
                task = asyncio.ensure_future(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _read(self, source: asyncio.StreamReader, arrivals: _Arrivals) -> None:
        """Note when all that comes is due; nothing comes behind an empty piece."""
        data, now = b"begin", asyncio.get_running_loop().time
        while data:
            try:
                data = await source.read(CHUNK_BYTES)
            except OSError:
                data = b""
            arrivals.put_nowait((now() + self._one_way_s, data))

    async def _write(self, arrivals: _Arrivals, sink: asyncio.StreamWriter) -> None:
        """Pass on what is due."""
        now = asyncio.get_running_loop().time
        with suppress(OSError):
            while True:
                due_at, data = await arrivals.get()
                if (left_s := due_at - now()) > 0:
                    await asyncio.sleep(left_s)
                if not data:
                    break
                sink.write(data)
        sink.close()

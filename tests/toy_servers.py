"""The toys of toy_services behind real gRPC servers, in threads of this process; each may say whatever a test wants.

A server's `answer` is a generator function like the handler that it takes the place of: it gets the requests of one
stream and its context, and yields responses, or bytes that are none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outrider.protocol.errors import FailedPreconditionError, ModelChangedError, ServiceError
from outrider.serving.server import error_metadata
from outrider.v1 import common_pb2, draft_pb2, target_pb2
from tests.toy_services import VOCAB_SIZE, ToyDraft, ToyTarget

PIECES = "abcdefghi"
Answer = Callable[[Iterator[Any], grpc.ServicerContext], Iterator[Any]]


def tokenizer_json(pieces: Sequence[str] = PIECES) -> bytes:
    """Return a tokenizer with a piece for each id."""
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str().encode()


def info_of(identity: str = "toy", pieces: Sequence[str] = PIECES, context_length: int = 200) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        model_id=f"toy {identity}",
        vocab_size=VOCAB_SIZE,
        context_length=context_length,
        tokenizer=common_pb2.TokenizerFingerprint(
            num_pieces=len(pieces), block_digests=[hash("".join(pieces)) & 0xFFFF]
        ),
        limits=common_pb2.ServiceLimits(max_support=VOCAB_SIZE, max_proposals=64),
        identity=identity,
    )


def abort(context: grpc.ServicerContext, error: ServiceError, code=grpc.StatusCode.FAILED_PRECONDITION) -> None:
    context.set_trailing_metadata(error_metadata(code, error))
    context.abort(code, str(error))


def check_identity(expected: str, info: common_pb2.ModelInfo, context: grpc.ServicerContext) -> None:
    """Do what a service does about OpenVerification.model_identity."""
    if expected and expected != info.identity:
        abort(context, ModelChangedError(f"this is {info.identity}"))


def wait_until_gone(context: grpc.ServicerContext) -> None:
    """Say nothing until the client has gone."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait()


def honest_draft(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[draft_pb2.ProposeResponse]:
    """Propose as a draft service does, all that is wanted after each message."""
    session: ToyDraft | None = None
    try:
        for request in requests:
            if session is None:
                session = ToyDraft(request)
            else:
                session.commit(request)
            while session.wants_token:
                yield session.draft()
    except FailedPreconditionError as error:
        abort(context, error)


def honest_target(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[target_pb2.VerifyResponse]:
    session: ToyTarget | None = None
    try:
        for request in requests:
            if session is None:
                session = ToyTarget(request)
            elif request.HasField("grant"):
                session.grant(request)
            else:
                yield session.answer(request)
            while session.may_write:
                yield session.write()
    except FailedPreconditionError as error:
        abort(context, error)


class ToyServer:
    """A draft service or a target service that answers by generator functions."""

    def __init__(
        self,
        kind: str,
        answer: Answer,
        info: Any = None,
        port: int = 0,
        pieces: Sequence[str] = PIECES,
        send_tokenizer: Callable[[grpc.ServicerContext], Iterator[bytes]] | None = None,
    ):
        """`info` is a ModelInfo, or a function of the context that returns one or aborts.

        `send_tokenizer` yields the parts of `tokenizer.json`; by default that of the pieces.
        """
        self._answer, self._info = answer, info or info_of(pieces=pieces)
        self._send_tokenizer = send_tokenizer or (lambda context: iter([tokenizer_json(pieces)]))
        draft = kind == "draft"
        self._module: Any = draft_pb2 if draft else target_pb2
        name = self._module.DESCRIPTOR.services_by_name[f"{kind.title()}Service"].full_name
        request = draft_pb2.ProposeRequest if draft else target_pb2.VerifyRequest
        handlers = {
            "GetModelInfo": grpc.unary_unary_rpc_method_handler(self._describe, None, _serialised),
            ("Propose" if draft else "Verify"): grpc.stream_stream_rpc_method_handler(
                self._talk, request.FromString, _serialised
            ),
        }
        handlers["GetTokenizer"] = grpc.unary_stream_rpc_method_handler(self._tokenizer, None, _serialised)
        self._pool = ThreadPoolExecutor(32)
        self._server = grpc.server(self._pool, options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def __enter__(self) -> ToyServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Break all streams and free the port."""
        self._server.stop(0).wait()
        self._pool.shutdown(wait=False)

    def _describe(self, request: bytes, context: grpc.ServicerContext) -> Any:
        info = self._info(context) if callable(self._info) else self._info
        name = f"{'Draft' if self._module is draft_pb2 else 'Target'}ServiceGetModelInfoResponse"
        return info if isinstance(info, bytes) else getattr(self._module, name)(model=info)

    def _tokenizer(self, request: bytes, context: grpc.ServicerContext) -> Iterator[Any]:
        is_draft = self._module is draft_pb2
        response = draft_pb2.DraftServiceGetTokenizerResponse if is_draft else target_pb2.GetTokenizerResponse
        for part in self._send_tokenizer(context):
            yield response(tokenizer_json=part)

    def _talk(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        if callable(self._info):
            yield from self._answer(requests, context)
            return
        opening = next(requests, None)
        if opening is None:
            return
        check_identity(opening.open.model_identity, self._info, context)

        def all_requests() -> Iterator[Any]:
            yield opening
            yield from requests

        yield from self._answer(all_requests(), context)


def _serialised(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()

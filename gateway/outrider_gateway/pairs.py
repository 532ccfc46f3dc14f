"""The pairs of services that one gateway holds, each with its client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from outrider.sampling.messages import defaults_of
from outrider.v1 import common_pb2
from outrider_client.aio import AsyncSpeculativeClient
from outrider_client.conversation.patience import Patience
from outrider_client.credentials import Credentials
from outrider_client.errors import InvalidRequestError
from outrider_client.text.text import TargetTokenizer
from outrider_gateway.errors import HttpError
from outrider_gateway.tokens import TokenTexts

CONNECT_S = 10.0  # longest wait for a target's description


@dataclass(frozen=True)
class PairAddress:
    """What `--pair` says: the name under which callers ask for a pair, and where its services are."""

    name: str
    target: str
    draft: str | None

    @classmethod
    def parse(cls, text: str) -> PairAddress:
        """Return NAME=TARGET[,DRAFT]; the draft is what follows the last comma, since one address may list several.

        Raises:
            ValueError: it has another form.
        """
        name, equals, addresses = text.partition("=")
        target, _, draft = addresses.rpartition(",") if "," in addresses else (addresses, "", "")
        if not (name and equals and target):
            raise ValueError(f"{text!r} is no pair: give NAME=TARGET,DRAFT, or NAME=TARGET for a target only")
        return cls(name, target, draft or None)


@dataclass(frozen=True)
class Model:
    """The target's description, with its tokenizer."""

    info: common_pb2.ModelInfo
    tokenizer: TargetTokenizer | None
    texts: TokenTexts | None  # of single tokens

    @property
    def fingerprint(self) -> str:
        return self.info.identity

    @property
    def default_max_tokens(self) -> int | None:
        return defaults_of(self.info).get("max_new_tokens")

    def need_tokenizer(self) -> TargetTokenizer:
        """Return the tokenizer; raises InvalidRequestError if the model came without one."""
        if self.tokenizer is None:
            raise InvalidRequestError("prompt needs a tokenizer, and the model came without one: give token ids")
        return self.tokenizer


class Pair:
    """One pair: its client, and what its target last said of itself."""

    def __init__(self, address: PairAddress, patience: Patience, credentials: Credentials):
        self.name, self.has_draft = address.name, address.draft is not None
        connect_s = min(patience.retry_s, CONNECT_S)
        files = credentials.files
        self.client = AsyncSpeculativeClient(
            address.target,
            address.draft,
            patience=patience,
            connect_timeout=connect_s,
            api_key=credentials.api_key,
            tls_ca=files.ca,
            tls_cert=files.cert,
            tls_key=files.key,
        )
        self._model: Model | None = None

    async def model(self) -> Model:
        """Return the target's description; it is asked for again when the client has fetched another tokenizer.

        Raises:
            OutriderError: the target does not answer.
        """
        tokenizer, model = await self.client.tokenizer(), self._model
        if model is None or model.tokenizer is not tokenizer:
            info = (await self.client.info()).target
            model = self._model = Model(info, tokenizer, TokenTexts(tokenizer.tokenizer) if tokenizer else None)
        return model


class Pairs:
    """All pairs of a gateway, by name; the first one serves requests that name no model."""

    def __init__(self, addresses: Sequence[PairAddress], patience: Patience, credentials: Credentials):
        self.by_name: Mapping[str, Pair] = {each.name: Pair(each, patience, credentials) for each in addresses}

    def named(self, name: str | None) -> Pair:
        """Return the pair of a name; raises HttpError 404 for an unknown one."""
        if name is None:
            return next(iter(self.by_name.values()))
        if name not in self.by_name:
            known = ", ".join(self.by_name)
            raise HttpError(404, f"there is no model of this name: give one of {known}", "model_not_found", "model")
        return self.by_name[name]

    async def close(self) -> None:
        for pair in self.by_name.values():
            await pair.client.close()

"""A benchmark's result: samples and all that is needed to understand and repeat them, as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from outrider_client.bench.memory import Memory
from outrider_client.bench.rounds import summarise_rounds
from outrider_client.bench.samples import Sample, Settings
from outrider_client.bench.summary import Order, Row, measured_costs, summarise
from outrider_client.errors import InvalidRequestError

SCHEMA = 3
REPORTED_PACKAGES = (
    "outrider",
    "grpcio",
    "protobuf",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "scikit-learn",  # with it, transformers' dynamic assistance tunes its threshold
)
Kind = Literal["sweep", "latency", "throughput", "rpc"]


@dataclass(frozen=True)
class Result:
    """One run of a benchmark."""

    kind: Kind
    settings: Settings
    prompts: Sequence[str]
    pair: dict[str, Any]  # the models' descriptions, by role
    samples: Sequence[Sample]
    threads: dict[str, int | None]  # CPU threads of each service started here, and of the peer; None: unknown
    versions: dict[str, str | None]
    machine: dict[str, Any]
    made_at: str
    memory: Sequence[Memory] = ()  # of services started here and of llama.cpp, where the two are compared

    @property
    def title(self) -> str:
        draft = self.pair["draft"]["model_id"] if "draft" in self.pair else "lookup"
        return f"{self.pair['target']['model_id']} with {draft}, {self.settings.rule_name}"

    @property
    def order(self) -> Order:
        return "concurrent" if self.kind == "throughput" else "sequential"

    def rows(self) -> list[Row]:
        return summarise(self.samples, self.pair["target"]["vocab_size"], self.order)

    def as_dict(self) -> dict[str, Any]:
        summary = summarise_rounds(self.samples) if self.kind == "rpc" else self.rows()
        costs = measured_costs(self.samples) if self.order == "sequential" else None
        fields = {name: getattr(self, name) for name in ("kind", "made_at", "pair", "threads", "versions", "machine")}
        return {
            "schema": SCHEMA,
            **fields,
            "settings": asdict(self.settings),
            "prompts": list(self.prompts),
            "costs": costs and asdict(costs),
            "memory": [each.as_dict() for each in self.memory],
            "summary": [row.as_dict() for row in summary],
            "samples": [sample.as_dict() for sample in self.samples],
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Result:
        """Return the result that `as_dict` wrote; raises InvalidRequestError for any other document."""
        if document.get("schema") != SCHEMA or document.get("kind") not in get_args(Kind):
            raise InvalidRequestError(
                f"schema is {document.get('schema')!r}: this version reads results of schema {SCHEMA}; measure again"
            )
        fields = {"memory": []} | {name: document[name] for name in cls.__dataclass_fields__ if name in document}
        fields["settings"] = Settings.from_dict(fields["settings"])
        fields["samples"] = [Sample.from_dict(record) for record in fields["samples"]]
        fields["memory"] = [Memory.from_dict(record) for record in fields["memory"]]
        return cls(**fields)


def new_result(
    kind: Kind,
    settings: Settings,
    prompts: Sequence[str],
    pair: dict[str, Any],
    threads: dict[str, int | None],
    samples: Sequence[Sample],
) -> Result:
    """Return a result made now, on this machine."""
    versions = {name: _version(name) for name in REPORTED_PACKAGES} | {"python": platform.python_version()}
    made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Result(kind, settings, prompts, pair, samples, threads, versions, machine(), made_at)


def write(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result.as_dict()), encoding="utf-8")


def read(path: Path) -> Result:
    """Return a saved result; raises InvalidRequestError if the file holds none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequestError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"{path} holds no result of outrider bench")
    return Result.from_dict(document)


def write_csv(result: Result, path: Path) -> None:
    """Write the summary, one line per cell; names of nested figures are dotted: `ttft_ms.median`."""
    records = [_flat(row) for row in result.as_dict()["summary"]]
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(records)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{name}.")
        elif item is not None:
            flat[prefix + name] = " ".join(map(str, item)) if isinstance(item, list) else item
    return flat


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": _processor(), "num_cores": num_cores()}


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()

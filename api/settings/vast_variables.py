"""What the platform and its templates set in a container's environment, and what it means here.

`api.settings.config` reads them, as it reads every variable; this is what they may be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, SecretStr
from pydantic_settings import BaseSettings

DEFAULT_REPORT_ADDRESS = "https://run.vast.ai"

PYWORKER_BACKEND = ("127.0.0.1", 5001)
"""Where the platform's stock PyWorker looks for its model server. Only the PyWorker may reach it,
since the PyWorker is what verifies signatures.
"""

_MAPPED_PORT = 70_000
"""From here on the platform maps a port to a random one of the same number inside and out."""


class MissingVariable(Exception):
    """The platform sets it in every worker's container."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports, and to whom.

    report_addresses  of autoscalers, without trailing slash, to be tried in order
    url               where clients reach it, from outside
    """

    container_id: int
    master_token: SecretStr
    report_addresses: tuple[str, ...]
    url: str


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """A worker's place on the platform, and how it is to behave there.

    port              where it listens, inside
    max_queue_time_s  a request that would wait for longer is answered 429; None: never
    max_sessions      open at once; 0: no limit
    """

    identity: Identity
    port: int
    use_ssl: bool
    unsecured: bool
    max_queue_time_s: float | None
    max_sessions: int
    console_url: str
    tls_directory: Path
    benchmark_cache: Path
    benchmark_seconds: float


def _truth(value: object) -> object:
    """As Python's `strtobool`, which the platform's own worker reads them with."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("y", "yes", "t", "true", "on", "1"):
            return True
        if word in ("n", "no", "f", "false", "off", "0"):
            return False
        raise ValueError("must be true or false")
    return value


def _without_slash(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value.rstrip("/")


def _addresses(value: str) -> str:
    _split(value)
    return value


def _split(addresses: str | None) -> tuple[str, ...]:
    listed = (addresses or DEFAULT_REPORT_ADDRESS).split(",")
    return tuple(_without_slash(address.strip()) for address in listed)


Truth = Annotated[bool, BeforeValidator(_truth)]


class VastVariables(BaseSettings):
    container_id: Annotated[int | None, Field(ge=0)] = Field(
        None,
        description="Vast.ai: the instance; with MASTER_TOKEN or REPORT_ADDR this is one of its "
        "serverless workers",
    )
    vast_containerlabel: str | None = Field(
        None, description="Vast.ai: C.<id>, read where CONTAINER_ID is not set"
    )
    master_token: SecretStr | None = Field(
        None, description="Vast.ai: what its autoscaler knows the worker by"
    )
    report_addr: Annotated[str | None, AfterValidator(_addresses)] = Field(
        None,
        description="Vast.ai: autoscalers that load is reported to, separated by commas; None is "
        f"{DEFAULT_REPORT_ADDRESS}",
    )
    public_ipaddr: str | None = Field(None, description="Vast.ai: the machine's public address")
    worker_port: PositiveInt = Field(
        3000,
        description="Vast.ai: port that a worker listens on, in place of --port; its public port "
        "is in VAST_TCP_PORT_<port>",
    )
    worker_http_port: PositiveInt | None = Field(
        None, description="unused: sessions are closed on WORKER_PORT"
    )
    use_ssl: Truth = Field(True, description="Vast.ai: serve TLS, as the platform's clients ask")
    unsecured: Truth = Field(
        False, description="Vast.ai: serve whoever asks, without looking at signatures"
    )
    max_queue_time: Annotated[float, Field(ge=0)] | None = Field(
        60.0, description="Vast.ai: seconds; a request that would wait longer is answered 429"
    )
    max_sessions: NonNegativeInt = Field(
        10, description="Vast.ai: most sessions open at once; 0 is without limit"
    )
    vast_console_url: Annotated[str, AfterValidator(_without_slash)] = Field(
        "https://console.vast.ai", description="Vast.ai: who signs the worker's certificate"
    )
    tls_directory: Path = Field(
        Path("/etc"), description="Vast.ai: folder of instance.key and instance.crt"
    )
    benchmark_cache: Path | None = Field(
        None,
        description="Vast.ai: folder for the benchmark's results; None is beside the hub's cache",
    )
    benchmark_seconds: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Vast.ai: what the benchmark at start may take"
    )
    backend: str | None = Field(
        None,
        description="Vast.ai: set by templates whose PyWorker stands in front; Skiff is then what "
        "that worker takes for its model server",
    )
    model_log: Path = Field(
        Path("/workspace/infer.log"), description="Vast.ai: log that such a PyWorker reads"
    )
    model_health_endpoint: str | None = Field(
        None, description="unused: health is known in this process"
    )

    @property
    def vast_mode(self) -> Literal["worker", "behind pyworker"] | None:
        if not self._container():
            return None
        if self.backend is not None:
            return "behind pyworker"
        known = self.master_token is not None or self.report_addr is not None
        return "worker" if known else None

    def worker_config(self, environment: Mapping[str, str], home: Path) -> WorkerConfig:
        """`home` is where results are kept that no other folder is named for. Raises
        MissingVariable.
        """
        mapped = environment.get(f"VAST_TCP_PORT_{self.worker_port}", "")
        return WorkerConfig(
            identity=Identity(
                container_id=self._container_id(),
                master_token=self.master_token or SecretStr(""),
                report_addresses=_split(self.report_addr),
                url=self._url(mapped),
            ),
            port=int(mapped) if self.worker_port >= _MAPPED_PORT else self.worker_port,
            use_ssl=self.use_ssl,
            unsecured=self.unsecured,
            max_queue_time_s=self.max_queue_time,
            max_sessions=self.max_sessions,
            console_url=self.vast_console_url,
            tls_directory=self.tls_directory,
            benchmark_cache=self.benchmark_cache or home,
            benchmark_seconds=self.benchmark_seconds,
        )

    def _url(self, mapped: str) -> str:
        if not self.public_ipaddr:
            raise MissingVariable("PUBLIC_IPADDR: is not set; it is the machine's public address")
        if not mapped.isdecimal() or not 0 < int(mapped) < 65536:
            raise MissingVariable(
                f"VAST_TCP_PORT_{self.worker_port}: is not a port; publish the worker's port "
                f"(-p {self.worker_port}:{self.worker_port} in the template's options)"
            )
        scheme = "https" if self.use_ssl else "http"
        return f"{scheme}://{self.public_ipaddr}:{mapped}"

    def _container(self) -> str:
        if self.container_id is not None:
            return str(self.container_id)
        return (self.vast_containerlabel or "").removeprefix("C.")

    def _container_id(self) -> int:
        container = self._container()
        if not container.isdecimal():
            raise MissingVariable("CONTAINER_ID: is not a number; it is the instance's")
        return int(container)


def is_behind_pyworker(environment: Mapping[str, str]) -> bool:
    return bool(_container_in(environment) and environment.get("BACKEND"))


def _container_in(environment: Mapping[str, str]) -> str:
    container = environment.get("CONTAINER_ID") or environment.get("VAST_CONTAINERLABEL", "")
    return container.removeprefix("C.")


def identity_in(environment: Mapping[str, str]) -> Identity | None:
    """Whatever else is wrong with it: who can report that. None: it is no worker's."""
    container = _container_in(environment)
    known = environment.get("MASTER_TOKEN") or environment.get("REPORT_ADDR")
    if not container.isdecimal() or not known or is_behind_pyworker(environment):
        return None
    try:
        addresses = _split(environment.get("REPORT_ADDR"))
    except ValueError:
        addresses = (DEFAULT_REPORT_ADDRESS,)
    return Identity(
        container_id=int(container),
        master_token=SecretStr(environment.get("MASTER_TOKEN", "")),
        report_addresses=addresses,
        url="",
    )

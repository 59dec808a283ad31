"""The environment variables that Vast and its templates set in a container.

They are fields of the settings like all others, and `api.settings.config` reads them. The
functions at the end read some of them again where the settings as a whole are invalid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, SecretStr
from pydantic_settings import BaseSettings

DEFAULT_REPORT_ADDRESS = "https://run.vast.ai"

PYWORKER_BACKEND = ("127.0.0.1", 5001)
"""Where Vast's stock PyWorker expects its model server. Only the PyWorker may reach the server,
because the PyWorker verifies the signatures.
"""

VastMode = Literal["worker", "behind pyworker"]

_MAPPED_PORT = 70_000
"""Vast maps a port from this number on to a random port, which is the same inside and outside."""


class MissingVariable(Exception):
    """A variable is missing or wrong that Vast sets in every worker's container."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker needs for its reports.

    report_addresses  addresses of autoscalers, without trailing slash, tried in order
    url               where clients reach the worker from outside
    """

    container_id: int
    master_token: SecretStr
    report_addresses: tuple[str, ...]
    url: str


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The configuration of a Vast worker.

    port              where it listens, inside the container
    max_queue_time_s  a request that would wait longer is answered 429; None: never
    max_sessions      most sessions open at once; 0: no limit
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
    """Parse a boolean like Python's `strtobool`, which Vast's stock worker uses."""
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
        description="Vast.ai: number of the instance; with MASTER_TOKEN or REPORT_ADDR it is a "
        "serverless worker",
    )
    vast_containerlabel: str | None = Field(
        None, description="Vast.ai: C.<number>, used if CONTAINER_ID is not set"
    )
    master_token: SecretStr | None = Field(
        None, description="Vast.ai: token with which the worker reports to the autoscaler"
    )
    report_addr: Annotated[str | None, AfterValidator(_addresses)] = Field(
        None,
        description="Vast.ai: addresses of autoscalers to report to, separated by commas; None is "
        f"{DEFAULT_REPORT_ADDRESS}",
    )
    public_ipaddr: str | None = Field(None, description="Vast.ai: the machine's public IP address")
    worker_port: PositiveInt = Field(
        3000,
        description="Vast.ai: port that a worker listens on, instead of --port; its public port is "
        "in VAST_TCP_PORT_<port>",
    )
    worker_http_port: PositiveInt | None = Field(
        None, description="unused: sessions are closed on WORKER_PORT"
    )
    use_ssl: Truth = Field(True, description="Vast.ai: serve TLS, which Vast's clients require")
    unsecured: Truth = Field(
        False, description="Vast.ai: serve every request, without checking signatures"
    )
    max_queue_time: Annotated[float, Field(ge=0)] | None = Field(
        60.0, description="Vast.ai: seconds; a request that would wait longer is answered 429"
    )
    max_sessions: NonNegativeInt = Field(
        10, description="Vast.ai: most sessions open at once; 0 is no limit"
    )
    vast_console_url: Annotated[str, AfterValidator(_without_slash)] = Field(
        "https://console.vast.ai",
        description="Vast.ai: address that signs the worker's certificate",
    )
    tls_directory: Path = Field(
        Path("/etc"), description="Vast.ai: folder of instance.key and instance.crt"
    )
    benchmark_cache: Path | None = Field(
        None,
        description="Vast.ai: folder for benchmark results; None is next to the hub's cache",
    )
    benchmark_seconds: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Vast.ai: most seconds that the benchmark at start may take"
    )
    backend: str | None = Field(
        None,
        description="Vast.ai: set by templates that run Vast's PyWorker; Skiff is then the model "
        "server behind it",
    )
    model_log: Path = Field(
        Path("/workspace/infer.log"), description="Vast.ai: log file that such a PyWorker reads"
    )
    model_health_endpoint: str | None = Field(
        None, description="unused: the worker knows the engine's health without a request"
    )

    @property
    def vast_mode(self) -> VastMode | None:
        return _mode(self._container, self.backend, self.master_token, self.report_addr)

    def worker_config(self, environment: Mapping[str, str], home: Path) -> WorkerConfig:
        """Return the worker's configuration. `home` is the default folder of benchmark results.
        Raises MissingVariable.
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

    @property
    def _container(self) -> str:
        return _container_of(self.container_id, self.vast_containerlabel)

    def _container_id(self) -> int:
        if not self._container.isdecimal():
            raise MissingVariable("CONTAINER_ID: is not a number; it is the instance's number")
        return int(self._container)


def _container_of(container_id: int | str | None, label: str | None) -> str:
    """Return the number of the instance as text, or an empty string outside of Vast."""
    return str((label or "") if container_id is None else container_id).removeprefix("C.")


def _mode(
    container: str, backend: str | None, master_token: object, report_addr: object
) -> VastMode | None:
    """Return how Skiff runs on Vast; None for a plain server, on Vast or elsewhere."""
    if not container:
        return None
    if backend is not None:
        return "behind pyworker"
    is_worker = master_token is not None or report_addr is not None
    return "worker" if is_worker else None


def _read(environment: Mapping[str, str], *names: str) -> list[str | None]:
    """Return the values of variables. An empty one counts as not set, as in the settings."""
    return [environment.get(name) or None for name in names]


def _container_in(environment: Mapping[str, str]) -> str:
    return _container_of(*_read(environment, "CONTAINER_ID", "VAST_CONTAINERLABEL"))


def vast_mode_in(environment: Mapping[str, str]) -> VastMode | None:
    """Return `VastVariables.vast_mode` where there are no settings yet."""
    variables = _read(environment, "BACKEND", "MASTER_TOKEN", "REPORT_ADDR")
    return _mode(_container_in(environment), *variables)


def identity_in(environment: Mapping[str, str]) -> Identity | None:
    """Return the identity of a worker whose settings are invalid, so that it can report that.
    None if the container is no worker.
    """
    container = _container_in(environment)
    if vast_mode_in(environment) != "worker" or not container.isdecimal():
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

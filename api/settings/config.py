"""Reading the settings from flags and environment variables. No other module reads either.

Names are those of TGI's launcher: `--max-best-of 4` is `MAX_BEST_OF=4`, and a flag overrides the
environment. The fields are declared in `served_flags.py` (settings that Skiff acts on),
`launcher_flags.py` (other flags of TGI's launcher) and `vast_variables.py`.
"""

import ipaddress
import logging
import os
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from api.settings.launcher_flags import CheckpointFormat, LauncherFlags, flag_of
from api.settings.served_flags import ServedFlags
from api.settings.vast_variables import (
    PYWORKER_BACKEND,
    Identity,
    MissingVariable,
    VastVariables,
    WorkerConfig,
    identity_in,
    vast_mode_in,
)
from engine.core.config import (
    EngineConfig,
    LoadConfig,
    Quantization,
    RopeScaling,
)

MAX_COUNTED_NEW_TOKENS = 1024
"""Like TGI, count at most this many new tokens of a request against the context's length."""

logger = logging.getLogger(__name__)


class ConfigError(Exception):
    """A setting is not allowed. The message names its flag and the allowed values."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on requests, for their validation."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    prefill_logprobs: bool


# --help lists the fields of the last base first: those that have an effect.
class Settings(LauncherFlags, VastVariables, ServedFlags):
    """Serve one model with the API of Text Generation Inference. Every flag is also an
    environment variable: --max-best-of 4 is MAX_BEST_OF=4. A flag overrides its variable. Set
    HF_TOKEN to download gated models.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_shortcuts={"port": "p", "graceful-termination-timeout": "g", "env": "e"},
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags and environment, except two variables. ENV is a flag only, as in TGI: many
        containers set a variable of that name. PORT is ignored behind a PyWorker, which expects
        the server on a fixed port and not on the one that the image sets.
        """
        assert isinstance(env_settings, EnvSettingsSource)
        behind_pyworker = vast_mode_in(os.environ) == "behind pyworker"
        ignored = {"env", "port"} if behind_pyworker else {"env"}
        env_settings.env_vars = {
            name: value for name, value in env_settings.env_vars.items() if name not in ignored
        }
        return init_settings, env_settings

    @field_validator("cors_allow_origin", "cuda_graphs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("log_colorize", mode="before")
    @classmethod
    def _colours_unless_one(cls, value: object) -> object:
        return value.lower() not in ("1", "false") if isinstance(value, str) else value

    @field_validator("api_key")
    @classmethod
    def _fits_in_header(cls, value: SecretStr | None) -> SecretStr | None:
        """The key is sent in a header: it must be printable ASCII, with no surrounding spaces."""
        key = "x" if value is None else value.get_secret_value()
        if key != key.strip() or not (key.isascii() and key.isprintable()):
            raise ValueError("must be printable ASCII, with no surrounding spaces")
        return value

    @field_validator("hostname")
    @classmethod
    def _listening_address(cls, value: str) -> str:
        """Listen on all addresses if the value is no address: containers set HOSTNAME to their
        own name.
        """
        if value == "localhost":
            return "127.0.0.1"
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            logger.warning("hostname %r is not an IP address: listening on 0.0.0.0", value)
            return "0.0.0.0"

    @model_validator(mode="after")
    def _limits_agree(self) -> "Settings":
        """Check the limits that are known before the model is loaded. The texts are TGI's."""
        if self.max_input_tokens is not None and self.max_input_length is not None:
            raise ValueError(
                f"Both `max_input_tokens` ({self.max_input_tokens}) and `max_input_length` "
                f"({self.max_input_length}) are set. Please define only `max_input_tokens` as "
                "`max_input_length` is deprecated for naming consistency."
            )
        total, batch = self.max_total_tokens, self.max_batch_total_tokens
        if total is not None and batch is not None and total > batch:
            raise ValueError(
                "`max_total_tokens` must be <= `max_batch_total_tokens`. "
                f"Given: {total} and {batch}"
            )
        return self

    def notes(self) -> Iterator[str]:
        """Yield a line for each setting that does not do what its name says."""
        yield from self.unused()
        if self.quantize == "eetq":
            yield "--quantize (QUANTIZE) eetq: bitsandbytes' 8 bits are used instead of EETQ's"
        if self.quantize in get_args(CheckpointFormat):
            yield (
                f"--quantize (QUANTIZE) {self.quantize}: the weights are loaded as they are in the "
                "checkpoint, quantised or not"
            )
        if self.cuda_graphs is not None and any(self.cuda_graphs):
            yield "--cuda-graphs (CUDA_GRAPHS): graphs are enabled, but the sizes are ignored"

    def notes_on_device(self, is_cpu: bool) -> Iterator[str]:
        """Yield a line for each setting that is given and is for another kind of device."""
        names = ("cuda_memory_fraction", "tgi_wiggle_room") if is_cpu else ("cpu_cache_gib",)
        device, instead = ("CPU", "cpu_cache_gib") if is_cpu else ("GPU", "cuda_memory_fraction")
        for name in names:
            if name in self.model_fields_set:
                yield (
                    f"{flag_of(name)} changes nothing on a {device}: {flag_of(instead)} limits the "
                    "memory there"
                )

    def export_library_settings(self) -> None:
        """Set the environment variables that libraries read when they are first used.

        What the user has set for torch and Triton stays.
        """
        self._export_hub_settings()
        # Memory that is freed within a segment can be given back, and a segment can grow. The
        # second name is the older one: torch reads it only where the first is not set.
        if not any(os.environ.get(f"PYTORCH_{name}") for name in ("ALLOC_CONF", "CUDA_ALLOC_CONF")):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        # Compiled kernels lie beside the models: what keeps these from start to start keeps both.
        if _can_write(kernels := self._home() / "triton"):
            os.environ.setdefault("TRITON_CACHE_DIR", str(kernels))
        os.environ.setdefault("TRITON_CACHE_MANAGER", "kernels.compiled:CompiledKernels")

    def _export_hub_settings(self) -> None:
        if self.huggingface_hub_cache is not None:
            os.environ["HF_HUB_CACHE"] = self.huggingface_hub_cache
        for name in ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # TGI's order
            if token := os.environ.get(name):
                os.environ["HF_TOKEN"] = token
                break
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

    def load_config(self) -> LoadConfig:
        return LoadConfig(
            model_id=self.model_id,
            revision=self.revision,
            dtype=self.dtype,
            quantize=self._quantization(),
            rope=self._rope(),
            batch_invariant=self.batch_invariant,
            trust_remote_code=self.trust_remote_code,
            tokenizer_config_path=self.tokenizer_config_path,
        )

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            max_sequences=self.max_batch_size,
            max_batch_tokens=self.max_batch_prefill_tokens,
            max_total_tokens=self.max_total_tokens,
            memory_fraction=self.cuda_memory_fraction * self.tgi_wiggle_room,
            cpu_cache_bytes=None if self.cpu_cache_gib is None else int(self.cpu_cache_gib * 2**30),
            kv_cache_dtype=self.kv_cache_dtype,
            prefix_caching=self.prefix_caching,
            cuda_graphs=self.cuda_graphs is None or any(self.cuda_graphs),
            max_top_tokens=max(EngineConfig().max_top_tokens, self.max_top_n_tokens),
            watermark=(self.watermark_gamma, self.watermark_delta),
        )

    @property
    def address(self) -> tuple[str, int]:
        """The address to listen on. Not used by a Vast worker, which has its own."""
        if self.vast_mode != "behind pyworker":
            return self.hostname, self.port
        hostname, port = PYWORKER_BACKEND
        return hostname, self.port if "port" in self.model_fields_set else port

    def vast_worker(self) -> WorkerConfig:
        """Return the worker's configuration. Raises ConfigError, which names the variable that is
        missing.
        """
        try:
            return self.worker_config(os.environ, self._home())
        except MissingVariable as error:
            raise ConfigError(str(error)) from None

    def _home(self) -> Path:
        """Return the folder beside the downloaded models that has what else is kept."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface") / "skiff"

    def limits(self, max_total_tokens: int) -> Limits:
        """Return the limits on requests, given how long the engine lets a sequence be."""
        max_input = self.max_input_tokens or self.max_input_length or max_total_tokens - 1
        if max_input >= max_total_tokens:
            raise ConfigError(
                "`max_input_tokens` must be < `max_total_tokens`. "
                f"Given: {max_input} and {max_total_tokens}"
            )
        return Limits(
            max_best_of=self.max_best_of,
            max_stop_sequences=self.max_stop_sequences,
            max_top_n_tokens=self.max_top_n_tokens,
            max_input_tokens=max_input,
            max_total_tokens=max_total_tokens,
            prefill_logprobs=self.enable_prefill_logprobs or self.request_logprobs,
        )

    def _rope(self) -> tuple[RopeScaling, float] | None:
        if self.rope_scaling is None and self.rope_factor is None:
            return None
        return self.rope_scaling or "linear", self.rope_factor or 1.0

    def _quantization(self) -> Quantization | None:
        """Return how to quantise the weights while loading, if at all."""
        match self.quantize:
            case "bitsandbytes" | "bitsandbytes-nf4" | "bitsandbytes-fp4":
                return self.quantize
            case "eetq":
                return "bitsandbytes"
        return None


def _can_write(folder: Path) -> bool:
    """Make a folder, if it is not there, and return whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def platform_identity() -> Identity | None:
    """Return the identity with which a Vast worker reports that its settings are wrong; None if
    this is no Vast worker.
    """
    return identity_in(os.environ)


def read_settings(argv: Sequence[str]) -> Settings:
    """Read flags and environment. Raises `ConfigError` if a value is not allowed."""
    try:
        source = CliSettingsSource[Any](Settings, root_parser=_parser())
        settings = CliApp.run(Settings, cli_args=list(argv), cli_settings_source=source)
    except ValidationError as error:
        raise ConfigError(_error_text(error.errors(include_url=False)[0])) from None
    if settings.api_key is None and _is_key_given_empty(argv):
        raise ConfigError(f"{flag_of('api_key')}: is empty; leave it out to serve everyone")
    if settings.max_total_tokens is not None:
        settings.limits(settings.max_total_tokens)  # fail now, not after the model has loaded
    return settings


def _is_key_given_empty(argv: Sequence[str]) -> bool:
    """Whether an empty API key is given, for example by a shell variable that is not set. That
    must not open the server to everyone.
    """
    given = "--api-key=" in argv or ("--api-key", "") in pairwise(argv)
    return given or os.environ.get("API_KEY") == ""


def _parser() -> ArgumentParser:
    """Return a parser whose usage is one line. The default usage lists all sixty flags, which
    hides the error message below it.
    """
    name = "text-generation-launcher"
    return ArgumentParser(
        name, f"{name} [--flag value ...]", description=Settings.__doc__, allow_abbrev=False
    )


def _error_text(detail: ErrorDetails) -> str:
    """Return one line that names the flag and the problem. Secret values are not shown."""
    problem = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return problem
    name = str(detail["loc"][0])
    flag = flag_of(name)
    if Settings.model_fields[name].annotation == SecretStr | None:
        return f"{flag}: {problem}"
    match detail["type"]:
        case "value_error":
            return f"{flag} {detail['input']}: {problem}"
        case "greater_than":  # in TGI's words
            problem = f"`{name}` must be > {detail['ctx']['gt']}"
    return f"{flag}: {problem}, not {detail['input']!r}"

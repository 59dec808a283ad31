"""Every setting, as a flag and as an environment variable: the only reader of either.

Names are those of TGI's launcher: `--max-best-of 4` is `MAX_BEST_OF=4`. A flag wins
over the environment. HF_TOKEN is read by huggingface_hub itself.
"""

import ipaddress
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from engine.config import DEFAULT_MODEL_ID, EngineConfig, KVCacheType, LoadConfig, Quantization

_ENGINE_DEFAULTS = EngineConfig()

logger = logging.getLogger(__name__)


class ConfigError(Exception):
    """A setting that cannot be honoured; the message names its flag and what is allowed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, as validation needs it."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    prefill_logprobs: bool


class Settings(BaseSettings):
    """Serve one model as Text Generation Inference does. Every flag is an environment variable
    too: --max-best-of 4 is MAX_BEST_OF=4; a flag wins. HF_TOKEN opens gated models.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        extra="ignore",
        cli_prog_name="python -m api",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_shortcuts={"port": "p", "graceful-termination-timeout": "g"},
    )

    model_id: str = Field(DEFAULT_MODEL_ID, description="hub id, local folder or .gguf file")
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub model; None is its main branch"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the weights; None is the best that the processor has"
    )
    quantize: Quantization | None = Field(
        None, description="quantise the weights as they load; None takes them as they are"
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model's repo")
    huggingface_hub_cache: str | None = Field(
        None, description="folder for downloaded models; None is that of huggingface_hub"
    )

    hostname: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    payload_limit: PositiveInt = Field(2_000_000, description="largest request body, in bytes")
    graceful_termination_timeout: PositiveInt = Field(
        90, description="seconds that running requests get to finish on SIGTERM"
    )
    stall_timeout: Annotated[float, Field(gt=0)] = Field(
        60.0, description="seconds without a step, with work waiting, until /health says stalled"
    )
    compute_type: str | None = Field(
        None, description="value of the x-compute-type header; None is 1-<device>"
    )

    max_concurrent_requests: PositiveInt = Field(
        128, description="generations accepted at once; more are answered 429"
    )
    max_best_of: PositiveInt = Field(2, description="largest best_of of a request")
    max_stop_sequences: int = Field(4, ge=0, description="most stop sequences of a request")
    max_top_n_tokens: int = Field(5, ge=0, description="largest top_n_tokens of a request")
    max_client_batch_size: PositiveInt = Field(4, description="most prompts of one request")
    max_input_tokens: PositiveInt | None = Field(
        None, description="longest prompt, in tokens; None is one less than --max-total-tokens"
    )
    max_input_length: PositiveInt | None = Field(
        None, description="older name of --max-input-tokens"
    )
    max_total_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="longest prompt and output together; None is what model and memory allow",
    )
    enable_prefill_logprobs: bool = Field(
        False, description="answer decoder_input_details with the logprobs of the prompt's tokens"
    )
    validation_workers: PositiveInt = Field(2, description="threads that tokenise prompts")

    max_batch_prefill_tokens: PositiveInt | None = Field(
        None, description="token budget of one step; None leaves it to the device"
    )
    max_batch_size: PositiveInt = Field(
        _ENGINE_DEFAULTS.max_sequences, description="most sequences running at once"
    )
    cuda_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        _ENGINE_DEFAULTS.memory_fraction, description="share of the device's memory to use"
    )
    kv_cache_dtype: KVCacheType | None = Field(
        None, description="type of the cached keys and values; None is the model's own"
    )
    disable_prefix_caching: bool = Field(
        False, description="compute every prompt anew instead of reusing common beginnings"
    )

    @field_validator("hostname")
    @classmethod
    def _bindable(cls, value: str) -> str:
        """Containers set HOSTNAME to their own name, which is nothing to listen on."""
        if value == "localhost":
            return "127.0.0.1"
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            logger.warning("hostname %r is not an IP address: listening on 0.0.0.0", value)
            return "0.0.0.0"

    @model_validator(mode="after")
    def _one_name_for_input_tokens(self) -> "Settings":
        if self.max_input_tokens is not None and self.max_input_length is not None:
            raise ValueError("give --max-input-tokens or --max-input-length, not both")
        return self

    def export_hub_cache(self) -> None:
        """huggingface_hub takes it from the environment, when it is first imported."""
        if self.huggingface_hub_cache is not None:
            os.environ["HF_HUB_CACHE"] = self.huggingface_hub_cache

    def load_config(self) -> LoadConfig:
        return LoadConfig(
            model_id=self.model_id,
            revision=self.revision,
            dtype=self.dtype,
            quantize=self.quantize,
            trust_remote_code=self.trust_remote_code,
        )

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            max_sequences=self.max_batch_size,
            max_batch_tokens=self.max_batch_prefill_tokens,
            max_total_tokens=self.max_total_tokens,
            memory_fraction=self.cuda_memory_fraction,
            kv_cache_dtype=self.kv_cache_dtype,
            prefix_caching=not self.disable_prefix_caching,
        )

    def limits(self, max_total_tokens: int) -> Limits:
        """The limits, once the engine knows how long a sequence may be."""
        max_input = self.max_input_tokens or self.max_input_length or max_total_tokens - 1
        if max_input >= max_total_tokens:
            raise ConfigError(
                f"--max-input-tokens {max_input}: must be less than the "
                f"{max_total_tokens} of --max-total-tokens"
            )
        return Limits(
            max_best_of=self.max_best_of,
            max_stop_sequences=self.max_stop_sequences,
            max_top_n_tokens=self.max_top_n_tokens,
            max_input_tokens=max_input,
            max_total_tokens=max_total_tokens,
            prefill_logprobs=self.enable_prefill_logprobs,
        )


def read_settings(argv: Sequence[str]) -> Settings:
    """From flags and environment. Raises `ConfigError` on a value that is not allowed."""
    try:
        settings = CliApp.run(Settings, cli_args=list(argv))
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors(include_url=False)[0])) from None
    if settings.max_total_tokens is not None:
        settings.limits(settings.max_total_tokens)  # told now, not when the model has loaded
    return settings


def _sentence(detail: ErrorDetails) -> str:
    problem = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return problem
    name = str(detail["loc"][0])
    return f"--{name.replace('_', '-')} ({name.upper()}): {problem}, not {detail['input']!r}"

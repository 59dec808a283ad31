"""The settings that Skiff acts on: one field per flag, with its default and its --help text."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, NoDecode

from api.settings.launcher_flags import CheckpointFormat
from engine.core.config import (
    DEFAULT_MODEL_ID,
    EngineConfig,
    KVCacheType,
    Quantization,
    RopeScaling,
)

_ENGINE_DEFAULTS = EngineConfig()


class ServedFlags(BaseSettings):
    model_id: str = Field(
        DEFAULT_MODEL_ID, description="model to serve: hub id, local folder or .gguf file"
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub model; None is the main branch"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the weights; None chooses the best type for the device"
    )
    quantize: Literal[Quantization, "eetq", CheckpointFormat] | None = Field(
        None,
        description="quantise the weights while loading: bitsandbytes to 8 bits, -nf4 and -fp4 to "
        "4 bits; None leaves them as they are, as does the name of the checkpoint's own format",
    )
    batch_invariant: bool = Field(
        False, description="have a request's answer on a GPU not depend on those beside it"
    )
    rope_scaling: RopeScaling | None = Field(
        None, description="how to scale rotary positions, instead of the model's own scaling"
    )
    rope_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="factor for --rope-scaling; without that flag, scaling is linear"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code from the model's repository"
    )
    huggingface_hub_cache: str | None = Field(
        None, description="folder for downloaded models; None is the default of huggingface_hub"
    )
    tokenizer_config_path: str | None = Field(
        None, description="tokenizer_config.json to use instead of the model's own"
    )

    hostname: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(3000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_key: SecretStr | None = Field(
        None, description="key that requests must send as `Authorization: Bearer <key>`"
    )
    api_key_for_chat_tokenize: bool = Field(
        False, description="require the API key on /chat_tokenize, which TGI leaves open"
    )
    cors_allow_origin: Annotated[list[str], NoDecode] = Field(
        [],
        description="origins whose pages may read answers, separated by commas; empty allows all",
    )
    payload_limit: PositiveInt = Field(2_000_000, description="largest request body, in bytes")
    graceful_termination_timeout: PositiveInt = Field(
        90, description="seconds that running requests get to finish after SIGTERM"
    )
    stall_timeout: Annotated[float, Field(gt=0)] = Field(
        60.0,
        description="seconds without a step, while there is work, until /health reports a stall",
    )
    watchdog_timeout: Annotated[float, Field(gt=0)] = Field(
        300.0,
        description="seconds that a step may take; one that takes longer hangs: all requests fail, "
        "and the server ends with exit code 86",
    )
    supervise: bool = Field(
        True,
        description="start the server again, from a small process of its own, when it ends with "
        "exit code 86 or dies of a signal such as SIGSEGV",
    )
    compute_type: str | None = Field(
        None, description="value of the x-compute-type header; None is 1-<device>"
    )

    max_concurrent_requests: PositiveInt = Field(
        128, description="generations accepted at once; more are answered 429"
    )
    max_best_of: PositiveInt = Field(2, description="largest best_of in a request")
    max_stop_sequences: int = Field(4, ge=0, description="most stop sequences in a request")
    max_top_n_tokens: int = Field(5, ge=0, description="largest top_n_tokens in a request")
    max_client_batch_size: PositiveInt = Field(4, description="most prompts in one request")
    max_input_tokens: PositiveInt | None = Field(
        None, description="longest prompt, in tokens; None is one less than --max-total-tokens"
    )
    max_input_length: PositiveInt | None = Field(
        None, description="older name of --max-input-tokens"
    )
    max_total_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="longest prompt plus output, in tokens; None is what model and memory allow",
    )
    enable_prefill_logprobs: bool = Field(
        False,
        description="return logprobs of prompt tokens when a request sets decoder_input_details",
    )
    request_logprobs: bool = Field(False, description="older name of --enable-prefill-logprobs")
    disable_grammar_support: bool = Field(False, description="reject requests with a grammar")
    watermark_gamma: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="fraction of the vocabulary that a watermark favours"
    )
    watermark_delta: float = Field(
        2.0, description="what a watermark adds to the scores of favoured tokens"
    )
    validation_workers: PositiveInt = Field(2, description="threads that tokenise prompts")

    max_batch_prefill_tokens: PositiveInt | None = Field(
        None, description="token budget of one step; None chooses it for the device"
    )
    max_batch_size: PositiveInt = Field(
        _ENGINE_DEFAULTS.max_sequences, description="most sequences running at once"
    )
    cuda_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="fraction of the GPU's memory that this server may use"
    )
    cpu_cache_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="memory of the KV cache on a CPU, in GiB; None is 30% of what is free, and at "
        "most 8",
    )
    tgi_wiggle_room: Annotated[float, Field(gt=0, le=1)] = Field(
        _ENGINE_DEFAULTS.memory_fraction,
        description="fraction of that memory to plan with; the rest is a reserve",
    )
    kv_cache_dtype: KVCacheType | None = Field(
        None, description="type of the cached keys and values; None is the model's own type"
    )
    prefix_caching: bool = Field(
        True, description="reuse cached keys and values for common beginnings of prompts"
    )
    cuda_graphs: Annotated[list[int] | None, NoDecode] = Field(
        None,
        description="0 turns CUDA graphs off; any other value leaves them on, in Skiff's own sizes",
    )

    json_output: bool = Field(False, description="log in JSON")
    log_level: str = Field("info", description="debug, info or warn")
    log_colorize: bool = Field(
        True, description="colour the log; LOG_COLORIZE=1 turns colours off, as in TGI"
    )
    otlp_endpoint: str | None = Field(
        None, description="OpenTelemetry collector to send traces to, by gRPC"
    )
    otlp_service_name: str = Field(
        "text-generation-inference.router", description="service name in traces"
    )
    env: bool = Field(False, description="print the versions of installed packages, and continue")

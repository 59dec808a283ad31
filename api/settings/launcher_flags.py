"""Flags of TGI's launcher that Skiff does not need. They are accepted so that a command line or
container environment made for TGI also starts Skiff.

A flag that would change the answers is refused unless it has its neutral value. Any other flag has
no effect, and a line in the log says why. The defaults are TGI's.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, SecretStr
from pydantic_settings import BaseSettings

_UNUSED = "unused: "

CheckpointFormat = Literal["awq", "compressed-tensors", "exl2", "fp8", "gptq", "marlin"]
"""Values of `quantize` that name the format of an already quantised checkpoint. They are not
needed, since the checkpoint names its format too.
"""


def _unused(default: Any, why: str) -> Any:
    return Field(default, description=_UNUSED + why)


def _only(*allowed: object, otherwise: str) -> AfterValidator:
    """Return a validator that accepts only `allowed`. Its error is `otherwise`, which says what to
    do instead.
    """

    def check(value: object) -> object:
        if value not in allowed:
            raise ValueError(otherwise)
        return value

    return AfterValidator(check)


_ONE_GPU = _only(
    None,
    1,
    "false",
    otherwise="one process serves one GPU: leave this flag out, and quantise a model that does not "
    "fit (--quantize)",
)


class LauncherFlags(BaseSettings):
    num_shard: Annotated[PositiveInt | None, _ONE_GPU] = Field(
        None, description="1: one process serves one GPU"
    )
    sharded: Annotated[Literal["true", "false"] | None, _ONE_GPU] = Field(
        None, description="false: one process serves one GPU"
    )
    lora_adapters: Annotated[
        str | None,
        _only(None, otherwise="adapters are not supported: merge them into the model's weights"),
    ] = Field(None, description="refused: adapters are not supported")
    speculate: NonNegativeInt | None = _unused(
        None,
        "each step makes one token of a sequence; guesses would change the speed, not the text",
    )
    waiting_served_ratio: float = _unused(
        0.3, "prompts are computed in chunks, so running sequences never wait for them"
    )
    max_waiting_tokens: int = _unused(20, "a new request joins at the next step")
    max_batch_total_tokens: PositiveInt | None = _unused(
        None, "as many tokens as the memory holds; see --cuda-memory-fraction"
    )
    disable_custom_kernels: bool = _unused(
        False, "kernels are checked against the model's own operations at load"
    )
    weights_cache_override: str | None = _unused(
        None, "pass the folder of the weights as --model-id or --huggingface-hub-cache"
    )
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] = _unused(
        9000, "/metrics is served on --port"
    )
    usage_stats: Literal["on", "off", "no-stack"] = _unused(
        "on", "no usage statistics are collected"
    )
    ngrok: bool = _unused(False, "there is no tunnel, as in TGI 3")
    ngrok_authtoken: SecretStr | None = _unused(None, "there is no tunnel, as in TGI 3")
    ngrok_edge: str | None = _unused(None, "there is no tunnel, as in TGI 3")
    shard_uds_path: str = _unused("/tmp/text-generation-server", "there are no shards to talk to")
    master_addr: str = _unused("localhost", "there are no shards to talk to")
    master_port: int = _unused(29500, "there are no shards to talk to")

    # TGI reads these from the environment only; it has no flags for them.
    attention: str | None = _unused(None, "every model uses the same paged attention")
    prefill_chunking: bool = _unused(True, "long prompts are always computed in chunks")
    use_flash_attention: bool = _unused(True, "every model uses the same paged attention")
    max_image_fetch_size: PositiveInt = _unused(1 << 30, "only text is supported")
    disable_exllama: bool = _unused(False, "transformers chooses the kernels of a quantised model")
    use_cutlass_w8a8: bool = _unused(False, "transformers chooses the kernels of a quantised model")

    def unused(self) -> Iterator[str]:
        """Yield a line for each flag that is set but has no effect."""
        for name, field in LauncherFlags.model_fields.items():
            why = (field.description or "").removeprefix(_UNUSED)
            if why != field.description and getattr(self, name) != field.default:
                yield f"{flag_of(name)} changes nothing here: {why}"


def flag_of(name: str) -> str:
    """Return how a setting is given: as a flag and, in parentheses, as an environment variable."""
    return f"--{name.replace('_', '-')} ({name.upper()})"

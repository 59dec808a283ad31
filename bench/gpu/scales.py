"""How much `bench.gpu` measures: everything, a quick part, or tiny shapes to test the run."""

from dataclasses import dataclass, replace

from bench.gpu.expert_cases import MIXTRAL_FP16, QWEN3_30B, ExpertsShape
from bench.gpu.kernel_cases import LLAMA_8B, KernelShape
from bench.gpu.workloads import Workload, mixed, uniform


@dataclass(frozen=True, slots=True)
class Points:
    """The steps of a model to measure; contexts are cut to the model's longest.

    prompts  prefills as (number of prompts, tokens of each, cached tokens before them)
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[tuple[int, int, int], ...]

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return max(*self.contexts, *(length + before for _, length, before in self.prompts))


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured, and in how many seconds.

    model          the model of all sections; only steps are measured of `others`
    count          timed steps of each kind
    steady         (batch, context) of steady decode; `steady_count` steps of each are timed
    cached_prompt  length of the prompt whose first token is timed when it is cached
    single         workload of one request, for the engine and `generate`
    peer           workload for the engine and transformers' continuous batching
    starts         number of starts of the server, of which the last one counts
    mixed          models of which a step is timed that has a prompt beside decodes
    mixed_step     (tokens of the prompt, decodes, context of these) of such a step
    """

    name: str
    seconds: float
    model: str
    others: tuple[str, ...]
    points: Points
    other_points: Points
    count: int
    copy_bytes: int
    gemm_size: int
    kernels: KernelShape
    experts: tuple[ExpertsShape, ...]
    kernel_batches: tuple[int, ...]
    kernel_contexts: tuple[int, ...]
    kernel_prompts: tuple[tuple[int, int, int], ...]
    steady: tuple[tuple[int, int], ...]
    steady_count: int
    cached_prompt: int
    offline: tuple[Workload, ...]
    http: Workload
    single: Workload
    peer: Workload
    starts: int
    mixed: tuple[str, ...]
    mixed_step: tuple[int, int, int]

    @property
    def longest(self) -> int:
        """Most tokens of any sequence of the first model, with some to spare."""
        workloads = [w.longest for w in (*self.offline, self.http, self.single, self.peer)]
        return max(self.points.longest + self.count, self.cached_prompt, *workloads) + 16


FULL = Scale(
    name="full",
    seconds=493,
    model="Llama-3.1-8B",
    others=("Qwen3-8B", "Gemma-2-9B", "Mixtral-8x7B-8-layers", "Phi-3-mini", "gpt2-xl"),
    points=Points(
        batches=(1, 8, 32, 128, 256),
        contexts=(1024, 8192),
        prompts=((1, 8192, 0), (1, 512, 0), (8, 512, 0), (1, 4096, 0)),
    ),
    other_points=Points(batches=(1, 32, 256), contexts=(1024,), prompts=((4, 1024, 0),)),
    count=12,
    copy_bytes=4 << 30,
    gemm_size=8192,
    kernels=LLAMA_8B,
    experts=(MIXTRAL_FP16, QWEN3_30B),
    kernel_batches=(32, 1, 256),
    kernel_contexts=(4096, 1024),
    kernel_prompts=((1, 4096, 0), (1, 4096, 4096), (8, 512, 0)),
    steady=((1, 1024), (32, 1024), (256, 1024)),
    steady_count=64,
    cached_prompt=32768,
    offline=(uniform(256, 1000, 1000),),
    http=uniform(256, 1000, 1000),
    single=uniform(1, 1000, 128),
    peer=uniform(64, 1000, 128),
    starts=2,
    mixed=("Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-0.6B"),
    mixed_step=(300, 32, 1024),
)
QUICK = replace(
    FULL,
    name="quick",
    seconds=170,
    others=(),
    points=Points((1, 32, 256), (1024,), ((1, 8192, 0),)),
    kernel_contexts=(4096,),
    kernel_prompts=((1, 4096, 0),),
    count=6,
    offline=(mixed(64, 256),),
    http=uniform(64, 200, 200),
    peer=uniform(64, 200, 64),
    starts=1,
    mixed=("Llama-3.1-8B",),
)
_FEW = Points(batches=(1, 3), contexts=(20, 50), prompts=((2, 24, 0), (1, 300, 20)))
TINY = Scale(
    name="tiny",
    seconds=600,
    model="tiny",
    others=("tiny-experts", "tiny-gpt2"),
    points=_FEW,
    other_points=Points(batches=(2,), contexts=(80,), prompts=((1, 24, 0),)),
    count=2,
    copy_bytes=1 << 20,
    gemm_size=64,
    kernels=KernelShape(64, 128, 4, 2, 16, 512),
    experts=(ExpertsShape("tiny", 4, 2, 64, 128),),
    kernel_batches=(1, 3),
    kernel_contexts=(40,),
    kernel_prompts=((2, 24, 0), (1, 16, 20)),
    steady=((1, 40), (3, 40)),
    steady_count=4,
    cached_prompt=96,
    offline=(mixed(4, 24), uniform(4, 12, 6)),
    http=uniform(4, 12, 6),
    single=uniform(1, 12, 4),
    peer=uniform(3, 12, 4),
    starts=1,
    mixed=("tiny",),
    mixed_step=(24, 2, 20),
)

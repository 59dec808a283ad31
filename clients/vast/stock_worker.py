"""Vast's stock worker, unchanged, configured as for Text Generation Inference. Run as a program.

Its benchmark is smaller than the template's (8 runs of 50 requests of 128 tokens), to suit a CPU.
"""

import os
import random

from vastai import BenchmarkConfig, HandlerConfig, LogActionConfig, Worker, WorkerConfig

WORDS = ("sea", "wind", "sail", "rope", "tide", "shore", "deck", "mast", "keel", "hull")
RUNS, CONCURRENCY, MAX_NEW_TOKENS = 2, 2, 8


def benchmark_payload() -> dict[str, object]:
    return {
        "inputs": " ".join(random.choices(WORDS, k=8)),
        "parameters": {
            "max_new_tokens": MAX_NEW_TOKENS,
            "temperature": 0.7,
            "return_full_text": False,
        },
    }


def handler(route: str, benchmark: BenchmarkConfig | None = None) -> HandlerConfig:
    return HandlerConfig(
        route=route,
        allow_parallel_requests=True,
        max_queue_time=60.0,
        workload_calculator=lambda payload: payload["parameters"]["max_new_tokens"],
        benchmark_config=benchmark,
    )


LOG_ACTIONS = LogActionConfig(
    on_load=[
        '"message":"Connected","target":"text_generation_router"',
        '"message":"Connected","target":"text_generation_router::server"',
    ],
    on_error=["Error: WebserverFailed", "Error: DownloadError", "Error: ShardCannotStart"],
    on_info=['"message":"Download'],
)


if __name__ == "__main__":
    benchmark = BenchmarkConfig(
        generator=benchmark_payload, runs=RUNS, concurrency=CONCURRENCY, do_warmup=True
    )
    config = WorkerConfig(
        model_server_url="http://127.0.0.1",
        model_server_port=int(os.environ["MODEL_SERVER_PORT"]),
        model_log_file=os.environ["MODEL_LOG"],
        model_healthcheck_url="/health",
        handlers=[handler("/generate", benchmark), handler("/generate_stream")],
        log_action_config=LOG_ACTIONS,
    )
    Worker(config).run()

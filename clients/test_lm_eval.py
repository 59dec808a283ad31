"""lm-evaluation-harness scores a task over `/v1/completions` as it does with the model itself.

The harness brings its own virtual environment: `make lm-eval`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="`make lm-eval` runs these tests")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).parents[1]
NUM_ITEMS = 50
MAX_LENGTH = 512  # tokens, as many as the server takes
TOLERANCE = 1e-3  # of a sum of logprobs; those of single tokens differ by rounding


def sentences() -> list[str]:
    """Return sentences of the project's documents, each of at least twelve words."""
    text = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    prose = re.sub(r"(?m)^(\||#|    ).*$", "\n", text)
    flat = [" ".join(part.split()) for part in re.split(r"(?<=\.)\s|\n\n", prose)]
    return [s for s in dict.fromkeys(flat) if s.endswith(".") and len(s.split()) >= 12]


def write_items(path: Path) -> None:
    """Write the task: the first half of a sentence, its true end and the ends of three others."""
    halves = [(s.split()[:6], s.split()[6:]) for s in sentences()]
    assert len(halves) >= NUM_ITEMS + 3
    with path.open("w") as file:
        for number, (beginning, _) in enumerate(halves[:NUM_ITEMS]):
            ends = [" ".join(end) for _, end in halves[number : number + 4]]
            item = {"beginning": " ".join(beginning), "ends": ends, "answer": 0}
            file.write(json.dumps(item) + "\n")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("task") / "items.jsonl"
    write_items(path)
    return path


@pytest.fixture(scope="module")
def model_folder() -> str:
    from engine.core.config import DEFAULT_MODEL_ID
    from engine.loading.checkpoint import locate

    return str(locate(DEFAULT_MODEL_ID).path)


def transformers_model(folder: str) -> Any:
    return HFLM(folder, dtype="float32", device="cpu", batch_size=1, max_length=MAX_LENGTH)


def served_model(url: str, folder: str, **options: Any) -> Any:
    """Return the model behind the server. The harness tokenises, and sends token ids."""
    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="tgi",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        max_length=MAX_LENGTH,
        **options,
    )


def evaluated(model: Any, items: Path) -> dict[str, Any]:
    """Return the harness' results and, as `scores`, what the model said of each choice."""
    task = {
        "task": "project_documents",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{beginning}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1},
    }
    told: dict[str, Any] = simple_evaluate(
        model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    samples = told["samples"]["project_documents"]
    assert len(samples) == NUM_ITEMS
    scores = [score for sample in samples for score in sample["filtered_resps"]]
    return {"results": told["results"]["project_documents"], "scores": scores}


@pytest.fixture(scope="module")
def by_transformers(model_folder: str, items: Path) -> dict[str, Any]:
    return evaluated(transformers_model(model_folder), items)


@pytest.mark.parametrize(("batch_size", "num_concurrent"), [(1, 8), (4, 2)])
def test_a_task_has_the_same_scores_as_with_transformers(
    url: str,
    model_folder: str,
    items: Path,
    by_transformers: dict[str, Any],
    batch_size: int,
    num_concurrent: int,
) -> None:
    served = served_model(url, model_folder, batch_size=batch_size, num_concurrent=num_concurrent)
    told = evaluated(served, items)
    expected = by_transformers
    assert len(told["scores"]) == 4 * NUM_ITEMS
    for (ours, ours_greedy), (theirs, theirs_greedy) in zip(
        told["scores"], expected["scores"], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
        assert ours_greedy == theirs_greedy
    assert told["results"] == expected["results"]


def test_the_loglikelihood_of_a_text_without_context_is_the_same(
    url: str, model_folder: str
) -> None:
    """The text fits into one window: the harness cuts longer ones differently for an API."""
    text = " ".join(sentences()[:8])
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0, ("text", 0, 1))]
    (expected,) = transformers_model(model_folder).loglikelihood_rolling(asked)
    (told,) = served_model(url, model_folder).loglikelihood_rolling(asked)
    assert told == pytest.approx(expected, abs=TOLERANCE)

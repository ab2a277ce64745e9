"""The bridge to EleutherAI's lm-evaluation-harness (the extra `eval`), whose tasks come by name or from YAML files.

Importing this registers the model type "miras" there, so its own commands take a run folder too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from miras.errors import UsageError, near
from miras.evaluate.loading import load_model

PAPER = (
    *("wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa"),
    "boolq",
)
"""The columns of arXiv 2504.13173, table 2, under the harness' names."""


@register_model("miras")
class MirasLM(HFLM):
    """A model of this library as the harness sees it.

    Args:
        pretrained: a run folder or model folder, see `load_model`.
        batch_size: sequences at once.
        max_length: tokens of a sequence; longer ones are cut into windows.
        **options: see `HFLM`.
    """

    def __init__(self, pretrained: str, batch_size: int = 8, max_length: int = 2048, **options: Any) -> None:
        model, tokenizer = load_model(pretrained)
        where: Any = {"batch_size": batch_size, "max_length": max_length, "device": str(model.device)}
        init = cast(Any, super().__init__)  # its decorators hide its arguments from type checkers
        init(pretrained=model, tokenizer=tokenizer, **options, **where)


def harness(
    tasks: Sequence[str], models: Sequence[str], include: str | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """What `lm_eval.simple_evaluate` gives, per model.

    Args:
        tasks: names of tasks, groups or tags; "paper" for those of `PAPER`.
        models: run folders or model folders.
        include: a folder with task files of one's own, which go before the harness' of the same name.
        limit: examples of each task, at most.

    Raises:
        UsageError: no such task, or its data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [part for name in tasks for part in (PAPER if name == "paper" else (name,))]
    manager = _manager(names, include)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(
                f"--lm-eval {name}: there is no such task among the harness' {len(manager.all_tasks):,}."
                + _like(name, manager)
            )
    loaded = [_loaded(manager, name) for name in names]
    evaluate, load = cast(Any, simple_evaluate), cast(Any, MirasLM)  # likewise
    options = {"tasks": loaded, "limit": limit, "task_manager": manager, "log_samples": False}
    return {model: evaluate(load(model), **options) for model in models}


def table(results: dict[str, Any]) -> str:
    """The harness' own table of one model's results, with its groups where there are some."""
    parts = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(parts)


def _manager(names: Sequence[str], include: str | None) -> TaskManager:
    """The tasks there are; the harness' own, thousands of files, are read only where one of them is named."""
    if include is None:
        return TaskManager()
    if not Path(include).is_dir():
        raise UsageError(f"--include-path {include}: expected a folder with .yaml files of tasks, and there is none.")
    own = TaskManager(include_path=include, include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=include)


def _like(name: str, manager: TaskManager) -> str:
    """The nearest name; there are too many to list them all."""
    said = near(name, manager.all_tasks)
    return said if said.startswith(" Did you mean") else " For a list write: lm_eval ls tasks"


def _loaded(manager: TaskManager, name: str) -> Any:
    """A task with its data."""
    try:
        return manager._load_spec(name)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        offline = ", and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise UsageError(
            f"--lm-eval {name}: the Hugging Face hub did not give its data ({reason}{offline}); set HF_ENDPOINT to a "
            "mirror of the hub, or give --include-path a folder with the task's .yaml file in which dataset_path is "
            "json and dataset_kwargs is {data_files: {test: FILE.jsonl}}."
        ) from error

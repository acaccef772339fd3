"""Tasks of EleutherAI's lm-eval on a model in memory."""

import argparse
import logging
from pathlib import Path
from typing import Any

from shared_lib.errors import InputError
from shared_lib.models import Model, Tokenizer


class Harness:
    """Run the same tasks as often as wanted.

    Args:
        path: a folder with tasks of the user's own, or None.
        limit: of questions per task, or None.
    Raises:
        InputError: a task doesn't exist, or its data can't be loaded.
    """

    def __init__(self, tasks: list[str], path: Path | None, limit: int | None, batch_size: int) -> None:
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = TaskManager(include_path=str(path) if path else None)
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size
        unknown = [task for task in tasks if not self.manager.match_tasks([task])]
        if unknown:
            raise InputError(f"--lm-eval: there is no task {', '.join(unknown)}. lm-eval ls tasks lists them.")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Harness | None":
        """Return None where no task is asked for."""
        if not options.lm_eval:
            return None
        return cls(options.lm_eval, options.lm_eval_path, options.lm_eval_limit, options.eval_batch)

    def evaluate(self, model: Model, tokenizer: Tokenizer) -> dict[str, float]:
        """Return every number that the tasks and groups report, by "task metric"; standard errors are left out."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
        try:
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=self.tasks,
                limit=self.limit,
                task_manager=self.manager,
                log_samples=False,
                bootstrap_iters=0,
            )
        except Exception as error:  # The hub, the data and the task's own code each have their exceptions.
            reason = str(error).strip().splitlines() or [""]
            raise InputError(
                f"--lm-eval: {', '.join(self.tasks)} could not be run: {type(error).__name__}: {reason[0]}"
            ) from error
        return _flatten({**found["results"], **found.get("groups", {})})


def _flatten(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float)) and "," in metric and "_stderr" not in metric
    }

"""Run tasks of EleutherAI's lm-eval, which is imported by the functions that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenyard import ConfigError
from tokenyard.errors import did_you_mean
from tokenyard_train.commands.options import EvalOptions


def run_tasks(model: Any, options: EvalOptions) -> list[dict[str, Any]]:
    """Run tasks, which are names or files, and return a record for each of their metrics.

    Raises ConfigError for a task that lm-eval does not load.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = [name for given in options.tasks or [] for name in given.split(",") if name]
    if not names:
        raise ConfigError("--tasks names no task; give one of lm-eval, or a YAML file")
    files = [Path(name).suffix in (".yaml", ".yml") for name in names]
    manager = TaskManager(include_defaults=not all(files))
    for name in names:
        _check_loads(manager, name)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        results = lm_eval.simple_evaluate(
            model,
            tasks=names,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=manager,
            log_samples=False,
            **dict.fromkeys(seeds, options.seed),
        )
    except ValueError as error:  # such as for more examples than a task has documents
        raise ConfigError(f"lm-eval cannot run {', '.join(names)}: {error}") from error
    return [record for task in results["results"] for record in _records(results, task)]


def _check_loads(manager: Any, name: str) -> None:
    try:
        manager.load([name])
    except KeyError:
        hint = did_you_mean(name, manager.all_tasks)
        raise ConfigError(
            f"--tasks {name!r} is neither a task of lm-eval nor the path of a YAML file{hint}"
        ) from None
    except Exception as error:  # of YAML, of datasets, and of the functions of a task
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--tasks {name!r} cannot be loaded by lm-eval: {reason}") from None


def _records(results: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Return the metrics of a task or a group. lm-eval's keys are 'metric,filter'."""
    values = results["results"][task]
    records = []
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not name or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{name}")
        records.append(
            {
                "task": task,
                "version": results["versions"].get(task),
                "filter": name,
                "shots": results["n-shot"].get(task),
                "documents": results["n-samples"].get(task, {}).get("effective"),
                "metric": metric,
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
            }
        )
    return records

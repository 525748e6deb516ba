"""The MLflow runs of an evaluation: one for the report, one below it for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.config.overrides import leaves
from pipelines.files import write_json
from pipelines.log import log, without_passwords
from pipelines.tracking.mlflow_client import _log_values, _numbers, mlflow_client, open_experiment, source_tags
from pipelines.tracking.pipeline_runs import STATE_FILE, made_by


def log_evaluation(uri: str, experiment: str, parent: str | None, folder: Path, report: dict[str, Any]) -> None:
    """Log an evaluation as a run below the run that made the models, with a run below it for each row of the table.

    An earlier evaluation of the same folder is replaced. An unreachable server costs a warning, for the report is on disk.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    try:
        client = mlflow_client(uri)
        if parent is not None:
            try:
                place = client.get_run(parent).info.experiment_id
            except Exception:  # made under another server
                parent = None
        if parent is None:
            place = open_experiment(client, uri, experiment, folder.parent)
        _forget(client, uri, folder)
        tags = {**source_tags(), "evaluation": report["name"], **({MLFLOW_PARENT_RUN_ID: parent} if parent else {})}
        top = client.create_run(place, run_name=f"evaluation {report['name']}", tags=tags).info.run_id
        _log_values(client, top, leaves(report["config"]), _numbers({k: report[k] for k in MEASURED}))
        for file in sorted(f for f in folder.iterdir() if f.suffix in (".md", ".json", ".png", ".html")):
            client.log_artifact(top, str(file))
        for row in report["rows"]:
            run = client.create_run(place, run_name=row["name"], tags={MLFLOW_PARENT_RUN_ID: top}).info.run_id
            params = [("k", row["k"]), ("method", row["method"])]
            _log_values(
                client, run, params, _numbers({k: v for k, v in row.items() if k not in ("name", "k", "method")})
            )
            client.set_terminated(run)
        client.set_terminated(top)
        write_json(folder / STATE_FILE, {"uri": without_passwords(uri), "run": top})
    except Exception as error:
        log.warning(without_passwords(f"tracking to {uri} failed, the report is in {folder} ({error})"))


MEASURED = (
    "windows",
    "joint",
    "free",
    "determinism",
    "mauve",
    "frontier",
    "batch_invariant",
    "cost",
    "references",
    "gen_ppl_again",
)


def _forget(client: Any, uri: str, folder: Path) -> None:
    """Delete the run that a folder was logged to before, and those below it."""
    state = made_by(folder)
    if state.get("uri") != uri:
        return
    run = client.get_run(state["run"]).info
    below = client.search_runs([run.experiment_id], f"tags.mlflow.parentRunId = '{run.run_id}'", max_results=1000)
    for old in (run.run_id, *(child.info.run_id for child in below)):
        client.delete_run(old)

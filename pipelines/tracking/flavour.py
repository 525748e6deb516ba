"""The MLflow flavour of a registered student: `mlflow.pyfunc.load_model("models:/NAME@k4").predict(prompts)` continues text.

The flavour is a file `MLmodel` beside the weights, with the requirements of the model. Their folder still loads with
`PushForwardLM.from_pretrained` and in the endpoint. Versions that older releases registered have no flavour.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("kforcing", "torch", "transformers", "safetensors", "tokenizers", "mlflow")
"""What `predict` needs. `kforcing` has to be installed from its wheel or its repository."""


def log_flavour(client: Any, run: str, folder: str) -> None:
    """Write `MLmodel` and the files of its environment into an artifact folder of a run that holds a student's files."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.utils.environment import _PythonEnv

    text = Schema([ColSpec("string")])
    params = [
        ParamSpec("max_new_tokens", "long", 64),
        ParamSpec("temperature", "double", 1.0),
        ParamSpec("seed", "long", 0),
        ParamSpec("k", "long", 0),
    ]
    model = Model(artifact_path=folder, run_id=run, signature=ModelSignature(text, text, ParamSchema(params)))
    pyfunc.add_to_model(model, loader_module="kforcing.pyfunc", python_env="python_env.yaml")
    with tempfile.TemporaryDirectory() as place:
        files = Path(place)
        model.save(str(files / "MLmodel"))
        (files / "requirements.txt").write_text("\n".join(requirements()) + "\n")
        _PythonEnv(dependencies=["-r requirements.txt"]).to_yaml(str(files / "python_env.yaml"))
        client.log_artifacts(run, str(files), folder)


def requirements() -> list[str]:
    """The installed versions of `PACKAGES`, without local parts such as `+cpu`; packages on the path alone are left out."""
    lines = []
    for name in PACKAGES:
        try:
            lines.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return lines

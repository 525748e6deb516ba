"""The MLflow flavour of a registered student: `mlflow.pyfunc.load_model("models:/NAME@k4").predict(prompts)` continues text.

The flavour is a file `MLmodel` beside the weights, with the requirements of the model. Their folder still loads with
`PushForwardLM.from_pretrained` and in the endpoint. Versions that older releases registered have no flavour.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("kforcing", "torch", "transformers", "safetensors", "tokenizers", "mlflow")
"""What `predict` needs. `kforcing` has to be installed from its wheel or its repository."""


def write_flavour(folder: Path, run: str, model_id: str | None) -> None:
    """Write `MLmodel` and the files of its environment into a folder that holds a student's files.

    Args:
        run: id of the run that made the student.
        model_id: of the logged model; None where the files belong to the run itself.
    """
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
    signature = ModelSignature(text, text, ParamSchema(params))
    model = Model(artifact_path="model", run_id=run, signature=signature, model_id=model_id)
    pyfunc.add_to_model(model, loader_module="kforcing.pyfunc", python_env="python_env.yaml")
    model.save(str(folder / "MLmodel"))
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    _PythonEnv(dependencies=["-r requirements.txt"]).to_yaml(str(folder / "python_env.yaml"))


def requirements() -> list[str]:
    """The installed versions of `PACKAGES`, without local parts such as `+cpu`; packages on the path alone are left out."""
    lines = []
    for name in PACKAGES:
        try:
            lines.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return lines

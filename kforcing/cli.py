"""The command `kforcing`: `kforcing distill | evaluate | generate | serve | benchmark`, each the same as its script.

    kforcing distill --recipe smoke            python pipelines/distill.py --recipe smoke
    kforcing generate MODEL prompts.txt        python -m kforcing.complete MODEL prompts.txt
    kforcing serve model=runs/quickstart/k4    serve run serve.app:build model=runs/quickstart/k4

`kforcing COMMAND --help` shows the options of a command.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys

COMMANDS = {
    "distill": ("pipelines.distill", "train", ("ray", "deepspeed", "mlflow", "datasets")),
    "evaluate": ("pipelines.evaluate", "eval", ("ray", "mlflow", "datasets", "openai")),
    "generate": ("kforcing.complete", "", ()),
    "serve": ("ray.serve.scripts", "serve", ("ray", "fastapi", "prometheus_client")),
    "benchmark": ("pipelines.benchmark", "train", ("matplotlib", "mlflow")),
}
"""Command → the module that it runs, the extra that it needs, and packages of that extra."""


def main() -> None:
    """Run the command that the first word names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        sys.exit(f"error: unknown command {command!r}; choose one of {', '.join(COMMANDS)}")
    module, extra, packages = COMMANDS[command]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: `kforcing {command}` needs {', '.join(missing)}; install them with the extra `{extra}`: "
            f"pip install 'kforcing[{extra}]'"
        )
    if command == "serve" and "--help" not in rest and "-h" not in rest:
        rest = ["serve.app:build", *rest]
    # The script's usage line names the command that the person typed.
    sys.argv = [f"kforcing {command}", *(["run"] if command == "serve" else []), *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()

"""Read the manifests of `infra/`."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml")
KUBERNETES = (*KUBERAY, "mlflow.yaml")


def objects(name):
    """The Kubernetes objects in a file."""
    return list(yaml.safe_load_all((INFRA / name).read_text()))


def cluster_of(ray_object):
    """The cluster that a RayCluster, RayJob or RayService describes."""
    spec = ray_object["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(cluster):
    """The head group and the worker groups of a cluster."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates(one):
    """The pod templates in an object."""
    if one["apiVersion"] == "ray.io/v1":
        submitter = [one["spec"]["submitterPodTemplate"]] if "submitterPodTemplate" in one["spec"] else []
        return [group["template"] for group in groups(cluster_of(one))] + submitter
    return [one["spec"]["template"]] if one["kind"] in ("Deployment", "StatefulSet") else []


def pods():
    """(file, pod spec) of every pod that a file describes."""
    return [(name, template["spec"]) for name in KUBERNETES for one in objects(name) for template in templates(one)]

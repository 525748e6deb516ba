"""What goes to Kubernetes and to Ray's launcher fits their schemas, and a platform's rules for pods and secrets."""

import configparser
import copy
import json

import jsonschema
import kubernetes_validate
import pytest
import yaml

from kforcing.version import __version__
from serve.middleware import PUBLIC_PATHS
from tests.infra.manifests import INFRA, KUBERAY, KUBERNETES, ROOT, cluster_of, groups, objects, pods, templates

KUBERNETES_VERSION = "1.33"
CRDS = json.loads((ROOT / "tests" / "data" / "kuberay.json").read_text())
SECRETS = {
    "KFORCING_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "POSTGRES_PASSWORD",
}


def one(name):
    """The only object of a file."""
    (only,) = objects(name)
    return only


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field(name):
    jsonschema.validate(one(name), CRDS)


def test_labels_in_the_start_parameters_are_refused_as_by_kuberay():
    wrong = copy.deepcopy(one("rayjob.yaml"))
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"] = {"labels": "pool=trainer"}
    with pytest.raises(jsonschema.ValidationError) as refused:
        jsonschema.validate(wrong, CRDS)
    assert refused.value.json_path == "$.spec.rayClusterSpec.workerGroupSpecs[0].rayStartParams"


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_knows_every_field(name):
    for each in objects(name):
        if each["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(each, KUBERNETES_VERSION, strict=True)
        for template in templates(each):
            whole = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            kubernetes_validate.validate(whole, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(("file", "pod"), pods())
def test_pods_obey_the_restricted_security_standard(file, pod):
    user = pod["securityContext"]
    assert user["runAsNonRoot"] is True
    assert user["runAsUser"] > 0
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_autoscalers_container_obeys_it_too():
    for name in KUBERAY:
        cluster = cluster_of(one(name))
        if cluster.get("enableInTreeAutoscaling"):
            context = cluster["autoscalerOptions"]["securityContext"]
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize(("file", "pod"), pods())
def test_secrets_come_from_secrets_alone(file, pod):
    for container in pod["containers"]:
        for variable in container.get("env", []):
            if variable["name"] in SECRETS:
                assert list(variable["valueFrom"]) == ["secretKeyRef"]
            else:
                assert not any(word in variable["name"] for word in ("PASSWORD", "SECRET_", "TOKEN", "API_KEY"))


def test_the_comment_of_a_file_names_the_secrets_and_keys_that_it_needs():
    for name in KUBERNETES:
        comment = "\n".join(line for line in (INFRA / name).read_text().splitlines() if line.startswith("#"))
        for _, pod in [(file, pod) for file, pod in pods() if file == name]:
            for variable in [v for c in pod["containers"] for v in c.get("env", []) if "valueFrom" in v]:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] in comment, name
                assert reference["key"] in comment, name


def test_no_file_holds_a_secret():
    for file in INFRA.glob("*.yaml"):
        for each in yaml.safe_load_all(file.read_text()):
            assert each.get("kind") != "Secret", file


def test_every_image_is_pinned_by_a_tag():
    images = {container["image"] for _, pod in pods() for container in pod["containers"]}
    assert f"registry.example.com/kforcing:{__version__}-cuda" in images
    for image in images:
        assert image.rpartition(":")[2][:1].isdigit() or image.rpartition(":")[2].startswith("v"), image


def test_every_pod_has_limits():
    for file, pod in pods():
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), file


def test_every_mount_has_its_volume():
    for name in KUBERNETES:
        for each in objects(name):
            claims = {claim["metadata"]["name"] for claim in each.get("spec", {}).get("volumeClaimTemplates", [])}
            for template in templates(each):
                volumes = {volume["name"] for volume in template["spec"].get("volumes", [])} | claims
                mounts = [m["name"] for c in template["spec"]["containers"] for m in c.get("volumeMounts", [])]
                assert set(mounts) <= volumes, name


@pytest.mark.parametrize("name", KUBERAY)
def test_clusters_run_the_ray_of_the_image_and_ask_for_a_token(name):
    cluster = cluster_of(one(name))
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:5] == "ray=="
    )
    assert cluster["rayVersion"] == pinned["ray"]
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.fixture
def service():
    return one("rayservice.yaml")["spec"]


def test_the_service_serves_the_serve_config(service):
    assert yaml.safe_load(service["serveConfigV2"]) == yaml.safe_load((INFRA / "serve.yaml").read_text())


def test_an_upgrade_of_the_cluster_loses_no_answer(service):
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    assert service["upgradeStrategy"] == {"type": "NewCluster"}
    assert service["rayClusterDeletionDelaySeconds"] > application["args"]["drain_s"]
    for group in cluster_of(one("rayservice.yaml"))["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > application["args"]["drain_s"]


def test_the_service_can_grow_to_its_replicas(service):
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert service["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert group["maxReplicas"] == application["args"]["max_replicas"]
    assert group["minReplicas"] == application["args"]["min_replicas"]
    assert float(limits["nvidia.com/gpu"]) == application["args"]["gpus"]
    assert float(limits["cpu"]) >= application["args"]["cpus"]


def test_every_node_of_the_service_has_the_key(service):
    for group in groups(service["rayClusterConfig"]):
        env = group["template"]["spec"]["containers"][0]["env"]
        assert "KFORCING_API_KEY" in [variable["name"] for variable in env]


def test_probes_wait_for_loading_and_need_no_key(service):
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    ready = container["readinessProbe"]["httpGet"]
    assert ready == {"path": "/health", "port": 8000}
    assert ready["path"] in PUBLIC_PATHS
    # A restart would begin the loading again, so no probe that restarts asks for a model.
    for restarts in ("startupProbe", "livenessProbe"):
        assert container[restarts]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 300


def test_the_interactive_cluster_grows_and_shrinks():
    cluster = one("raycluster.yaml")["spec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert [(g["minReplicas"], g["maxReplicas"]) for g in cluster["workerGroupSpecs"]] == [(0, 2), (0, 8)]


def test_clients_find_mlflow_where_it_is():
    by_kind = {(each["kind"], each["metadata"]["name"]): each for each in objects("mlflow.yaml")}
    service, server = by_kind["Service", "mlflow"], by_kind["Deployment", "mlflow"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= server["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["port"] == 5000
    (container,) = server["spec"]["containers"]
    (hosts,) = [word.partition("=")[2].split(",") for word in container["args"] if word.startswith("--allowed-hosts=")]
    addresses = set()
    for name in ("rayjob.yaml", "raycluster.yaml", "serve.yaml"):
        addresses |= {
            word for word in (INFRA / name).read_text().split() if word.strip('"').startswith("http://mlflow")
        }
    assert addresses
    assert {address.strip('"}').removeprefix("http://") for address in addresses} <= set(hosts)


def test_mlflow_keeps_runs_in_postgres_and_artifacts_in_object_storage():
    server = next(each for each in objects("mlflow.yaml") if each["kind"] == "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    pinned = (ROOT / "constraints.txt").read_text()
    version = container["image"].rpartition(":v")[2].removesuffix("-full")
    assert f"\nmlflow=={version}\n" in pinned
    assert "--artifacts-destination=s3://mlflow-artifacts" in container["args"]
    names = [variable["name"] for variable in container["env"]]
    assert "MLFLOW_BACKEND_STORE_URI" in names
    assert not any(word.startswith("--backend-store-uri") for word in container["args"])


@pytest.mark.cluster
def test_mlflow_knows_its_options_and_variables():
    from mlflow import environment_variables
    from mlflow.cli import server

    by_kind = {each["kind"]: each for each in objects("mlflow.yaml")}  # the last of its kind
    (container,) = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    options = server.make_context("server", list(container["args"])).params
    assert options["artifacts_destination"] == "s3://mlflow-artifacts"
    assert options["app_name"] == "basic-auth"
    known = {parameter.envvar for parameter in server.params} | set(vars(environment_variables))
    assert {v["name"] for v in container["env"] if v["name"].startswith("MLFLOW_")} <= known
    users = configparser.ConfigParser()
    users.read_string(by_kind["ConfigMap"]["data"]["basic_auth.ini"])
    assert set(users["mlflow"]) == {"default_permission", "database_uri", "authorization_function"}


@pytest.mark.cluster
def test_the_launcher_file_is_one_that_ray_accepts():
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    from pipelines.config.section import node_selector

    given = yaml.safe_load((INFRA / "vm-cluster.yaml").read_text())
    validate_config(fillout_defaults(copy.deepcopy(given)))
    kinds = given["available_node_types"]
    job = {group["groupName"]: group["labels"] for group in cluster_of(one("rayjob.yaml"))["workerGroupSpecs"]}
    assert {name: kind["labels"] for name, kind in kinds.items() if "labels" in kind} == job
    assert [node_selector(f"pool={name}") for name in job] == list(job.values())
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) == given["max_workers"]
    assert given["docker"]["image"] == f"registry.example.com/kforcing:{__version__}-cuda"

"""Dashboards, alerts and the scrape configuration ask for metrics that exist, where they are."""

import json
import re
import shutil
import subprocess

import promql_parser
import pytest
import yaml

from pipelines.tracking.metrics import COUNTERS, GAUGES
from serve.metrics import EngineMetrics, Metrics
from tests.infra.manifests import INFRA, objects

DASHBOARDS = ("grafana.json", "grafana-pipeline.json")
PIPELINE = {f"ray_{name}" for name in (*GAUGES, *COUNTERS)}


def exported():
    """Names of the samples of /metrics."""
    text = Metrics()
    own = EngineMetrics(text, "m", "r")
    own.queued(0.1)
    own.delivered(0.1)
    own.first_token(0.1)
    own.finished("stop", 1.0, 0.5, 3, 4)
    lines = text.text().splitlines()
    return {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}


def dashboard(name):
    return json.loads((INFRA / name).read_text())


def alerts():
    return [rule for g in yaml.safe_load((INFRA / "alerts.yaml").read_text())["groups"] for rule in g["rules"]]


def queries():
    """(where, PromQL) of the dashboards and the alerts, with Grafana's variables filled in."""
    for name in DASHBOARDS:
        for panel in dashboard(name)["panels"]:
            for target in panel["targets"]:
                text = target["expr"].replace("$__rate_interval", "5m").replace("$run", ".*")
                yield f"{name}: {panel['title']}", text
    yield from ((rule["alert"], rule["expr"]) for rule in alerts())


def asked(query):
    """Names of the metrics in a query."""
    return set(re.findall(r"\b(?:ray_)?kforcing_\w+", query))


@pytest.mark.parametrize(("where", "query"), queries())
def test_the_query_is_promql(where, query):
    promql_parser.parse(query)


def test_a_query_that_is_not_is_refused():
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql_parser.parse("rate(kforcing_generation_tokens_total[5m]")


@pytest.mark.parametrize(("where", "query"), queries())
def test_the_query_asks_for_exported_metrics(where, query):
    assert asked(query)
    assert asked(query) <= exported() | PIPELINE


def test_the_dashboards_show_what_operators_ask_first():
    endpoint = set().union(*(asked(query) for where, query in queries() if where.startswith("grafana.json")))
    assert len(endpoint) > 12
    shown = set().union(*(asked(query) for where, query in queries() if where.startswith("grafana-pipeline")))
    assert shown == PIPELINE
    titles = [panel["title"] for panel in dashboard("grafana-pipeline.json")["panels"]]
    assert titles[:3] == ["Tokens/s", "Data wait", "Rollout queue"]
    assert {"Checkpoint age", "Stage", "NaN guard"} <= set(titles)


def test_dashboards_remember_a_gauge_that_nobody_repeats():
    """A rollout actor sets its gauge once a call, and Ray forgets it after 20 s."""
    asking = [query for _, query in queries() if "rollout_rows" in query]
    assert asking
    assert all("last_over_time(ray_kforcing_rollout_rows" in query for query in asking)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_panels_of_a_dashboard_do_not_overlap(name):
    panels = dashboard(name)["panels"]
    taken = [(p["gridPos"]["x"] + x, p["gridPos"]["y"] + y) for p in panels for x in range(8) for y in range(8)]
    assert len(set(taken)) == len(taken)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)


def test_alerts_say_how_urgent_they_are_and_what_is_wrong():
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
        promql_parser.parse_duration(rule.get("for", "1m"))
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}


@pytest.fixture
def jobs():
    return {job["job_name"]: job for job in yaml.safe_load((INFRA / "prometheus.yaml").read_text())["scrape_configs"]}


def test_prometheus_loads_the_alerts():
    files = yaml.safe_load((INFRA / "prometheus.yaml").read_text())["rule_files"]
    assert all((INFRA / file).is_file() for file in files)


def test_prometheus_finds_the_endpoint_of_the_service(jobs):
    (service,) = objects("rayservice.yaml")
    port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
    name = f"{service['metadata']['name']}-serve-svc.default.svc:{port}"
    assert jobs["kforcing-endpoint"]["static_configs"] == [{"targets": [name]}]
    assert "metrics_path" not in jobs["kforcing-endpoint"]  # it is /metrics


def test_prometheus_finds_the_pods_of_kuberay_and_rays_port(jobs):
    keep, address, *_ = jobs["ray"]["relabel_configs"]
    assert keep == {
        "source_labels": ["__meta_kubernetes_pod_label_ray_io_is_ray_node"],
        "regex": "yes",
        "action": "keep",
    }
    assert re.sub(address["regex"], address["replacement"].replace("$", "\\"), "10.0.0.7") == "10.0.0.7:8080"


def test_machines_export_metrics_at_the_same_port(jobs):
    cluster = yaml.safe_load((INFRA / "vm-cluster.yaml").read_text())
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "--metrics-export-port=8080" in commands[-1]
    assert jobs["ray-vm"]["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]


def promtool(*words):
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@pytest.mark.cluster
@needs_promtool
def test_prometheus_accepts_its_configuration_and_rules(tmp_path, jobs):
    whole = yaml.safe_load((INFRA / "prometheus.yaml").read_text())
    for job in whole["scrape_configs"]:  # Debian builds Prometheus without its discovery in Kubernetes
        job.pop("kubernetes_sd_configs", None)
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(whole))
    (tmp_path / "alerts.yaml").write_text((INFRA / "alerts.yaml").read_text())
    promtool("check", "config", tmp_path / "prometheus.yaml")


def series(name, values, labels='run="a", stage="k2"'):
    return {"series": f"{name}{{{labels}}}", "values": values}


STALLED = [
    series("ray_kforcing_train_step", "50x180"),
    series("ray_kforcing_train_steps", "100x180"),
    series("ray_kforcing_train_tokens_total", "0+100x60 6000x120"),
    series("ray_kforcing_checkpoint_timestamp_seconds", "0x180"),
]
DIVERGED = [series("ray_kforcing_diverged_total", "_x10 1x100")]
WAITING = [
    series("ray_kforcing_train_wait_seconds_total", "0+40x120"),
    series("ray_kforcing_train_seconds_total", "0+60x120"),
]


@pytest.mark.cluster
@needs_promtool
@pytest.mark.parametrize(
    ("given", "alert", "quiet_at", "fires_at"),
    [
        (STALLED, "KforcingTrainingStalled", "1h", "2h"),
        (STALLED, "KforcingCheckpointOld", "2h", "2h10m"),
        (DIVERGED, "KforcingDiverged", "9m", "12m"),
        (DIVERGED, "KforcingDiverged", "40m", "20m"),
        (WAITING, "KforcingDataWait", "20m", "1h"),
    ],
)
def test_an_alert_of_the_pipeline_fires_when_it_should(tmp_path, given, alert, quiet_at, fires_at):
    (rule,) = [rule for rule in alerts() if rule["alert"] == alert]
    labels = {"run": "a", "stage": "k2"}
    summary = rule["annotations"]["summary"].replace("{{ $labels.run }}", "a").replace("{{ $labels.stage }}", "k2")
    firing = {"exp_labels": rule["labels"] | labels, "exp_annotations": {"summary": summary}}
    checks = [
        {"eval_time": quiet_at, "alertname": alert, "exp_alerts": []},
        {"eval_time": fires_at, "alertname": alert, "exp_alerts": [firing]},
    ]
    case = {"rule_files": [str(INFRA / "alerts.yaml")], "evaluation_interval": "1m"}
    case["tests"] = [{"interval": "1m", "input_series": given, "alert_rule_test": checks}]
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    promtool("test", "rules", tmp_path / "case.yaml")


def test_vllms_names_are_kept_behind_the_prefix():
    wanted = [
        "num_requests_running",
        "num_requests_waiting",
        "time_to_first_token_seconds_bucket",
        "kv_cache_usage_perc",
    ]
    wanted += [
        "request_time_per_output_token_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "prompt_tokens_total",
    ]
    wanted += ["generation_tokens_total", "request_success_total", "tokens_per_forward", "discarded_tokens_total"]
    assert {f"kforcing_{name}" for name in wanted} <= exported()


def test_the_page_names_every_metric_of_the_pipeline():
    section = (INFRA / "README.md").read_text().split("\n## Metrics of the pipeline\n")[1].split("\n## ")[0]
    described = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M))
    assert described == {f"ray_{name}": text.rstrip(".") for name, text in (GAUGES | COUNTERS).items()}

"""Tracking: a JSONL log, which is always written, MLflow runs and registered models, and metrics for Prometheus.

tracker.py         `Tracker`: what a pipeline reports to, with the log and the metrics of train workers
pipeline_runs.py   `PipelineRuns`: the MLflow runs of a pipeline and its registered students
metrics.py         gauges and counters that Ray exports to Prometheus
evaluation_log.py  the MLflow runs of an evaluation
registry.py        reading registered students, and the files of a student that are registered
flavour.py         the MLflow flavour of a registered student
mlflow_client.py   clients, URIs, experiments
"""

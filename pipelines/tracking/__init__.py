"""Tracking: a JSONL log that is always written, and MLflow runs and registered models."""

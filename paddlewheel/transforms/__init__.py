"""Pipelines' Python steps: processes that run what is installed."""

"""Loops round a model: caches, sampling, speculation, scheduling, serving."""

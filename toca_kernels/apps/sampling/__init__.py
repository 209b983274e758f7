"""Samplers, which all commands that draw share: noise, weights, checkpoints, pipelines, prompts.

A Python file with a sampler of one's own imports the names below.
"""

from .generators import noise
from .sampler import LatentSampler, Request, Sampler

__all__ = ["LatentSampler", "Request", "Sampler", "noise"]

"""`accelerate()`: fused modules swapped into a live model by a table of rules, and `decelerate()`, the way back."""

from mmfuse.fused.acceleration.engine import accelerate
from mmfuse.fused.acceleration.method import decelerate
from mmfuse.fused.acceleration.report import Report

__all__ = ["Report", "accelerate", "decelerate"]

"""What every operator shares: its declaration, the choice of an implementation, device facts, checks, tuned tables."""

from mmfuse.kernels._runtime.dispatch import UnsupportedError, use_backend
from mmfuse.kernels._runtime.operator import (
    Deferred,
    Implementation,
    Operator,
    OpSpec,
    Size,
    chosen,
    explain,
    operators,
)

__all__ = [
    "Deferred",
    "Implementation",
    "OpSpec",
    "Operator",
    "Size",
    "UnsupportedError",
    "chosen",
    "explain",
    "operators",
    "use_backend",
]

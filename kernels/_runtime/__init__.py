"""What every operator shares: choice of implementation, registration with torch, device facts, tuned tables."""

from mmfuse.kernels._runtime.dispatch import Impl, Op, UnsupportedError, explain, operators, use_backend
from mmfuse.kernels._runtime.library import register

__all__ = ["Impl", "Op", "UnsupportedError", "explain", "operators", "register", "use_backend"]

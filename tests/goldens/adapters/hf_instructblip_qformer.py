from __future__ import annotations

from goldens.adapters.hf_blip2_qformer import qformer as run

__all__ = ["run"]

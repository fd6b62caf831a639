"""Print which optional packages this interpreter can import; tests and benchmarks leave out what is absent."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import packages_distributions, version

from mmfuse._compat import allow_torchvision

PEERS = (
    *("triton", "rich", "matplotlib", "sklearn", "skimage"),
    *("transformers", "open_clip", "timm", "torchscale", "torchvision"),
    *("onnx", "onnxruntime", "onnxscript", "tensorrt"),
    *("xformers", "flash_attn", "inf_cl", "memeff", "siglip_kernel", "liger_kernel", "cut_cross_entropy"),
)


def state(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a peer built for another torch raises anything
        return f"absent ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    owners = packages_distributions().get(name)
    return version(owners[0]) if owners else "present"


if __name__ == "__main__":
    allow_torchvision()
    print(f"python {sys.version.split()[0]}, optional packages:")
    for peer in PEERS:
        print(f"  {peer:18} {state(peer)}", flush=True)

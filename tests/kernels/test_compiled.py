"""What kernels compile to for sm_90: wide accesses to N x N matrices, cheap exponentials, exact division."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
    import json, sys
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for family, name, variant in json.loads(sys.argv[1]):
        module = import_module(f"mmfuse.kernels.{family}.kernel")
        (spec,) = (s for s in module.aot_specs() if s.kernel.endswith(f":{name}") and s.variant == variant)
        kernel = getattr(module, name)
        at = kernel.arg_names.index
        divisible = {n for n, kind in spec.signature.items() if kind.startswith("*")} | set(spec.aligned)
        source = ASTSource(
            fn=kernel,
            signature={n: spec.signature.get(n, "constexpr") for n in kernel.arg_names},
            constexprs={(at(n),): value for n, value in spec.constants.items()},
            attrs={(at(n),): [["tt.divisibility", 16]] for n in divisible},
        )
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        print(json.dumps(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]))
"""


def ptx(*kernels: tuple[str, str, str]) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = "\n".join(line.removeprefix("    ") for line in COMPILE.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(kernels)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def accesses(text: str, kind: str) -> dict[str, int]:
    """How often a global access of each width, e.g. v4.b32, is there."""
    names = [line.split(kind)[1].split()[0] for line in text.splitlines() if kind in line]
    return {name: names.count(name) for name in names}


def test_matrices_are_read_and_written_in_whole_vectors() -> None:
    even, odd = ptx(("contrastive", "_grad_kernel", "bf16 int16"), ("contrastive", "_grad_kernel", "bf16 int16 odd N"))
    for text in (even, odd):
        # the rows of G are whole vectors whatever N is
        assert set(accesses(text, "st.global.")) == {"v4.b32"}
    assert "v4.b32" in accesses(even, "ld.global.") and "b16" not in accesses(even, "ld.global.")
    assert "b16" in accesses(odd, "ld.global.")
    for text in (even, odd):
        assert "ex2.approx.ftz.f32" in text and "ex2.approx.f32" not in text


def test_what_decides_a_bucket_is_divided_exactly() -> None:
    (text,) = ptx(("patch.positions", "_interpolate_kernel", "bf16 nearest_bucket"))
    assert "div.rn.f32" in text
    assert "div.full.f32" not in text and "rcp.approx" not in text

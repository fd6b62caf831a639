"""Properties of every public operator, over drawn arguments: 200 calls of each, or FUZZ_EXAMPLES and larger ones."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

from fuzz.calls import CALLS, bad, of  # noqa: E402
from fuzz.properties import check, check_refusal  # noqa: E402
from fuzz.strategies import DEVICE, DTYPES  # noqa: E402
from mmfuse.kernels._runtime import operators  # noqa: E402
from mmfuse.kernels._runtime.device import INTERPRET  # noqa: E402

# for hours: other calls every time, and a failure made small
LONG = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SIZES = (0, 1, 2, 3, 5, 17, *((40, 130, 300) if LONG else ()))
# The interpreter runs a program in Python; its bfloat16 rounds otherwise than a GPU's.
INTERPRETED = (0, 1, 3, 17), tuple(t for t in DTYPES if t != torch.bfloat16)
SHARED = {
    "deadline": None,
    "database": None,
    "derandomize": not LONG,
    "phases": [Phase.generate, Phase.shrink] if LONG else [Phase.generate],
    "report_multiple_bugs": False,
    "suppress_health_check": list(HealthCheck),
}
with_triton = [name for name in CALLS if "triton" in operators()[name].implementations]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_operator_is_drawn():
    needs_a_group = {name for name in operators() if name.startswith("distributed_")}
    assert set(CALLS) == set(operators()) - needs_a_group


@pytest.mark.parametrize("name", CALLS)
def test_results(name):
    @settings(max_examples=LONG or 200, **SHARED)
    @given(of(name, SIZES))
    def holds(call):
        compiled = ("cuda", "cpu", "slices", "chunked")
        check(call, compiled if INTERPRET else (*compiled, "triton"))

    holds()


@pytest.mark.skipif(not INTERPRET, reason="test_results runs it")
@pytest.mark.parametrize("name", with_triton)
def test_interpreted(name):
    @settings(max_examples=LONG // 20 or 5, **SHARED)
    @given(of(name, *INTERPRETED))
    def holds(call):
        check(call, ("triton",))

    holds()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look for an index out of range")
@pytest.mark.parametrize("name", CALLS)
def test_bad_arguments(name):
    @settings(max_examples=LONG or 50, **SHARED)
    @given(bad(name, SIZES))
    def holds(call):
        check_refusal(call)

    holds()

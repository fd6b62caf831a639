"""Not collected with the others: tests that end in every way, for test_gpu_report.py."""

import os
import time

import pytest


@pytest.mark.parametrize("i", range(6))
def test_triton_passes(i: int) -> None:
    pass


def test_triton_fails() -> None:
    raise ValueError("the numbers differ")


def test_triton_ends_its_process() -> None:
    os._exit(3)


@pytest.mark.timeout(3)
def test_triton_hangs() -> None:
    time.sleep(600)


def test_triton_is_skipped() -> None:
    pytest.skip("not here")


def test_of_another_kind() -> None:
    raise AssertionError("only Triton's are run")

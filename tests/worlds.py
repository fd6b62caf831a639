"""Run a function as every rank of a small gloo group, in processes of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mmfuse.fused  # noqa: F401  (imported once, by the server that the processes fork from)
from mmfuse._compat import allow_torchvision

allow_torchvision()
with suppress(ImportError):
    import open_clip.loss  # noqa: F401

_CONTEXT = multiprocessing.get_context("forkserver")


def _serve() -> None:
    """Start the server that the ranks fork from: it imports this module once, for all of them."""
    _CONTEXT.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(Path(__file__).parent), before) if p)
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def run(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 30.0, may_end: bool = False) -> list[Any]:
    """What `fn(rank, size, *args)` returns on every rank; its error is raised here.

    `fn` belongs to a module that can be imported by its name, which a test's own is not. A rank that ends its process
    without a word gives None if it `may_end`, otherwise that is an error.
    """
    _serve()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_CONTEXT.Process(target=_rank, args=(r, size, folder, timeout, fn, args)) for r in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(2 * timeout)
            if process.is_alive():
                process.kill()
        silent = [r for r in range(size) if not Path(folder, str(r)).exists()]
        found = [_load(Path(folder, str(r))) for r in range(size)]
    ended = f"ranks {silent} ended without a result, by {[ranks[r].exitcode for r in silent]}"
    if errors := [e for e in found if isinstance(e, str) and e.startswith("Traceback")]:
        raise AssertionError("\n".join([*errors, ended] if silent else errors))
    if silent and not may_end:
        raise AssertionError(ended)
    return found


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None


def _rank(rank: int, size: int, folder: str, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # newer names of the collectives
    torch.set_num_threads(1)
    try:
        where = f"file://{folder}/meeting"
        dist.init_process_group("gloo", where, timedelta(seconds=timeout), rank=rank, world_size=size)
        result = fn(rank, size, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder, f"{rank}.part"))
    os.replace(Path(folder, f"{rank}.part"), Path(folder, str(rank)))
    os._exit(0)  # another rank may be gone: nothing to say good-bye to

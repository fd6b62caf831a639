"""`mmfuse tune`: what decides, what is kept, and what a table then changes. None of these judges a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import mmfuse
from mmfuse.bench import tune
from mmfuse.bench.cases import find
from mmfuse.bench.row import Row
from mmfuse.cli import main
from mmfuse.kernels import nearest_code, patch_embed
from mmfuse.kernels._runtime import chosen, configs
from mmfuse.kernels._runtime.aot import Facts, Spec
from mmfuse.kernels._runtime.device import vectors

CPU = torch.device("cpu")
NAMES = ["cpu", "chunked", "torch"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MMFUSE_TUNED", str(tmp_path))
    configs.forget()
    yield tmp_path
    configs.forget()


def pretend(monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> list[tuple[str, int]]:
    """Fused implementations take a fixed time and the growth dimension's, torch 2 of it; returns what was timed."""
    timed = []

    def fastest(row: Row, names: list[str]) -> dict[str, float]:
        n = row.shape[row.case.growth]
        timed.append((row.case.name, n))
        return {name: 1e-6 * (2 * n if name == "torch" else n + slow.get(name, 0)) for name in names}

    monkeypatch.setattr(tune, "fastest", fastest)
    return timed


def least(implementation: str, kind: str = "float32", columns: int = 512) -> int | None:
    steps = configs.least("contrastive", "clip_loss", implementation, CPU, kind)
    return next((size for at, size in steps if columns >= at), 0)


def test_a_table_falls_where_every_size_below_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    x = torch.empty(128, 512)
    assert chosen(lambda: mmfuse.clip_loss(x, x, 1.0)) == "torch"
    narrow, bfloat16 = least("chunked", columns=64), least("chunked", "bfloat16")
    timed = pretend(monkeypatch, {"cpu": 100, "chunked": 500})
    options = ["--dtypes", "float32", "--budget", "100", "--json"]
    assert main(["tune", "--ops", "clip_loss", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    # forward and backward, up to the size that the table had, and two sizes after the last that lost
    sizes = sorted({n for case, n in timed if case == "clip"})
    assert sizes[0] == 64 and sizes[-1] >= 1024 and sizes == [2**k for k in range(6, 6 + len(sizes))]
    fused = facts["found"][0]["implementation"]
    assert least("chunked") == 512**2 and facts["files"] == [str(configs.path_of(folder, "contrastive", CPU))]
    if fused == "cpu":
        assert least("cpu") == 128**2 and chosen(lambda: mmfuse.clip_loss(x, x, 1.0)) == "cpu"
    # narrower features are as before, and so is another dtype
    assert narrow and least("chunked", columns=64) == narrow
    assert bfloat16 and least("chunked", "bfloat16") == bfloat16
    # what was found before stays when another operator is tuned
    assert main(["tune", "--ops", "siglip_loss", *options]) == 0
    assert least("chunked") == 512**2


def test_what_is_not_known_does_not_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    case = find("clip")
    monkeypatch.setattr(tune, "ladder", lambda case, device: [64, 128])
    found, _ = tune.tuned(case, CPU, torch.float32, 100.0)
    assert found and all(f.least == 64**2 for f in found)  # the smallest
    monkeypatch.setattr(tune, "ladder", lambda case, device: [64, 128, 256, 512, 1024])
    timed = pretend(monkeypatch, {})
    monkeypatch.setattr(tune, "_right", lambda *of: True)
    # no time after the first size
    clock = iter(range(0, 10000, 60))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    found, why = tune.tuned(case, CPU, torch.float32, 100.0)
    assert found == [] and "there was no time" in why[-1] and {n for _, n in timed} == {64}


def test_a_table_rises_where_an_implementation_loses() -> None:
    def times(*worse: bool) -> tune.Times:
        return [
            (100 * 4**i, [{"cpu": 1.0, "chunked": 9.0, "torch": 0.5 if slow else 2.0}, dict.fromkeys(NAMES, 1.0)])
            for i, slow in enumerate(worse)
        ]

    assert tune.least_size(times(False, False), "cpu", NAMES) == 100
    assert tune.least_size(times(True, False, False), "cpu", NAMES) == 400
    assert tune.least_size(times(False, True, False), "cpu", NAMES) == 1600
    assert tune.least_size(times(False, False, True), "cpu", NAMES) == 3200
    won = times(True, False, False)
    assert tune.settled(won, "cpu", NAMES, 1600) and not tune.settled(won, "cpu", NAMES, 1601)
    assert not tune.settled(won[:2], "cpu", NAMES, 0) and not tune.settled(won, "cpu", NAMES, None)
    # the slowest of all later ones does not count, the fastest does
    assert tune.least_size(times(False, False), "chunked", NAMES) == 800


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(tune, "fastest", lambda row, names: timed.append(names) or dict.fromkeys(names, 1.0))
    own = Row.probe
    wrong = {"status": "wrong", "reason": "d text: 7 times the error that is allowed"}
    monkeypatch.setattr(Row, "probe", lambda row, name: wrong if name == "mmfuse-chunked" else own(row, name))
    found, why = tune.tuned(find("clip"), CPU, torch.float32, 100.0)
    assert why[0] == "chunked is wrong: d text: 7 times the error that is allowed"
    assert all(f.implementation != "chunked" for f in found) and all("chunked" not in names for names in timed)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    own, done = tune.tuned, []

    def tuned(case, device, dtype, seconds):  # type: ignore[no-untyped-def]
        if done:
            raise KeyboardInterrupt
        done.append(case.name)
        return own(case, device, dtype, seconds)

    pretend(monkeypatch, {"chunked": 500})
    monkeypatch.setattr(tune, "tuned", tuned)
    assert main(["tune", "--ops", "clip_loss", "--dtypes", "float32", "--budget", "100"]) == 130
    printed = capsys.readouterr().out
    assert "interrupted: what was found so far is kept" in printed and "written: " in printed
    assert least("chunked") == 512**2


def test_a_tiny_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured in truth: whatever it finds, the tables are read and the operators run."""
    assert main(["tune", "--ops", "select_head,masked_patch_loss", "--budget", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(configs.read(Path(file))["threads"] == torch.get_num_threads() for file in facts["files"])
    assert all(f["operator"] in ("select_head", "masked_patch_loss") and f["least"] >= 0 for f in facts["found"])
    x = torch.randn(4, 3, 8)
    assert mmfuse.kernels.head.select_head(x, 0, (None, None, 1e-6)).shape == (4, 8)


def test_the_tables_that_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "kernels")
    pretend(monkeypatch, {"chunked": 500})
    options = ["--ops", "clip_loss", "--dtypes", "float32", "--budget", "100", "--save"]
    monkeypatch.setenv("MMFUSE_TUNED", "")
    assert main(["tune", *options]) == 0
    path = configs.path_of(tmp_path / "kernels", "contrastive", CPU)
    assert configs.read(path)["least"]["clip_loss/chunked/float32/512"] == 512**2


def test_a_new_table_that_ships_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    shipped = {"another": {"threads": torch.get_num_threads(), "vectors": vectors(), "least": {"clip_loss/cpu": 7}}}
    monkeypatch.setattr(configs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(configs, "tables", cache(lambda family: shipped))
    configs.forget()
    for where, kept in ((configs.SHIPPED, {"clip_loss/cpu": 7}), (folder, {})):
        (path,) = tune.put(where, CPU, "contrastive", "least", {"siglip_loss/cpu": 5})
        assert configs.read(path)["least"] == kept | {"siglip_loss/cpu": 5}


def test_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--ops", "clap_loss"], "--ops has 'clap_loss', expected some of ball_query"),
        (["--dtypes", "float8"], "--dtypes has 'float8', expected some of float32"),
        (["--device", "meta"], "--device is 'meta', expected cpu"),
    ):
        assert main(["tune", *options]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("MMFUSE_TUNED", "")
    assert main(["tune"]) == 2
    assert "MMFUSE_TUNED is empty, expected a folder to write to, or --save" in capsys.readouterr().err


def test_info_says_where_the_tables_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = configs.path_of(folder, "head", CPU)
    configs.write(path, {"least": {"select_head/chunked": 7}})
    main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)["tables"]
    assert facts["folder"] == str(folder)
    assert torch.cuda.is_available() or facts["tuned"] == [str(path)]


def test_launch_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what compiles clean is tried, only what is right is timed, and what is not clearly faster is left."""
    kernel = pytest.importorskip("mmfuse.kernels.contrastive.kernel")
    key, tried = "stats/float32-ieee/512", []
    spec = {n: Spec(f"{kernel.__name__}:_stats_fwd_kernel", str(n), {}, {}) for n in (1, 2, 4, 8)}
    options = [({"num_warps": n}, [one]) for n, one in spec.items()]
    monkeypatch.setattr(kernel, "candidates", lambda operator, *of: [(key, options)] if operator == "clip_loss" else [])
    facts = {n: Facts(registers=32, spills=8 * (n == 1), shared=0, f64=0) for n in spec}
    monkeypatch.setattr(tune, "compile_all", lambda jobs: ((s, arch, facts[int(s.variant)]) for s, arch in jobs))

    def warps() -> int | None:
        return configs.in_force("contrastive", "configs", CPU).get(key, {}).get("num_warps")

    monkeypatch.setattr(tune, "_right", lambda *of: tried.append(warps()) or warps() != 8)
    seconds = {None: 1.0, 2: 0.98, 4: 0.9, 8: 0.1}
    monkeypatch.setattr(tune, "fastest", lambda row, names: {"triton": seconds[warps()]})
    found = tune.launches(find("clip"), CPU, torch.float32, 80, 100.0)
    assert found == {key: {"num_warps": 4}} and tried == [2, 4, 8] and warps() is None
    seconds[4] = 0.98
    assert tune.launches(find("clip"), CPU, torch.float32, 80, 100.0) == {}
    assert tune.launches(find("siglip"), CPU, torch.float32, 80, 100.0) == {}


def test_candidates_are_the_neighbours_of_the_default() -> None:
    kernel = pytest.importorskip("mmfuse.kernels.contrastive.kernel")
    (stats, options), (grad, _) = kernel.candidates("clip_loss", torch.bfloat16, 768, 90)
    assert (stats, grad) == ("stats/bfloat16/1024", "grad/bfloat16/1024")
    default = kernel._TILES["half"][9]["stats"]
    assert all(len(set(tile.items()) - set(default.items())) == 1 for tile, _ in options) and len(options) > 8
    assert all(spec.archs == (90,) for _, specs in options for spec in specs)


@pytest.mark.parametrize(
    "family, operator, dtype, columns, key",
    [
        ("patch", "patch_embed", torch.bfloat16, 0, "tokens/bytes"),
        ("patch", "patch_embed", torch.float32, 0, "tokens/ieee"),
        ("codebook", "nearest_code", torch.float32, 32, "search/32"),
    ],
)
def test_launches_of_candidates_reach_the_kernel(
    family: str, operator: str, dtype: torch.dtype, columns: int, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tried under a key are the settings that the operator launches its kernel with."""
    kernel = pytest.importorskip(f"mmfuse.kernels.{family}.kernel")
    [(found, options)] = kernel.candidates(operator, dtype, columns, 90)
    assert found == key and len(options) > 5 and list(kernel.candidates("other", dtype, columns, 90)) == []
    assert all(spec.archs == (90,) and spec.num_warps == tile["num_warps"] for tile, (spec, *_) in options)
    tile, _ = options[0]
    monkeypatch.setattr(configs, "tuned", lambda *parts: tile if configs.key(*parts[2:]) == key else None)
    launched: list[dict[str, int]] = []
    monkeypatch.setattr(kernel, "launch", lambda of, grid, on, **given: launched.append(given))
    if family == "patch":
        patch_embed(
            torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(16, 3, 16, 16, dtype=dtype), backend="triton"
        )
    else:
        nearest_code(torch.zeros(5, columns), torch.zeros(40, columns), backend="triton")
    assert any(tile.items() <= given.items() for given in launched)

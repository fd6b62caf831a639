"""A module as a compiled library that needs neither mmfuse nor Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmfuse.export.aoti import export_aoti
from mmfuse.kernels._runtime import UnsupportedError
from mmfuse.kernels.head import select_head

pytestmark = [
    pytest.mark.xdist_group("aoti"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler"),
]

# what takes least time to compile
FAST = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(16), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return select_head(x, 0, (self.norm.weight, self.norm.bias, self.norm.eps), self.weight)


FRESH = """
import sys, torch
from safetensors.torch import load_file
given = load_file(sys.argv[2])
run = torch._inductor.aoti_load_package(sys.argv[1])
for number in range(2):
    [found] = run(given[f"x{number}"])
    torch.testing.assert_close(found, given[f"y{number}"], rtol=1e-5, atol=1e-5)
assert "mmfuse" not in sys.modules and not hasattr(torch.ops.mmfuse, "select_head")
print("equal")
"""


# numbers in, numbers out
CPP = """
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ATen.h>

#include <cstdio>

int main(int, char **argv) {
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  at::Tensor x = at::linspace(-1, 1, 6 * 5 * 16).reshape({6, 5, 16});
  at::Tensor y = loader.run({x})[0].contiguous();
  for (int64_t i = 0; i < y.numel(); i++) std::printf("%.9g\\n", y.data_ptr<float>()[i]);
}
"""


def run_in_cpp(file: Path, folder: Path) -> Tensor:
    root = Path(torch.__file__).parent
    (folder / "runner.cpp").write_text(CPP)
    libraries = [
        f"-L{root / 'lib'}",
        f"-Wl,-rpath,{root / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    command = ["g++", "-std=c++20", "-O0", "runner.cpp", "-o", "runner", "-isystem", str(root / "include"), *libraries]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run([folder / "runner", file], capture_output=True, text=True, check=True)
    return torch.tensor([float(line) for line in done.stdout.split()]).view(6, 8)


def test_python_and_cpp_run_it_without_mmfuse(tmp_path: Path) -> None:
    model = Head().train()
    file = export_aoti(
        model, {"x": torch.randn(3, 5, 16)}, tmp_path / "head.pt2", dynamic={"x": {0: "batch"}}, options=FAST
    )
    assert model.training and [f.name for f in tmp_path.iterdir()] == ["head.pt2"]
    given = {}
    for number, batch in enumerate((1, 6)):
        given[f"x{number}"] = x = torch.randn(batch, 5, 16)
        given[f"y{number}"] = model(x).detach()
    save_file(given, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", FRESH, str(file), str(tmp_path / "given.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr
    x = torch.linspace(-1, 1, 6 * 5 * 16).view(6, 5, 16)
    torch.testing.assert_close(run_in_cpp(file, tmp_path), model(x).detach(), rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_what_cannot_be_compiled(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        export_aoti(nn.Linear(4, 4), [x], tmp_path / "linear.so")
    with pytest.raises(ValueError, match="whose folder does not exist"):
        export_aoti(nn.Linear(4, 4), [x], tmp_path / "none" / "linear.pt2")
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        export_aoti(torch.relu, [x], tmp_path / "relu.pt2")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="Branching cannot be traced"):
        export_aoti(Branching(), [x], tmp_path / "branching.pt2")
    with pytest.raises(ValueError, match="dynamic names 'y'"):
        export_aoti(nn.Linear(4, 4), [x], tmp_path / "linear.pt2", dynamic={"y": {0: "batch"}})
    assert not list(tmp_path.iterdir())

"""The GPU path on a machine without a GPU: builds fake_cuda.cpp and runs fake_gpu.py in its own process."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
RUN = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch, which asks for CUDA while it is imported
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_the_gpu_path_on_a_fake_gpu(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or torch.version.cuda or torch.version.hip:
        pytest.skip("needs a C++ compiler and a torch that knows no real GPU")
    root = os.path.dirname(torch.__file__)
    library = tmp_path / "fake_cuda.so"
    options = f"-std=c++20 -shared -fPIC -I{root}/include -L{root}/lib -Wl,-rpath,{root}/lib"
    options += " -lc10 -ltorch_cpu"
    subprocess.run([compiler, f"{HERE}/fake_cuda.cpp", *options.split(), "-o", library], check=True)
    command = [sys.executable, "-c", RUN, library, "-q", "-p", "no:cacheprovider", f"{HERE}/fake_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

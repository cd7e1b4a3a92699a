"""The GPU path on a machine without a GPU: builds fake_cuda.cpp and runs fake_gpu.py, in a process of its own."""

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

@pytest.fixture
def library(tmp_path):
    """fake_cuda.cpp, compiled against this torch."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch knows real GPUs, and a second CUDA cannot be put beside")
    root = os.path.dirname(torch.__file__)
    path = str(tmp_path / "fake_cuda.so")
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    subprocess.run([compiler, f"{HERE}/fake_cuda.cpp", *options, "-lc10", "-ltorch_cpu", "-o", path], check=True)
    return path

def test_the_gpu_path_on_a_fake_gpu(library):
    command = [sys.executable, "-c", RUN, library, "-q", "-p", "no:cacheprovider", f"{HERE}/fake_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]

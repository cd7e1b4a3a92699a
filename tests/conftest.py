"""Tests run from anywhere, leave the user's caches alone, and read the published systems' fixtures from golden/."""
import os
import sys
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("DUNE_CACHE", tempfile.mkdtemp(prefix="dune-cache-"))
os.environ.setdefault("OMP_NUM_THREADS", "2")

import dune  # noqa: E402


@pytest.fixture
def golden():
    """golden(name): what the published code computed, see DESIGN of each fixture in the test that uses it."""
    return lambda name: dune.read_checkpoint(os.path.join(ROOT, "tests", "golden", f"{name}.pt"))


@pytest.fixture
def close():
    """close(a, b, tolerance=1e-5): relative error in fp32, asserted."""
    def check(a, b, tolerance=1e-5):
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        shapes = f"shapes {tuple(a.shape)} {tuple(b.shape)}"
        assert a.shape == b.shape and error <= tolerance, f"relative error {error:.2e}, {shapes}"
    return check

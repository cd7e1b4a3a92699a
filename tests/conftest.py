"""Tests run from anywhere, leave the user's caches alone. golden/ holds what the published code computed."""

import os
import signal
import sys
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("DUNE_CACHE", tempfile.mkdtemp(prefix="dune-cache-"))
os.environ.setdefault("OMP_NUM_THREADS", "2")

import dune  # noqa: E402


@pytest.fixture(autouse=True)
def sigterm():
    """A run takes over SIGTERM. Left like that, forked processes would not end when they are told to."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def golden():
    """golden(name): what the published code computed, golden/NAME.pt."""
    return lambda name: dune.load_checkpoint(f"{ROOT}/tests/golden/{name}.pt")


@pytest.fixture
def close():
    """close(a, b, tolerance=1e-5): same shape, and a relative error of at most `tolerance`."""
    def check(a, b, tolerance=1e-5):
        assert a.shape == b.shape
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"relative error {error:.2e}"
    return check

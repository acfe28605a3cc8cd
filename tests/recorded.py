"""The recorded cases: numbers of the authors' implementation, and how closely they must be met."""

from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "data" / "recorded"
LAYER_CASES = sorted(path.stem for path in DIRECTORY.glob("layer_*.npz"))
ALLOCATION_CASES = sorted(path.stem for path in DIRECTORY.glob("alloc_*.npz"))
MODEL_CASES = sorted(path.stem.removeprefix("model_") for path in DIRECTORY.glob("model_*.npz"))


def read(name):
    """All arrays of a case, by name."""
    with np.load(DIRECTORY / f"{name}.npz") as archive:
        return dict(archive)


def assert_close(actual, expected, dtype, name=""):
    """Relative 1e-6 in float64; in float32 2e-4 of the array's largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == dtype, f"{name}: {actual.dtype}"
    largest = np.max(np.abs(expected), initial=0.0)
    if dtype == np.float64:
        # Sums that cancel are held to the size of their terms.
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9 * largest, err_msg=name)
    else:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * largest + 1e-30, err_msg=name)

"""Settings of the whole suite: strict dtypes, several fake CPU devices, shared compilations."""

import os
import signal
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402 - reads the environment above when it is imported
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Workers of pytest-xdist and later runs share what was compiled once.
_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

_MOST_BYTES = 1.2e9  # of memory of a worker that keeps its compiled programs for the next module


@pytest.fixture(autouse=True, scope="module")
def _quickly_compiled(request):
    """Most programs run once, and to compile them well takes longer; some are compiled as users' are."""
    quickly = request.node.get_closest_marker("optimized") is None
    if quickly != jax.config.read("jax_disable_most_optimizations") or _resident_bytes() > _MOST_BYTES:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(scope="module", params=[1, 8])
def device_count(request):
    """Number of devices that formulations are chosen by: most users have one, this suite has eight."""
    if request.param == jax.device_count():
        yield
        return
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: request.param)
        yield
    jax.clear_caches()


def _resident_bytes():
    """Memory of this process, as Linux tells it."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return float("inf")
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def reallocated_run(tmp_path_factory):
    """The directory of a tiny run whose last checkpoint, of step 16, has closed channels and copies."""
    from runs import quiet_console, tiny_config
    from selconv_jax.train import train_run

    workdir = tmp_path_factory.mktemp("runs") / "reallocated"
    assert train_run(tiny_config(allocation={"threshold": 0.6}), workdir, quiet_console()[0]) == 0
    return workdir


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The directory of an unbroken tiny run with all that a run does, and what it printed.

    Of each module its own, as it is compared bit for bit with runs that are compiled as the module's are.
    """
    from runs import quiet_console, whole_config
    from selconv_jax.train import train_run

    workdir = tmp_path_factory.mktemp("runs") / "whole"
    console, text = quiet_console()
    assert train_run(whole_config(), workdir, console) == 0
    return workdir, text.getvalue()


@pytest.fixture
def cluster_config(tmp_path):
    """The file of a tiny configuration for several processes: 20 steps on any number of devices."""
    file = tmp_path / "tiny.toml"
    file.write_text(
        """\
epochs = 4
batch_size = 400
eval_batch_size = 500
[model]
name = "densenet40"
options = { blocks = [1], growth = 4 }
[allocation]
threshold = 0.4
compile_frozen = false
"""
    )
    return file


@pytest.fixture(scope="session")
def small_densenet():
    """A DenseNet of one layer, and its variables as after training, with closed channels and copies."""
    from selconv_jax.models import DenseNet
    from states import perturbed_variables

    model = DenseNet(num_classes=3, blocks=(1,), growth=2)
    return model, perturbed_variables(model, (1, 8, 8, 3), seed=0, closed=0.2, copies=0.5)

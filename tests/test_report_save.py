"""Pictures are written whole or not at all, and equal data gives equal bytes."""

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from selconv_jax.errors import ConfigError
from selconv_jax.report import learning_curves, save_figure
from selconv_jax.report._style import new_figure


def curve() -> Figure:
    return learning_curves([{"epoch": 1, "train_loss": 2.0, "test_accuracy": 0.5}], "run")


def test_equal_data_gives_equal_bytes(tmp_path):
    save_figure(curve(), tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "savefig.bbox": "tight"}):
        save_figure(curve(), tmp_path / "b.png")
    figure = curve()
    save_figure(figure, tmp_path / "c.png")
    save_figure(figure, tmp_path / "c.png")
    first = (tmp_path / "a.png").read_bytes()
    assert (tmp_path / "b.png").read_bytes() == first, "the reader's matplotlibrc changes the picture"
    assert (tmp_path / "c.png").read_bytes() == first, "drawing a figure twice changes the picture"


def test_metadata_is_fixed(tmp_path):
    save_figure(new_figure(3.0, 2.0), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Software"] == "selconv_jax"
        assert set(image.info) == {"Software", "dpi"}


def test_size_in_pixels_and_missing_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "a.PNG"
    save_figure(new_figure(3.0, 2.0), path)
    with Image.open(path) as image:
        assert image.size == (360, 240)
    assert [file.name for file in path.parent.iterdir()] == ["a.PNG"], "a temporary file is left"


@pytest.mark.parametrize("name", ["a.pdf", "a", "png"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"{name}'.*name it \*\.png"):
        save_figure(new_figure(3.0, 2.0), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["matplotlib.figure.Figure.savefig", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, step):
    def fail(*arguments, **options):
        raise OSError("no space left on device")

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="no space"):
            save_figure(new_figure(3.0, 2.0), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]

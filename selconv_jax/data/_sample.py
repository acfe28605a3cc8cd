"""The embedded sample: 3,000 Fashion-MNIST images included in the package.

It needs neither a download nor tensorflow-datasets. ``FASHION_MNIST_LICENSE.txt`` beside the file
contains the licence (MIT, Zalando SE, 2017) and describes how the images were chosen.
"""

import importlib.resources

import numpy as np

from selconv_jax.data._catalog import KNOWN, SAMPLE
from selconv_jax.data._dataset import ImageData, Split

__all__ = ["load_sample"]


def load_sample() -> ImageData:
    """Load the first 200 training and 100 test images of each class of Fashion-MNIST.

    Returns:
        2,000 training and 1,000 test images, uint8 ``[N, 28, 28, 1]``, in their original order.

    Example:
        >>> len(load_sample().train)
        2000
    """
    file = importlib.resources.files("selconv_jax.data") / "fashion_mnist_sample.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return ImageData(
            info=KNOWN[SAMPLE].info(),
            train=Split(arrays["train_images"], arrays["train_labels"]),
            test=Split(arrays["test_images"], arrays["test_labels"]),
        )

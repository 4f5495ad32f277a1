"""Data sets by name: from a folder, from scikit-learn, or downloaded with a checksum.

`load("mnist")` looks for `mnist.npz` (x_train, y_train, x_test, y_test) in `data_dir`,
then in `$QJAX_DATA`; else it downloads the official files to a cache and checks them.
"""

import gzip
import hashlib
import os
import pathlib
import tempfile
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images in [0, 1], NHWC float32, and labels."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


# Base address, then file -> MD5 as their publishers give it.
_IDX = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}
NAMES = ("digits", *_IDX)


def load(name: str, data_dir: str = "") -> Split:
    """Loads a data set.

    Args:
      name: One of ``NAMES``.
      data_dir: Folder with ``NAME.npz``; `$QJAX_DATA` by default.

    Raises:
      ValueError: for a name that is not known.
      FileNotFoundError: if it is neither in a folder nor can be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"The data sets are {', '.join(NAMES)}; got {name!r}.")
    if name == "digits":
        return _digits()
    for folder in filter(None, (data_dir, os.environ.get("QJAX_DATA"))):
        path = pathlib.Path(folder) / f"{name}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return _split(*(arrays[field] for field in Split._fields))
    return _split(*_download(name))


def _digits() -> Split:
    """The 1,797 digits of scikit-learn, 8x8; a fixed fifth of them is held out."""
    import sklearn.datasets

    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)[order]
    y = y.astype(np.int32)[order]
    held_out = len(x) // 5
    return Split(x[held_out:], y[held_out:], x[:held_out], y[:held_out])


def _split(x_train, y_train, x_test, y_test) -> Split:
    images = [(x / np.float32(255)).astype(np.float32) for x in (x_train, x_test)]
    images = [x[..., None] if x.ndim == 3 else x for x in images]
    labels = [y.astype(np.int32).reshape(-1) for y in (y_train, y_test)]
    return Split(images[0], labels[0], images[1], labels[1])


def _download(name: str) -> list[np.ndarray]:
    base, files = _IDX[name]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "qjax" / name
    try:
        return [
            _read_idx(_fetch(base + f, folder / f, md5)) for f, md5 in files.items()
        ]
    except (urllib.error.URLError, OSError) as error:
        raise FileNotFoundError(
            f"{name}.npz is in no data folder, and {base} cannot be reached ({error}). "
            f"Pass --data-dir or set $QJAX_DATA to a folder with {name}.npz (arrays "
            f"{', '.join(Split._fields)}), or put {', '.join(files)} into {folder}."
        ) from error


def _fetch(url: str, path: pathlib.Path, md5: str) -> bytes:
    if not path.exists():
        with urllib.request.urlopen(url, timeout=20) as response:
            data = response.read()
        _check(data, url, md5)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    data = path.read_bytes()
    _check(data, str(path), md5)
    return data


def _check(data: bytes, name: str, md5: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise OSError(f"{name} has the checksum {found}, wanted {md5}; delete it")


def _read_idx(data: bytes) -> np.ndarray:
    """The IDX format: two zero bytes, type 8, rank, sizes, then the values."""
    raw = gzip.decompress(data)
    rank = raw[3]
    sizes = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)

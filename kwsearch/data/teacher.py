"""A teacher's logits from a .npz file, one row for each example of the training set.

The file holds `logits` (N, classes), floats, and `names` (N,): the examples' file names, or their
indices in the training set. Rows in any order; those of other examples are left out. On purpose
different from EfficientAT, which trains an example without a row on its labels alone: here each
example needs one, so that a loss is what its weight says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kwsearch.data.errors import DataError, few
from kwsearch.data.images import Images

_TRY = "try np.savez(path, names=…, logits=…)"


def read_logits(path: Path, names: Sequence[str], num_classes: int) -> Tensor:
    """out: (len(names), num_classes) float32, row i of the example called names[i].

    names: of the training set, in its order, such as audio_folder.ClipFiles.names. Raises
    DataError.
    """
    return _chosen(path, *_arrays(path), names, num_classes)


def _chosen(
    path: Path, found: np.ndarray, logits: np.ndarray, names: Sequence[str], num_classes: int
) -> Tensor:
    if logits.shape[1] != num_classes:
        raise DataError(
            f"{path}: logits of {logits.shape[1]} classes; allowed {num_classes}, as the training "
            "set has"
        )
    wanted = list(names) if found.dtype.kind == "U" else list(range(len(names)))
    rows = {name: row for row, name in enumerate(found.tolist())}
    if len(rows) != len(found):
        values, counts = np.unique(found, return_counts=True)
        twice = values[counts > 1].tolist()
        raise DataError(f"{path}: {few(twice)} more than once in names; allowed one row of each")
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise DataError(
            f"{path}: no logits of {len(missing):,} of {len(wanted):,} training examples: "
            f"{few(missing)}; its names are {few(found.tolist())}; allowed a row for each example"
        )
    chosen = logits[[rows[name] for name in wanted]]
    # After the rounding to float32, which may overflow.
    with np.errstate(over="ignore"):
        chosen = chosen.astype(np.float32)
    finite = np.isfinite(chosen).all(axis=1)
    if not finite.all():
        wrong = [name for name, fine in zip(wanted, finite, strict=True) if not fine]
        raise DataError(f"{path}: logits of {few(wrong)} are not finite; allowed finite numbers")
    return torch.from_numpy(chosen)


def taught(images: Images, path: Path) -> Images:
    """The training examples with the logits of the file, by their names, or their indices where
    they have none. Raises DataError.
    """
    found, logits = _arrays(path)
    if images.names and found.dtype.kind != "U":
        raise DataError(
            f"{path}: names are numbers, places in a training set, which is another one with "
            f"another fold; allowed here are names of files, such as {images.names[0]}"
        )
    names = images.names or tuple(map(str, range(len(images))))
    return replace(images, teacher=_chosen(path, found, logits, names, images.num_classes))


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """names (N,) of text or whole numbers, logits (N, classes) of floats."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names, logits = arrays["names"], arrays["logits"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {_TRY}") from None
    except Exception as error:  # whatever a damaged archive makes zipfile or numpy raise
        raise DataError(
            f"{path}: not a .npz file of names and logits ({' '.join(str(error).split())}); {_TRY}"
        ) from None
    if names.ndim != 1 or names.dtype.kind not in "Uiu":
        raise DataError(
            f"{path}: names are {names.dtype} of shape {names.shape}; allowed file names or whole "
            "numbers, of shape (N,)"
        )
    if logits.ndim != 2 or logits.dtype.kind != "f" or len(logits) != len(names):
        raise DataError(
            f"{path}: logits are {logits.dtype} of shape {logits.shape}; allowed floats of shape "
            f"(N, classes), a row for each of the {len(names)} names"
        )
    return names, logits

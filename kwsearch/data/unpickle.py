"""Pickled dictionaries of numbers, bytes and uint8 arrays, read without running what they name.

A pickle is a program that may call anything importable. Here the few names such a dictionary
needs stand for the small classes below; any other name is refused before anything is called,
and numpy's own reconstruction, which trusts its arguments, never sees the file's.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from kwsearch.data.errors import DataError


def read_pickle(path: Path) -> dict[str, Any]:
    """The pickled dictionary; keys as text, arrays as uint8, what Python 2 called str as bytes."""
    try:
        with path.open("rb") as file:
            found = _Unpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except _RefusedError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{path}: not a readable pickle ({type(error).__name__}: {error}); "
            "try unpacking the archive again"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: the pickle holds a {type(found).__name__}; allowed a dictionary")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            value.array if isinstance(value, _Array) else value
        )
        for key, value in found.items()
    }


class _RefusedError(pickle.UnpicklingError):
    pass


class _StandIn:
    # The pickle may ask to set attributes on whatever it is given, these classes included.
    # With this method there, that is a call with the wrong arguments instead.
    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"sets the state of {type(self).__name__}")


class _Dtype(_StandIn):
    """numpy.dtype("u1", False, True); its state only repeats what "u1" says."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise _RefusedError(f"has an array of dtype {code!r}; allowed uint8 ('u1')")

    def __setstate__(self, state: Any) -> None:
        pass


class _Ndarray(_StandIn):
    """numpy.ndarray, named as the type that `_reconstruct` makes."""


class _Array(_StandIn):
    """numpy's _reconstruct(ndarray, (0,), b"b"): an array that its state will fill."""

    array: np.ndarray | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, content = state
        self.array = _uint8_array(content, dtype, shape, "F" if fortran else "C")


class _FromBuffer(_Array):
    """numpy's _frombuffer: an array in protocol 5."""

    def __init__(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        self.array = _uint8_array(content, dtype, shape, order)


class _Encoded(_StandIn):
    """_codecs.encode(text, "latin1"): how Python 3 writes bytes in the old protocols."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise _RefusedError(f"encodes text as {encoding!r}; allowed 'latin1'")
        return text.encode("latin1")


def _uint8_array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise _RefusedError(f"has an array of dtype {dtype!r}; allowed uint8 ('u1')")
    array: np.ndarray = np.frombuffer(content, np.uint8).reshape(shape, order=order)
    return array


_STAND_INS: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Ndarray,
    ("_codecs", "encode"): _Encoded,
    # numpy 2 renamed numpy.core; importing the old name warns, so neither is imported.
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_StandIn]:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(
                f"refused, the pickle names {module}.{name}; allowed numbers, text, bytes, lists, "
                "dictionaries and uint8 numpy arrays; if you trust the file, save it again "
                "as .npz with x_train, y_train, x_test, y_test"
            ) from None

"""Data sets for short proxy trainings, in memory: images, log-mels of sound, time series.

>>> from kwsearch import data
>>> train = data.load("digits")
>>> train, held_out = data.split_holdout(train, 0.1, seed=0)
>>> tuple(train.x.shape), tuple(held_out.x.shape)
((1294, 1, 8, 8), (143, 1, 8, 8))

Nothing is downloaded, nothing a file names is run, and every problem is a `DataError`.
"""

from __future__ import annotations

from kwsearch.data.audio_folder import Clips
from kwsearch.data.errors import DataError
from kwsearch.data.images import Images, Split, fingerprint, resize, split_holdout, subset
from kwsearch.data.loading import NAMES, load, load_videos, places
from kwsearch.data.series import Series, windows
from kwsearch.data.teacher import taught
from kwsearch.data.videos import Videos, thinned
from kwsearch.data.videos import fingerprint as fingerprint_videos
from kwsearch.data.videos import held_out as hold_out_videos

__all__ = [
    "NAMES",
    "Clips",
    "DataError",
    "Images",
    "Series",
    "Split",
    "Videos",
    "fingerprint",
    "fingerprint_videos",
    "hold_out_videos",
    "load",
    "load_videos",
    "places",
    "resize",
    "split_holdout",
    "subset",
    "taught",
    "thinned",
    "windows",
]

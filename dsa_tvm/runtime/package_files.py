"""Where the package's own files are, however it was installed."""

from __future__ import annotations

import sys
from pathlib import Path


def find(relative: str) -> Path:
    """One of the package's files or folders that are no Python modules.

    An ordinary install has everything in one folder. An editable one has the compiled library in ``site-packages``, and
    the folders ``export``, ``schedules`` and ``tuning_logs`` in the checkout, beside the package. The package's loader
    knows all of these places, and ``__file__`` only one.

    Parameters
    ----------
    relative : str
        Its path as in an ordinary install, such as ``"lib/libdsa_tvm.so"``.

    Returns
    -------
    Path
        The first that exists; where an ordinary install has it if none does.
    """
    package = sys.modules[__name__.partition(".")[0]]
    places = [Path(directory, relative) for directory in package.__path__]
    return next((place for place in places if place.exists()), places[0])

"""Find the package's own files, however it was installed."""

from __future__ import annotations

import sys
from pathlib import Path


def find(relative: str) -> Path:
    """Find a file or folder of the package that is not a Python module.

    An ordinary install has everything in one folder. An editable install has the compiled library in ``site-packages``,
    and the folders ``export``, ``schedules`` and ``tuning_logs`` in the checkout, beside the package. The package's
    loader knows all these places; ``__file__`` names only one.

    Parameters
    ----------
    relative : str
        The path in an ordinary install, such as ``"lib/libdsa_tvm.so"``.

    Returns
    -------
    Path
        The first path that exists; otherwise the path in an ordinary install.
    """
    package = sys.modules[__name__.partition(".")[0]]
    places = [Path(directory, relative) for directory in package.__path__]
    return next((place for place in places if place.exists()), places[0])

"""Tuning records: logs of what searches measured, and the choice of decisions that a library is built with."""

from __future__ import annotations

from .log import Damage, Log, default_directory, logs, merge, read_directory
from .record import DATE_FORMAT, Record, as_key, spec_hash

__all__ = [
    "DATE_FORMAT",
    "Damage",
    "Log",
    "Record",
    "as_key",
    "default_directory",
    "logs",
    "merge",
    "read_directory",
    "spec_hash",
]

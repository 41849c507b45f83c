"""Tuning records: what searches measured, in logs that survive anything, and what of it a library is built from."""

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

"""From records to the decisions that a library is built with.

Each device has a module with the same questions: `BUCKETS`, ``stage_of``, ``by_size`` and ``explain``. The answers
differ. A CPU library may hold several kernels of one operator, each for some sizes. A GPU library holds one for each
stage, which serves all sizes.
"""

from __future__ import annotations

from types import ModuleType

from ...gpu.architectures import is_arch
from ..record import Record
from . import cpu, gpu


def of(target: str) -> ModuleType:
    """The module for the device of a target: `gpu` for an architecture such as ``sm_90a``, else `cpu`."""
    return gpu if is_arch(target) else cpu


def stage_of(record: Record) -> str:
    """The stage that a record measured; "" on CPUs."""
    return of(record.target).stage_of(record.op, record.shape, record.target, record.types)

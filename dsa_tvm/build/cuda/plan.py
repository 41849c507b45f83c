"""Which decisions a library's CUDA kernels are compiled with: the best measured ones if there are any, else DEFAULT.

A record counts for the architecture, operator, element types, stage and model that it was measured with. float16
without records of its own gets the decisions of bfloat16, because both use the same instructions on as many bytes.
int8 gets those of float8_e4m3fn, because their keys are equally wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...gpu.architectures import is_arch
from ...presets import Preset
from ...records import Record
from ...records.selection.finals import in_words
from ...records.selection.gpu import Choice, choose, finals_of
from ..plan import accepted
from .space import Space

#: The type whose records count for a type without its own.
_LIKE = {"float16": "bfloat16", "int8": "float8_e4m3fn"}


class Plan:
    """Decisions from records, as a `kernels.Chosen`.

    Parameters
    ----------
    records : sequence of Record
    preset : Preset
        Only records of its sizes count, and only for kernels of its lengths.
    progress : callable
        Takes a line of text for every choice, and for every record that the kernel factory refuses.
    """

    def __init__(
        self, records: Iterable[Record], preset: Preset, progress: Callable[[str], None] = lambda line: None
    ) -> None:
        self._records = [r for r in records if r.kind == "final" and is_arch(r.target)]
        self._lengths = preset.lengths
        self._progress = progress
        self._choices: dict[tuple, Choice] = {}

    def __call__(
        self, arch: str, op: str, stage: str, variant: Mapping[str, str], sizes: Mapping[str, int], decisions: Any
    ) -> Any:
        """The decisions to make a kernel with; `decisions`, its DEFAULT, if no records speak for others."""
        if any(self._lengths[name] != length for name, length in sizes.items()):
            return decisions
        chosen = self._choice(arch, op, stage, tuple(variant.values())).decisions
        return decisions if chosen is None else type(decisions)(**chosen)

    def made(self) -> list[dict[str, Any]]:
        """Every choice other than DEFAULT, for the manifest."""
        return [
            {
                **{"arch": arch, "op": op, "stage": stage, "types": list(types)},
                **{"decisions": dict(choice.decisions), "speedup": round(choice.speedup, 3)},
            }
            for (arch, op, stage, types), choice in self._choices.items()
            if choice.decisions is not None
        ]

    def _choice(self, arch: str, op: str, stage: str, types: tuple[str, ...]) -> Choice:
        key = (arch, op, stage, types)
        if key not in self._choices:
            finals: list[Record] = []
            for like in (types, tuple(_LIKE.get(t, t) for t in types)):
                finals = finals or finals_of(self._records, op, arch, like, stage, self._lengths)
            space = Space(op, arch, stage, types, self._lengths) if finals else None
            self._choices[key] = choice = choose(accepted(finals, space, self._progress))
            if finals:
                what = in_words(choice.decisions)
                self._progress(f"{' '.join((arch, op, stage, *types))}: {what}; {choice.why}")
        return self._choices[key]

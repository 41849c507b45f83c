"""What a kernel declares its buffers as."""

from __future__ import annotations

from ..spec import ELEMENT_BYTES

#: The type of a buffer by element type: an unsigned integer for all that are narrower than float32.
STORAGE = {name: name if size == 4 else f"uint{8 * size}" for name, size in ELEMENT_BYTES.items()}

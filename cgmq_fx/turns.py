"""Threads take turns: torch.export and the default random generator belong to the whole process."""

from __future__ import annotations

import threading

TURN = threading.RLock()
"""Held while a model is captured, and for the whole of `quantize`."""

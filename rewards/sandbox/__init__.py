"""Where code from a model runs: bubblewrap around a Python interpreter, with nothing to reach and little to take."""

from .pool import Ended, Limits, Sandboxes, Verdict

__all__ = ["Ended", "Limits", "Sandboxes", "Verdict"]

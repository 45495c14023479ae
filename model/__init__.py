"""Models: `load` and `save` a checkpoint (a folder, or the name of a preset that ships with the package).

They are imported when they are asked for: what reads chats alone (`model.completion`) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import end_ids, load, save
    from .checkpoint import initialize
    from .deepseek_v4 import DeepseekV4
    from .language_model import LanguageModel, Output

__all__ = ["DeepseekV4", "LanguageModel", "Output", "end_ids", "initialize", "load", "save"]
_HOMES = {
    **dict.fromkeys(("end_ids", "load", "save"), "auto"),
    "initialize": "checkpoint",
    "DeepseekV4": "deepseek_v4",
    **dict.fromkeys(("LanguageModel", "Output"), "language_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

"""Models: `load` and `save` a checkpoint (a folder, or the name of a preset that ships with the package)."""

from .auto import end_ids, load, save
from .checkpoint import initialize
from .deepseek_v4 import DeepseekV4
from .language_model import LanguageModel, Output

__all__ = ["DeepseekV4", "LanguageModel", "Output", "end_ids", "initialize", "load", "save"]

"""DeepSeek-V4: `load` and `save` a checkpoint (a folder, or the name of a preset that ships with the package)."""

from .checkpoint import initialize, load, save
from .deepseek_v4 import DeepseekV4, Output

__all__ = ["DeepseekV4", "Output", "initialize", "load", "save"]

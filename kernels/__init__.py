"""Operations of DeepSeek-V4, a file each, in plain PyTorch: the definition that every faster version is held to.

What is called fp32 is at least that: float64 inputs are computed in float64 (upcast.py).
"""

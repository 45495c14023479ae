"""Operations of DeepSeek-V4, a file each, in plain PyTorch: the definition that every faster version is held to."""

"""DeepSeek-V4's post-training: an expert per domain by SFT and GRPO, merged by on-policy distillation."""

__version__ = "0.1.0"

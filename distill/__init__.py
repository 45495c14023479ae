"""On-policy distillation from many teachers."""

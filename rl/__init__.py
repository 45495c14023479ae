"""On-policy machinery: rollouts, the learner, weight sync, packing, GRPO."""

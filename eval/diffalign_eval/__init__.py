"""Honest comparison of checkpoints: same prompts, same seeds, paired statistics, pictures side by side."""

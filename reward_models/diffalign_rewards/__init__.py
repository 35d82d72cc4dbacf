"""Reward models, one file each. They are found by name through the entry points of `diffalign.rewards`."""

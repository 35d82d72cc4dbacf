"""What a run will need, before it starts: peak memory and time per iteration, from shapes on the meta device."""

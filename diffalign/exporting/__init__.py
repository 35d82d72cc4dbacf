"""The result of a run in the formats of other tools: diffusers, kohya, peft, merged weights, one file."""

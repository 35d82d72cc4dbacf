"""Running an algorithm: the loop, precision, checkpoints, previews, evaluation before and after."""

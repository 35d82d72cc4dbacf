"""Where training data comes from: prompts, images, preferences, and the bundled Shapes world."""

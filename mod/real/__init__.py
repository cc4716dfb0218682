"""Real checkpoints and videos. The method (mod/*.py) imports nothing from here."""

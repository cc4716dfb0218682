"""Real checkpoints and videos. The core imports nothing from here."""

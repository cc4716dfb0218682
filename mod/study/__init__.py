"""What measures, compares and draws. The method (mod/*.py) imports nothing from here."""

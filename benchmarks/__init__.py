"""Side-by-side measurements: interleaved in one run, every row with its parity figure."""

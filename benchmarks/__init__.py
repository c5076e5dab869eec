"""Side-by-side measurements; every row carries its parity figure."""

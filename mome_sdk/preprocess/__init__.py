"""Source grid to model grid, and back."""

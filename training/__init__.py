"""Training of MoME in PyTorch: experts first, then all jointly under the curriculum loss."""

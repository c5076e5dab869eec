"""Training of MoME in PyTorch: experts, gate, then all jointly under the curriculum loss."""

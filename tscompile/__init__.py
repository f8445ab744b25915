"""torch.compile backend that hides communication behind the matmul or attention next to it."""

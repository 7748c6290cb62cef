"""What the loss tail should cost, from shapes and devices."""

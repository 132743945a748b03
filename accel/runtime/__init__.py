"""What one process of a run is made of."""

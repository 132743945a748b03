"""The `accel` command. Imports no torch."""

"""Context parallelism: each process holds some positions of each sequence."""

"""A config becomes running workers."""

"""A second derivation of a run's numbers that shares no code with the project."""

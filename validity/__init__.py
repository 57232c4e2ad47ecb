"""Simulations with known true values: coverage of every interval, and false positive rate of every test."""

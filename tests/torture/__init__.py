"""Faults on purpose: kills, bad inputs, flipped bits, full disks and two commands at once, on a toy model."""

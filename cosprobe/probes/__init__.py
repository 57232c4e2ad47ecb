"""Fits the linear probes of all cells in one computation and saves them as a bank."""

from cosprobe.probes.bank import ProbeBank, Provenance, kept_bank, load_probes
from cosprobe.probes.calibration import Reliability, brier, ece, reliability
from cosprobe.probes.checkpoints import ChecksumIO, check_state
from cosprobe.probes.datamodule import shared
from cosprobe.probes.linalg import affine, blocks, classes_last, design, principal_axes, spread, standardise, validated
from cosprobe.probes.logistic import fit
from cosprobe.probes.newton import fit_newton
from cosprobe.probes.ridge import fit_ridge, problem_folds

__all__ = [
    "ChecksumIO",
    "ProbeBank",
    "Provenance",
    "Reliability",
    "affine",
    "blocks",
    "brier",
    "check_state",
    "classes_last",
    "design",
    "ece",
    "fit",
    "fit_newton",
    "fit_ridge",
    "kept_bank",
    "load_probes",
    "principal_axes",
    "problem_folds",
    "reliability",
    "shared",
    "spread",
    "standardise",
    "validated",
]

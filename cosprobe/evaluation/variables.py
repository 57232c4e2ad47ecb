"""The variables of `grid.nc` and what each of them means; the baselines; the levels that decide what is evidence."""

from __future__ import annotations

from cosprobe.cells import INPUTS, X0

UNIFORM, MAJORITY = "uniform", "majority"  # one over the number of classes; the most frequent training label
X0_PARSED = "x0_parsed"  # the candidate with the highest parser score in the decoded x0-hat
WEIGHTS = ("permuted_weights", "fresh_weights")  # measured on few samples: listed, but never the reference
GUESSES = (UNIFORM, MAJORITY)  # baselines without any input; `chance` is the better one of the two
X0_BASELINES = (X0_PARSED, X0)  # what x0-hat shows at a step
BASELINES = (*GUESSES, *INPUTS, *X0_BASELINES, *WEIGHTS)
ALPHA = 0.05  # a cell has evidence where its corrected p is at most this
CEILING = 0.95  # skill is NaN where the reference is above this
# descriptions of the variables
MEANING = {
    "accuracy": "test accuracy of the probe",
    "nested_accuracy": "with cross-fitting: test accuracy where every bank chooses its best cell on its own validation "
    "problems",
    "nested_accuracy_lower": "lower end of the 95 % interval of nested_accuracy",
    "nested_accuracy_upper": "upper end of it",
    "lower": "lower end of the 95 % interval of accuracy", "upper": "upper end of the 95 % interval of accuracy",
    "skill": "(accuracy - reference) / (1 - reference); NaN where reference > 0.95, and where `not_measured` says so",
    "p_permutation": "p of the test that the predictions go along with the labels, by permutation of labels between "
    "problems; corrected over all cells of the target",
    "p_inputs": "p of the test that accuracy is above that of every input the target is compared with: the largest p "
    "of the cell's pairs with inputs, corrected over all pairs of the target; NaN where there is no such input",
    "p_guess": "p of the test that accuracy is above that of the most frequent training label, corrected over all "
    "cells of the target; NaN where this guess is not better than one over the number of classes",
    "p_evidence": "the largest of p_permutation, p_guess and p_inputs; the cell has evidence where it is at most 0.05; "
    "NaN where an input has to be beaten and none was measured",
    "above_x0": "accuracy - x0_accuracy",
    "above_x0_lower": "lower end of the paired 95 % interval of above_x0",
    "above_x0_upper": "upper end of the paired 95 % interval of above_x0",
    "p_x0": "p of the test that accuracy is above what x0-hat shows at the step: the largest p of the cell's pairs "
    "with x0_latent and with x0_parsed at the nearest decoded steps, corrected over all pairs of the target",
    "validation_accuracy": "validation accuracy of the probe",
    "penalty": "penalty of the probe",
    "agreement": "share of the test samples with a model answer in which the probe gives that answer",
    "correct_when_model_wrong": "share of the test samples with a wrong model answer (no answer counts as wrong) in "
    "which the probe is right",
    "correct_when_model_wrong_lower": "lower end of the 95 % interval of correct_when_model_wrong",
    "correct_when_model_wrong_upper": "upper end of the 95 % interval of correct_when_model_wrong",
    "selectivity": "accuracy - accuracy of the same cell on a random relabelling of a visible attribute",
    "selectivity_lower": "lower end of the paired 95 % interval of selectivity",
    "selectivity_upper": "upper end of the paired 95 % interval of selectivity",
    "temperature": "divisor of the decision values before the softmax, fitted on validation",
    "ece": "expected calibration error of the probabilities on test", "ece_raw": "the same without the temperature",
    "brier": "Brier score of the probabilities on test, summed over classes",
    "latency": "step index where accuracy above chance first reaches half of its maximum over steps, on test; NaN "
    "without evidence on validation",
    "latency_lower": "lower end of the 95 % interval of latency",
    "latency_upper": "upper end of the 95 % interval of latency",
    "latency_censored": "latency is at or before the first step",
    "x0_latency": "latency of what x0-hat shows", "x0_latency_lower": "lower end of its 95 % interval",
    "x0_latency_upper": "upper end of its 95 % interval",
    "x0_latency_censored": "x0_latency is at or before the first step",
    "lag": "x0_latency - latency: positive where a probe decodes the answer before x0-hat shows it",
    "lag_lower": "lower end of the paired 95 % interval of lag", "lag_upper": "upper end of it",
    "depth": "layer where accuracy above chance first reaches half of its maximum over layers, on test; NaN without "
    "evidence on validation",
    "depth_lower": "lower end of the 95 % interval of depth", "depth_upper": "upper end of it",
    "baseline_accuracy": "test accuracy of each baseline",
    "baseline_lower": "lower end of the 95 % interval of baseline_accuracy",
    "baseline_upper": "upper end of the 95 % interval of baseline_accuracy",
    "baseline_validation": "validation accuracy of each baseline",
    "baseline_cross_validation": "accuracy of the kept form of each input in cross-validation over problems of train "
    "and validation",
    "baseline_form": "the form in which each input is read: region or whole frame; mean over latent frames, or frames "
    "concatenated",
    "baseline_columns": "number of features of that form",
    "baseline_projected": "number of principal axes the features were projected onto; equal to baseline_columns where "
    "they were not projected",
    "reference": "test accuracy of the input with the highest baseline_cross_validation among those the target is "
    "compared with, never below chance",
    "reference_source": "name of the baseline that is the reference",
    "x0_accuracy": "test accuracy of the best x0-hat baseline: x0_latent (chosen by its cross-validated accuracy) or "
    "x0_parsed at one of the nearest decoded steps (chosen by its validation accuracy)",
    "x0_source": "name of the x0-hat baseline that x0_accuracy belongs to",
    "chance": "the higher test accuracy of two guesses: `uniform`, one over the number of classes, and `majority`, the "
    "most frequent training label",
    "smallest_detectable_skill": "the smallest skill above chance that can count as evidence, in the best case: the "
    "cell is right wherever the baseline is right, and on more problems",
    "n_train": "training samples", "n_validation": "validation samples", "n_test": "test samples",
    "n_train_problems": "different problems among the training samples",
    "n_validation_problems": "different problems among the validation samples",
    "n_test_problems": "different problems among the test samples",
    "n_effective": "effective number of test problems: (sum m)^2 / sum m^2 for m samples of each problem",
    "n_no_answer": "samples left out because the finished video shows no answer",
    "n_model_wrong": "test samples in which the finished video shows a wrong answer or none",
}  # fmt: skip

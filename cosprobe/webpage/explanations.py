"""What the sections of a page show, in words: checks, pictures of tokens, and interventions."""

from __future__ import annotations

CHECKS = {  # rows of the table of checks: what a row says, and what would be bad
    "above every input": (
        "Accuracy minus that of the best input. Inputs are known before the first layer runs.",
        "`no evidence`: the probe may only read what was put in.",
    ),
    "above what x0-hat shows": (
        "Accuracy minus that of x0-hat at the step or the nearest decoded ones.",
        "`no evidence`: what the probe reads may already be visible in the model's estimate of the video.",
    ),
    "selectivity": (
        "Accuracy minus that of a probe of the same cell, trained on a random relabelling of a visible attribute.",
        "Near 0: a probe of this cell can learn any labels, so its accuracy says little.",
    ),
    "latency, steps": (
        "The step at which accuracy above chance first reaches half of its maximum over steps.",
        "A wide interval, or `-`: the onset is not known. `at or before 0.0`: it may lie before the first step read.",
    ),
    "latency of x0-hat, steps": (
        "The same for what x0-hat shows.",
        "Earlier than the latency of the probe: the answer is visible before the probe reads it.",
    ),
    "lag of x0-hat, steps": (
        "Latency of x0-hat minus latency of the probe: positive if the probe comes first.",
        "An interval that holds 0, or `unknown`: nothing shows that the probe comes before x0-hat.",
    ),
    "depth at this step, layers": (
        "The layer at which accuracy above chance first reaches half of its maximum over layers.",
        "Near 0, or a wide interval: no later layer is shown to compute it.",
    ),
    "agrees with the finished video": (
        "Share of samples in which the probe gives the answer that the finished video shows.",
        "Much below the accuracy: the probe reads something that the model does not draw.",
    ),
    "right where the video is wrong": (
        "Share of the samples with a wrong video in which the probe is right.",
        "Few wrong videos: the interval is wide, and nothing follows.",
    ),
    "calibration error": (
        "Mean distance between the probability that the probe states and the share it is right, with the temperature T "
        "that was fitted on validation problems, and without it (at 1).",
        "Larger with T than at 1: the temperature made it worse. Large: the probabilities are not to be trusted.",
    ),
    "Brier score": (
        "Squared error of the probabilities, summed over classes: 0 is perfect.",
        "1 - 1 / classes or more: no better than equal probabilities.",
    ),
    "bits per label": (
        "Length of a code of the labels, given the hidden states (online code): small if labels are easy to learn "
        "from few samples. In brackets: the same for other inputs, and the code of a uniform guess.",
        "Not below the uniform code, or not below the inputs: labels are not easier to read here.",
    ),
    "confounds removed": (
        "Accuracy before and after the difficulty of the problem is removed from the hidden states, the interval of "
        "the change, and the accuracy of the difficulty alone.",
        "An interval of the change below 0: a part of the accuracy comes from the difficulty.",
    ),
    "random weights": (
        "Accuracy of separate probes, fitted on few samples, on the trained transformer and on two with random "
        "weights: permuted (the trained ones, shuffled) and fresh (as before training).",
        "Alike: the architecture alone may explain what is decodable.",
    ),
    "projection": (
        "Accuracy of probes on all channels and on the projected features, at a cell where both are kept, and the "
        "interval of the difference. The penalty of each is chosen on validation.",
        "An interval below 0: the projection loses a part of the answer; raise probe.project.",
    ),
}
QUANTITIES = {  # of pictures of tokens, by the end of the names of their files
    "energy": "energy: root mean square of a token over its channels",
    "temporal_energy": "temporal energy: the change of a token since the latent frame before, as a root mean square "
    "over channels",
    "channel_variance": "variance of a token over its channels",
    "cosine": "cosine between a token and the same token at the last step",
    "components": "the first three principal components of the tokens of a layer, as red, green and blue",
}
TOKEN_PICTURES = (
    "The pictures of tokens use no probe and no label. A panel shows one layer (row) at one denoising step (column): "
    "the tokens of the last latent frame, as colours over the last frame of the finished video.",
    "Every row has a colour scale of its own, whose ends stand beside it. They are the 1 % and 99 % quantiles of the "
    "row over all steps, without tokens with massive activations. Colours of different rows do not compare. "
    "`(8 beyond)` means that 8 tokens lie outside of this range; they have the colour of its end.",
    "Percentages beside a row of components are the shares of the variance along the three axes (red + green + blue). "
    "The orange outline is around the tokens through which the solution passes, where one is known.",
)
EDITS = {  # by name: what is changed, counted and compared; and what the figure shows
    "noise": (
        "The latent of one step, or one of its frames in every step, is replaced by Gaussian noise (`fresh`). Counted: "
        "videos that keep their answer. Compared with: changes of the same size (`equal damage`), x0-hat with new "
        "noise (`renoised`), and hits with as many evaluations after them (`10 evaluations left`).",
        "Top: share of videos that keep the answer of the clean run, by the place of the noise in the run (left) and "
        "by the latent frame that is replaced at every step (right), with 95 % intervals. Bottom: how much x0-hat of "
        "every later step (column) differs from the clean run after noise at one step (row).",
    ),
    "swap": (
        "The output of one block is replaced by that of a donor whose video shows another answer. Counted: videos that "
        "show the donor's answer. Compared with: a donor with the same answer, a random state, the donor's state of "
        "another step, and other regions.",
        "Share of videos that show the donor's answer, by layer (rows) and step (columns; `all`: every step at once). "
        "The first map is the swap. The maps beside it are its controls, or swaps of a part of the tokens. "
        "Grey: not made.",
    ),
    "steer": (
        "The direction that raises the score of a probe for one label is added to the output of a block. Counted: "
        "videos that show that label. Compared with: random directions of the same norm, and the direction of a probe "
        "of random labels.",
        "Share of videos that show the label that is steered towards, by dose, with 95 % intervals, beside the "
        "controls. Dotted: share that keeps the answer of the clean run.",
    ),
    "erase": (
        "What linear probes could read of the answer is removed from the hidden states (LEACE). Counted: videos that "
        "keep their answer. Compared with: a change of the same size along random directions, and random labels erased "
        "in the same way.",
        "Share of videos that keep the answer of the clean run after erasing the answer at a step and layer (rows), "
        "beside the controls, with 95 % intervals. 1: every video keeps it.",
    ),
    "ablate": (
        "What a block adds to its input is removed (`zero`), or replaced by its mean over the batch (`mean`) or by "
        "that of another sample (`resample`). Counted: videos that keep their answer. Compared with: the clean run, "
        "and another region.",
        "Share of videos that keep the answer of the clean run after a block is ablated at one step or at all steps "
        "(rows), by what replaces it (colours), with 95 % intervals. 1: every video keeps it.",
    ),
}
TERMS = (  # words of the tables of interventions
    ("clean run", "a run without a change, with the same problem and noise seed"),
    ("kept", "the changed video shows the answer of the clean run"),
    ("fresh", "the latent is replaced by new Gaussian noise"),
    ("renoised", "the latent is replaced by x0-hat with new noise of the level of the step, which keeps the content"),
    ("equal damage", "a change with the same norm as another one"),
    ("resample", "the states of another sample take the place of those of this one"),
    ("host, donor", "in a swap, the run that is changed, and the run that gives its state"),
    ("dose", "size of the direction that is added in steering; 1 is the norm of a token"),
    ("margin", "the smallest effect that counts: below it, a decodable cell is listed as not used"),
    ("CKA", "centred kernel alignment, a similarity of two sets of tokens; 1 - CKA is 0 where they are alike"),
    ("holds", "p is at most 0.05 and the 95 % interval is above 0; `does not hold`: below 0; `no evidence`: neither"),
)

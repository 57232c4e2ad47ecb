"""Features as a labelled array that reads from the store what is selected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from xarray.backends import BackendArray
from xarray.core import indexing

from cosprobe.activations.stored_tensor import StoredTensor


class LabelledFeatures(BackendArray):
    """Features [sample, step, layer, branch, position, region, channel] in float32, of a tensor [sample, cell, region,
    channel] in a store. xarray asks for parts of them; only the samples and cells of a part are read.

    sizes: number of steps, layers, branches and positions, whose combinations are the cells.
    """

    def __init__(self, features: StoredTensor, sizes: Sequence[int]):
        self.features, self.sizes = features, tuple(sizes)
        self.shape = (len(features), *self.sizes, *features.shape[2:])
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key: tuple) -> Float[np.ndarray, "..."]:
        """A part. key: for every axis a whole number, which drops the axis, a slice, or an array of indices."""
        at = [np.atleast_1d(np.arange(size)[one]) for size, one in zip(self.shape, key, strict=True)]
        cells = np.arange(self.features.shape[1]).reshape(self.sizes)[np.ix_(*at[1:5])]
        values = self.features[at[0][:, None], cells.flatten()].to(torch.float32).numpy()
        part = values[:, :, at[5][:, None], at[6]].reshape([len(one) for one in at])
        return part.squeeze(tuple(axis for axis, one in enumerate(key) if isinstance(one, int | np.integer)))

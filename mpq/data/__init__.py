"""Images and labels by name, free of torch: `open_data("cifar10")` is the way in.

- `dataset`: what a split is (`Split`), a data set (`DataSet`), arrays and subsets as splits
- `catalog`: from a name to a data set, and where it is looked for
- `containers`, `images`, `folders`: files in a folder or zip, decoding, the image-folder layout
- `cifar`, `digits`, `factory`: the other readers
- `splits`: stratified hold-outs and balanced samples; `cache`: a whole split as arrays
- `normalize`: the arithmetic between stored bytes and a network's input
"""

from __future__ import annotations

from mpq.data.cache import load_arrays
from mpq.data.catalog import DataSource, open_data, open_unlabelled
from mpq.data.dataset import DataSet, Split
from mpq.data.normalize import Normalization
from mpq.data.splits import sample_indices

__all__ = [
    "DataSet",
    "DataSource",
    "Normalization",
    "Split",
    "load_arrays",
    "open_data",
    "open_unlabelled",
    "sample_indices",
]

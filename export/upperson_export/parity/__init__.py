"""Compare the embeddings of a model and of its files, at every export and in ``upperson parity``.

In reading order: `inputs` go through each of the `subjects`, the runs and files to compare;
`comparisons` compares their embeddings with a reference, and `check` judges the comparisons of a
written file, of a run or of a bundle.
"""

from upperson_export.parity.check import require_parity

__all__ = ["require_parity"]

"""Do a model and what was made of it embed alike? At every export, and in ``upperson parity``.

In reading order: `inputs` go through every one of the `subjects`, the runs and files to compare;
`comparisons` holds what comes out against a reference, and `check` says whether that is alike and
puts the three checks together: of a written file, of a run, of a bundle.
"""

from upperson_export.parity.check import require_parity

__all__ = ["require_parity"]

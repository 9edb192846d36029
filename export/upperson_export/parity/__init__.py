"""Do two forms of a model embed alike? At every export, and in ``upperson parity``.

`written_file` guards the export. The rest is the parity report: `inputs` and `subjects` say what is
compared, `ranking` how, `check` runs every batch, `report` judges.
"""

from upperson_export.parity.written_file import TOLERANCE, require_parity

__all__ = ["TOLERANCE", "require_parity"]

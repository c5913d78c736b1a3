"""`dqw study NAME`: questions about bits, grids, matching and guidance, answered by measurement.

`table.py` says what each study measures, as data; `lab.py` measures one cell of it, and `cells.py`
keeps it; `runner.py` has those measured that are not there yet; `dqw.whisper.stats` says which
differences are ties; `report.py` and `plot.py` write the CSV, the plot and the page; `sizes.py`
counts bytes as the paper's authors do.
"""

from __future__ import annotations

from dqw.study.runner import Request, run_study
from dqw.study.table import STUDIES, Setting, Study

__all__ = ["STUDIES", "Request", "Setting", "Study", "run_study"]

"""One stage of training, from resolved settings to a finished run folder.

records -> split by prompt -> items -> roles -> the loop -> model/, samples.jsonl, report.html, card.md
"""

from palate.stage.run import run_stage

__all__ = ["run_stage"]

"""Trained models at work on texts: sampling, scoring, talking, and looking at what is trained."""

from palate.data.formats.convert import check_target, write_lines
from palate.texts.looking import Checked, check_tokens
from palate.texts.sampling import read_prompts, sample_records
from palate.texts.scoring import Scorable, read_scorable, score_records
from palate.texts.talking import Conversation

__all__ = [
    "Checked",
    "Conversation",
    "Scorable",
    "check_target",
    "check_tokens",
    "read_prompts",
    "read_scorable",
    "sample_records",
    "score_records",
    "write_lines",
]

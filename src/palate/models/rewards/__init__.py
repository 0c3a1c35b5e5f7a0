"""Rewards of every kind, from what stands in the settings to one score a response.

Each is a scalar model on the policy's ids, or a ``types.Reward``: rows of tokens in, one score a row out. The latter read
text, decoded from the rows; the rows' ids stay the policy's own and are never encoded again for training.

runs/reward/model                                        a scalar model, or a hub name
my_rewards:shortness    rewards.py:shortness             a Python function
{classifier: lvwerra/distilbert-imdb, label: positive}   a label of a classifier
{check: number, answer: answer}                          what a program can verify: number, regex, json, code
{url: "http://localhost:8000/score"}                     a service
{ensemble: [one, another, third], take: min}             several models of one thing
{length: -0.001}                                         a price for each token of the response
[one, another]    {helpful: one, brief: another}         a sum; the names are those of the metrics

Any of them may have ``name``, ``weight`` and ``normalise`` beside it. docs/rewards.md says all of it.
"""

from palate.models.rewards.check import CheckReward
from palate.models.rewards.classifier import ClassifierReward
from palate.models.rewards.endpoint import EndpointReward
from palate.models.rewards.ensemble import EnsembleReward
from palate.models.rewards.find import FUNCTION, find_function
from palate.models.rewards.function import FunctionReward
from palate.models.rewards.length import LengthReward
from palate.models.rewards.load import load_reward
from palate.models.rewards.parts import Scale, WeightedReward, check_records, members, unmeasured
from palate.models.rewards.preference import PreferenceFunction
from palate.models.rewards.spec import first_folder, is_unmeasured, with_scales
from palate.models.rewards.text import TextRewardModel

__all__ = [
    "FUNCTION",
    "CheckReward",
    "ClassifierReward",
    "EndpointReward",
    "EnsembleReward",
    "FunctionReward",
    "LengthReward",
    "PreferenceFunction",
    "Scale",
    "TextRewardModel",
    "WeightedReward",
    "check_records",
    "find_function",
    "first_folder",
    "is_unmeasured",
    "load_reward",
    "members",
    "unmeasured",
    "with_scales",
]

"""The policy file: models, lanes and routing. Reading it, judging it, and asking it where a request goes.

`document` turns text into data with line numbers, `content` says which keys there are, `sentences` words what is wrong
with one key, `checks` what is wrong with the whole and `warnings` what will disappoint, `lanes` says which lanes follow
and which one a request gets. Nothing here talks to Redis or to a runtime.
"""

from broker.policy.content import LaneEntry, Match, Model, Priority, Rule, Trust
from broker.policy.lanes import Lane
from broker.policy.policy import Policy

__all__ = ["Lane", "LaneEntry", "Match", "Model", "Policy", "Priority", "Rule", "Trust"]

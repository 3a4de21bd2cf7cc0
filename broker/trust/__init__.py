"""What may leave the machine: what a request holds, whether the policy lets it go, and what is written down of it.

`content` reads a request and finds what is in it, `files` and `secrets` look into its texts, `verdict` asks the rules,
and `audit` reads the records. Nothing leaves that has not been through all of them under the rules in force.
"""

from broker.trust.content import Content, ScannerNotReady, examine
from broker.trust.verdict import digest_of, rules_of, why_not

__all__ = ["Content", "ScannerNotReady", "digest_of", "examine", "rules_of", "why_not"]

"""The gold audit: find gold values that no answer could match, or that the grader cannot handle, before a run starts.

A gold answer is data from outside: a power tower in it hangs math-verify like one in an answer does. So the audit
runs in the same killable children, under the same deadline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence

from reward.rules import RULES, Gold, RuleError, Task, parse_rule
from reward.verifier import Verifier, VerifierSpec

_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")


def check_rules(rules: Sequence[str], *, user_rule: str | None) -> None:
    """Raise `RuleError` for the first rule expression that cannot be used."""
    for rule in dict.fromkeys(rules):
        if any(term.name == "user" for term in parse_rule(rule)) and user_rule is None:
            raise RuleError(f"rule {rule!r}: no user rule is configured; set reward.user_rule to module:function")


def audit_gold(golds: Sequence[Gold], rules: Sequence[str], spec: VerifierSpec) -> list[str | None]:
    """Why each gold value cannot be used with its rule; None where it can.

    Equal pairs are checked once, plain numbers not at all, and children are started only if something needs them.
    Raises `RuleError` for a rule expression that cannot be used.
    """
    check_rules(rules, user_rule=spec.user_rule)
    keys = [_key(gold, rule) for gold, rule in zip(golds, rules, strict=True)]
    pairs = dict(zip(keys, zip(golds, rules, strict=True), strict=True))
    found: dict[Hashable, str | None] = {}
    undecided: list[Hashable] = []
    for key, (gold, rule) in pairs.items():
        if isinstance(gold, str) and _PLAIN_NUMBER.fullmatch(gold.strip()) and rule == "math":
            found[key] = None
            continue
        checks = [_check(term.name, gold) for term in parse_rule(rule)]
        found[key] = next((check for check in checks if isinstance(check, str)), None)
        if found[key] is None and any(isinstance(check, Task) for check in checks):
            undecided.append(key)
    if undecided:
        verifier = Verifier(spec)
        try:
            problems = verifier.audit([pairs[key][0] for key in undecided], [pairs[key][1] for key in undecided])
        finally:
            verifier.close()
        found.update(zip(undecided, problems, strict=True))
    return [found[key] for key in keys]


def _check(rule: str, gold: Gold) -> str | Task | None:
    try:
        return RULES[rule].check_gold(gold)
    except RuleError as error:
        return str(error)


def _key(gold: Gold, rule: str) -> Hashable:
    return (gold if isinstance(gold, str) else json.dumps(gold, sort_keys=True, default=str), rule)

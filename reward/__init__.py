"""Verifier actors: extraction, rules, math-verify in killable children, verdicts."""

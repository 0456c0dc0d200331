"""Look at a dataset before training on it: `python -m agentft.audit --help`. Exit code 3 where it should not be used."""

from __future__ import annotations

import sys

from agentft.config import AuditConfig, compose_and_run

FAILED = 3
"""Exit code where an invariant is broken or a finding of `audit.fail_on` was made; 1 and 2 are errors, as elsewhere."""


def main() -> int:
    """Run the command line; returns the exit code."""
    verdicts: list[bool] = []

    def run(config: AuditConfig) -> float:
        # Imported here: composing, refusing a typo and --help must not wait for the tokenizer's library.
        from agentft.audits.audit import audit

        result = audit(config)
        verdicts.append(result.passed)
        return float(result.findings)

    compose_and_run("audit", AuditConfig, run)
    return 0 if all(verdicts) else FAILED


if __name__ == "__main__":
    sys.exit(main())

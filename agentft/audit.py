"""Look at a dataset before training on it: `python -m agentft.audit --help`. Exit code 3 where it should not be used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from agentft.config import AuditConfig, compose_and_run

if TYPE_CHECKING:
    from agentft.audits.checks import Finding

FAILED = 3
"""Exit code where an invariant is broken or a finding of `audit.fail_on` was made; 1 and 2 are errors, as elsewhere."""


def main() -> int:
    """Run the command line; returns the exit code."""
    failing: list[Finding] = []

    def run(config: AuditConfig) -> float:
        # Imported here: composing, refusing a typo and --help must not wait for the tokenizer's library.
        from agentft.audits.audit import audit

        found = audit(config)
        failing.extend(found)
        return float(len(found))

    compose_and_run("audit", AuditConfig, run)
    return FAILED if failing else 0


if __name__ == "__main__":
    sys.exit(main())

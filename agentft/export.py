"""A run as a folder that transformers, vLLM and the hubs load: `python -m agentft.export --help`."""

from __future__ import annotations

import logging
import sys

from agentft.config import ExportConfig, compose_and_run


def main() -> int:
    """Run the command line; returns the exit code."""

    def run(config: ExportConfig) -> float:
        # Imported here: composing, refusing a typo and --help must not wait for torch.
        from agentft.recipes.export import export

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        export(config)
        return 0.0

    compose_and_run("export", ExportConfig, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())

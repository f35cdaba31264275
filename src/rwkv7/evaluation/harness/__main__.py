"""`python -m rwkv7.evaluation.harness`: the harness's command line, which then knows "rwkv7"."""

from __future__ import annotations

import sys

from . import register

if __name__ == "__main__":
    try:
        register()
    except ValueError as error:
        sys.exit(f"error: {error}")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

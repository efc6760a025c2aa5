"""`python -m fxfuse`: the command line."""

from .cli import main

raise SystemExit(main())

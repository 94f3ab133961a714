"""`python -m batch_invariant` is `bi`."""

from batch_invariant.cli import main

raise SystemExit(main())

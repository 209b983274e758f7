"""`python -m toca_kernels` is `toca`."""

from .cli import main

raise SystemExit(main())

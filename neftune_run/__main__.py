"""python -m neftune_run: neftune-run where its script is not on the PATH."""

from . import main

main()

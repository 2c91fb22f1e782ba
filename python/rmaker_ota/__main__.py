"""``python -m rmaker_ota`` is ``rmaker-ota``."""

from rmaker_ota.cli import main

main()

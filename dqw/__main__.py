"""``python -m dqw`` is the ``dqw`` command."""

from dqw.cli import main

main()

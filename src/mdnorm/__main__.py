"""``python -m mdnorm``."""

from mdnorm.cli import main

main()

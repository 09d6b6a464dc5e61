"""The command line as ``python -m mdnorm_experiments``."""

from mdnorm_experiments.commands import main

if __name__ == "__main__":
    main()

"""The commands of ``mdnorm``, one file each. Heavy parts load where used."""

from mdnorm.commands.app import app

__all__ = ["app"]

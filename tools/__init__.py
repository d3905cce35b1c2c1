"""The commands: one module per verb of `sightline`."""

import sightline_packages

sightline_packages.check()

"""One training run: recipe -> engine -> loop -> checkpoint."""

import sightline_packages

sightline_packages.check()

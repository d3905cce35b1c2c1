"""Every family's tiny twin on the small world: trained, bundled and scored in turn, over backbones that they share."""

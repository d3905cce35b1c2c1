"""Every family's tiny config on the synthetic world: trained, bundled and scored, with shared backbones."""

"""The whole chain on the synthetic world, from images and text to a bundle that answers, each step a command."""
